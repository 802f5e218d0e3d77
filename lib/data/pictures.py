"""Prepares an image for a vision-language model, and batches the images of several rows.

Axes: S side of a crop, c crops of an image, C of a row, I images of a row, B rows, V tokens of an
image, K features that a token is made of, R, C' rows and columns of the grid of a Qwen tower, P
numbers of a patch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lib.data.token_layout import NEWLINE
from models.backbones.images import Images


@dataclasses.dataclass(frozen=True)
class Picture:
  """Holds one image: the input of the tower, and how its features become tokens.

  Attributes:
    pixels: float32[c, S, S, 3], or patches float32[c, R, C', P].
    index: int[V, K], the features of each token: crop * (patches of a crop) + patch, or NEWLINE.
    weight: float32[V, K], the share of each.
    sizes: int[c, 2] for patches, else None.
    axes: int[V, 3], time, row and column of each token; None where positions have one axis.
    extent: by how much positions move on (0 without axes).
    tiling: rows and columns of the crops that the image is cut into, beside the first.
    base_view: the whole image as one crop, which a model reads instead where a row has several
      images; None where it then reads the same.
  """

  pixels: np.ndarray
  index: np.ndarray
  weight: np.ndarray
  sizes: np.ndarray | None = None
  axes: np.ndarray | None = None
  extent: int = 0
  tiling: tuple[int, int] = (0, 0)
  base_view: Picture | None = None


def row_of(pictures: Sequence[Picture]) -> list[Picture]:
  """Returns the pictures of one row as the model reads them: base views where there are several."""
  if len(pictures) < 2:
    return list(pictures)
  return [picture.base_view or picture for picture in pictures]


def batch_pictures(rows: Sequence[Sequence[Picture]], *, patches: int, crops: int = 0,
                   images: int = 0, tokens: int = 0) -> Images | None:
  """Stacks the images of rows into one batch; None where no row has any.

  Args:
    rows: the images of each row, in the order of its placeholders.
    patches: features of a crop: n * n, or cells of a Qwen tower's grid.
    crops, images, tokens: C, I and V; what is needed where 0. Fixed ones keep one compiled program.

  Raises:
    ValueError: a row with more than those.
  """
  rows = [row_of(row) for row in rows]
  every = [picture for row in rows for picture in row]
  if not every:
    return None
  needed = {'crops': max(sum(len(each.pixels) for each in row) for row in rows),
            'images': max(map(len, rows)), 'tokens': max(len(each.index) for each in every)}
  limits = {'crops': crops, 'images': images, 'tokens': tokens}
  for name, count in needed.items():
    if limits[name] and limits[name] < count:
      raise ValueError(f'{name}={limits[name]} are too few: a row has {count}; raise it, or give '
                       'smaller images')
    limits[name] = limits[name] or count
  crops, images, tokens = limits.values()
  shape, taps = every[0].pixels.shape[1:], max(each.index.shape[1] for each in every)
  pixels = np.zeros((len(rows), crops, *shape), np.float32)
  sizes = np.zeros((len(rows), crops, 2), np.int32)
  index = np.zeros((len(rows), images, tokens, taps), np.int32)
  weight = np.zeros(index.shape, np.float32)
  axes = np.zeros((len(rows), images, tokens, 3), np.int32)
  extent = np.zeros((len(rows), images), np.int32)
  tiling = np.zeros((len(rows), images, 2), np.int32)
  for number, row in enumerate(rows):
    first = 0
    for image, picture in enumerate(row):
      last, (count, width) = first + len(picture.pixels), picture.index.shape
      pixels[number, first:last] = picture.pixels
      # Features count over the row's crops; the newline comes behind all of them.
      index[number, image, :count, :width] = np.where(
          picture.index == NEWLINE, crops * patches, picture.index + first * patches)
      weight[number, image, :count, :width] = picture.weight
      tiling[number, image] = picture.tiling
      if picture.axes is not None:
        axes[number, image, :count] = picture.axes
        extent[number, image] = picture.extent
      if picture.sizes is not None:
        sizes[number, first:last] = picture.sizes
      first = last
  has_axes = every[0].axes is not None
  # Arrays of numpy, which jit moves.
  arrays: tuple[Any, ...] = (
      pixels, sizes if every[0].sizes is not None else None, index, weight,
      axes if has_axes else None, extent if has_axes else None, tiling)
  return Images(*arrays)
