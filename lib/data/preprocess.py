"""Pixels as the authors of a pretrained model prepared them.

Axes: H, W sides of an image in pixels.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from PIL import Image

from lib.data.image_files import rgb
from models.checkpoints.json_files import (
    naming,
    needed,
    read_json,
    read_json_if_there,
    shown,
    value_of,
)
from ops.values import Pixels, Range

# The numbers that configs give are Pillow's own; all of these antialias when they shrink.
RESAMPLE = {code.value: code for code in Image.Resampling}
# Before `size` was a dict, a single number meant the shorter edge to these, a square to all others.
SHORTEST_EDGE = ('CLIPFeatureExtractor', 'CLIPImageProcessor', 'BitImageProcessor')
# Longer sides than any tower has would fill the memory.
Sides = Pixels | Mapping[str, Pixels | None]
# Pixels are numbers of 0 to 1, or where nothing rescales them of 0 to 255.
Factor = Annotated[float, Range(above=0, high=1)]
Channel = Annotated[float, Range(0, 255)]
Spread = Annotated[float, Range(above=0, high=255)]
Colour = tuple[Channel, Channel, Channel]


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """Resizes, crops, rescales and normalises images; a step that is None is left out.

  Attributes:
    size: (height, width), or the length of the shorter edge.
    resample: a key of `RESAMPLE`.
    crop: (height, width) cut from the centre; black is added where the image is smaller.
    rescale: factor on pixels of 0 to 255.
    mean, std: one number a channel, after rescaling.
  """

  size: tuple[int, int] | int | None
  resample: int
  crop: tuple[int, int] | None
  rescale: float | None
  mean: tuple[float, ...] | None
  std: tuple[float, ...] | None

  def __call__(self, image: Image.Image | np.ndarray) -> np.ndarray:
    """Turns an image, or uint8[H, W, 3], into float32[H, W, 3] for a model."""
    if not isinstance(image, Image.Image):
      image = Image.fromarray(image)
    image = rgb(image)
    if self.size is not None:
      image = image.resize(self._sides(image.size), RESAMPLE[self.resample])
    pixels = np.asarray(image)
    if self.crop is not None:
      pixels = _centre(pixels, self.crop)
    values = pixels.astype(np.float64)
    if self.rescale is not None:
      values = values * self.rescale
    values = values.astype(np.float32)
    if self.mean is not None:
      mean, std = (np.asarray(numbers, np.float32) for numbers in (self.mean, self.std))
      values = (values - mean[None, None]) / std[None, None]
    return values

  def _sides(self, sides: tuple[int, int]) -> tuple[int, int]:
    """Returns the (width, height) to resize to."""
    if isinstance(self.size, tuple):
      return self.size[::-1]
    assert self.size is not None
    short, long = min(sides), max(sides)
    # Rounded down, as the references do.
    longer = int(self.size * long / short)
    return (self.size, longer) if sides[0] <= sides[1] else (longer, self.size)


def read(source: str | pathlib.Path) -> Preprocess:
  """Reads the steps that a checkpoint's preprocessor_config.json describes.

  Args:
    source: that file, or the folder it lies in.

  Raises:
    ValueError: no such file, or steps that are unknown here.
  """
  path, steps = read_steps(source)
  with naming(path):
    return from_config(steps)


def read_steps(source: str | pathlib.Path) -> tuple[pathlib.Path, Mapping[str, Any]]:
  """Returns the file that describes a checkpoint's steps, and what it says of them.

  Args:
    source: that file, or the folder that it or a processor_config.json lies in, which newer
      releases have.

  Raises:
    ValueError: no such file, or no JSON object in it.
  """
  path = pathlib.Path(source)
  if not path.is_dir():
    return path, read_json(path)
  whole = path / 'processor_config.json'
  with naming(whole):
    steps = value_of(read_json_if_there(whole), 'image_processor', Mapping[str, Any])
  if steps:
    return whole, steps
  path = path / 'preprocessor_config.json'
  if not os.path.lexists(path):
    raise ValueError(f'there is no {path}: give the folder of a checkpoint that has one, or build '
                     'Preprocess(...) by hand')
  return path, read_json(path)


def from_config(config: Mapping[str, Any]) -> Preprocess:
  """Makes the steps of `read` from the file's content.

  Raises:
    ValueError: a key that is missing, or of the wrong form.
  """
  size = crop = rescale = mean = std = None
  if value_of(config, 'do_resize', bool, True):
    size = _size(config)
  if value_of(config, 'do_center_crop', bool, False):
    crop = _square(needed(config, 'crop_size', Sides))
  if value_of(config, 'do_rescale', bool, True):
    rescale = value_of(config, 'rescale_factor', Factor) or 1 / 255
  if value_of(config, 'do_normalize', bool, True):
    mean = tuple(needed(config, 'image_mean', Colour))
    std = tuple(needed(config, 'image_std', tuple[Spread, Spread, Spread]))
  return Preprocess(size, resample(config, Image.Resampling.BILINEAR), crop, rescale, mean, std)


def resample(config: Mapping[str, Any], default: Image.Resampling) -> int:
  """Returns how a config interpolates, a key of `RESAMPLE`.

  Raises:
    ValueError: it names none.
  """
  code = config.get('resample', default.value)
  if type(code) is not int or code not in RESAMPLE:
    raise ValueError(f'resample={shown(code)} is unknown: choose one of '
                     f'{", ".join(f"{key} ({code.name})" for key, code in RESAMPLE.items())}')
  return code


def _size(config: Mapping[str, Any]) -> tuple[int, int] | int:
  size = needed(config, 'size', Sides)
  if not isinstance(size, Mapping):
    name = config.get('image_processor_type') or config.get('feature_extractor_type')
    return size if name in SHORTEST_EDGE else (size, size)
  keys = {key for key, value in size.items() if value is not None}
  if keys == {'height', 'width'}:
    return (size['height'], size['width'])
  if keys == {'shortest_edge'}:
    return size['shortest_edge']
  raise ValueError(f'size={size} is unknown: give height and width, or shortest_edge')


def _square(size: int | Mapping[str, int]) -> tuple[int, int]:
  if not isinstance(size, Mapping):
    return (size, size)
  return needed(size, 'height', Pixels), needed(size, 'width', Pixels)


def _centre(pixels: np.ndarray, crop: tuple[int, int]) -> np.ndarray:
  """Cuts the middle of uint8[H, W, 3]; where a side is short, black comes in around it."""
  missing = [max(0, wanted - side) for wanted, side in zip(crop, pixels.shape, strict=False)]
  pixels = np.pad(pixels, [(-(-short // 2), short // 2) for short in missing] + [(0, 0)])
  top, left = ((side - wanted) // 2 for wanted, side in zip(crop, pixels.shape, strict=False))
  return pixels[top:top + crop[0], left:left + crop[1]]
