"""Values that lie apart from the others of their row.

Axes: B batch, N values, K neighbours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ops.assignments import take

Array = jax.Array


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
  return jax.vmap(lambda flags, at, found: flags.at[at].set(found))(
      jnp.zeros_like(among), order, apart)
