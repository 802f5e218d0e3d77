"""Layers after which no token of a kind is left, and layers at which tokens join."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_lm import TINY, variables

from models.plan import make_cache_plan, make_plan
from ops.tokens import TEXT, VISUAL, TokenSet

# Of each row: text, an image, text; then padding.
ROWS = ((2, 6, 4), (3, 2, 2))
SLOTS, VISUALS, LAYERS = 14, 6, 4
LM = TINY.clone(depth=LAYERS)
EXIT = {'method': 'fastv', 'token_kinds': 'visual', 'layers': (1, 3), 'keep_ratio': (0.5, 0.0)}
INJECT = {'method': 'late_injection', 'layers': 2}
PLANS = {
    'fastv': EXIT,
    'aim as released': EXIT | {'method': 'aim', 'layers': (1, 2), 'args': {'variant': 'release'}},
    'dyvte': {'method': 'dyvte', 'args': {'width': 8}, 'token_kinds': 'visual', 'layers': (0, 1, 2),
              'keep': 0},
    'sparsevlm': EXIT | {'method': 'sparsevlm', 'layers': (1, 2)},
    'sparsevlm plus': EXIT | {'method': 'sparsevlm', 'layers': (1, 2),
                              'args': {'variant': 'plus', 'heads': 2}},
    'sparsevlm paper': EXIT | {'method': 'sparsevlm', 'layers': (1, 2), 'keep_ratio': (0.9, 0.5),
                               'args': {'variant': 'paper', 'scale': 0.8}},
    'corematching': EXIT | {'method': 'corematching', 'layers': (1, 2), 'keep_ratio': (0.9, 0.5),
                            'args': {'variant': 'paper', 'back': 2}},
    'vtw': {'method': 'vtw', 'token_kinds': 'visual'},
    'dart': EXIT | {'method': 'dart', 'args': {'image': 2, 'text': 1}},
    'fitprune': EXIT | {'method': 'fitprune', 'layers': (1, 2)},
    'catp': [EXIT | {'method': 'catp_images', 'layers': 0, 'keep_ratio': 0.75},
             EXIT | {'method': 'catp', 'layers': 1, 'keep_ratio': 0.7},
             EXIT | {'method': 'catp', 'layers': 2, 'keep_ratio': 0.6, 'args': {'part': 'query'}}],
    'todre_exit': {'method': 'todre_exit', 'token_kinds': 'visual', 'layers': (1, 2), 'keep': 0,
                   'args': {'threshold': 0.35}},
    'lvlm_csp': [EXIT | {'method': 'lvlm_csp', 'layers': 1, 'keep_ratio': 0.5, 'expand': 1},
                 EXIT | {'layers': (3,), 'keep_ratio': 0.5}],
    'adatoken_3d': EXIT | {'method': 'adatoken_3d', 'layers': (1, 2), 'keep_ratio': (0.9, 0.5)},
    'mustdrop': EXIT | {'method': 'mustdrop', 'layers': (1, 2), 'keep_ratio': (0.9, 0.5),
                        'args': {'overall': 0.15, 'single': 0.2}},
    'pact': EXIT | {'method': 'pact', 'layers': (1, 2), 'keep_ratio': (0.9, 0.5),
                    'args': {'keep': 0.9, 'cutoff': 0.7}},
    'visiondrop': EXIT | {'method': 'visiondrop', 'keep_ratio': (0.7, 0.5),
                          'args': {'contextual': 1}},
    'in attention': EXIT | {'site': 'inside', 'layers': (1, 2)},
    'masked': EXIT | {'mode': 'mask'},
    'back': EXIT | {'layers': (1, 2), 'keep_ratio': 0.5, 'expand': 2},
    'hidrop': [INJECT, EXIT | {'method': 'hidrop', 'layers': (2, 3)}],
    'text first': [{'method': 'fastv', 'token_kinds': 'text', 'layers': 1, 'keep_ratio': 0.75},
                   INJECT, EXIT | {'layers': (3,), 'keep_ratio': 0.5}],
}


def parameters(lm):
  """Returns the tiny model's, and those of learned methods, large enough that gates differ."""
  tokens = prompts('right')
  fresh = jax.eval_shape(lm.init, jax.random.key(0), tokens)['params']['stack']
  own = {name: jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(4), leaf.shape), tree)
         for name, tree in fresh.items() if name != 'blocks'}
  params = variables(LAYERS)['params']
  return {'params': params | {'stack': params['stack'] | own}}


