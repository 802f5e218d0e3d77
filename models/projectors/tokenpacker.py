"""TokenPacker: coarse features attend to the fine ones that they stand for.

Axes: B batch, N patches, C cells, R patches of a cell, W width of the tower, D width of the
language model.
"""

from typing import ClassVar

import flax.linen as nn

from models.blocks import dense, layer_norm
from models.projectors.attention import CrossAttention
from models.projectors.base import (
  LEVELS,
  Array,
  Beside,
  Compressor,
  Names,
  concatenated,
)
from models.projectors.mlp import Projector
from ops.primitives import grids
from ops.primitives.grids import Grid
from ops.tokens import TokenSet
from ops.values import Count, CountOrZero

EPS = 1e-6


class TokenPacker(Compressor):
  """Replaces each cell of patches by one token, which attends to them in several layers.

  TokenPacker (Li et al., 2024), Sec. 3, arXiv:2407.02392, as released: the query is the bilinearly
  resampled grid of the last features, keys and values are of four layers, there is no residual.

  Attributes:
    side: patches of a cell each way; 2, 3 and 4 leave 144, 64 and 36 of 576.
    heads: of the attention, 128 features each in the release.
    levels: layers of the tower whose features keys and values are made of, from 0 on; of the
      release's 24 layers these are those that its `hidden_states` 12, 16, 22 and 23 come from.
  """

  side: Count = 2
  heads: Count = 8
  levels: tuple[CountOrZero, ...] = (11, 15, 21, 22)
  reads = frozenset({LEVELS})
  released: ClassVar[Names] = {
      'query': 'q_proj_1.*', 'norm_query': 'ln_q_1.*',
      'keys/fc1': 'k_proj_1.0.*', 'keys/fc2': 'k_proj_1.2.*', 'norm_keys': 'ln_k_1.*',
      'values/fc1': 'v_proj_1.0.*', 'values/fc2': 'v_proj_1.2.*', 'norm_values': 'ln_v_1.*',
      'attention/qkv': 'clip_attn.in_proj_*', 'attention/out': 'clip_attn.out_proj.*',
      'mlp/fc1': 'mlp.0.*', 'mlp/fc2': 'mlp.2.*'}

  def grid_after(self, grid: Grid) -> Grid:
    """Returns the grid of cells."""
    return grids.cells(grid, (self.side,) * len(grid))

  @nn.compact
  def __call__(self, tokens: TokenSet, beside: Beside) -> TokenSet:
    """Compresses, as `Compressor`."""
    width, side = tokens.x.shape[-1], (self.side,) * 2
    after, fine = self.grid_after(beside.grid), concatenated(beside.levels, self.levels)

    def inside(name: str) -> Array:
      x = Projector(width, 'gelu', self.dtype, name=name)(fine)
      return grids.windows(layer_norm(EPS, name=f'norm_{name}')(x), beside.grid, side)

    query = dense(width, self.dtype, name='query', bias=False)(
        grids.resample(tokens.x, beside.grid, after, 'linear'))
    query = layer_norm(EPS, name='norm_query')(query)[:, :, None]
    mixed = CrossAttention(self.heads, self.dtype, name='attention')(
        query, inside('keys'), inside('values'))[:, :, 0]
    return TokenSet.create(Projector(self.width, 'gelu', self.dtype, name='mlp')(mixed))
