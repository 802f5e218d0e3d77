"""QueCC: cells of patches that know the question attend to the features they stand for.

Axes: B batch, N patches, C cells, R patches of a cell, W width of the tower, E features of all
levels, D width of the language model.
"""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from models.blocks import dense, layer_norm
from models.projectors import base
from models.projectors.attention import CrossAttention
from models.projectors.base import Array, Beside, Compressor, concatenated
from models.projectors.mlp import Projector
from ops.primitives import grids
from ops.primitives.grids import Grid
from ops.tokens import TokenSet
from ops.values import Count, CountOrZero

EPS = 1e-6


class QueCC(Compressor):
  """Replaces each cell of patches by one token, whose query knows the question.

  Query-based convolutional cross-attention (Li et al., 2024), arXiv:2411.03312, as released: what
  the language model makes of the question is added to the last features, a convolution of each
  feature by itself makes one query of a cell, keys and values are of four layers, there is no
  residual. The release takes the question of a conversation's first turn, and the word "image" for
  a row without an image; here the question is the caller's.

  Attributes:
    side: patches of a cell each way; 4, 6, 12 and 24 leave 36, 16, 4 and 1 of 576.
    heads: of the attention.
    levels: layers of the tower whose features keys and values are made of, from 0 on, as those of
      `TokenPacker`.
  """

  side: Count = 4
  heads: Count = 8
  levels: tuple[CountOrZero, ...] = (11, 15, 21, 22)
  reads = frozenset({base.LEVELS, base.QUESTION})
  released: ClassVar[base.Names] = {
      'cells/question': '0.text_projection.0.*', 'cells/norm_question': '0.text_projection.1.*',
      **{f'cells/{own}/{layer}': f'0.{theirs}_proj.{place}.*'
         for own, theirs in (('query', 'q'), ('keys', 'k'), ('values', 'v'))
         for layer, place in (('fc1', 0), ('fc2', 2))},
      'cells/norm_query': '0.q_proj.3.*', 'cells/norm_keys': '0.k_proj.3.*',
      'cells/norm_values': '0.v_proj.3.*', 'cells/patch': '0.q_downsample.*',
      'cells/attention/qkv': '0.clip_attn.in_proj_*',
      'cells/attention/out': '0.clip_attn.out_proj.*', 'mlp/fc1': '1.*', 'mlp/fc2': '3.*'}

  def grid_after(self, grid: Grid) -> Grid:
    """Returns the grid of cells."""
    return grids.cells(grid, (self.side,) * 2)

  @nn.compact
  def __call__(self, tokens: TokenSet, beside: Beside) -> TokenSet:
    """Compresses, as `Compressor`.

    Raises:
      ValueError: no question, or another number of levels.
    """
    if beside.question is None:
      raise ValueError('QueCC reads a question, and there is none: give one, or choose a projector '
                       'that reads the image alone')
    cells = Cells(self.side, self.heads, self.dtype, name='cells')(
        tokens.x, concatenated(beside.levels, self.levels), beside.question, beside.grid)
    return TokenSet.create(Projector(self.width, 'gelu', self.dtype, name='mlp')(cells))


class Cells(nn.Module):
  """Makes one query of each cell, and lets it attend to the cell's patches.

  Attributes:
    side, heads: as of `QueCC`.
    dtype: of the products.
  """

  side: int
  heads: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Array, fine: Array, question: Array, grid: Grid) -> Array:
    """Compresses float[B, N, W], float[B, N, E] and float[B, D] -> float[B, C, W]."""
    width, side = x.shape[-1], (self.side,) * 2

    def inside(name: str, x: Array) -> Array:
      x = Projector(width, 'gelu', self.dtype, name=name)(x)
      return grids.windows(layer_norm(EPS, name=f'norm_{name}')(x), grid, side)

    question = layer_norm(EPS, name='norm_question')(
        dense(width, self.dtype, name='question')(question))
    query = Depthwise(self.dtype, name='patch')(inside('query', x + question[:, None]))[:, :, None]
    return CrossAttention(self.heads, self.dtype, name='attention')(
        query, inside('keys', fine), inside('values', fine))[:, :, 0]


class Depthwise(nn.Module):
  """Sums the patches of a cell with weights of each feature: a depth-wise convolution."""

  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Sums float[B, C, R, W] -> float[B, C, W]."""
    kernel = self.param('kernel', nn.initializers.lecun_normal(), x.shape[2:])
    bias = self.param('bias', nn.initializers.zeros, x.shape[3:])
    x, kernel, bias = (jnp.asarray(each, self.dtype) for each in (x, kernel, bias))
    return jnp.einsum('bcrw,rw->bcw', x, kernel) + bias[None, None]
