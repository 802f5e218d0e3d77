"""Distributions over the tokens of a row: quantiles and samples at them, ranges, outliers.

Axes: B batch, N slots now, M slots after, P quantiles, K neighbours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ops.assignments import Gather
from ops.moves.rows import put, take
from ops.primitives.select import ranks, top
from ops.tokens import TokenSet, num_left

Array = jax.Array


def sample_at(quantiles: Array, share: Array, order: Array, counts: Array) -> Array:
  """Samples the slots whose shares are nearest to quantiles.

  Args:
    quantiles: float32[B, P].
    share: float32[B, N], the sums of the distribution, rising, of the slots in `order`.
    order: int32[B, N], slots.
    counts: bool[B, N], the entries of `order` that count.

  Returns:
    bool[B, N], sampled at least once.
  """
  nearest = take(order, jax.vmap(_nearest_share)(jnp.where(counts, share, jnp.inf), quantiles))
  return put(jnp.zeros_like(counts), nearest, jnp.ones_like(nearest, bool))


def keep_sampled(tokens: TokenSet, scores: Array, hit: Array, *, num_slots: int,
                 turn: Array | None = None) -> Gather:
  """Keeps the protected tokens, then the sampled ones, then padding.

  Args:
    tokens: N slots.
    scores: float32[B, N]; where more tokens were sampled than fit, the highest stay.
    hit: bool[B, N], the sampled tokens.
    num_slots: M.
    turn: float32[B, N], the order of the sampled tokens; None for the lowest score first.
  """
  picked = top(scores, num_slots, forced=tokens.fixed, excluded=~(tokens.fixed | hit))
  wanted = tokens.fixed | hit
  stays = wanted
  if tokens.budget is not None:
    stays &= ranks(picked, tokens.slots) < num_left(tokens, num_slots)
  rank = jnp.where(tokens.fixed, -jnp.inf,
                   jnp.where(stays, scores if turn is None else turn, jnp.inf))
  src = take(picked, jnp.argsort(take(rank, picked), axis=1))
  return Gather(src, tokens.slots, valid=take(stays, src),
                wanted=jnp.sum(wanted, axis=1, dtype=jnp.int32))


def above_lowest(scores: Array, among: Array) -> tuple[Array, Array]:
  """Measures scores from the lowest of their row.

  Args:
    scores: float32[B, N].
    among: bool[B, N], those that count.

  Returns:
    float32[B, N], how far each is above the lowest, 0 where it does not count; float32[B, 1], the
    largest of these, 0 where they differ by no more than their rounding.
  """
  low = jnp.min(jnp.where(among, scores, jnp.inf), axis=1, keepdims=True)
  above = jnp.where(among, scores - low, 0.0)
  spread = jnp.max(above, axis=1, keepdims=True)
  size = jnp.max(jnp.where(among, jnp.abs(scores), 0.0), axis=1, keepdims=True)
  return above, jnp.where(spread > 1e-6 * size, spread, 0.0)


def quantile(scores: Array, among: Array, share: float) -> Array:
  """Returns the score below which a share of each row lies, between two scores in proportion.

  Args:
    scores: float32[B, N].
    among: bool[B, N], those that count.
    share: from 0 to 1.

  Returns:
    float32[B, 1]; infinity in a row of none.
  """
  ordered = jnp.sort(jnp.where(among, scores, jnp.inf), axis=1)
  place = share * jnp.maximum(jnp.sum(among, axis=1, keepdims=True) - 1, 0).astype(jnp.float32)
  below = jnp.floor(place).astype(jnp.int32)
  low, high = (jnp.take_along_axis(ordered, jnp.minimum(at, scores.shape[1] - 1), axis=1)
               for at in (below, below + 1))
  part = place - below
  return jnp.where(part > 0, low + part * (high - low), low)


def local_outliers(values: Array, among: Array, *, neighbours: int, factor: float = 1.5) -> Array:
  """Finds values around which it is thinner than around their neighbours: local outlier factors.

  LOF (Breunig et al., 2000): a value's density is one over the mean distance to its K nearest, none
  counted as shorter than that one's own distance to its K-th; the factor is the mean density of
  these over its own. Neighbours stand beside it in sorted order, so that no two rows of N are
  compared. A row of K values or fewer has one neighbour less than values.

  Args:
    values: float32[B, N].
    among: bool[B, N], those that count.
    neighbours: K.
    factor: above which a value is an outlier.

  Returns:
    bool[B, N].
  """
  size = values.shape[1]
  count = min(neighbours, size - 1)
  if count < 1:
    return jnp.zeros_like(among)
  order = jnp.argsort(jnp.where(among, values, jnp.inf), axis=1)
  ordered, real = take(values, order), take(among, order)
  offsets = jnp.asarray([*range(-count, 0), *range(1, count + 1)], jnp.int32)
  beside = jnp.arange(size, dtype=jnp.int32)[:, None] + offsets[None]
  there = (beside >= 0) & (beside < size)
  beside = jnp.clip(beside, 0, size - 1)
  there = there[None] & real[:, beside] & real[:, :, None]
  distance = jnp.where(there, jnp.abs(ordered[:, beside] - ordered[:, :, None]), jnp.inf)
  near, index = jax.lax.top_k(-distance, count)
  counts = near > -jnp.inf
  index = jnp.take_along_axis(jnp.broadcast_to(beside, distance.shape), index, axis=2)
  number = jnp.maximum(jnp.sum(counts, axis=2), 1)
  farthest = jnp.max(jnp.where(counts, -near, 0.0), axis=2)

  def mean(found: Array) -> Array:
    return jnp.sum(jnp.where(counts, found, 0.0), axis=2) / number

  def of(value: Array) -> Array:
    return take(value, index.reshape(len(value), -1)).reshape(index.shape)

  density = 1 / (mean(jnp.maximum(-near, of(farthest))) + 1e-10)
  apart = real & (mean(of(density)) / density > factor)
  return put(jnp.zeros_like(among), order, apart)


def variance(values: Array, among: Array) -> Array:
  """Returns the variance of the values of each row that count, float32[B]; of a sample."""
  axes = tuple(range(1, values.ndim))
  number = jnp.sum(among, axis=axes)
  mean = jnp.sum(jnp.where(among, values, 0.0), axis=axes) / jnp.maximum(number, 1)
  gap = values - mean.reshape(-1, *(1,) * (values.ndim - 1))
  return jnp.sum(jnp.where(among, gap * gap, 0.0), axis=axes) / jnp.maximum(number - 1, 1)


def by_each_others_variance(one: Array, other: Array, among: Array) -> Array:
  """Joins two scores float32[B, N], softmaxed, each weighed by the other's variance over a row."""
  one, other = (jax.nn.softmax(each, axis=1, where=among) for each in (one, other))
  of_one, of_other = (variance(each, among)[:, None] for each in (one, other))
  weight = of_other / jnp.maximum(of_one + of_other, 1e-30)
  return weight * one + (1 - weight) * other


