"""What of a row's crops a compressor reads at once (`Compressor.span`).

Axes: B batch, C rows of the tower (crops, frames) of a row of the batch, I images of a row, V most
tokens of an image.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from models.backbones.images import Images, Layout
from models.backbones.lm import LM
from models.projectors.base import IMAGE, Compressor
from ops.primitives.grids import Grid

Array = jax.Array
# What to do about it.
APART = "set compressor.args.span='crop', or choose a compressor that reads crops one by one"


def grids_read(compressor: Compressor, grid: Grid, layout: Layout) -> tuple[int, Grid]:
  """Returns how many grids of a row a compressor reads one by one, and which each is.

  Args:
    compressor: the module.
    grid: (rows, columns) of a crop.
    layout: (C, I, V) of `Images`.

  Returns:
    C of the grid; or one, (C, rows, columns), of all crops of an image.

  Raises:
    ValueError: several images of a row, laid out, for one that reads an image at once.
  """
  crops, images, tokens = layout
  if compressor.span != IMAGE or not tokens:
    return crops, grid
  if images > 1:
    raise ValueError(f'{type(compressor).__name__} reads all crops of a row as one image, and '
                     f'these rows have up to {images} images: give one a row, leave index and '
                     f'weight out of Images of one crop each, or {APART}')
  return 1, (crops, *grid)


def crops_there(images: Images, each: int) -> Array:
  """Counts the crops of each row's only image: int32[B], up to the last one that it names.

  Args:
    images: laid out, with I = 1.
    each: features of a crop, as their index counts them.
  """
  assert images.index is not None
  assert images.weight is not None
  crops = images.pixels.shape[1]
  named = (images.weight > 0) & (images.index < crops * each)
  return jnp.max(jnp.where(named, images.index // each + 1, 0), axis=(1, 2, 3)).astype(jnp.int32)


def as_crops(compressor: Compressor, images: Images) -> Images:
  """Returns how what a compressor leaves is laid out: of an image as of one crop, if read so."""
  if compressor.span != IMAGE:
    return images
  return dataclasses.replace(images, index=None, weight=None)


def check(compressor: Compressor, lm: LM) -> None:
  """Raises unless a language model can read what is left of images that are read at once.

  Raises:
    ValueError: a language model that asks where each token stands, or one that reads a memory.
  """
  if compressor.span != IMAGE:
    return
  if lm.rope.sections or lm.mask == 'frames' or lm.frame_stride:
    raise ValueError(f'{type(compressor).__name__} leaves tokens of several crops, which have no '
                     'frame, row and column: choose a language model without sections of rope, '
                     f"mask='frames' and frame_stride, or {APART}")
  if compressor.reader(lm):
    raise ValueError(f'{type(compressor).__name__} leaves a memory of each crop, so it cannot read '
                     f'all crops at once: {APART}')
