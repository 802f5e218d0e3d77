"""Caches of which a step reads the best pages, against the released code and against whole ones.

Axes: B batch, N entries, K kv heads, H heads, d features a head.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import recorded
from helpers.tiny_lm import PROMPT, TINY, VALID, ids, prefill, unstacked, with_cache

from lib.cost import lm as lm_cost
from models.plan import make_cache_plan, make_method
from ops.caches.best_pages import BestPagesKV
from ops.kv_cache import KV
from ops.reducers.cache import CACHE_REDUCERS

STEPS = 3


def quest(**args):
  return make_method('quest', args, CACHE_REDUCERS)


def steps(method, keys, values, new, valid=None, room=STEPS):
  """Attention float[B, 3, H, d] of three tokens behind a prompt, and the cache."""
  batch, _, slots, _ = keys.shape
  valid = jnp.ones((batch, slots), bool) if valid is None else valid
  pos = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
  kv = KV.create(keys, values, pos=pos, valid=valid, start=pos[:, -1] + 1, filled=slots)
  cache = method(None, None, num_slots=slots).shrink(kv, positions='keep', rope=None)
  cache, found = cache.with_room(room), []
  for step in range(STEPS):
    q, k, v = (x[:, step] for x in new)
    cache = cache.append(k, v, kv.start + step, jnp.int32(step))
    found.append(cache.attend(q, kv.start + step)[0])
  return jnp.stack(found, axis=1), cache


@pytest.mark.parametrize('case', 'abc')
def test_quest_as_released(case):
  """Three steps of quest_attention.forward over 37 entries (tests/fixtures/in_llm/quest.npz)."""
  raw = recorded.arrays('in_llm/quest')
  page, budget = (int(x) for x in raw[f'page_budget_{case}'])
  new = [raw[name][None] for name in ('queries', 'new_keys', 'new_values')]
  found, _ = jax.jit(functools.partial(steps, quest(page=page, budget=budget)))(
      raw['keys'], raw['values'], new)
  np.testing.assert_allclose(found[0], raw[f'out_{case}'], atol=1e-5)


@functools.cache
def random_entries():
  rng = np.random.default_rng(0)
  keys, values = (rng.normal(size=(2, 2, 21, 4)).astype(np.float32) for _ in range(2))
  new = [rng.normal(size=(2, STEPS, heads, 4)).astype(np.float32) for heads in (4, 2, 2)]
  return keys, values, new


def test_bounds_hold_and_follow_what_is_appended():
  _, cache = jax.jit(functools.partial(steps, quest(page=4, budget=4)))(*random_entries())
  anew = jax.jit(BestPagesKV.bounded)(cache)
  for name in ('low', 'high', 'order'):
    np.testing.assert_array_equal(getattr(cache, name), getattr(anew, name))
  q = random_entries()[2][0][:, 0]
  bounds = np.asarray(cache.bounds(q))
  products = np.einsum('bkgd,bksd->bkgs', q.reshape(2, 2, 2, 4), cache.k).reshape(2, 2, 2, 6, 4)
  assert (bounds >= products.max(axis=4) - 1e-5).all()
  assert (bounds > products.max(axis=4) + 1e-3).any()


def test_heads_that_share_keys_may_read_the_same_pages():
  """With equal queries those that each reads by itself."""
  keys, values, (q, k, v) = random_entries()
  run = {name: jax.jit(functools.partial(steps, quest(page=4, budget=4, pages_of=name)))
         for name in ('head', 'kv_head')}
  twice = np.repeat(q[:, :, ::2], 2, axis=2)
  shared, own = (np.asarray(run[name](keys, values, (twice, k, v))[0]) for name in run)
  np.testing.assert_allclose(shared, own, atol=1e-6)
  shared, own = (np.asarray(run[name](keys, values, (q, k, v))[0]) for name in run)
  assert np.abs(shared - own).max() > 1e-3


def test_padding_takes_no_part_in_pages():
  keys, values, new = random_entries()
  valid = np.ones((2, 27), bool)
  valid[0, :6] = valid[1, 3:9] = False
  padded = [np.full((2, 2, 27, 4), 1e3, np.float32) for _ in range(2)]
  for row in range(2):
    for wide, x in zip(padded, (keys, values), strict=True):
      wide[row, :, valid[row]] = np.moveaxis(x[row], 1, 0)
  method = quest(page=4, budget=4)
  found, _ = jax.jit(functools.partial(steps, method))(*padded, new, jnp.asarray(valid))
  wanted, _ = jax.jit(functools.partial(steps, method))(keys, values, new)
  np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_pages_beyond_a_window_are_not_read():
  """Of 24 entries the last 5 are seen: pages before them cost the others no place."""
  keys, values, (q, k, v) = random_entries()
  keys = np.concatenate([keys[:, :, :8] * 50, keys[:, :, 8:]], axis=2)  # The best, if far away.

  @jax.jit
  def run(keys, values, q):
    pos = jnp.broadcast_to(jnp.arange(21, dtype=jnp.int32), (2, 21))
    kv = KV.create(keys, values, pos=pos, valid=pos >= 0, start=pos[:, -1] + 1, filled=21)
    paged = quest(page=4, budget=4)(None, None, num_slots=21).shrink(
        kv, positions='keep', rope=None)
    return tuple(x.with_room(3).append(k[:, 0], v[:, 0], kv.start, jnp.int32(0)).attend(
        q, kv.start, 5)[0] for x in (paged, kv))

  found, wanted = run(keys, values, q[:, 0])
  np.testing.assert_allclose(found, wanted, atol=1e-6)


def decoded(lm, room=4):
  logits, cache = prefill(lm, ids()[:, :PROMPT], VALID, room=room)
  step, found = jax.jit(functools.partial(lm.apply, method='decode')), [logits]
  for number in range(STEPS):
    logits, cache = step(unstacked(3), ids()[:, PROMPT + number], cache)
    found.append(logits)
  return np.stack(found), cache


@pytest.mark.long
def test_a_model_that_reads_all_pages_is_the_whole_model():
  whole, _ = decoded(TINY)
  for budget, same in ((16, True), (2, False)):
    lm = with_cache(method='quest', args={'page': 2, 'budget': budget})
    found, cache = decoded(lm)
    assert [isinstance(kv, BestPagesKV) for kv in cache.layers] == [False, False, True]
    np.testing.assert_array_equal(found[0], whole[0])
    assert (np.abs(found - whole).max() < 1e-5) == same
  # A chunk reads all of it, and is found in the bounds.
  _, cache = prefill(lm, ids()[:, :PROMPT], VALID)
  logits, cache = jax.jit(functools.partial(lm.apply, method='extend'))(
      unstacked(3), ids()[:, PROMPT:PROMPT + STEPS], cache)
  np.testing.assert_allclose(logits, whole[STEPS], atol=1e-5)
  np.testing.assert_array_equal(cache.layers[2].high, cache.layers[2].bounded().high)


def test_quest_costs_what_it_reads():
  lm = with_cache(method='quest', args={'page': 2, 'budget': 2})
  cost, whole = (lm_cost.of(model, PROMPT, room=4) for model in (lm, TINY))
  assert cost.kv_bytes == whole.kv_bytes < cost.allocated_bytes
  # Three pages of two, and seven bounds, of 13 entries.
  assert whole.decode_macs - cost.decode_macs == 2 * (13 - 6 - 7) * 4 * 8
  long = make_cache_plan({'method': 'quest'}, TINY.clone(context=9000).host(8192))
  far = lm_cost.of(TINY.clone(context=9000, cache_plan=long), 8192)
  assert far.read(far.layers[0], 1) == 8193
  assert far.read(far.layers[2], 1) == 1024 + 513


def test_quest_takes_no_budget():
  with pytest.raises(ValueError, match='quest keeps all entries, and reads few'):
    make_cache_plan({'method': 'quest', 'keep_ratio': 0.5}, TINY.host(PROMPT))
