"""Square cells of patches, over an image in small and over its crops put together.

Axes: B batch, N slots, C cells at most.
"""

import math

import jax
import jax.numpy as jnp

from ops.moves.rows import take
from ops.signals import Signals
from ops.tokens import TokenSet

Array = jax.Array


def cell_along(place: Array, side: float) -> Array:
  """Returns which cell of a row or a column of cells a place is in."""
  return jnp.floor(place / side).astype(jnp.int32)


def cells_of_crops(tokens: TokenSet, signals: Signals, side: float) -> tuple[Array, Array, int]:
  """Numbers the cells of the whole image in small, then those of its crops put together.

  Args:
    tokens: N slots, newlines behind the rows that they end.
    signals: with `CROP_SIGNALS`.
    side: of a cell, in patches.

  Returns:
    int32[B, N], the cell of each token; int32[B, 1], how many a row has; and C.
  """
  rows, columns = signals.crop_grid
  own = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), signals.crop.shape)
  newline = signals.crop < 0
  last = jnp.maximum(jax.lax.cummax(jnp.where(newline, -1, own), axis=1), 0)
  crop, patch = take(signals.crop, last), take(signals.patch, last)
  tiles, part = jnp.maximum(signals.tiling[:, 1:], 1), jnp.maximum(crop - 1, 0)
  joint = tokens.free & (crop > 0)

  def placed(place: Array, length: int) -> tuple[Array, Array]:
    """Finds the cell along an axis, and how many there are of the joint crops, int32[B, 1]."""
    low = jnp.min(jnp.where(joint, place, tokens.slots), axis=1, keepdims=True)
    place = cell_along(jnp.where(joint, place - low, jnp.minimum(place, length - 1)), side)
    return place, 1 + jnp.max(jnp.where(joint, place, -1), axis=1, keepdims=True)

  row, down = placed(part // tiles * rows + patch // columns, rows)
  column, over = placed(part % tiles * columns + patch % columns + newline, columns)
  small = math.ceil(columns / side)
  whole = math.ceil(rows / side) * small
  parts = signals.num_crops - 1
  most = max((math.ceil(high * rows / side) * math.ceil((parts // high * columns + 1) / side)
              for high in range(1, parts + 1)), default=0)
  cell = jnp.where(joint, whole + row * over + column, row * small + column)
  return cell, whole + down * over, whole + most
