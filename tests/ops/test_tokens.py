"""Properties of assignments and of what is done with them, against plain numpy.

Axes: B batch, N slots now, M slots after, T original tokens, D features, H heads.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_long
from hypothesis import given
from hypothesis import strategies as st

from ops import tokens as tk
from ops.assignments import Gather, Merge, Mix
from ops.moves.rows import put, take
from ops.tokens import SPECIAL, TEXT, VISUAL, TokenSet

BATCH, COUNTS = 2, (9, 6, 4)
SEEDS = st.integers(0, 2**32 - 1)
KINDS = ('gather', 'merge', 'mix')
HARD = ('gather', 'merge')


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def same(a, b):
  np.testing.assert_array_equal(a, b)


def make(kind, slots, outputs, seed, *, holes=False, op='sum'):
  """A random assignment: anchors distinct, members and weights anything; holes are padding."""
  rng = np.random.default_rng(seed)
  src = np.stack([rng.permutation(slots)[:outputs] for _ in range(BATCH)]).astype(np.int32)
  valid = np.concatenate([np.ones((BATCH, 1), bool), rng.random((BATCH, outputs - 1)) < 0.6],
                         axis=1) if holes else None
  if kind == 'gather':
    return Gather(src, slots, valid=valid)
  if kind == 'mix':
    weights = rng.normal(size=(BATCH, outputs, slots)).astype(np.float32)
    return Mix(weights * (rng.random(weights.shape) < 0.7), valid=valid)
  dst = rng.integers(0, outputs + 1, size=(BATCH, slots)).astype(np.int32)
  np.put_along_axis(dst, src, np.tile(np.arange(outputs), (BATCH, 1)), axis=1)
  weight = rng.normal(size=(BATCH, slots)).astype(np.float32)
  return Merge(src, dst, weight, valid=valid, op=op)


def fresh(slots, seed, **fields):
  """Tokens of their own; half of the fields are left out where `fields` says None."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(BATCH, slots, 3)).astype(np.float32)
  kind = rng.choice([SPECIAL, VISUAL, TEXT], size=(BATCH, slots)).astype(np.int8)
  tokens = TokenSet.create(x, kind=kind)
  return tokens.replace(stats={'memo': tokens.pos * 10}, **fields)


@functools.cache
def jitted(function, **static):
  """The function compiled, with numpy results: indexing those costs nothing."""
  compiled = jax.jit(functools.partial(function, **static))
  return lambda *args: jax.tree.map(np.asarray, compiled(*args))


def _call(assignment, *args, method):
  return getattr(assignment, method)(*args)


def call(assignment, *args, method):
  return jitted(_call, method=method)(assignment, *args)


def matrix(assignment):
  return call(assignment, method='matrix')


def reduce(tokens, assignment):
  return jitted(tk.reduce)(tokens, assignment)


@pytest.mark.parametrize('holes', [False, True])
@pytest.mark.parametrize('kind', KINDS)
@given(seed=SEEDS)
def test_applying_is_multiplying_by_the_matrix(kind, holes, seed):
  assignment = make(kind, 9, 6, seed, holes=holes)
  for shape in ((), (3,), (2, 2)):
    values = np.random.default_rng(seed).normal(size=(BATCH, 9, *shape)).astype(np.float32)
    close(call(assignment, values, method='apply'),
          np.einsum('bmn,bn...->bm...', matrix(assignment), values))
  if holes:
    assert (matrix(assignment)[~np.asarray(assignment.valid)] == 0).all()


@given(seed=SEEDS)
def test_the_matrix_of_a_gather_is_one_hot(seed):
  gather = make('gather', 9, 6, seed, holes=True)
  rows = matrix(gather)
  for b in range(BATCH):
    for m in range(6):
      wanted = np.zeros(9)
      wanted[gather.src[b, m]] = gather.valid[b, m]
      same(rows[b, m], wanted)


@given(seed=SEEDS)
def test_mean_is_the_weighted_mean_of_each_group(seed):
  plain = make('merge', 9, 4, seed)
  rng = np.random.default_rng(seed)
  weight = (rng.integers(0, 3, size=(BATCH, 9)) * rng.random((BATCH, 9))).astype(np.float32)
  values = rng.normal(size=(BATCH, 9, 3)).astype(np.float32)
  merged = call(jitted(Merge.mean)(plain.src, plain.dst, weight), values, method='apply')
  dst = np.asarray(plain.dst)
  for b in range(BATCH):
    for m in range(4):
      group = dst[b] == m
      if weight[b, group].sum() > 0:
        close(merged[b, m], np.average(values[b, group], axis=0, weights=weight[b, group]))
      else:
        same(merged[b, m], 0)