@functools.cache
def prompts(side, row=None):
  """All rows padded to one length, or one row as it is."""
  chosen = ROWS if row is None else ROWS[row:row + 1]
  most = SLOTS if row is None else sum(ROWS[row])
  rows = [], [], [], []
  for number, (before, visual, after) in enumerate(ROWS):
    if (before, visual, after) not in chosen:
      continue
    length = before + visual + after
    kind = np.full(most, TEXT, np.int8)
    place = np.arange(most) - (most - length if side == 'left' else 0)
    real = (place >= 0) & (place < length)
    kind[(place >= before) & (place < before + visual)] = VISUAL
    # Budgets are static: padding is visual as far as a row lacks visual tokens.
    lacking = (VISUALS if row is None else visual) - visual
    kind[np.flatnonzero(~real)[:lacking]] = VISUAL
    x = np.full((most, LM.width), 7.0, np.float32)
    x[real] = np.random.default_rng(number).normal(size=(length, LM.width))
    for part, value in zip(rows, (x, kind, real, np.maximum(place, 0)), strict=True):
      part.append(value)
  x, kind, real, place = map(np.stack, rows)
  return TokenSet.create(jnp.asarray(x), kind=jnp.asarray(kind), pos=jnp.asarray(place, jnp.int32),
                         valid=None if row is not None else jnp.asarray(real),
                         padding='last' if side == 'right' else 'anywhere')


def planned(config, row=None, cache=None):
  """The model with a plan for all rows, or for one."""
  slots, visual = (SLOTS, VISUALS) if row is None else (sum(ROWS[row]), ROWS[row][1])
  host = LM.host(slots, visual=visual)
  plan = make_plan(config, host)
  cache_plan = make_cache_plan(cache, host, plan=plan) if cache else None
  return LM.clone(plan=plan, cache_plan=cache_plan)


@functools.cache
def reader(lm):
  """Logits after a prompt, after one more token, and the cache in between."""
  @jax.jit
  def read(variables, tokens):
    logits, cache = lm.apply(variables, tokens, room=1, method='prefill')
    ids = jnp.full((len(tokens.x),), 5, jnp.int32)
    return logits, lm.apply(variables, ids, cache, method='decode')[0], cache

  return read


def check_rows(config, side, cache=None, rows=(0, 1)):
  lm = planned(config, cache=cache)
  weights = parameters(lm)
  logits, following, caches = reader(lm)(weights, prompts(side))
  for row in rows:
    alone = reader(planned(config, row, cache))(weights, prompts('right', row))
    np.testing.assert_allclose(logits[row], alone[0][0], atol=1e-5, err_msg=f'row {row}')
    np.testing.assert_allclose(following[row], alone[1][0], atol=1e-5, err_msg=f'row {row}')
    for layer, other in zip(caches.layers, alone[2].layers, strict=True):
      np.testing.assert_array_equal(layer.valid[row].sum(axis=-1), other.valid[0].sum(axis=-1))
  return caches


@pytest.mark.long
@pytest.mark.parametrize(('name', 'side'), [
    (name, 'left') for name in PLANS if name not in ('fastv', 'masked')])
def test_a_row_of_a_batch_equals_the_row_alone(name, side):
  check_rows(PLANS[name], side, rows=(1,))


@pytest.mark.long
def test_an_exit_leaves_caches_of_text():
  """A cache method behind the exit reads what is left there, and what was there before."""
  cache = {'method': 'snapkv', 'keep_ratio': 0.5, 'args': {'window': 2, 'kernel': 1}}
  caches = check_rows(EXIT, 'right', cache)
  assert [layer.pos.shape[-1] for layer in caches.layers] == [8, 6, 6, 5]


