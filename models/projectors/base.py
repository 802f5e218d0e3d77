"""What stands between a vision tower and a language model in place of an MLP.

Axes: B batch, N patches of a crop, M tokens that are left of it, W width of the tower, D width of
the language model, T ids of a prompt, E width of an embedding of images and text, G tokens of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from models.memory import Memory, Reader, Sizes
from ops.primitives.grids import Grid
from ops.tokens import TokenSet
from ops.values import Width, check_fields

Array = jax.Array
# From a module's path to its name in a release (`models.checkpoints.layout.Layout.names`).
Names = Mapping[str, str | tuple[str, ...]]
# What a compressor may read beside the tower's last features.
LEVELS, TEXT, QUESTION, EMBED, GUIDE = 'levels', 'text', 'question', 'embed', 'guide'
# What it reads at once: a crop, or all crops of an image.
CROP, IMAGE = SPANS = 'crop', 'image'


class Beside(struct.PyTreeNode):
  """Holds what a compressor may read beside the tower's last features.

  Attributes:
    grid: (rows, columns) of the patches; (frames, rows, columns) of a video, or of several crops.
    levels: float[B, N, W] each, the features behind the layers that `Compressor.levels` names.
    text: float[B, T, D], embeddings of the prompt's ids, the image's own apart.
    text_valid: bool[B, T], those that there are.
    question: float[B, D], what the language model makes of the question's last token when it reads
      the question alone; no gradient flows through it.
    embed: float[B, N, E], each patch as the tower's head takes it to the space of its text tower.
    guide: float[B, E], what is asked, in that space.
    guide_tokens: float[B, G, E], the same token by token.
    guide_valid: bool[B, G], tokens that there are; None for all.
    frames: int32[B], of a grid with three axes the frames that there are, its first ones; None for
      all.
  """

  grid: Grid = struct.field(pytree_node=False)
  levels: tuple[Array, ...] = ()
  text: Array | None = None
  text_valid: Array | None = None
  question: Array | None = None
  embed: Array | None = None
  guide: Array | None = None
  guide_tokens: Array | None = None
  guide_valid: Array | None = None
  frames: Array | None = None


class Compressor(nn.Module):
  """Makes the patches of a crop into the tokens that a language model reads in their place.

  A subclass says what grid it leaves of one (`grid_after`) or how many tokens (`slots`), what it
  `reads` beside the tower's last features, and what its parameters are called in the release
  (`released`). One that reads LEVELS has a field of that name: the layers, from 0 on. One that
  leaves a memory beside tokens says what layers of the language model read it with (`reader`). One
  that reads all crops of an image at once says so (`span`): it takes grids of three axes, too, and
  marks what it made of frames that are not there as invalid.

  Attributes:
    width: D.
    dtype: of the products.
  """

  width: Width
  dtype: DTypeLike = jnp.float32
  released: ClassVar[Names] = {}

  def __post_init__(self) -> None:
    check_fields(self)
    super().__post_init__()

  @property
  def reads(self) -> frozenset[str]:
    """Names what it reads beside the tower's last features."""
    return frozenset()

  @property
  def span(self) -> str:
    """Names what it reads at once, one of `SPANS`.

    One with IMAGE gets an image of several crops as a grid (crops, rows, columns). Other images,
    each of one crop (`Images` without an index), have (rows, columns) with either.
    """
    return CROP

  def grid_after(self, grid: Grid) -> Grid | None:
    """Returns the grid that is left of a crop's, None where tokens are no grid.

    Raises:
      ValueError: a grid that it cannot divide.
    """
    raise NotImplementedError

  def slots(self, grid: Grid) -> int:
    """Returns M, the tokens that are left of a crop.

    Raises:
      ValueError: as `grid_after`.
    """
    after = self.grid_after(grid)
    assert after is not None, 'a compressor without a grid says how many tokens it leaves'
    return math.prod(after)

  def reader(self, sizes: Sizes) -> Reader | None:
    """Returns what reads, in a language model, the memory that it leaves; None for no memory.

    Raises:
      ValueError: a language model that cannot.
    """
    del sizes
    return None

  def __call__(self, tokens: TokenSet, beside: Beside) -> TokenSet | Memory:
    """Compresses.

    Args:
      tokens: x float[B, N, W], all patches of the grid, in raster order.
      beside: what else there is.

    Returns:
      x float[B, M, D], of frames that are not there invalid; or these as the `tokens` of a memory.
    """
    raise NotImplementedError


def identity(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
  """Returns the product that changes nothing, as an initializer of a kernel [D, D]."""
  del key
  return jnp.eye(shape[0], shape[1], dtype=dtype)


def concatenated(levels: tuple[Array, ...], wanted: tuple[Any, ...]) -> Array:
  """Joins the features of several layers: float[B, N, K W].

  Raises:
    ValueError: another number of them than wanted.
  """
  if len(levels) != len(wanted):
    raise ValueError(f'{len(wanted)} layers of the tower are read, and {len(levels)} are given: '
                     f'give the features behind the layers {wanted}')
  return jnp.concatenate(levels, axis=-1)
