"""The largest and the smallest along an axis, and where they first stand.

`jnp.argmax` compares pairs of a value and its index, which XLA does not vectorise on CPU: over
float32[8, 197, 197] it takes 1.4 ms, the maximum and a search for it 0.2 ms.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Extreme(NamedTuple):
  """A value and its place, both without the axis.

  Attributes:
    value: float[...].
    index: int32[...], the first place of equals, as `jnp.argmax` has it; the last place of all
      where a NaN was among them.
  """

  value: Array
  index: Array


def max_and_index(values: Array, axis: int) -> Extreme:
  """The largest along an axis of float[...], and where."""
  value = jnp.max(values, axis=axis, keepdims=True)
  return Extreme(jnp.squeeze(value, axis), _first(values == value, axis % values.ndim))


def min_and_index(values: Array, axis: int) -> Extreme:
  """The smallest along an axis of float[...], and where."""
  value = jnp.min(values, axis=axis, keepdims=True)
  return Extreme(jnp.squeeze(value, axis), _first(values == value, axis % values.ndim))


def _first(hit: Array, axis: int) -> Array:
  """int32[...]: the first True along an axis, the last place where there is none."""
  last = hit.shape[axis] - 1
  place = jax.lax.broadcasted_iota(jnp.int32, hit.shape, axis)
  return jnp.min(jnp.where(hit, place, last), axis=axis)
