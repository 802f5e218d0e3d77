"""MQT: of nested queries the first few attend to the patches, as many as one wants.

Axes: B batch, N patches, M queries that are used, W width of the tower, D width of the language
model.
"""

import math
from typing import Annotated, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from models.blocks import layer_norm
from models.projectors.attention import CrossAttention
from models.projectors.base import Beside, Compressor, Names
from ops.primitives import grids
from ops.primitives.grids import Grid
from ops.tokens import TokenSet
from ops.values import Count, OneOf

EPS = 1e-6
KEYS = ('positions', 'content')


class MQT(Compressor):
  """Lets the first of many learned queries attend to the patches.

  Matryoshka Query Transformer (Hu et al., 2024), arXiv:2405.19315, as released. No query sees
  another, so the tokens of a smaller count are the first of those of a larger one, and all counts
  read the same parameters. Training draws an even count from 2 to 256 for each step.

  The keys of the release are of positions alone: which patches a query reads is learned once, and
  is the same for every image.

  Attributes:
    queries: that there are, a square.
    count: M, how many of them are used.
    heads: of the attention.
    keys: 'positions' as released, or 'content', normed features with positions added, as in
      Qwen-VL's resampler.
  """

  queries: Count = 256
  count: Count = 256
  heads: Count = 16
  keys: Annotated[str, OneOf(KEYS)] = 'positions'
  released: ClassVar[Names] = {
      'query': 'query', 'projection': 'proj', 'norm_query': 'ln_q.*', 'norm_keys': 'ln_k.*',
      'norm_values': 'ln_v.*', 'attention/qkv': 'attn.in_proj_*',
      'attention/out': 'attn.out_proj.*'}

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.count > self.queries:
      raise ValueError(f'count={self.count} is more than queries={self.queries}: choose at most as '
                       'many as there are')
    if math.isqrt(self.queries) ** 2 != self.queries:
      raise ValueError(f'queries={self.queries} have positions on a square, and are none: choose a '
                       'square number, as 256')

  def grid_after(self, grid: Grid) -> None:
    """Returns None: tokens have no places."""

  def slots(self, grid: Grid) -> int:
    """Returns M, whatever the grid."""
    return self.count

  @nn.compact
  def __call__(self, tokens: TokenSet, beside: Beside) -> TokenSet:
    """Compresses, as `Compressor`."""
    width, square = tokens.x.shape[-1], (math.isqrt(self.queries),) * 2
    # As the release stores them.
    places = jnp.asarray(grids.sincos(square, width).astype(jnp.float16), jnp.float32)
    query = self.param('query', nn.initializers.truncated_normal(0.02), places.shape)
    projection = self.param('projection', nn.initializers.normal(self.width ** -0.5),
                            (width, self.width))
    query = layer_norm(EPS, name='norm_query')((query + places)[None, :self.count])
    keys = grids.resample(places[None], square, beside.grid, 'bicubic')
    norm = layer_norm(EPS, name='norm_keys')
    keys = norm(keys) if self.keys == 'positions' else norm(tokens.x) + keys
    values = layer_norm(EPS, name='norm_values')(tokens.x)
    mixed = CrossAttention(self.heads, self.dtype, name='attention')(query, keys, values)
    return TokenSet.create(jnp.einsum('bmw,wd->bmd', mixed, projection.astype(self.dtype)))
