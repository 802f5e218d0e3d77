"""The visual tokens of one image: the features that each is made of, and where it stands.

An index int[V, K] names features as crop * (patches of a crop) + patch, or NEWLINE; a weight
float32[V, K] has the share of each.

Axes: H, W sides of an image in pixels, S side of a crop, n patches a side of a crop, V tokens of an
image, K features that a token is made of.
"""

from __future__ import annotations

import math

import numpy as np

NEWLINE = -1
Size = tuple[int, int]


def unpadded(grid: Size, size: Size) -> tuple[slice, slice]:
  """Returns the rows and columns of a grid of features that hold the image, not its padding."""
  (rows, columns), (height, width) = grid, size
  if width / height > columns / rows:
    cut = (rows - int(round(height * (columns / width), 7))) // 2
    return slice(cut, rows - cut), slice(0, columns)
  cut = (columns - int(round(width * (rows / height), 7))) // 2
  return slice(0, rows), slice(cut, columns - cut)


def bilinear(grid: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
  """Resamples features int[rows, columns]: index and weight, int and float32 [rows', columns', 4].

  Interpolates between the four nearest centres, without antialiasing, as torch's 'bilinear'.
  """
  taps = []
  for old, new in zip(grid.shape, size, strict=True):
    point = np.maximum((np.arange(new, dtype=np.float32) + 0.5) * np.float32(old / new) - 0.5, 0)
    low = np.minimum(point.astype(int), old - 1)
    taps.append((low, np.minimum(low + 1, old - 1), (point - low).astype(np.float32)))
  (top, bottom, down), (left, right, across) = taps
  index = np.stack([grid[np.ix_(y, x)] for y in (top, bottom) for x in (left, right)], axis=-1)
  weight = np.stack([np.outer(y, x) for y in (1 - down, down) for x in (1 - across, across)],
                    axis=-1)
  return index, weight.astype(np.float32)


def raster_layout(count: int, *, newline: bool = False) -> tuple[np.ndarray, np.ndarray]:
  """Returns index int[V, 1] and weight float32[V, 1] of one crop's features in order.

  Args:
    count: of features.
    newline: whether a NEWLINE ends them.
  """
  index = np.append(np.arange(count), [NEWLINE] * newline)
  return index[:, None], np.ones((len(index), 1), np.float32)


def anyres_layout(size: Size, resolution: Size, *, tile: int, side: int, max_crops: int = 0,
                  unpad: bool = True, newline: bool = True) -> tuple[np.ndarray, np.ndarray]:
  """Returns index and weight [V, K] of an image's tokens: the whole in small, then its crops' grid.

  Args:
    size: (H, W) of the image.
    resolution: (height, width) that its crops make up.
    tile: S, side of a crop in pixels.
    side: n.
    max_crops: crops' worth of tokens that the grid is scaled down to where it has over 1.21
      times as many (LLaVA-OneVision's anyres with 9), 0 for never.
    unpad: whether rows and columns of padding are left out.
    newline: whether a NEWLINE ends every row.
  """
  rows, columns = resolution[0] // tile, resolution[1] // tile
  each = side * side
  grid: np.ndarray = each + np.arange(rows * columns * each).reshape(rows, columns, side, side)
  grid = grid.transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
  if unpad:
    grid = grid[unpadded(grid.shape, size)]
  index: np.ndarray
  weight: np.ndarray
  index, weight = grid[..., None], np.ones((*grid.shape, 1), np.float32)
  ratio = math.sqrt(grid.size / (max_crops * each)) if max_crops else 0
  if ratio > 1.1:
    index, weight = bilinear(grid, (int(grid.shape[0] // ratio), int(grid.shape[1] // ratio)))
  if newline:
    ends = np.full((len(index), 1, index.shape[2]), NEWLINE)
    share = np.zeros(ends.shape, np.float32)
    share[..., 0] = 1
    index, weight = np.append(index, ends, axis=1), np.append(weight, share, axis=1)
  taps = index.shape[2]
  first, share = raster_layout(each)
  first = np.pad(first, ((0, 0), (0, taps - 1)))
  share = np.pad(share, ((0, 0), (0, taps - 1)))
  return (np.concatenate([first, index.reshape(-1, taps)]),
          np.concatenate([share, weight.reshape(-1, taps)]))


def video_layout(frames: int, side: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns index and weight [V, 4] of a video: frames at half their sides, then one NEWLINE."""
  half = math.ceil(side / 2)
  pairs = [bilinear(frame * side * side + np.arange(side * side).reshape(side, side), (half, half))
           for frame in range(frames)]
  index, weight = (np.concatenate([pair[part].reshape(-1, 4) for pair in pairs])
                   for part in range(2))
  return (np.append(index, np.full((1, 4), NEWLINE), axis=0),
          np.append(weight, np.asarray([[1, 0, 0, 0]], np.float32), axis=0))


def cell_layout(frames: int, size: Size, columns: int, each: int, *,
                interval: float = 1.0) -> tuple[np.ndarray, np.ndarray, int]:
  """Returns index int[V, 1], axes int[V, 3] and extent of an image of merged cells, or a video.

  Args:
    frames: rows of the tower that it has.
    size: (rows, columns) of its cells.
    columns: of the tower's own grid of cells, in whose upper left they lie.
    each: cells of that grid.
    interval: by how much positions move on between frames (Qwen2.5-VL's videos: tokens a second
      times seconds a frame).
  """
  time, row, column = (axis.reshape(-1) for axis in np.indices((frames, *size)))
  index = time * each + row * columns + column
  axes = np.stack([(time * interval).astype(int), row, column], axis=1)
  # One more than the largest on any axis (Qwen2-VL, Sec. 2.1, arXiv:2409.12191).
  return index[:, None], axes, int(axes.max()) + 1