def test_a_mean_of_one_is_bit_equal_and_of_many_bf16_terms_is_exact():
  src = jnp.array([[0, 1]])
  dst = jnp.array([[0] + [1] * 600])
  x = jnp.concatenate([jnp.full((1, 1, 1), 0.1), jnp.full((1, 600, 1), 1.0)], axis=1)
  merged = Merge.mean(src, dst, jnp.full((1, 601), 3.0)).apply(x.astype(jnp.bfloat16))
  assert merged.dtype == jnp.bfloat16
  same(merged[0, :, 0], jnp.array([0.1, 1.0], jnp.bfloat16))


@given(seed=SEEDS)
def test_maximum_of_each_group_and_zero_where_a_group_is_empty(seed):
  merge = make('merge', 9, 4, seed, op='max')
  merge = merge.replace(dst=np.where(merge.dst == 2, 4, merge.dst))
  values = np.random.default_rng(seed).normal(size=(BATCH, 9, 3)).astype(np.float32)
  merged, dst = call(merge, values, method='apply'), np.asarray(merge.dst)
  for b in range(BATCH):
    for m in range(4):
      group = values[b, dst[b] == m]
      same(merged[b, m], group.max(0) if len(group) else np.zeros(3))


def test_a_maximum_is_no_matrix():
  with pytest.raises(ValueError, match="op='max' is not a matrix"):
    make('merge', 9, 4, 0, op='max').matrix()


@pytest.mark.long
@pytest.mark.parametrize('holes', [False, True])
@given(seed=SEEDS, kinds=st.tuples(st.sampled_from(HARD), st.sampled_from(HARD)))
def test_owners_sizes_and_anchors_over_two_cuts(holes, seed, kinds):
  """Against a simulation with one Python set of original tokens a slot."""
  tokens, product = fresh(COUNTS[0], seed), np.eye(COUNTS[0])[None]
  x = np.asarray(tokens.x)
  held = [[{n} for n in range(COUNTS[0])] for _ in range(BATCH)]
  anchors = [list(range(COUNTS[0])) for _ in range(BATCH)]
  kind = np.asarray(tokens.kind)
  for step, name in enumerate(kinds):
    assignment = make(name, COUNTS[step], COUNTS[step + 1], seed + step, holes=holes)
    tokens, product = reduce(tokens, assignment), matrix(assignment) @ product
    for b in range(BATCH):
      src, dst = np.asarray(assignment.src[b]), np.asarray(assignment.dst[b])
      groups = [set() for _ in src]
      for n, m in enumerate(dst):
        if m < len(src):
          groups[m] |= held[b][n]
      # What was padding before stays padding where it anchors.
      gone = np.array([anchors[b][n] is None for n in src])
      if holes:
        gone |= ~assignment.valid[b]
      held[b] = [set() if g else group for g, group in zip(gone, groups, strict=True)]
      anchors[b] = [None if g else anchors[b][n] for g, n in zip(gone, src, strict=True)]
  real, sizes = np.asarray(tokens.real), np.asarray(tokens.sizes)
  for b in range(BATCH):
    wanted = np.full(COUNTS[0], -1)
    for m, group in enumerate(held[b]):
      wanted[list(group)] = m
    same(tokens.owner[b], wanted)
    for m, anchor in enumerate(anchors[b]):
      assert real[b, m] == (anchor is not None)
      if anchor is not None:
        close(sizes[b, m], len(held[b][m]))
        same(tokens.pos[b, m], anchor)
        same(tokens.stats['memo'][b, m], anchor * 10)
        same(tokens.kind[b, m], kind[b, anchor])
        close(tokens.x[b, m], product[b, m] @ x[b])


@given(seed=SEEDS)
def test_soft_sizes_add_up_and_owners_follow_the_heaviest_weight(seed):
  mix = make('mix', 9, 4, seed)
  tokens = fresh(9, seed, size=jnp.asarray(
      np.random.default_rng(seed).integers(1, 5, size=(BATCH, 9)).astype(np.float32)))
  reduced, weights = reduce(tokens, mix), np.abs(matrix(mix))
  seen = weights.sum(1) > 0
  close(reduced.size.sum(1), (tokens.size * seen).sum(1))
  same(reduced.owner, np.where(seen, weights.argmax(1), -1))
  same(reduced.pos, np.take_along_axis(np.asarray(tokens.pos), weights.argmax(2), axis=1))


