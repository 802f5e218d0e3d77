"""Grids of patches: windows of them, positions, and resampling as a matrix an axis.

Tokens of a grid lie in raster order on axis 1. A grid is (rows, columns), or (frames, rows,
columns) for a video.

Axes: B batch, N patches, C cells, R patches of a cell, D features.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ops import choices

Array = jax.Array
Grid = tuple[int, ...]
# The parameter of cubic convolution (Keys, 1981, IEEE Trans. ASSP 29(6)) that torch has.
CUBIC = -0.75
RESAMPLINGS = ('area', 'bicubic', 'linear', 'nearest')
AXES = ('frames', 'rows', 'columns')
# The wavelengths of `sincos` and `summed_sincos` are 2 pi to so many times 2 pi.
LONGEST = 10000.0


def cells(grid: Grid, side: Grid) -> Grid:
  """Counts the windows along each axis of a grid.

  Args:
    grid: of patches.
    side: patches of a window along each axis.

  Raises:
    ValueError: a side that does not divide its axis.
  """
  if len(grid) != len(side) or any(length % part for length, part in zip(grid, side, strict=True)):
    raise ValueError(f'windows of {side} patches do not divide a grid of {grid}: choose sides that '
                     'do')
  return tuple(length // part for length, part in zip(grid, side, strict=True))


def windows(x: Array, grid: Grid, side: Grid) -> Array:
  """Divides patches into windows: [B, N, ...] -> [B, C, R, ...], both in raster order.

  Raises:
    ValueError: as `cells`.
  """
  count, rank = cells(grid, side), len(grid)
  split = [part for pair in zip(count, side, strict=True) for part in pair]
  x = x.reshape(len(x), *split, *x.shape[2:])
  inside = [*range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2)]
  x = x.transpose(0, *inside, *range(2 * rank + 1, x.ndim))
  return x.reshape(len(x), math.prod(count), math.prod(side), *x.shape[2 * rank + 1:])


def unwindow(x: Array, grid: Grid, side: Grid) -> Array:
  """Undoes `windows`: [B, C, R, ...] -> [B, N, ...]."""
  count, rank = cells(grid, side), len(grid)
  x = x.reshape(len(x), *count, *side, *x.shape[3:])
  pairs = [axis for i in range(1, rank + 1) for axis in (i, rank + i)]
  x = x.transpose(0, *pairs, *range(2 * rank + 1, x.ndim))
  return x.reshape(len(x), math.prod(grid), *x.shape[2 * rank + 1:])


def nearest_cell(grid: Grid, after: Grid) -> np.ndarray:
  """Returns which cell of a coarser grid each patch lies in, int[N]."""
  places = np.meshgrid(*(np.arange(old) * new // old for old, new in zip(grid, after, strict=True)),
                       indexing='ij')
  return np.ravel_multi_index([place.ravel() for place in places], after)


def balanced_cells(grid: Grid, side: Grid) -> Grid:
  """Counts the windows along each axis of a grid, where those that must overlap by one.

  Args:
    grid: of patches.
    side: patches of a window along each axis; all of an axis that has fewer.

  Raises:
    ValueError: an axis that no windows of this length cover so.
  """
  if len(grid) != len(side):
    raise ValueError(f'windows of {side} patches do not divide a grid of {grid}: give one side for '
                     'each of its axes')
  return tuple(len(_balanced(*axis)) for axis in zip(grid, side, AXES[-len(grid):], strict=True))


def balanced_windows(x: Array, grid: Grid, side: Grid) -> Array:
  """Divides patches into windows: [B, N, ...] -> [B, C, R, ...], both in raster order.

  Where a side does not divide its axis, the last windows begin where the ones before them end.

  Raises:
    ValueError: as `balanced_cells`.
  """
  side = tuple(min(pair) for pair in zip(side, grid, strict=True))
  if not any(length % part for length, part in zip(grid, side, strict=True)):
    return windows(x, grid, side)
  return x[:, balanced(grid, side)]


@functools.cache
def balanced(grid: Grid, side: Grid) -> np.ndarray:
  """Returns the patches of the windows that `balanced_cells` counts, int[C, R]."""
  index = np.zeros((1, 1), int)
  for length, part, axis in zip(grid, side, AXES[-len(grid):], strict=True):
    own = _balanced(length, part, axis)
    index = (index[:, None, :, None] * length + own[:, None]).reshape(
        len(index) * len(own), index.shape[1] * own.shape[1])
  return index


def _balanced(length: int, side: int, axis: str) -> np.ndarray:
  """Places of each window along an axis, int[windows, side]."""
  side = min(side, length)
  number = -(-length // side)
  whole = length % number or number  # So many windows come first that share no place.
  first = np.arange(number) * side - np.maximum(np.arange(number) - whole + 1, 0)
  if first[-1] + side != length:
    raise ValueError(f'windows of {side} cannot cover {length} {axis} and overlap by one at most: '
                     f'give {number * (side - 1) + 1} to {number * side} {axis}, or choose another '
                     'side')
  return first[:, None] + np.arange(side)


@functools.cache
def summed_sincos(grid: Grid, width: int) -> np.ndarray:
  """Returns sines and cosines of the place on each axis, added up, float32[N, D].

  Feature i has the sine (i even) or cosine (i odd) of the place over 10000^(2 floor(i / 2) / D), as
  the positions of the transformer (Vaswani et al., 2017), Sec. 3.5, arXiv:1706.03762.

  Args:
    grid: of patches.
    width: D.
  """
  index, result = np.arange(width), np.zeros((*grid, width))
  for axis, length in enumerate(grid):
    angles = np.arange(length)[:, None] / LONGEST ** (2 * (index // 2) / width)
    table = np.where(index % 2, np.cos(angles), np.sin(angles))
    result += table.reshape(length, *(1,) * (len(grid) - 1 - axis), width)
  return result.reshape(-1, width).astype(np.float32)


def resample(x: Array, grid: Grid, after: Grid, method: str) -> Array:
  """Resamples patches on another grid: float[B, N, D] -> float[B, N', D].

  Args:
    x: of the grid.
    grid, after: of as many axes.
    method: a name in `RESAMPLINGS`, as `matrix` has it.
  """
  kept = x.reshape(len(x), *grid, x.shape[-1])
  for axis, (old, new) in enumerate(zip(grid, after, strict=True), 1):
    if old != new:
      weights = jnp.asarray(matrix(old, new, method), x.dtype)
      kept = jnp.moveaxis(jnp.tensordot(weights, kept, (1, axis), precision='highest'), 0, axis)
  return kept.reshape(len(x), -1, x.shape[-1])


@functools.cache
def matrix(old: int, new: int, method: str) -> np.ndarray:
  """Returns what each new place of an axis takes of the old ones, float64[new, old].

  'linear' and 'bicubic' are torch's bilinear and bicubic interpolation with align_corners=False and
  no antialiasing, 'nearest' its nearest, 'area' its adaptive average pooling, whose bins overlap
  where one length does not divide the other. A place beyond an edge has the edge's value.
  """
  choices.check('method=', method, RESAMPLINGS)
  result, index = np.zeros((new, old)), np.arange(new)
  if method == 'nearest':
    result[index, index * old // new] = 1.0
    return result
  if method == 'area':
    for i in index:
      first, last = i * old // new, -(-(i + 1) * old // new)
      result[i, first:last] = 1 / (last - first)
    return result
  place = (index[:, None] + 0.5) * old / new - 0.5
  place = np.maximum(place, 0) if method == 'linear' else place
  reach = (0, 1) if method == 'linear' else (-1, 0, 1, 2)
  taps = np.floor(place) + np.array(reach)
  x = np.abs(place - taps)
  weight = 1 - x if method == 'linear' else np.where(
      x <= 1, (CUBIC + 2) * x ** 3 - (CUBIC + 3) * x ** 2 + 1,
      CUBIC * (x ** 3 - 5 * x ** 2 + 8 * x - 4))
  np.add.at(result, (index[:, None], np.clip(taps, 0, old - 1).astype(int)), weight)
  return result


def sincos(grid: Grid, width: int) -> np.ndarray:
  """Returns fixed positions of a grid, float32[rows * columns, width].

  One half is of the columns, the other of the rows. Each holds sines, then cosines, at frequencies
  10000^(-i / (width / 4)); MAE, arXiv:2111.06377, released code.

  Raises:
    ValueError: a width that 4 does not divide.
  """
  if width % 4:
    raise ValueError(f'sin-cos positions need a width divisible by 4, got {width}')
  frequencies = LONGEST ** (-np.arange(width // 4) / (width // 4))
  rows, columns = (place.reshape(-1, 1) * frequencies for place in np.indices(grid))
  return np.concatenate([wave(angles) for angles in (columns, rows) for wave in (np.sin, np.cos)],
                        axis=1).astype(np.float32)
