"""Vision Remember: averages of patches that read what they stand for again between layers.

Axes: B batch, C crops of a row, N patches of a crop, M tokens that are left of it, S tokens of a
row's crops, R patches that a token stands for, W width of the tower, E features of all levels, F
width of the attention, D width of the language model.
"""

from __future__ import annotations

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from models.blocks import dense, layer_norm
from models.memory import LayerMemory, Memory, Reader, Sizes, States, visual_first
from models.projectors.attention import CrossAttention
from models.projectors.base import LEVELS, Array, Beside, Compressor, concatenated
from models.projectors.mlp import Projector
from ops.moves.rows import take
from ops.primitives import grids
from ops.primitives.grids import Grid
from ops.tokens import TokenSet
from ops.values import Count, CountOrZero, Width

EPS = 1e-6


class VisionRemember(Compressor):
  """Averages the patches of each window, and lets the tokens attend to them again between layers.

  Vision Remember (Feng et al., 2025), arXiv:2506.03928, of which no code is known. The paper gives
  features of several layers of the tower, which visual tokens attend to between layers of the
  language model, each to the region that it stands for. Reconstructed are the attention, that of
  TokenPacker (arXiv:2407.02392) with a query from the language model, a gate, the tanh of a scalar
  that begins at 0, the layers, and the projector, an MLP on means. What the paper calls saliency
  enhancing beyond the regions is not here.

  Attributes:
    side: patches of a window each way; 2, 3 and 4 leave 144, 64 and 36 of 576.
    every: the tokens attend before the layers that this divides, but the first.
    heads: of the attention.
    inner: F, the width of the attention; None for D.
    levels: layers of the tower whose features it reads, from 0 on.
  """

  side: Count = 2
  every: Count = 8
  heads: Count = 8
  inner: Width | None = 1024
  levels: tuple[CountOrZero, ...] = (12, 17, 22)
  reads = frozenset({LEVELS})

  def grid_after(self, grid: Grid) -> Grid:
    """Returns the grid of windows."""
    return grids.cells(grid, (self.side,) * len(grid))

  def reader(self, sizes: Sizes) -> RegionAttention:
    """Returns the attention before some layers."""
    layers = tuple(range(self.every, sizes.depth, self.every))
    return RegionAttention(layers, self.inner or self.width, self.heads, self.dtype, parent=None)

  @nn.compact
  def __call__(self, tokens: TokenSet, beside: Beside) -> Regions:
    """Compresses, as `Compressor`."""
    side = (self.side,) * len(beside.grid)
    means = grids.windows(tokens.x, beside.grid, side).mean(axis=2)
    fine = grids.windows(concatenated(beside.levels, self.levels), beside.grid, side)
    return Regions(TokenSet.create(Projector(self.width, 'gelu', self.dtype, name='mlp')(means)),
                   fine)


class Regions(Memory):
  """Holds what the tower made of the patches that each token stands for.

  Attributes:
    x: float[B * C, M, R, E]; of rows float[B, S, R, E].
    seen: bool[B, S], regions that a row has; None until they are of rows.
  """

  x: Array
  seen: Array | None = None

  def of_rows(self, there: Array, slots: int) -> Regions:
    """Returns the regions of all crops of a row, as `Memory`."""
    del slots  # As many as regions.
    seen = jnp.repeat(there, self.x.shape[1], axis=1)
    return Regions(None, self.x.reshape(*seen.shape, *self.x.shape[2:]), seen)


class Fine(LayerMemory):
  """Holds what one layer reads.

  Attributes:
    keys, values: float[B, S, R, F].
    seen: bool[B, S].
  """

  keys: Array
  values: Array
  seen: Array


class RegionAttention(Reader):
  """Lets each visual token attend to the patches that it stands for.

  Attributes:
    width: of keys and values, which the heads divide.
    heads: of the attention.
    dtype: of the products.
  """

  width: int
  heads: int
  dtype: DTypeLike
  site: ClassVar[str] = 'before'

  def setup(self) -> None:
    """Makes the attention of each layer."""
    self.sources = [KeysAndValues(self.width, self.dtype) for _ in self.layers]
    self.regions = [GatedRegions(self.heads, self.dtype) for _ in self.layers]

  def states(self, memory: Regions) -> States:
    """Returns keys and values, as `Reader`."""
    assert memory.seen is not None
    return {layer: Fine(*source(memory.x), memory.seen)
            for layer, source in zip(self.layers, self.sources, strict=True)}

  def read(self, layer: int, tokens: TokenSet, state: Fine) -> Array:
    """Returns what attention adds to visual tokens, as `Reader`; those of a row are its regions."""
    order, back = visual_first(tokens)
    count = state.seen.shape[1]
    change = self.regions[self.layers.index(layer)](take(tokens.x, order[:, :count]), state)
    rest = jnp.zeros((len(change), tokens.slots - count, change.shape[2]), change.dtype)
    return take(jnp.concatenate([change, rest], axis=1), back)


class GatedRegions(nn.Module):
  """Attends to regions; its gate begins at 0.

  Attributes:
    heads, dtype: as of `RegionAttention`.
  """

  heads: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Array, state: Fine) -> Array:
    """Returns what is added to float[B, S, D], nothing where no region is seen."""
    width = state.keys.shape[-1]
    query = dense(width, self.dtype, name='query', bias=False)(x)
    query = layer_norm(EPS, name='norm_query')(query)[:, :, None]
    mixed = CrossAttention(self.heads, self.dtype, name='attention')(
        query, state.keys, state.values)[:, :, 0]
    mixed = dense(x.shape[-1], self.dtype, name='projection')(mixed)
    gate = jnp.tanh(self.param('gate', nn.initializers.zeros, ())).astype(mixed.dtype)
    return jnp.where(state.seen[..., None], gate * mixed, 0)


class KeysAndValues(nn.Module):
  """Makes keys and values of features.

  Attributes:
    width: F.
    dtype: of the products.
  """

  width: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, Array]:
    """float[..., E] -> two of float[..., F]."""
    keys, values = (layer_norm(EPS, name=f'norm_{name}')(
        Projector(self.width, 'gelu', self.dtype, name=name)(x)) for name in ('keys', 'values'))
    return keys, values