def outliers(values: Array, among: Array) -> Array:
  """Finds what lies above the third quartile by more than 1.5 times the interquartile range.

  Quartiles are interpolated, as numpy does.

  Args:
    values: float32[B, N].
    among: bool[B, N], those that count.

  Returns:
    bool[B, N].
  """
  rising = jnp.sort(jnp.where(among, values, jnp.inf), axis=1)
  last = jnp.maximum(jnp.sum(among, axis=1, keepdims=True, dtype=jnp.int32) - 1, 0)

  def quartile(number: int) -> Array:
    below, above = number * last // 4, jnp.minimum(number * last // 4 + 1, last)
    part = (number * last % 4).astype(jnp.float32) / 4
    return take(rising, below) * (1 - part) + take(rising, above) * part

  first, third = quartile(1), quartile(3)
  return among & (values > third + 1.5 * (third - first))


def _nearest_share(share: Array, quantiles: Array) -> Array:
  """int32[P]: where float32[N], rising, is nearest to float32[P]; the first of equals."""
  above = jnp.minimum(jnp.searchsorted(share, quantiles), share.shape[0] - 1)
  below = jnp.searchsorted(share, share[jnp.maximum(above - 1, 0)])
  lower = jnp.abs(quantiles - share[below]) <= jnp.abs(share[above] - quantiles)
  return jnp.where(lower, below, above).astype(jnp.int32)
