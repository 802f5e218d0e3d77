"""Finds the largest and the smallest value along an axis, and the first index of each.

`jnp.argmax` compares pairs of a value and its index, which XLA does not vectorise on CPU: over
float32[8, 197, 197] it takes 1.4 ms, the maximum and a search for it 0.2 ms.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Extreme(NamedTuple):
  """Holds a value and its index, both without the axis.

  Attributes:
    value: float[...].
    index: int32[...], the first of equals, as `jnp.argmax` has it; the last index of the axis
      where a NaN is among the values.
  """

  value: Array
  index: Array  # type: ignore[assignment]  # In place of a tuple's method of this name.


def max_and_index(values: Array, axis: int) -> Extreme:
  """Finds the largest value along an axis of float[...], and its index."""
  value = jnp.max(values, axis=axis, keepdims=True)
  return Extreme(jnp.squeeze(value, axis), _first(values == value, axis % values.ndim))


def min_and_index(values: Array, axis: int) -> Extreme:
  """Finds the smallest value along an axis of float[...], and its index."""
  value = jnp.min(values, axis=axis, keepdims=True)
  return Extreme(jnp.squeeze(value, axis), _first(values == value, axis % values.ndim))


def _first(hit: Array, axis: int) -> Array:
  """Finds the first True along an axis, int32[...]; the last index where there is none."""
  last = hit.shape[axis] - 1
  index = jax.lax.broadcasted_iota(jnp.int32, hit.shape, axis)
  return jnp.min(jnp.where(hit, index, last), axis=axis)
