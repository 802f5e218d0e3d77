"""A row of a padded batch is the row alone: in every place, for every method and form of budget.

Prompts of unequal lengths stand in one batch, padded on the left, the right or into a longer
bucket, and beside each other; alone they have no padding at all.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_lm import TINY, unstacked

from models.plan import Host, make_cache_plan, make_plan, methods
from models.plans.row_budgets import row_budgets
from models.projector import ProjectorReduction, reduce_visual
from ops.reducers.cache import CACHE_REDUCERS
from ops.reducers.scoring import Wrapper
from ops.splice import Visual
from ops.tokens import TEXT, VISUAL, TokenSet

LENGTHS, SLOTS, LATER = (13, 9, 5), 24, 1
# Rows that are as long as each other share the program of a row alone.
EQUAL = (13, 9, 9)
SMALL = TINY.clone(depth=2)
BUDGETS = {'ratio': {'keep_ratio': 0.6}, 'remove': {'remove': 3}, 'keep': {'keep': 7}}
# Arguments by which a method can act on so few tokens.
ARGS = {'snapkv': {'window': 3}, 'expected_attention': {'sinks': 1}, 'streaming_llm': {'sinks': 2},
        'compactor': {'sinks': 1, 'recent': 1, 'chunk': 4},
        'duo_attention': {'sinks': 1, 'recent': 2}}
HOST = SMALL.host(LENGTHS[0])
# Without those that mix all tokens, or read a special one, or a stat that prompts do not have.
NAMES = [name for name in methods(HOST) if not hasattr(methods()[name], 'init')
         and name not in ('none', 'token_transforming', 'crossget', 'relevance_rank')]
SITES = {'mctf': {'site': 'between'}}
SOME = ('random', 'tome', 'fastv')


def prompt(row, length):
  return np.random.default_rng(row).integers(0, 29, length).astype(np.int32)


def batch(lengths=LENGTHS):
  """Prompts with padding on their left, on their right, and on both sides."""
  ids, valid = (np.zeros((len(lengths), SLOTS), dtype) for dtype in (np.int32, bool))
  for row, (length, start) in enumerate(zip(lengths, (SLOTS - lengths[0], 0, 7), strict=True)):
    ids[row, start:start + length], valid[row, start:start + length] = prompt(row, length), True
  return ids, valid


@functools.cache
def answering(lm):
  """Logits after the prompt, and after each of the tokens that follow."""

  @jax.jit
  def answer(params, ids, valid, later):
    logits, cache = lm.apply(params, ids, valid, room=LATER, method='prefill')
    found = [logits]
    for i in range(LATER):
      logits, cache = lm.apply(params, later[:, i], cache, method='decode')
      found.append(logits)
    return jnp.stack(found, axis=1)

  return answer


def check(make, lengths):
  """Compares the shorter rows of the batch with themselves alone, as long as they are."""
  later = np.random.default_rng(9).integers(0, 29, (len(lengths), LATER)).astype(np.int32)
  found = np.asarray(answering(make(SLOTS))(unstacked(2), *batch(lengths), later))
  for row in (1, 2):
    wanted = np.asarray(answering(make(lengths[row]))(
        unstacked(2), prompt(row, lengths[row])[None], None, later[row:row + 1]))
    np.testing.assert_allclose(found[row], wanted[0], atol=2e-5, err_msg=f'row {row}')


# mctf leaves ten tokens at least.
CASES = ([(name, 'remove' if name == 'mctf' else 'ratio') for name in NAMES]
         + [(name, form) for name in SOME for form in ('remove', 'keep')])


@pytest.mark.parametrize(('name', 'form'), [
    pytest.param(*case, marks=[] if case == ('tome', 'ratio') else pytest.mark.long)
    for case in CASES])
def test_between_layers(name, form):
  layers = {'layers': 1 if methods()[name].site == 'before' else (0, 1)}
  config = {'method': name} | layers | SITES.get(name, {}) | BUDGETS[form]

  @functools.cache
  def make(slots):
    return SMALL.clone(plan=make_plan(config, SMALL.host(slots)))

  check(make, LENGTHS if name in SOME else EQUAL)


@pytest.mark.parametrize(('name', 'form'), [
    pytest.param(name, form, marks=[] if (name, form) == ('h2o', 'ratio') else pytest.mark.long)
    for name, made in CACHE_REDUCERS.items() for form in BUDGETS
    # Those that hold others, or have budgets of their own, are in test_wrapped_caches.py.
    if not (issubclass(made, Wrapper) or made.allocates is True)
    and (form == 'ratio' or name in ('streaming_llm', 'snapkv'))])
def test_in_the_cache(name, form):
  config = {'method': name, 'args': ARGS.get(name, {})} | BUDGETS[form]

  @functools.cache
  def make(slots):
    return SMALL.clone(cache_plan=make_cache_plan(config, SMALL.host(slots)))

  check(make, LENGTHS if name in ('streaming_llm', 'snapkv') else EQUAL)


@pytest.mark.parametrize('budget', BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize('name', ['divprune', 'textmonkey', 'tome_kth'])
@pytest.mark.long
def test_at_the_projector(name, budget):
  """An image of fewer tokens, beside one of more."""
  counts, width = (12, 7), 8
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1, 2, counts[0], width)).astype(np.float32)
  keys = rng.normal(size=(1, 2, counts[0], 2, 4)).astype(np.float32)
  valid = np.arange(counts[0])[None, None] < np.array(counts)[None, :, None]

  @jax.jit
  def run(x, keys, valid):
    host = Host(1, x.shape[2], 0, frozenset({'keys'}))
    plan = make_plan({'method': name, 'site': 'after', 'layers': 0, **budget}, host)
    visual = Visual(x, valid, stats={'tower_keys': keys})
    found, _, _ = reduce_visual(ProjectorReduction(plan), visual, None, lambda *_: None)
    return found.x, jnp.ones(found.x.shape[:3], bool) if found.valid is None else found.valid

  def reduced(*args):
    found, real = map(np.asarray, run(*args))
    return [one[here] for one, here in zip(found[0], real[0], strict=True)]

  together = reduced(x, keys, valid)
  for image, count in enumerate(counts):
    own = slice(image, image + 1), slice(count)
    alone, = reduced(x[:, *own], keys[:, *own], None)
    np.testing.assert_allclose(together[image], alone, atol=1e-6)


@pytest.mark.parametrize('holds', ['last', 'none'])
def test_the_last_token_of_a_prompt_stays_unless_a_config_says_otherwise(holds):
  config = {'method': 'stride', 'layers': 1, 'keep_ratio': 0.25, 'holds': holds}
  lm = SMALL.clone(plan=make_plan(config, SMALL.host(24)))
  ids, valid = batch()
  _, out = jax.jit(lm.apply)(unstacked(2), ids, valid)
  last = np.asarray(out['tokens'].owner)[np.arange(len(LENGTHS)), [SLOTS - 1, 8, 11]]
  assert (last >= 0).all() == (holds == 'last')
  np.testing.assert_array_equal(np.asarray(out['tokens'].real).sum(axis=1), [4, 3, 2])


def test_short_prompts_keep_what_a_method_cannot_leave():
  """A window, or a count, that is longer than a prompt leaves it whole."""
  config = {'method': 'snapkv', 'args': {'window': 6}, 'keep_ratio': 0.3}
  lm = SMALL.clone(cache_plan=make_cache_plan(config, SMALL.host(24)))
  ids, valid = batch()
  _, cache = jax.jit(functools.partial(lm.apply, room=1, method='prefill'))(
      unstacked(2), ids, valid)
  np.testing.assert_array_equal(np.asarray(cache.layers[0].valid).sum(axis=-1)[:, 0], [7, 7, 5])


def test_what_has_visual_tokens_loses_those_alone():
  """FastV and its like, where a config does not say of which tokens."""
  host = SMALL.host(24, visual=8)
  config = {'method': 'random', 'layers': 1, 'keep_ratio': 0.5}
  assert make_plan(config, host).events[0].reduction.of == (VISUAL,)
  assert make_plan(config, SMALL.host(24)).events[0].reduction.of == (TEXT,)
  both = make_plan(config | {'token_kinds': ('visual', 'text')}, host)
  assert both.events[0].reduction.of == (VISUAL, TEXT)


def test_reductions_of_a_tower_agree_on_what_they_hold():
  configs = [{'method': 'random', 'keep_ratio': 0.5, 'layers': 1, 'holds': holds}
             for holds in ('last', 'none')]
  with pytest.raises(ValueError, match="must agree on what they hold: give all of them holds='las"):
    make_plan(configs, SMALL.host(24))


COUNTS = ({'keep_ratio': 0.37}, {'keep_ratio': (0.7, 0.4), 'ratio_of': 'start'},
          {'keep_ratio': 0.5, 'rounding': 'round'}, {'keep_ratio': 0.35, 'ratio_of': 'start'},
          {'remove': (5, -1.0)}, {'remove': 4}, {'keep': (17, 6)})


@pytest.mark.parametrize('budget', COUNTS, ids=str)
@pytest.mark.parametrize('name', ['random', 'tome'])
def test_counts_that_rows_find_are_those_of_their_plans(name, budget):
  """Of every length, ratio and rounding: in the program, and on the host."""
  if name == 'tome' and 'remove' not in budget:
    budget = {'keep_ratio': 0.6}
  config = {'method': name, 'layers': (0, 1), **budget}
  longest = make_plan(config, SMALL.host(40))
  valid = jnp.arange(40)[None] < jnp.arange(1, 41)[:, None]
  kind = jnp.full((40, 40), TEXT, jnp.int8)
  tokens = TokenSet.create(jnp.zeros((40, 40, 1)), valid=valid, of=(TEXT,), kind=kind)
  found = np.stack(row_budgets(longest.events, tokens), axis=1)
  for length in range(4, 41):
    own = {event.layer: event.slots_out for event in make_plan(config, SMALL.host(length)).events}
    left, now = [], length
    for event in longest.events:
      now = own.get(event.layer, now)
      left.append(now)
    np.testing.assert_array_equal(found[length - 1], left, err_msg=f'{length} tokens')