def test_sizes_stay_unset_until_something_is_joined():
  tokens = fresh(9, 0)
  assert reduce(tokens, make('gather', 9, 6, 0)).size is None
  assert reduce(tokens, make('merge', 9, 6, 0)).size is not None
  assert reduce(tokens, make('mix', 9, 6, 0)).size is not None
  assert reduce(tokens, make('gather', 9, 6, 0)).valid is None


def test_gradients_reach_a_soft_decision_through_the_size():
  tokens = fresh(9, 0, size=jnp.full((BATCH, 9), 2.0))
  gather = make('gather', 9, 6, 0)

  def total(policy):
    return jnp.sum(tk.reduce(tokens, gather.replace(policy=policy)).size)

  value, grad = jax.value_and_grad(total)(jnp.full((BATCH, 6), 0.5))
  close(value, BATCH * 6.0)
  same(grad, 2.0)


@pytest.mark.long
@given(seed=SEEDS, kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)))
def test_composition_is_the_product_of_matrices(seed, kinds):
  first = make(kinds[0], 9, 6, seed, holes=True)
  second = make(kinds[1], 6, 4, seed + 1)
  both = jitted(tk.compose)(first, second)
  product = matrix(second) @ matrix(first)
  # An output whose anchor was padding is padding.
  anchored = np.take_along_axis(np.asarray(first.valid), np.asarray(second.src), axis=1)
  same(both.valid, anchored)
  close(matrix(both), np.where(anchored[..., None], product, 0))
  tokens = fresh(9, seed)
  once, twice = reduce(tokens, both), reduce(reduce(tokens, first), second)
  same(once.real, twice.real)
  real = np.asarray(once.real)
  close(np.asarray(once.x)[real], np.asarray(twice.x)[real])
  if 'mix' not in kinds:
    same(once.owner, twice.owner)
    same(once.pos, twice.pos)
    close(np.asarray(once.sizes)[real], np.asarray(twice.sizes)[real])


@pytest.mark.long
@given(seed=SEEDS, kinds=st.tuples(*[st.sampled_from(KINDS)] * 3))
def test_composition_is_associative(seed, kinds):
  a, b, c = (make(kind, n, m, seed + n) for kind, n, m in zip(kinds, (9, 6, 4), (6, 4, 2),
                                                             strict=True))
  compose = jitted(tk.compose)
  close(matrix(compose(compose(a, b), c)), matrix(compose(a, compose(b, c))))


@pytest.mark.long
def test_composition_carries_maxima_decisions_and_features_or_raises():
  tokens = fresh(9, 0)
  twice = [make('merge', 9, 6, 0, op='max'), make('merge', 6, 4, 1, op='max')]
  same(reduce(tokens, tk.compose(*twice)).x, reduce(reduce(tokens, twice[0]), twice[1]).x)
  soft = [make('gather', 9, 6, 0).replace(policy=jnp.full((BATCH, 6), 0.5)),
          make('gather', 6, 4, 1).replace(policy=jnp.full((BATCH, 4), 0.25))]
  for parts in (soft, [soft[0], make('gather', 6, 4, 1)], [make('gather', 9, 6, 0), soft[1]]):
    same(reduce(tokens, tk.compose(*parts)).size, reduce(reduce(tokens, parts[0]), parts[1]).size)
  features = make('mix', 9, 6, 0).replace(features=2 * tokens.x)
  later = make('mix', 6, 4, 1)
  close(reduce(tokens, tk.compose(features, later)).x, reduce(reduce(tokens, features), later).x)
  for first, second, message in (
      (make('merge', 9, 6, 0), twice[1], "op='max'"),
      (soft[0], make('merge', 6, 4, 1), 'soft decision'),
      (make('mix', 9, 6, 0), later.replace(features=jnp.zeros((BATCH, 6, 3))), 'features')):
    with pytest.raises(ValueError, match=message):
      tk.compose(first, second)


