"""Crops of an image: which part of the whole each one shows, and ranks within them.

Axes: B batch, N slots, G groups.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ops.assignments import Gather
from ops.moves.rows import put, take
from ops.tokens import TokenSet, count

Array = jax.Array


def ranks_within(group: Array, scores: Array) -> Array:
  """Ranks each slot among those of its group, the highest score first: int32[B, N].

  Args:
    group: int32[B, N].
    scores: float32[B, N]; of equals the lowest slot comes first.
  """
  slots = group.shape[1]
  own = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), group.shape)
  sorted_, _, order = jax.lax.sort((group, -scores, own), num_keys=2, is_stable=True)
  starts = jnp.concatenate([jnp.ones_like(group[:, :1], bool),
                            sorted_[:, 1:] != sorted_[:, :-1]], axis=1)
  rank = own - jax.lax.cummax(jnp.where(starts, own, 0), axis=1)
  return put(jnp.zeros_like(rank), order, rank)


def sums(values: Array, group: Array, groups: int) -> Array:
  """Adds up values, or counts flags, by group: [B, N, ...] -> [B, G, ...]; below 0 is no group."""
  values = values.astype(jnp.int32) if values.dtype == bool else values
  index = jnp.where(group < 0, groups, group)
  return jax.vmap(lambda v, g: jax.ops.segment_sum(v, g, num_segments=groups))(values, index)


def region(patch: Array, tiling: Array, grid: tuple[int, int]) -> Array:
  """Finds the crop that shows what a patch of the whole image shows: int32[B, N], 1 for the first.

  The last row and column of crops show what is left where the sides do not divide.

  Args:
    patch: int32[B, N], of the whole image in small.
    tiling: int32[B, 2], rows and columns of crops, at least 1.
    grid: (rows, columns) of patches.
  """
  row, column = patch // grid[1], patch % grid[1]
  rows, columns = tiling[:, :1], tiling[:, 1:]
  down = jnp.minimum(row // jnp.maximum(grid[0] // rows, 1), rows - 1)
  across = jnp.minimum(column // jnp.maximum(grid[1] // columns, 1), columns - 1)
  return 1 + down * columns + across


def keep_flagged(tokens: TokenSet, stays: Array, *, num_slots: int) -> Gather:
  """Keeps the tokens that are named and those that may not be touched, in slot order.

  Args:
    tokens: N slots.
    stays: bool[B, N]; of more than fit the last ones go.
    num_slots: M; the slots that nothing fills are padding.
  """
  stays = tokens.fixed | (stays & tokens.free)
  order = jnp.argsort(~stays, axis=1, stable=True)[:, :num_slots].astype(jnp.int32)
  return Gather(order, tokens.slots, valid=take(stays, order), wanted=count(stays)[:, 0])
