"""Scaling of scores to the range that they have in their row.

Axes: B batch, N slots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


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
