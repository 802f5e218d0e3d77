"""Buckets: the same logits in every capacity, counted compilations and overflow, sorted rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_vit

from models.decoding.buckets import Buckets, first_half, second_half
from models.plan import make_plan

# Behind the first cut nothing is decided, so rounding cannot tip a near tie.
ONE = {'method': 'ats', 'layers': (1,), 'keep': 48}
TWO = {'layers': (1, 2), 'keep': (48, 16)}


def adaptive(**changes):
  vit = golden_vit.model().clone(capture=False, depth=3)
  return vit.clone(plan=make_plan(ONE | changes, vit.host))


@functools.cache
def params():
  """The first three layers of the golden model."""
  blocks = golden_vit.params()['stack']['blocks']
  return golden_vit.params() | {'stack': {'blocks': jax.tree.map(lambda x: x[:3], blocks)}}


@functools.cache
def images():
  """Four images that need different numbers of tokens: two plain corners, two of noise."""
  noise = jnp.concatenate([golden_vit.images(), golden_vit.images()[:, ::-1]])
  flat = jnp.full((2, 32, 32, 3), 0.1).at[:, 4:8, 4:8].set(2.0).at[1, 20:24, 20:28].set(-2.0)
  return jnp.concatenate([noise[2:3], flat[:1], noise[:1], flat[1:]])


@functools.cache
@functools.cache
def full(**changes):
  """The unsplit run: logits, and how many tokens are real behind the first cut."""
  logits, out = jax.jit(adaptive(**changes).apply)({'params': params()}, images())
  return np.asarray(logits), np.asarray(out['cuts'][1].real.sum(axis=1))


@pytest.mark.long
def test_every_capacity_gives_the_logits_of_the_full_one():
  expected, counts = full(**TWO)
  assert len(set(counts.tolist())) > 1
  assert counts.max() < 49
  vit = adaptive(**TWO)
  tokens, found, beyond = jax.jit(functools.partial(first_half, vit, 1))(params(), images())
  np.testing.assert_array_equal(found, counts)
  assert beyond == 0
  # Real tokens lead.
  np.testing.assert_array_equal(tokens.valid, np.arange(49) < counts[:, None])
  for size in (int(counts.max()), 49):
    logits = jax.jit(functools.partial(second_half, vit, 1, size))(params(), tokens, np.arange(4))
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.long
def test_each_row_runs_in_the_smallest_bucket_that_holds_it():
  expected, counts = full()
  low, high = sorted(set(counts.tolist()))[0], int(counts.max())
  buckets = Buckets(adaptive(), params(), sizes=(low, high, 49), rows=1)
  assert buckets.sizes == (low, high, 49)
  for _ in range(2):
    answer = buckets(images())
    np.testing.assert_allclose(answer.logits, expected, atol=1e-5)
    np.testing.assert_array_equal(answer.counts, counts)
    np.testing.assert_array_equal(answer.capacity, np.where(counts <= low, low, high))
  # Two sizes were compiled, once each; nothing needed the third.
  assert set(buckets.compiled) == {(4, 1, low), (4, 1, high)}
  assert buckets.runs == {low: 2 * (counts <= low).sum(), high: 2 * (counts > low).sum()}
  assert buckets.overflow == 0


@pytest.mark.long
def test_what_fits_in_no_bucket_runs_in_full_and_is_counted():
  expected, counts = full()
  size = int(counts.max()) - 1
  buckets = Buckets(adaptive(), params(), sizes=(size,))
  answer = buckets(images())
  np.testing.assert_allclose(answer.logits, expected, atol=1e-5)
  assert answer.capacity.tolist() == [49] * 4
  assert buckets.overflow == (counts > size).sum() > 0


@pytest.mark.long
def test_tokens_beyond_the_method_s_own_capacity_are_counted():
  changes = {'args': {'points': 64}, 'keep': 24}
  vit = adaptive(**changes)
  _, out = jax.jit(vit.apply)({'params': params()}, images())
  wanted = int(out['overflow'][1].sum())
  buckets = Buckets(vit, params())
  buckets(images())
  assert buckets.beyond == wanted > 0


@pytest.mark.long
def test_sorted_rows_come_back_in_the_order_of_the_images():
  expected, counts = full()
  buckets = Buckets(adaptive(), params(), sizes=sorted(set(counts.tolist())), rows=2)
  answer = buckets(images())
  np.testing.assert_allclose(answer.logits, expected, atol=1e-5)
  np.testing.assert_array_equal(answer.counts, counts)
  order = np.argsort(counts, kind='stable')
  for pair in (order[:2], order[2:]):
    assert answer.capacity[pair].tolist() == [counts[pair].max()] * 2
  with pytest.raises(ValueError, match='rows=2: choose a divisor'):
    buckets(images()[:3])


def test_a_bucket_holds_more_than_the_next_cut_keeps():
  """With fewer slots than it keeps, the next cut would not ask its method."""
  vit = adaptive(**TWO | {'keep': (48, 30)})
  assert Buckets(vit, params(), sizes=(5, 20, 40)).sizes == (32, 40)
  assert Buckets(vit, params()).sizes == (36, 40, 45, 49)


@pytest.mark.long
def test_warming_compiles_every_bucket():
  buckets = Buckets(adaptive(keep=20), params(), sizes=(9, 21), rows=2)
  buckets.warm(images())
  assert set(buckets.compiled) == {(4, 2, 9), (4, 2, 21)}
  assert all(seconds > 0 for seconds in buckets.compiled.values())
  before = dict(buckets.compiled)
  buckets(images())
  assert buckets.compiled == before


def test_what_cannot_be_is_refused():
  vit = adaptive()
  fixed = vit.clone(plan=make_plan({'method': 'tome', 'layers': (1,), 'remove': 8}, vit.host))
  for given, sizes, fault in (
      (vit.clone(plan=None), None, 'adaptive'), (fixed, None, 'tome leaves as many'),
      (vit, (60,), 'from 1 to 49'), (vit, (), 'from 1 to 49'),
      (adaptive(layers=(2,), keep=20), None, 'nothing is left to save')):
    with pytest.raises(ValueError, match=fault):
      Buckets(given, params(), sizes=sizes)