def test_an_exit_counts():
  left = [tokens.queries for tokens in planned(EXIT).plan.profile(LAYERS, SLOTS)]
  assert left == [14, 11, 11, 8]
  left = [tokens.queries for tokens in planned(PLANS['vtw']).plan.profile(LAYERS, SLOTS)]
  assert left == [14, 8, 8, 8]


@pytest.mark.long
def test_what_leaves_is_what_a_mask_hides():
  lm = planned(EXIT)
  masked = planned(PLANS['masked'])
  for got, want in zip(*(reader(each)(parameters(lm), prompts('right'))[:2]
                         for each in (lm, masked)), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.long
def test_tokens_join_late():
  """The layers above run on text alone, cache text alone, and what joins has not changed."""
  lm = planned([INJECT])
  assert [tokens.queries for tokens in lm.plan.profile(LAYERS, SLOTS)] == [8, 8, 14, 14]
  tokens = prompts('left')
  text = prompts('right', 0)  # One row without its image.
  weights = parameters(lm)
  seen = []
  for model, given in ((lm, tokens), (LM, text)):
    _, out = jax.jit(model.clone(capture=True).apply)(weights, given)
    seen.append(out['hidden'])
  assert [x.shape[1] for x in seen[0]] == [8, 8, 14, 14]
  without = text.replace(**{name: jnp.delete(getattr(text, name), jnp.arange(2, 8), axis=1)
                            for name in ('x', 'pos', 'kind')}, owner=jnp.arange(6)[None])
  want = jax.jit(LM.clone(capture=True).apply)(weights, without)[1]['hidden']
  for layer in range(2):
    np.testing.assert_allclose(seen[0][layer][0, -6:], want[layer][0], atol=1e-5)


@pytest.mark.parametrize(('config', 'message'), [
    ([INJECT | {'layers': 0}], 'late_injection brings visual tokens in before layer 0, where they '
                               'are already: all tokens start; name one later layer, once'),
    ([INJECT, INJECT | {'layers': 3}], 'before layer 3, where they are already: they have joined'),
    ([INJECT | {'keep': 4}], 'brings all tokens of a kind in before one layer: give layers as one '
                             'index, and no keep'),
    ([INJECT | {'layers': (1, 2)}], 'give layers as one index'),
    ([INJECT, EXIT], 'fastv cuts in layer 1, where no visual token is (any more, or yet)'),
    ([INJECT, EXIT | {'layers': (2, 3)}],
     'fastv before layer 2 reads last_attention of the layer above, which the tokens of '
     'late_injection have not run: cut from layer 3 on'),
    ([INJECT, {'method': 'fastv', 'token_kinds': 'text', 'layers': 1, 'keep_ratio': 0.5,
               'positions': 'compact'}], "at their own positions: set positions='keep'"),
    ([INJECT, {'method': 'gemfilter', 'layers': 2, 'keep_ratio': 0.5}],
     'gemfilter has the model run anew on what it keeps, where late_injection has no place'),
    ([EXIT, {'method': 'random', 'keep': 2, 'layers': 3, 'site': 'after'}],
     'random cuts in layer 3, where no visual token is (any more, or yet): cut in other layers'),
    (EXIT | {'layers': (1, 2, 3), 'keep_ratio': 0.0},
     'fastv cuts in layer 2, where no visual token is (any more, or yet)'),
    (EXIT | {'method': 'tome'}, 'keep_ratio=0.0 leaves no token in layer 3, but this method must '
                                'leave one at least: raise the budget'),
    (EXIT | {'token_kinds': ('visual', 'text'), 'holds': 'none'},
     'keep_ratio=0.0 leaves no token in layer 3, but nothing would be left at all'),
    (EXIT | {'token_kinds': ('visual', 'text')},
     'keep_ratio=0.0 leaves no token in layer 3, but the last one of a prompt must stay: keep 1'),
    (PLANS['dyvte'] | {'mode': 'gather'},
     "dyvte with these args takes slots that stay as padding: set mode='mask'")])
def test_exits_that_cannot_be(config, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    planned(config)
