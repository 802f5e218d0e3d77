"""Methods that hold others, and caches whose heads differ, through a whole language model.

Axes: B batch, N slots of a prompt, K kv heads.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_lm import PROMPT, ROOM, TINY, VALID, ids, prefill, unstacked, with_cache

from models.backbones.lm import LM
from models.plan import make_cache_plan
from models.storage import to_storage
from ops.caches.heads import Pages
from ops.caches.split import SplitKV
from ops.rope import Rope

SNAPKV = {'method': 'snapkv', 'args': {'window': 2, 'kernel': 3}}
HELD = {'inner': SNAPKV}
WRAPPERS = {
    'adakv': {'args': HELD}, 'criticalkv': {'args': HELD}, 'criticaladakv': {'args': HELD},
    'pyramidkv': {'args': {**HELD, 'beta': 2}}, 'chunkkv': {'args': {**HELD, 'length': 2}},
    'chunk': {'args': {**HELD, 'length': 5}}, 'two_stage': {'args': HELD},
    'cam': {'args': {**HELD, 'merged': 2}}, 'think': {'args': {**HELD, 'window': 2}},
    'simlayerkv': {'args': {'first': 1, 'recent': 3, 'threshold': 0.3}, 'keep_ratio': None},
    'finch': {'args': {'window': 2}}, 'lagkv': {'args': {'sinks': 1, 'lag': 3}},
    'cur': {'args': {'sinks': 1, 'window': 4}}, 'keydiff': {},
    'quest': {'args': {'page': 2, 'budget': 6}, 'keep_ratio': None},
    # All scores are above it, so that the budget decides.
    'threshold': {'args': {'inner': {'method': 'knorm'}, 'window': 2, 'threshold': -1e6}}}


MODEL = TINY.clone(depth=2)


@functools.cache
def reduced(name, slots=PROMPT):
  config = {'keep_ratio': 0.5, 'method': name, **WRAPPERS[name]}
  return with_cache(MODEL, slots=int(slots), **config)


@functools.cache
def decoder(lm):
  return jax.jit(functools.partial(lm.apply, method='decode'))


def answers(lm, tokens, valid=None, steps=3):
  """Logits after the prompt and after each given token, float32[B, steps + 1, V], and the cache."""
  logits, cache = prefill(lm, tokens[:, :tokens.shape[1] - steps], valid)
  found = [logits]
  for step in range(steps):
    logits, cache = decoder(lm)(unstacked(2), tokens[:, tokens.shape[1] - steps + step], cache)
    found.append(logits)
  return np.stack(found, axis=1), cache


@pytest.mark.long
@pytest.mark.parametrize('name', WRAPPERS)
def test_a_padded_row_is_the_row_alone(name):
  tokens, valid = np.asarray(ids()[:, :PROMPT + 2]), np.array(VALID)
  valid[1] = valid[2][::-1]  # As many on the other side: one program is of both rows alone.
  together, _ = answers(reduced(name), tokens, valid, steps=2)
  for row in (1, 2):
    own = np.concatenate([tokens[row, :PROMPT][valid[row]], tokens[row, PROMPT:]])
    alone, _ = answers(reduced(name, valid[row].sum()), own[None], steps=2)
    np.testing.assert_allclose(together[row], alone[0], atol=2e-5)


@pytest.mark.long
def test_heads_that_keep_as_many_as_each_other_are_a_plain_cache():
  tokens = ids()[:, :PROMPT + 3]
  plain, _ = answers(with_cache(MODEL, keep_ratio=0.5, **SNAPKV), tokens)
  equal = with_cache(MODEL, method='adakv', keep_ratio=0.5, args={**HELD, 'safeguard': 1.0})
  found, cache = answers(equal, tokens)
  np.testing.assert_allclose(found, plain, atol=2e-5)
  assert all(isinstance(kv.prompt, Pages) for kv in cache.layers)
  assert cache.room == ROOM


@pytest.mark.long
@pytest.mark.parametrize('name', ['adakv', 'think'])
def test_a_question_behind_a_cut_context_is_its_tokens_one_by_one(name):
  lm, tokens = reduced(name), ids()[:, :PROMPT + 3]
  wanted, _ = answers(lm, tokens)
  _, cache = prefill(lm, tokens[:, :PROMPT])
  found, cache = jax.jit(functools.partial(lm.apply, logits='all', method='extend'))(
      unstacked(2), tokens[:, PROMPT:], cache)
  np.testing.assert_allclose(found, wanted[:, 1:], atol=2e-5)
  assert isinstance(cache.layers[0], SplitKV)
  twice = cache.take(jnp.array([2, 2]))
  logits, _ = decoder(lm)(unstacked(2), tokens[2:, 0].repeat(2), twice)
  one, _ = decoder(lm)(unstacked(2), tokens[:, 0], cache)
  np.testing.assert_allclose(logits, one[2:].repeat(2, 0), atol=2e-5)


def bytes_of(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize('name', [
    'adakv', pytest.param('criticaladakv', marks=pytest.mark.long)])
def test_a_cache_is_as_large_as_what_its_heads_hold(name):
  """Llama 3.1 8B's heads at 32k tokens, two of its layers."""
  slots, room, kept = 32768, 256, 8192
  lm = LM(vocabulary=512, width=4096, depth=2, mlp=14336, heads=32, kv_heads=8, head_width=128,
          context=131072, rope=Rope(128), dtype=jnp.bfloat16)
  weights = jax.eval_shape(lambda key: to_storage(lm.init(key, jnp.zeros((1, 4), jnp.int32))[
      'params'], storage='unstacked'), jax.random.key(0))
  sizes = {}
  for method in (name, 'snapkv'):
    config = {'method': method, 'keep_ratio': 0.25}
    cut = lm.clone(cache_plan=make_cache_plan(config, lm.host(slots)))
    _, cache = jax.eval_shape(functools.partial(cut.apply, room=room, method='prefill'),
                              {'params': weights}, jax.ShapeDtypeStruct((1, slots), jnp.int32))
    sizes[method] = bytes_of(cache.layers)
  held = 2 * 8 * (kept + room) * 2 * 128 * 2
  assert held <= sizes[name] <= 1.1 * held
  assert sizes[name] <= 1.05 * sizes['snapkv']


@pytest.mark.parametrize(('config', 'message'), [
    ({'method': 'simlayerkv', 'keep_ratio': 0.5}, 'simlayerkv keeps `first` and `recent` entries'),
    ({'method': 'think', 'keep_ratio': 0.5}, 'think keeps all entries unless it holds a method'),
    ({'method': 'think', 'args': HELD}, r'needs one budget, got none'),
    ({'method': 'pyramidkv'}, 'pyramidkv needs a budget, whose layers it tilts'),
    ({'method': 'adakv', 'args': HELD}, 'needs one budget, got none'),
    ({'method': 'adakv', 'args': HELD, 'keep': 5, 'capacity': 6}, 'capacity'),
    ({'method': 'adakv', 'args': {'inner': {'method': 'think'}}, 'keep': 5},
     'AdaKV cannot hold ThinK as its inner'),
], ids=str)
def test_wrappers_refuse_in_a_line_when_a_model_is_built(config, message):
  with pytest.raises(ValueError, match=message) as caught:
    make_cache_plan(config, TINY.host(PROMPT))
  assert '\n' not in str(caught.value)