@pytest.mark.parametrize('kind', mostly_long(KINDS))
@given(seed=SEEDS, holes=st.booleans(), padded=st.booleans())
def test_masking_leaves_the_real_tokens_of_reducing(kind, seed, holes, padded):
  rng = np.random.default_rng(seed)
  tokens = fresh(9, seed, size=jnp.asarray(rng.integers(1, 5, (BATCH, 9)).astype(np.float32)))
  if padded:
    tokens = tokens.replace(valid=jnp.asarray(rng.random((BATCH, 9)) < 0.7),
                            owner=jnp.where(rng.random((BATCH, 9)) < 0.2, -1, tokens.owner))
  assignment = make(kind, 9, 6, seed, holes=holes)
  less, masked = reduce(tokens, assignment), jitted(tk.reduce_masked)(tokens, assignment)
  assert masked.x.shape == tokens.x.shape
  all_real = np.asarray(less.real)
  for b in range(BATCH):
    here, real = masked.valid[b], all_real[b]
    assert here.sum() == real.sum()
    if kind == 'mix':
      same(np.flatnonzero(here), np.flatnonzero(real))
      place = np.arange(6)
    else:
      place = np.asarray(assignment.src[b])
      same(np.flatnonzero(here), np.sort(place[real]))
    for name in ('x', 'pos', 'kind', 'size'):
      same(getattr(masked, name)[b][place[real]], getattr(less, name)[b][real])
    same(masked.stats['memo'][b][place[real]], less.stats['memo'][b][real])
    owner = less.owner[b]
    same(masked.owner[b], np.where(owner >= 0, place[np.maximum(owner, 0)], -1))
    same(masked.x[b][~here], 0)


@pytest.mark.parametrize('kind', HARD)
@given(seed=SEEDS)
def test_restoring_gives_every_member_its_output(kind, seed):
  assignment = make(kind, 9, 4, seed, holes=True)
  values = np.random.default_rng(seed).normal(size=(BATCH, 4, 3)).astype(np.float32)
  back, dst = call(assignment, values, method='restore'), np.asarray(assignment.dst)
  for b in range(BATCH):
    for n in range(9):
      same(back[b, n], values[b, dst[b, n]] if dst[b, n] < 4 else np.zeros(3))


@given(seed=SEEDS)
def test_restoring_a_mixture_goes_by_shares(seed):
  mix = make('mix', 9, 4, seed)
  values = np.random.default_rng(seed).normal(size=(BATCH, 4, 3)).astype(np.float32)
  weights = np.abs(matrix(mix))
  shares = weights / np.maximum(weights.sum(1, keepdims=True), 1e-20)
  close(call(mix, values, method='restore'), np.einsum('bmn,bmd->bnd', shares, values))


def test_restoring_to_original_tokens_fills_the_dropped_and_keeps_the_dtype():
  tokens = reduce(fresh(9, 0), make('gather', 9, 4, 0))
  labels = jnp.arange(8, dtype=jnp.int32).reshape(BATCH, 4)
  back = tk.restore(tokens, labels, fill=-1)
  assert back.dtype == jnp.int32
  assert tk.restore(tokens, labels).dtype == jnp.int32
  for b in range(BATCH):
    wanted = np.full(9, -1)
    wanted[np.asarray(tokens.pos[b])] = labels[b]
    same(back[b], wanted)


@given(seed=SEEDS)
def test_regrouping_an_attention_map(seed):
  rng = np.random.default_rng(seed)
  attention = rng.random((BATCH, 2, 9, 9)).astype(np.float32)
  gather, merge, mix = (make(kind, 9, 4, seed) for kind in KINDS)
  reduce_attention_map = jitted(tk.reduce_attention_map)
  close(reduce_attention_map(gather, attention),
        np.einsum('bmn,bhnk->bhmk', matrix(gather), attention))
  merges = np.asarray(merge.dst)[:, None] == np.arange(4)[None, :, None]
  close(reduce_attention_map(merge, attention),
        np.einsum('bmn,bhnk,bjk->bhmj', matrix(merge), attention, merges.astype(np.float32)))
  shares = np.abs(matrix(mix)) / np.maximum(np.abs(matrix(mix)).sum(1, keepdims=True), 1e-20)
  close(reduce_attention_map(mix, attention),
        np.einsum('bmn,bhnk,bjk->bhmj', matrix(mix), attention, shares))


@given(seed=SEEDS)
def test_attending_is_the_regrouped_map_times_values(seed):
  rng = np.random.default_rng(seed)
  attention = rng.random((BATCH, 2, 9, 9)).astype(np.float32)
  regrouped = jitted(tk.reduce_attention_map)
  for kind in KINDS:
    assignment = make(kind, 9, 4, seed)
    rows = 9 if kind == 'gather' else 4
    values = rng.normal(size=(BATCH, rows, 2, 3)).astype(np.float32)
    wanted = np.einsum('bhmk,bkhd->bmhd', regrouped(assignment, attention), values)
    close(jitted(tk.attend_after_cut)(assignment, attention, values), wanted)
    if kind == 'merge':
      size_weights = jnp.asarray(rng.random((BATCH, 9)), jnp.float32)
      for other in (assignment.replace(op='max'),
                    assignment.replace(size_weights=size_weights)):
        wanted = np.einsum('bhmk,bkhd->bmhd', regrouped(other, attention), values)
        close(jitted(tk.attend_after_cut)(other, attention, values), wanted)


