"""Image processors of vision-language models: square crops, best resolutions, patches of any size.

LLaVA-1.5's square, LLaVA-NeXT's and LLaVA-OneVision's best resolution with crops, and Qwen2-VL's
own sizes. Each makes a `Picture` of an image.

Axes: H, W sides of an image in pixels, S side of a crop, n patches a side of a crop, c crops of an
image, R, C' rows and columns of the grid of a Qwen tower, P numbers of a patch.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from PIL import Image

from lib.data import preprocess
from lib.data.image_files import rgb
from lib.data.pictures import Picture
from lib.data.preprocess import RESAMPLE, Colour, Preprocess
from lib.data.token_layout import Size, anyres_layout, cell_layout, raster_layout
from models.checkpoints.json_files import naming, shown, value_of
from models.checkpoints.vlm_config import tower_config
from models.families import PINPOINTS
from ops import choices
from ops.values import Pixels, Range

LLAVAS = ('llava', 'llava_next', 'llava_onevision')
QWENS = ('qwen2_vl', 'qwen2_5_vl')
# The background of padding where a config names no mean.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
# Keys of the areas of an image in pixels, and what newer releases call them inside `size`.
AREAS = {'min_pixels': 'shortest_edge', 'max_pixels': 'longest_edge'}
Patch = Annotated[int, Range(1, 256)]
Area = Annotated[int, Range(1, 1 << 24)]
# Heights and widths.
Points = tuple[tuple[Pixels, Pixels], ...]


@dataclasses.dataclass(frozen=True)
class Square:
  """Makes one square crop (LLaVA-1.5): the image is padded to a square first or cut to one.

  Attributes:
    steps: resize, crop and normalise.
    tokens: that the model makes of a crop.
    background: colour, of channels in 0 to 1, that it is padded with; () where it is cut.
    used: side in pixels of the upper left part of a crop that the tower reads; 0 for all of it.
    newline: whether a NEWLINE ends its tokens.
  """

  steps: Preprocess
  tokens: int
  background: tuple[float, ...] = ()
  used: int = 0
  newline: bool = False

  def shown(self, picture: Picture) -> np.ndarray:
    """Returns the crops of a picture to look at: float[c, H, W, 3] in [0, 1]."""
    return _restored(picture.pixels, self.steps)

  def __call__(self, image: Image.Image) -> Picture:
    """Turns an image into a Picture."""
    image = rgb(image)
    if self.background:
      image = padded_square(image, self.background)
    index, weight = raster_layout(self.tokens, newline=self.newline)
    return Picture(_cut(self.steps(image)[None], self.used), index, weight)


@dataclasses.dataclass(frozen=True)
class Anyres:
  """Makes the whole in small and crops of the best resolution (LLaVA-NeXT, LLaVA-OneVision).

  Attributes:
    steps: of each crop, at the end.
    pinpoints: (height, width) of the resolutions, multiples of `tile`.
    tile: S.
    side: n.
    max_crops, unpad, newline: as in `anyres_layout`.
    used: as in `Square`.
    base_view: makes the `Picture.base_view` of an image; None where rows of several images have
      their crops too.
  """

  steps: Preprocess
  pinpoints: tuple[Size, ...]
  tile: int
  side: int
  max_crops: int = 0
  unpad: bool = True
  newline: bool = True
  used: int = 0
  base_view: Square | None = None

  def shown(self, picture: Picture) -> np.ndarray:
    """Returns the crops of a picture to look at: float[c, H, W, 3] in [0, 1]."""
    return _restored(picture.pixels, self.steps)

  def __call__(self, image: Image.Image) -> Picture:
    """Turns an image into a Picture of 1 + rows * columns crops."""
    image = rgb(image)
    size = image.size[::-1]
    target = best_resolution(size, self.pinpoints)
    high, wide = fitted_size(size, target)
    filter_ = RESAMPLE[self.steps.resample]
    canvas = Image.new('RGB', target[::-1])
    canvas.paste(image.resize((wide, high), filter_),
                 ((target[1] - wide) // 2, (target[0] - high) // 2))
    crops = [image.resize((self.tile, self.tile), filter_)]
    crops += [canvas.crop((x, y, x + self.tile, y + self.tile))
              for y in range(0, target[0], self.tile) for x in range(0, target[1], self.tile)]
    index, weight = anyres_layout(size, target, tile=self.tile, side=self.side,
                                  max_crops=self.max_crops, unpad=self.unpad, newline=self.newline)
    pixels = np.stack([self.steps(crop) for crop in crops])
    base_view = self.base_view(image) if self.base_view else None
    return Picture(_cut(pixels, self.used), index, weight, base_view=base_view,
                   tiling=(target[0] // self.tile, target[1] // self.tile))


@dataclasses.dataclass(frozen=True)
class Patches:
  """Cuts an image of its own size into patches (Qwen2-VL).

  Attributes:
    grid: (R, C') that every image must fit into; the tower's own.
    steps: rescale and normalise; its size is of no account.
    patch, temporal, merge: the tower's own.
    min_pixels, max_pixels: of an image.
  """

  grid: Size
  steps: Preprocess
  patch: int = 14
  temporal: int = 2
  merge: int = 2
  min_pixels: int = 56 * 56
  max_pixels: int = 28 * 28 * 1280

  def shown(self, picture: Picture) -> np.ndarray:
    """Returns the first frame of each row to look at: float[c, H, W, 3] in [0, 1]."""
    assert picture.sizes is not None
    count, (rows, columns) = len(picture.pixels), picture.sizes[0]
    pixels = picture.pixels[:, :rows, :columns].reshape(
        count, rows, columns, -1, self.temporal, self.patch, self.patch)[:, :, :, :, 0]
    pixels = pixels.transpose(0, 1, 4, 2, 5, 3)
    return _restored(pixels.reshape(count, rows * self.patch, columns * self.patch, -1), self.steps)

  def size(self, image: Image.Image) -> Size:
    """Returns the (height, width) that an image is resized to.

    Raises:
      ValueError: an image that is too long.
    """
    return smart_resize(image.size[::-1], factor=self.patch * self.merge,
                        min_pixels=self.min_pixels, max_pixels=self.max_pixels)

  def patches(self, image: Image.Image) -> Size:
    """Returns the rows and columns of patches that an image will have."""
    high, wide = self.size(image)
    return high // self.patch, wide // self.patch

  def __call__(self, image: Image.Image) -> Picture:
    """Turns an image into a Picture of one row of the tower.

    Raises:
      ValueError: an image that is too long, or that does not fit into the grid.
    """
    image = rgb(image)
    high, wide = self.size(image)
    image = image.resize((wide, high), RESAMPLE[self.steps.resample])
    pixels = dataclasses.replace(self.steps, size=None, crop=None)(image)
    return self.of_pixels(np.broadcast_to(pixels[None], (self.temporal, *pixels.shape)))

  def of_pixels(self, pixels: np.ndarray, *, interval: float = 1.0) -> Picture:
    """Turns normalised frames float32[frames, H, W, 3] into a Picture; an image repeats one frame.

    Args:
      pixels: as many frames as a multiple of `temporal`; sides are multiples of merge * patch.
      interval: as in `cell_layout`.
    """
    frames, height, width, channels = pixels.shape
    rows, columns = height // self.patch, width // self.patch
    if rows > self.grid[0] or columns > self.grid[1]:
      raise ValueError(f'an image of {rows} x {columns} patches does not fit into the grid of '
                       f'{self.grid[0]} x {self.grid[1]}: set grid, or fewer pixels (max_pixels)')
    pixels = pixels.reshape(frames // self.temporal, self.temporal, rows, self.patch, columns,
                            self.patch, channels)
    pixels = pixels.transpose(0, 2, 4, 6, 1, 3, 5).reshape(len(pixels), rows, columns, -1)
    patches = np.zeros((len(pixels), *self.grid, pixels.shape[-1]), np.float32)
    patches[:, :rows, :columns] = pixels
    size = rows // self.merge, columns // self.merge
    across = self.grid[1] // self.merge
    each = self.grid[0] // self.merge * across
    index, axes, extent = cell_layout(len(patches), size, across, each, interval=interval)
    sizes = np.broadcast_to(np.asarray([rows, columns], np.int32), (len(patches), 2))
    return Picture(patches, index, np.ones(index.shape, np.float32), sizes, axes, extent)


def smart_resize(size: Size, *, factor: int, min_pixels: int, max_pixels: int) -> Size:
  """Returns the (height, width) nearest to an image's in multiples of `factor`, of bounded area.

  Qwen2-VL as released. Halves round to even.

  Raises:
    ValueError: one side is over 200 times the other.
  """
  height, width = size
  if max(size) > 200 * min(size):
    raise ValueError(f'an image of {height} x {width} pixels is too long: one side may be 200 '
                     'times the other')
  high, wide = (round(side / factor) * factor for side in size)
  if high * wide > max_pixels:
    scale = math.sqrt(height * width / max_pixels)
    high, wide = (max(factor, math.floor(side / scale / factor) * factor) for side in size)
  elif high * wide < min_pixels:
    scale = math.sqrt(min_pixels / (height * width))
    high, wide = (math.ceil(side * scale / factor) * factor for side in size)
  return high, wide


def _restored(pixels: np.ndarray, steps: Preprocess) -> np.ndarray:
  """Returns pixels as they were before they were normalised."""
  mean, std = ((0.0,), (1.0,)) if steps.mean is None else (steps.mean, steps.std)
  return (pixels * np.asarray(std) + np.asarray(mean)).clip(0, 1)


def _cut(pixels: np.ndarray, used: int) -> np.ndarray:
  return pixels[:, :used, :used] if used else pixels


def padded_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
  """Puts an image in the middle of a square of a mean colour (of channels in 0 to 1)."""
  side = max(image.size)
  canvas = Image.new('RGB', (side, side), tuple(int(value * 255) for value in mean))
  canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
  return canvas


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
  """Returns the (height, width) that keeps most of an image's pixels, the smallest among equals.

  LLaVA-NeXT as released; ties go to the first.
  """
  height, width = size

  def worth(target: Size) -> tuple[int, int]:
    scale = min(target[1] / width, target[0] / height)
    kept = min(int(width * scale) * int(height * scale), width * height)
    return kept, kept - target[0] * target[1]

  best = max(pinpoints, key=worth)
  return best[0], best[1]


def fitted_size(size: Size, target: Size) -> Size:
  """Returns the (height, width) of an image scaled to fit into a target, rounded up."""
  (height, width), (high, wide) = size, target
  if wide / width < high / height:
    return min(math.ceil(height * (wide / width)), high), wide
  return high, min(math.ceil(width * (high / height)), wide)


def read(source: str | pathlib.Path, config: Mapping[str, Any], *,
         grid: Size = (32, 32)) -> Square | Anyres | Patches:
  """Reads the processor of a checkpoint's preprocessor_config.json.

  Args:
    source: that file, or the folder it lies in.
    config: the content of its config.json.
    grid: as `models.backbones.vlm.from_config` has it.

  Raises:
    ValueError: no such file, or steps that are unknown here.
  """
  path, steps = preprocess.read_steps(source)
  with naming(path):
    return from_config(steps, config, grid=grid)


def from_config(steps: Mapping[str, Any], config: Mapping[str, Any], *,
                grid: Size = (32, 32)) -> Square | Anyres | Patches:
  """Makes the processor of `read` from the files' contents."""
  kind: Any = config.get('model_type')
  choices.check('model_type ', kind, (*LLAVAS, *QWENS))
  if kind in QWENS:
    return _patches(steps, config, grid)
  vision = tower_config(config)
  crop_steps = preprocess.from_config(steps)
  tile = vision['image_size']
  side = tile // vision['patch_size']
  # Where patches do not divide a crop, its last pixels are not read.
  used = side * vision['patch_size']
  background = tuple(value_of(steps, 'image_mean', Colour) or CLIP_MEAN)
  if kind == 'llava':
    pad = value_of(steps, 'do_pad', bool)
    return Square(crop_steps, side ** 2, background if pad else (), used)
  max_crops, base_view = 0, None
  if kind == 'llava_onevision':
    ratio = config.get('vision_aspect_ratio', 'anyres_max_9')
    if not re.fullmatch(r'anyres_max_[1-9]\d*', str(ratio)):
      raise ValueError(f'vision_aspect_ratio={ratio!r} is unknown: anyres_max_N is read, as '
                       'anyres_max_9')
    max_crops = int(ratio.removeprefix('anyres_max_'))
    # Only an image by itself is divided into crops; among others it is one padded square.
    base_view = Square(crop_steps, side ** 2, background, used, newline=True)
  pinpoints = (value_of(steps, 'image_grid_pinpoints', Points)
               or value_of(config, 'image_grid_pinpoints', Points) or PINPOINTS[kind])
  for pair in pinpoints:
    if any(length % tile for length in pair):
      raise ValueError(f'image_grid_pinpoints has {tuple(pair)}, and a crop is {tile} pixels wide: '
                       'give multiples')
  return Anyres(crop_steps, tuple(map(tuple, pinpoints)), tile, side, max_crops, used=used,
                base_view=base_view)


def _patches(steps: Mapping[str, Any], config: Mapping[str, Any], grid: Size) -> Patches:
  """Makes the processor of a Qwen tower."""
  size = value_of(steps, 'size', Mapping[str, Any]) or {}
  for key in size:
    choices.check_key('size has no key ', key, (*AREAS, *AREAS.values()))
  value_of(steps, 'do_resize', bool)  # Whatever it says, sides are made multiples of patches.
  pixel_steps = preprocess.from_config({**steps, 'do_resize': False})
  tower, sides = config.get('vision_config') or {}, []
  for key, its_key, default in (('patch_size', 'patch_size', 14),
                                ('temporal_patch_size', 'temporal_patch_size', 2),
                                ('merge_size', 'spatial_merge_size', 2)):
    sides.append(value_of(steps, key, Patch) or default)
    if tower.get(its_key, sides[-1]) != sides[-1]:
      raise ValueError(f'{key}={sides[-1]} differs from vision_config.{its_key}='
                       f'{shown(tower[its_key])} in config.json: correct one of them')
  areas = [value_of(steps, key, Area) or value_of(size, key, Area) or value_of(size, edge, Area)
           or default for (key, edge), default in zip(
               AREAS.items(), (56 * 56, 28 * 28 * 1280), strict=True)]
  if areas[0] > areas[1]:
    raise ValueError(f'images have at least {areas[0]} and at most {areas[1]} pixels (min_pixels, '
                     'max_pixels, size): that is impossible, correct one of them')
  filter_ = preprocess.resample(steps, Image.Resampling.BICUBIC)
  return Patches(grid, dataclasses.replace(pixel_steps, resample=filter_), *sides, *areas)
