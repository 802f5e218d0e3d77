"""Images as vision-language models take them: crops, patches of any size, and where each goes.

LLaVA-1.5's square, LLaVA-NeXT's and LLaVA-OneVision's best resolution with crops, Qwen2-VL's own
sizes; and, as data, what every visual token is made of and where it stands
(`models.backbones.vlm.Images`).

Axes: H, W sides of an image in pixels, S side of a crop, n patches a side of a crop, c crops of an
image, C of a row, I images of a row, B rows, V tokens of an image, K features that a token is made
of, R, C' rows and columns of the grid of a Qwen tower, P numbers of a patch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lib.data import preprocess
from lib.data.preprocess import RESAMPLE, Preprocess
from models.backbones.vlm import Images

NEWLINE = -1
Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Picture:
  """One image: what the tower gets, and how its features are read.

  Attributes:
    pixels: float32[c, S, S, 3], or patches float32[c, R, C', P].
    index: int[V, K], features that each token is made of: crop * (patches of a crop) + patch, or
      NEWLINE.
    weight: float32[V, K], the share of each.
    sizes: int[c, 2] for patches, else None.
    axes: int[V, 3], time, row and column of each token; None where positions have one axis.
    extent: by how much positions move on (0 without axes).
  """

  pixels: np.ndarray
  index: np.ndarray
  weight: np.ndarray
  sizes: np.ndarray | None = None
  axes: np.ndarray | None = None
  extent: int = 0


# Where features go.


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
  """The (height, width) that keeps most of an image's pixels, and of those the smallest.

  LLaVA-NeXT as released; ties go to the first.
  """
  height, width = size

  def worth(target: Size) -> tuple[int, int]:
    scale = min(target[1] / width, target[0] / height)
    kept = min(int(width * scale) * int(height * scale), width * height)
    return kept, kept - target[0] * target[1]

  return tuple(max(pinpoints, key=worth))


def fitted(size: Size, target: Size) -> Size:
  """The (height, width) of an image that is scaled to fit into a target, rounded up."""
  (height, width), (high, wide) = size, target
  if wide / width < high / height:
    return min(math.ceil(height * (wide / width)), high), wide
  return high, min(math.ceil(width * (high / height)), wide)


def unpadded(grid: Size, size: Size) -> tuple[slice, slice]:
  """Rows and columns of a grid of features that hold the image, and not what it was padded with."""
  (rows, columns), (height, width) = grid, size
  if width / height > columns / rows:
    cut = (rows - int(round(height * (columns / width), 7))) // 2
    return slice(cut, rows - cut), slice(0, columns)
  cut = (columns - int(round(width * (rows / height), 7))) // 2
  return slice(0, rows), slice(cut, columns - cut)


def bilinear(grid: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
  """Features int[rows, columns] resampled: int and float32 [rows', columns', 4].

  Between the centres of the four nearest, without antialiasing, as torch's 'bilinear'.
  """
  taps = []
  for old, new in zip(grid.shape, size, strict=True):
    place = np.maximum((np.arange(new, dtype=np.float32) + 0.5) * np.float32(old / new) - 0.5, 0)
    low = np.minimum(place.astype(int), old - 1)
    taps.append((low, np.minimum(low + 1, old - 1), (place - low).astype(np.float32)))
  (top, bottom, down), (left, right, across) = taps
  index = np.stack([grid[np.ix_(y, x)] for y in (top, bottom) for x in (left, right)], axis=-1)
  weight = np.stack([np.outer(y, x) for y in (1 - down, down) for x in (1 - across, across)],
                    axis=-1)
  return index, weight.astype(np.float32)


def plain(count: int) -> tuple[np.ndarray, np.ndarray]:
  """Index and weight of one crop's features in order."""
  return np.arange(count)[:, None], np.ones((count, 1), np.float32)


def laid_out(size: Size, resolution: Size, *, tile: int, side: int, most: int = 0,
             unpad: bool = True, newline: bool = True) -> tuple[np.ndarray, np.ndarray]:
  """Index [V, K] and weight of an image's tokens: the whole in small, then the grid of its crops.

  Args:
    size: (H, W) of the image.
    resolution: (height, width) that its crops make up.
    tile: S, side of a crop in pixels.
    side: n.
    most: crops' worth of tokens that the grid is scaled down to where it has over 1.21 times as
      many (LLaVA-OneVision's anyres with 9), 0 for never.
    unpad: whether rows and columns of padding are left out.
    newline: whether a NEWLINE ends every row.
  """
  rows, columns = resolution[0] // tile, resolution[1] // tile
  each = side * side
  grid = each + np.arange(rows * columns * each).reshape(rows, columns, side, side)
  grid = grid.transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
  if unpad:
    grid = grid[unpadded(grid.shape, size)]
  index, weight = grid[..., None], np.ones((*grid.shape, 1), np.float32)
  ratio = math.sqrt(grid.size / (most * each)) if most else 0
  if ratio > 1.1:
    index, weight = bilinear(grid, (int(grid.shape[0] // ratio), int(grid.shape[1] // ratio)))
  if newline:
    ends = np.full((len(index), 1, index.shape[2]), NEWLINE)
    share = np.zeros(ends.shape, np.float32)
    share[..., 0] = 1
    index, weight = np.append(index, ends, axis=1), np.append(weight, share, axis=1)
  taps = index.shape[2]
  first, share = plain(each)
  first = np.pad(first, ((0, 0), (0, taps - 1)))
  share = np.pad(share, ((0, 0), (0, taps - 1)))
  return (np.concatenate([first, index.reshape(-1, taps)]),
          np.concatenate([share, weight.reshape(-1, taps)]))


def video(frames: int, side: int) -> tuple[np.ndarray, np.ndarray]:
  """Index [V, 4] and weight of a video: every frame at half its sides, then one NEWLINE."""
  half = math.ceil(side / 2)
  found = [bilinear(frame * side * side + np.arange(side * side).reshape(side, side), (half, half))
           for frame in range(frames)]
  index, weight = (np.concatenate([pair[part].reshape(-1, 4) for pair in found])
                   for part in range(2))
  return (np.append(index, np.full((1, 4), NEWLINE), axis=0),
          np.append(weight, np.float32([[1, 0, 0, 0]]), axis=0))


def cells(frames: int, size: Size, columns: int, each: int, *,
          interval: float = 1.0) -> tuple[np.ndarray, np.ndarray, int]:
  """Index int[V, 1], axes int[V, 3] and extent of an image of merged cells, or a video.

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


# Pixels.


@dataclasses.dataclass(frozen=True)
class Square:
  """LLaVA-1.5: one square crop, with the image padded to a square first or cut to one.

  Attributes:
    steps: resize, crop and normalise.
    side: n.
    pad: whether it is padded, by the mean colour.
    used: side in pixels of what the tower reads of a crop, its upper left; 0 for all of it.
  """

  steps: Preprocess
  side: int
  pad: bool = False
  used: int = 0

  def shown(self, picture: Picture) -> np.ndarray:
    """What it sees, for people: float[c, H, W, 3] in [0, 1]."""
    return _restored(picture.pixels, self.steps)

  def __call__(self, image: Image.Image) -> Picture:
    """An image as a Picture."""
    image = image.convert('RGB')
    if self.pad:
      image = padded_square(image, self.steps.mean)
    index, weight = plain(self.side ** 2)
    return Picture(_read(self.steps(image)[None], self.used), index, weight)


@dataclasses.dataclass(frozen=True)
class Anyres:
  """LLaVA-NeXT and LLaVA-OneVision: the whole in small, and crops of the best resolution.

  Attributes:
    steps: what each crop goes through at the end.
    pinpoints: (height, width) of the resolutions, multiples of `tile`.
    tile: S.
    side: n.
    most: as in `laid_out`.
    unpad, newline: as in `laid_out`.
    used: as in `Square`.
  """

  steps: Preprocess
  pinpoints: tuple[Size, ...]
  tile: int
  side: int
  most: int = 0
  unpad: bool = True
  newline: bool = True
  used: int = 0

  def shown(self, picture: Picture) -> np.ndarray:
    """What it sees, for people: float[c, H, W, 3] in [0, 1]."""
    return _restored(picture.pixels, self.steps)

  def __call__(self, image: Image.Image) -> Picture:
    """An image as a Picture of 1 + rows * columns crops."""
    image = image.convert('RGB')
    size = image.size[::-1]
    target = best_resolution(size, self.pinpoints)
    high, wide = fitted(size, target)
    filter_ = RESAMPLE[self.steps.resample]
    canvas = Image.new('RGB', target[::-1])
    canvas.paste(image.resize((wide, high), filter_),
                 ((target[1] - wide) // 2, (target[0] - high) // 2))
    crops = [image.resize((self.tile, self.tile), filter_)]
    crops += [canvas.crop((x, y, x + self.tile, y + self.tile))
              for y in range(0, target[0], self.tile) for x in range(0, target[1], self.tile)]
    index, weight = laid_out(size, target, tile=self.tile, side=self.side, most=self.most,
                             unpad=self.unpad, newline=self.newline)
    pixels = np.stack([self.steps(crop) for crop in crops])
    return Picture(_read(pixels, self.used), index, weight)


@dataclasses.dataclass(frozen=True)
class Patches:
  """Qwen2-VL: an image at its own size, cut into patches.

  Attributes:
    grid: (R, C') that every image must fit into; the tower's own.
    steps: rescale and normalise; its size is of no account.
    patch, temporal, merge: the tower's own.
    fewest, most: pixels of an image.
  """

  grid: Size
  steps: Preprocess
  patch: int = 14
  temporal: int = 2
  merge: int = 2
  min_slots: int = 56 * 56
  most: int = 28 * 28 * 1280

  def shown(self, picture: Picture) -> np.ndarray:
    """What it sees, for people: float[c, H, W, 3] in [0, 1], the first frame of each row."""
    count, (rows, columns) = len(picture.pixels), picture.sizes[0]
    pixels = picture.pixels[:, :rows, :columns].reshape(
        count, rows, columns, -1, self.temporal, self.patch, self.patch)[:, :, :, :, 0]
    pixels = pixels.transpose(0, 1, 4, 2, 5, 3)
    return _restored(pixels.reshape(count, rows * self.patch, columns * self.patch, -1), self.steps)

  def size(self, image: Image.Image) -> Size:
    """The (height, width) that an image is resized to.

    Raises:
      ValueError: an image that is too long.
    """
    return smart_resize(image.size[::-1], factor=self.patch * self.merge, min_slots=self.min_slots,
                        most=self.most)

  def patches(self, image: Image.Image) -> Size:
    """Rows and columns of patches that an image will have."""
    high, wide = self.size(image)
    return high // self.patch, wide // self.patch

  def __call__(self, image: Image.Image) -> Picture:
    """An image as a Picture of one row of the tower.

    Raises:
      ValueError: an image that is too long, or that does not fit into the grid.
    """
    image = image.convert('RGB')
    high, wide = self.size(image)
    image = image.resize((wide, high), RESAMPLE[self.steps.resample])
    pixels = dataclasses.replace(self.steps, size=None, crop=None)(image)
    return self.of_pixels(np.broadcast_to(pixels[None], (self.temporal, *pixels.shape)))

  def of_pixels(self, pixels: np.ndarray, *, interval: float = 1.0) -> Picture:
    """Frames float32[frames, H, W, 3], normalised, as a Picture; an image is its frame repeated.

    Args:
      pixels: as many frames as a multiple of `temporal`; sides are multiples of merge * patch.
      interval: as in `cells`.
    """
    frames, height, width, channels = pixels.shape
    rows, columns = height // self.patch, width // self.patch
    if rows > self.grid[0] or columns > self.grid[1]:
      raise ValueError(f'an image of {rows} x {columns} patches does not fit into the grid of '
                       f'{self.grid[0]} x {self.grid[1]}: set grid, or fewer pixels (most)')
    pixels = pixels.reshape(frames // self.temporal, self.temporal, rows, self.patch, columns,
                            self.patch, channels)
    pixels = pixels.transpose(0, 2, 4, 6, 1, 3, 5).reshape(len(pixels), rows, columns, -1)
    patches = np.zeros((len(pixels), *self.grid, pixels.shape[-1]), np.float32)
    patches[:, :rows, :columns] = pixels
    size = rows // self.merge, columns // self.merge
    across = self.grid[1] // self.merge
    each = self.grid[0] // self.merge * across
    index, axes, extent = cells(len(patches), size, across, each, interval=interval)
    sizes = np.broadcast_to(np.int32([rows, columns]), (len(patches), 2))
    return Picture(patches, index, np.ones(index.shape, np.float32), sizes, axes, extent)


def smart_resize(size: Size, *, factor: int, min_slots: int, most: int) -> Size:
  """The (height, width) nearest to an image's that are multiples of `factor`, between two areas.

  Qwen2-VL as released. Halves round to even.

  Raises:
    ValueError: one side is over 200 times the other.
  """
  height, width = size
  if max(size) > 200 * min(size):
    raise ValueError(f'an image of {height} x {width} pixels is too long: one side may be 200 '
                     'times the other')
  high, wide = (round(side / factor) * factor for side in size)
  if high * wide > most:
    scale = math.sqrt(height * width / most)
    high, wide = (max(factor, math.floor(side / scale / factor) * factor) for side in size)
  elif high * wide < min_slots:
    scale = math.sqrt(min_slots / (height * width))
    high, wide = (math.ceil(side * scale / factor) * factor for side in size)
  return high, wide


def _restored(pixels: np.ndarray, steps: Preprocess) -> np.ndarray:
  """Pixels as they were before they were normalised."""
  mean, std = ((0.0,), (1.0,)) if steps.mean is None else (steps.mean, steps.std)
  return (pixels * np.asarray(std) + np.asarray(mean)).clip(0, 1)


def _read(pixels: np.ndarray, used: int) -> np.ndarray:
  return pixels[:, :used, :used] if used else pixels


def padded_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
  """An image in the middle of a square of a mean colour (of channels in 0 to 1)."""
  side = max(image.size)
  canvas = Image.new('RGB', (side, side), tuple(int(value * 255) for value in mean))
  canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
  return canvas


def read(source: str | pathlib.Path, config: Mapping[str, Any], *,
         grid: Size = (32, 32)) -> Square | Anyres | Patches:
  """The steps of a checkpoint's preprocessor_config.json.

  Args:
    source: that file, or the folder it lies in.
    config: the content of its config.json.
    grid: as `models.backbones.vlm.from_config` has it.

  Raises:
    ValueError: no such file, or steps that are not known here.
  """
  path = pathlib.Path(source)
  path = path / 'preprocessor_config.json' if path.is_dir() else path
  if not path.exists():
    raise ValueError(f'there is no {path}: give the folder of a checkpoint that has one')
  return from_config(json.loads(path.read_text()), config, grid=grid)


def from_config(steps: Mapping[str, Any], config: Mapping[str, Any], *,
                grid: Size = (32, 32)) -> Square | Anyres | Patches:
  """`read`, of the files' contents."""
  kind, seen = config.get('model_type'), config['vision_config']
  if kind in ('qwen2_vl', 'qwen2_5_vl'):
    made = preprocess.from_config({**steps, 'do_resize': False})
    size = steps.get('size') or {}
    return Patches(
        grid, dataclasses.replace(made, resample=steps.get('resample', 3)),
        steps.get('patch_size', 14), steps.get('temporal_patch_size', 2),
        steps.get('merge_size', 2),
        steps.get('min_pixels') or size.get('shortest_edge', 56 * 56),
        steps.get('max_pixels') or size.get('longest_edge', 28 * 28 * 1280))
  made = preprocess.from_config(dict(steps))
  tile = seen['image_size']
  side = tile // seen['patch_size']
  # Where patches do not divide a crop, its last pixels are not read.
  used = side * seen['patch_size']
  if kind == 'llava':
    return Square(made, side, bool(steps.get('do_pad')), used)
  if kind in ('llava_next', 'llava_onevision'):
    most = 0
    if kind == 'llava_onevision':
      most = int(config.get('vision_aspect_ratio', 'anyres_max_9').removeprefix('anyres_max_'))
    pinpoints = steps.get('image_grid_pinpoints') or config['image_grid_pinpoints']
    return Anyres(made, tuple(map(tuple, pinpoints)), tile, side, most, used=used)
  raise ValueError(f'model_type {kind!r} is unknown: known are llava, llava_next, llava_onevision, '
                   'qwen2_vl, qwen2_5_vl')


# Batches.


def batch(rows: Sequence[Sequence[Picture]], *, patches: int, crops: int = 0, images: int = 0,
          tokens: int = 0) -> Images | None:
  """The images of rows as one batch; None where no row has any.

  Args:
    rows: the images of each row, in the order of its placeholders.
    patches: features of a crop: n * n, or cells of a Qwen tower's grid.
    crops, images, tokens: C, I and V; what is needed where 0. Fixed ones keep one compiled program.

  Raises:
    ValueError: a row with more than those.
  """
  every = [picture for row in rows for picture in row]
  if not every:
    return None
  needed = {'crops': max(sum(len(each.pixels) for each in row) for row in rows),
            'images': max(map(len, rows)), 'tokens': max(len(each.index) for each in every)}
  given = {'crops': crops, 'images': images, 'tokens': tokens}
  for name, count in needed.items():
    if given[name] and given[name] < count:
      raise ValueError(f'{name}={given[name]} are too few: a row has {count}; raise it, or give '
                       'smaller images')
    given[name] = given[name] or count
  crops, images, tokens = given.values()
  shape, taps = every[0].pixels.shape[1:], max(each.index.shape[1] for each in every)
  pixels = np.zeros((len(rows), crops, *shape), np.float32)
  sizes = np.zeros((len(rows), crops, 2), np.int32)
  index = np.zeros((len(rows), images, tokens, taps), np.int32)
  weight = np.zeros(index.shape, np.float32)
  axes = np.zeros((len(rows), images, tokens, 3), np.int32)
  extent = np.zeros((len(rows), images), np.int32)
  for number, row in enumerate(rows):
    first = 0
    for image, picture in enumerate(row):
      last, (count, width) = first + len(picture.pixels), picture.index.shape
      pixels[number, first:last] = picture.pixels
      moved = np.where(picture.index == NEWLINE, crops * patches, picture.index + first * patches)
      index[number, image, :count, :width] = moved
      weight[number, image, :count, :width] = picture.weight
      if picture.axes is not None:
        axes[number, image, :count] = picture.axes
        extent[number, image] = picture.extent
      if picture.sizes is not None:
        sizes[number, first:last] = picture.sizes
      first = last
  has_axes = every[0].axes is not None
  return Images(pixels, sizes if every[0].sizes is not None else None, index, weight,
                axes if has_axes else None, extent if has_axes else None)
