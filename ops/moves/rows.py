"""Rows of arrays: picked, written, and taken one after another where a device is faster so.

Axes: B batch, N rows, M rows picked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp

Array = jax.Array
T = TypeVar('T')
# Numbers in a row from which a CPU is faster at one row after another.
LARGE = 2 ** 20


# Both as the primitive itself: every cut has dozens of them, and what jax.numpy puts around it, as
# for indices below 0, takes longer to trace than the pick.
def take(values: Array, index: Array) -> Array:
  """Picks rows: values [B, N, ...], index int[B, M], 0 to N - 1 -> [B, M, ...].

  One of both may have a batch of one, which is then that of all rows. What lies beyond the end
  gives NaN, in integers the least (unsigned: the greatest), never another token.
  """
  if len(values) != len(index):
    batch = max(len(values), len(index))
    values, index = (jnp.broadcast_to(each, (batch, *each.shape[1:])) for each in (values, index))
  numbers = jax.lax.GatherDimensionNumbers(
      offset_dims=tuple(range(2, values.ndim)), collapsed_slice_dims=(1,), start_index_map=(1,),
      operand_batching_dims=(0,), start_indices_batching_dims=(0,))
  return jax.lax.gather(values, index[..., None], numbers, (1, 1, *values.shape[2:]),
                        mode='fill')


def put(values: Array, index: Array, new: Array) -> Array:
  """Writes entries: values [B, N], index int[B, M], new [B, M] -> [B, N].

  Args:
    index: 0 or more; N and more are entries of nowhere. Of one twice, either is written.
  """
  numbers = jax.lax.ScatterDimensionNumbers(
      update_window_dims=(), inserted_window_dims=(1,), scatter_dims_to_operand_dims=(1,),
      operand_batching_dims=(0,), scatter_indices_batching_dims=(0,))
  return jax.lax.scatter(values, index[..., None], new.astype(values.dtype), numbers, mode='drop')


def by_row(function: Callable[..., T], *rows: Any) -> T:
  """Returns what a function of one row makes of each: a CPU takes one row after another.

  What a row is compared with then stays in its cache: greedy selections of a batch of 16 images
  take 2 to 8 times as long otherwise.

  Args:
    function: of arrays [...], without control over other rows.
    *rows: its arrays [B, ...], or trees of them.
  """
  # Asked for when it is compiled, which may be for other devices than this process has.
  return cast(T, jax.lax.platform_dependent(
      *rows, cpu=lambda *rows: jax.lax.map(lambda row: function(*row), rows),
      default=jax.vmap(function)))


def by_large_row(function: Callable[..., T], *rows: Any) -> T:
  """Returns what `by_row` does; rows of few numbers are taken together on CPUs too."""
  numbers = sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(rows))
  return by_row(function, *rows) if numbers >= LARGE else jax.vmap(function)(*rows)


def expand_like(mask: Array, like: Array) -> Array:
  """Adds axes of one to a mask until it has as many as `like`."""
  return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def take_or_zero(values: Array, index: Array) -> Array:
  """Picks rows as `take`, with zeros where an index equals the number of rows (no such row)."""
  rows = values.shape[1]
  picked = take(values, jnp.minimum(index, rows - 1))
  return jnp.where(expand_like(index < rows, picked), picked, 0)