def test_regrouped_means_are_still_attention():
  rng = np.random.default_rng(0)
  attention = rng.dirichlet(np.ones(9), size=(BATCH, 2, 9)).astype(np.float32)
  merge = make('merge', 9, 4, 0)
  everyone = jnp.minimum(merge.dst, 3)
  rows = tk.reduce_attention_map(Merge.mean(merge.src, everyone, jnp.ones((BATCH, 9))), attention)
  close(rows.sum(-1), np.ones((BATCH, 2, 4)))


@given(seed=SEEDS)
def test_a_size_in_the_bias_counts_as_that_many_keys(seed):
  rng = np.random.default_rng(seed)
  size, logits = rng.integers(1, 5, size=(BATCH, 6)), rng.normal(size=(BATCH, 6))
  tokens = fresh(6, seed, size=jnp.asarray(size, jnp.float32))
  bias = tk.key_bias(tokens, proportional=True)
  weights = jax.nn.softmax(logits.astype(np.float32) + bias, axis=1)
  counted = size * np.exp(logits)
  close(weights, counted / counted.sum(1, keepdims=True))


def test_the_bias_hides_padding_and_is_absent_where_it_says_nothing():
  tokens = fresh(6, 0)
  assert tk.key_bias(tokens, proportional=True) is None
  sized = tokens.replace(size=jnp.full((BATCH, 6), 2.0))
  assert tk.key_bias(sized, proportional=False) is None
  padded = sized.replace(valid=jnp.arange(6)[None] < jnp.array([[4], [0]]),
                         size=jnp.zeros((BATCH, 6)))
  for proportional in (False, True):
    bias = tk.key_bias(padded, proportional=proportional)
    weights = jax.nn.softmax(bias, axis=1)
    assert jnp.isfinite(bias).all()
    assert jnp.isfinite(weights).all()
    close(weights[0], [0.25] * 4 + [0.0] * 2)


def test_free_slots_are_real_and_of_the_kinds_at_hand():
  kind = jnp.array([[SPECIAL, VISUAL, TEXT, VISUAL]], jnp.int8)
  tokens = TokenSet.create(jnp.zeros((1, 4, 2)), kind=kind)
  same(tokens.free, [[False, True, False, True]])
  same(tokens.fixed, [[True, False, True, False]])
  padded = tokens.replace(valid=jnp.array([[True, True, False, False]]), of=(VISUAL, TEXT))
  same(padded.free, [[False, True, False, False]])
  same(padded.fixed, [[True, False, False, False]])


def test_a_method_that_may_keep_everything_is_not_asked():
  tokens, asked = fresh(9, 0), []

  def method(tokens, signals, *, num_slots):
    asked.append((signals, num_slots))
    return make('gather', 9, num_slots, 0)

  same(tk.decide(method, tokens, 'signals', num_slots=9).src, np.tile(np.arange(9), (BATCH, 1)))
  assert tk.decide(method, tokens, 'signals', num_slots=12).src.shape == (BATCH, 9)
  assert not asked
  assert tk.decide(method, tokens, 'signals', num_slots=8).src.shape == (BATCH, 8)
  assert asked == [('signals', 8)]


def test_rows_are_picked_and_entries_written():
  rng = np.random.default_rng(0)
  values, index = rng.normal(size=(3, 5, 2)).astype(np.float32), rng.integers(0, 5, (3, 4))
  same(take(values, index), values[np.arange(3)[:, None], index])
  same(take(values[..., 0], index), values[np.arange(3)[:, None], index, 0])
  # A batch of one is that of all rows.
  same(take(values[:1], index), values[0][index])
  same(take(values, index[:1]), values[:, index[0]])
  assert jnp.isnan(take(jnp.asarray(values, jnp.float32), index + values.shape[1])).all()
  # What is written nowhere is lost.
  written = put(jnp.zeros((2, 4), jnp.int32), jnp.array([[3, 0], [4, 1]]),
                jnp.array([[7., 8.]] * 2))
  same(written, [[8, 0, 0, 7], [0, 8, 0, 0]])
  assert written.dtype == jnp.int32
