"""Windows of videos that have different numbers of frames, in one batch.

They lie as `ops.primitives.grids.balanced` has those of one video, with numbers of frames that are
data. The last window along time is shorter where those do not end with the video.

Axes: B batch, N patches, T frames, C windows, S of them along time, R patches of a window, K frames
of a window, W features.
"""

import jax
import jax.numpy as jnp

from ops.moves.rows import take
from ops.primitives import grids
from ops.primitives.grids import Grid

Array = jax.Array


def windows_over(frames: Array, side: int) -> Array:
  """Counts the windows along time of rows with so many frames: int32[B] -> int32[B]."""
  return -(-frames // side)


def frames_of_windows(frames: Array, side: int, most: int) -> Array:
  """Returns the frames of the windows of each row, as `grids.balanced` places them.

  Args:
    frames: int32[B], of each row.
    side: K; a row may have fewer frames, which then make one window.
    most: S.

  Returns:
    int32[B, S, K], of which numbers from `frames` on are not there.
  """
  number = jnp.maximum(windows_over(frames, side), 1)
  left = frames % number
  whole = jnp.where(left == 0, number, left)[:, None]
  index = jnp.arange(most, dtype=jnp.int32)[None]
  first = index * side - jnp.maximum(index - whole + 1, 0)
  # Windows that are not there may begin before the last frame.
  first = jnp.where(index < number[:, None], first, frames[:, None])
  return first[:, :, None] + jnp.arange(side, dtype=jnp.int32)[None, None]


def windows_of(x: Array, grid: Grid, sides: Grid, taken: Array) -> Array:
  """Divides the patches of videos into windows, both in raster order.

  Args:
    x: float[B, N, W] of the grid.
    grid, sides: of the patches, and of a window.
    taken: int32[B, S, K], frames of the windows.

  Returns:
    float[B, C, R, W]; what frames behind the last one have is of no account.
  """
  batch, width = len(x), x.shape[-1]
  x = grids.balanced_windows(x.reshape(batch * grid[0], -1, width), grid[1:], sides[1:])
  inside = x.shape[1:]
  index = jnp.minimum(taken, grid[0] - 1).reshape(batch, -1)
  x = take(x.reshape(batch, grid[0], *inside), index).reshape(*taken.shape, *inside)
  return jnp.moveaxis(x, 2, 3).reshape(batch, -1, taken.shape[2] * inside[1], width)


def resampled(x: Array, grid: Grid, cells: Grid, frames: Array, side: int) -> Array:
  """Resamples videos of several lengths, each to its windows, linearly as `grids.resample`.

  Args:
    x: float[B, N, W] of the grid.
    grid, cells: of the patches, and of the windows of the longest video.
    frames: int32[B], of each row.
    side: K.

  Returns:
    float[B, C, W]; what windows behind a row's last one have is of no account.
  """
  batch, width = len(x), x.shape[-1]
  count = jnp.maximum(frames, 1)[:, None].astype(jnp.float32)
  number = jnp.maximum(windows_over(frames, side), 1)[:, None].astype(jnp.float32)
  place = (jnp.arange(cells[0], dtype=jnp.float32)[None] + 0.5) * (count / number) - 0.5
  place = jnp.clip(place, 0, count - 1)[:, :, None]
  frame = jnp.arange(grid[0], dtype=jnp.float32)[None, None]
  share = jnp.maximum(1 - jnp.abs(place - frame), 0)
  over_time = jnp.einsum('bst,btn->bsn', share.astype(x.dtype), x.reshape(batch, grid[0], -1),
                         precision='highest')
  return grids.resample(over_time.reshape(batch * cells[0], -1, width), grid[1:], cells[1:],
                        'linear').reshape(batch, -1, width)
