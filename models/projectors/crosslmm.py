"""CrossLMM: a few averages of patches, and layers that let all tokens attend to the patches.

Axes: B batch, C crops of a row, N patches of a crop, S patches of a row, M tokens that are left of
a crop, T slots of a row, W width of the tower, D width of the language model, H heads, K kv heads,
d features a head.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from models.blocks import dense
from models.memory import LayerMemory, Memory, Reader, Sizes, States, visual_first
from models.projectors.base import Array, Beside, Compressor
from models.projectors.mlp import Projector
from ops import attention
from ops.moves.rows import take
from ops.primitives import grids
from ops.primitives.grids import Grid
from ops.tokens import TokenSet
from ops.values import Count


class CrossLMM(Compressor):
  """Averages the patches to a square of tokens, and lets layers attend to all patches.

  CrossLMM (Yan et al., 2025), Sec. 3, arXiv:2505.17020, of which no code is known. The paper gives
  the pooling in front of an MLP, the two cross-attentions with weights of their own behind the
  self-attention of every K-th layer, from visual tokens (V2V) and from text (T2V) to the projected
  patches, and their gates. Reconstructed are the gates' tanh of a scalar that begins at 0, heads as
  the language model has them, features that enter without a norm, as in the paper's formula, that
  text in front of an image reads it too, K, and where it begins: what visual tokens read in the
  last layer, nobody would see.

  Attributes:
    side: tokens each way; 1, 3 and 4 leave 1, 9 and 16. It need not divide the grid.
    every: K; of so many layers the first one reads.
  """

  side: Count = 3
  every: Count = 4

  def grid_after(self, grid: Grid) -> Grid:
    """Returns the square of tokens.

    Raises:
      ValueError: more tokens than patches along an axis.
    """
    if self.side > min(grid):
      raise ValueError(f'side={self.side} asks for more tokens each way than a grid of {grid} has '
                       f'patches: choose at most {min(grid)}')
    return (self.side,) * len(grid)

  def reader(self, sizes: Sizes) -> DualAttention:
    """Returns the two attentions of every K-th layer."""
    layers = tuple(range(0, sizes.depth, self.every))
    return DualAttention(layers, sizes.width, sizes.heads, sizes.kv_heads, sizes.head_width,
                         self.dtype, parent=None)

  @nn.compact
  def __call__(self, tokens: TokenSet, beside: Beside) -> Patches:
    """Compresses, as `Compressor`."""
    project = Projector(self.width, 'gelu', self.dtype, name='mlp')
    pooled = grids.resample(tokens.x, beside.grid, self.grid_after(beside.grid), 'area')
    return Patches(TokenSet.create(project(pooled)), project(tokens.x))


class Patches(Memory):
  """Holds projected patches.

  Attributes:
    x: float[B * C, N, D]; of rows float[B, S, D].
    seen: bool[B, S], those that a row has; None until they are of rows.
    slots: in every row those that are not for text. Static.
  """

  x: Array
  seen: Array | None = None
  slots: int = struct.field(pytree_node=False, default=0)

  def of_rows(self, there: Array, slots: int) -> Patches:
    """Returns the patches of all crops of a row, as `Memory`."""
    seen = jnp.repeat(there, self.x.shape[1], axis=1)
    return Patches(None, self.x.reshape(*seen.shape, -1), seen, slots)


class Entries(LayerMemory):
  """Holds keys and values of patches.

  Attributes:
    k, v: float[B, S, K, d].
    seen: bool[B, S].
  """

  k: Array
  v: Array
  seen: Array


class DualEntries(LayerMemory):
  """Holds what one layer reads.

  Attributes:
    text: what text attends to.
    visual: what visual tokens do; None behind the prompt, where there are none.
    slots: as of `Patches`. Static.
  """

  text: Entries
  visual: Entries | None
  slots: int = struct.field(pytree_node=False)


class DualAttention(Reader):
  """Lets visual tokens and text attend to patches, with weights of their own.

  Attributes:
    width, heads, kv_heads, head_width: D, H, K and d.
    dtype: of the products.
  """

  width: int
  heads: int
  kv_heads: int
  head_width: int
  dtype: DTypeLike
  site: ClassVar[str] = 'between'

  def setup(self) -> None:
    """Makes both attentions of each layer."""
    sizes = self.width, self.heads, self.kv_heads, self.head_width, self.dtype
    self.visual = [GatedAttention(*sizes) for _ in self.layers]
    self.text = [GatedAttention(*sizes) for _ in self.layers]

  def states(self, memory: Patches) -> States:
    """Returns keys and values, as `Reader`."""
    assert memory.seen is not None
    return {layer: DualEntries(text.entries(memory.x, memory.seen),
                               visual.entries(memory.x, memory.seen), memory.slots)
            for layer, visual, text in zip(self.layers, self.visual, self.text, strict=True)}

  def kept(self, states: Any) -> States:
    """Returns what text attends to, as `Reader`."""
    return {layer: state.replace(visual=None) for layer, state in states.items()}

  def read(self, layer: int, tokens: TokenSet, state: DualEntries) -> Array:
    """Returns what the two attentions add, as `Reader`."""
    assert state.visual is not None
    place, (order, back) = self.layers.index(layer), visual_first(tokens)
    x = take(tokens.x, order)
    visual, text = x[:, :state.slots], x[:, state.slots:]
    return take(jnp.concatenate([self.visual[place](visual, state.visual),
                                 self.text[place](text, state.text)], axis=1), back)

  def read_text(self, layer: int, x: Array, state: DualEntries) -> Array:
    """Returns what attention of text adds, as `Reader`."""
    return self.text[self.layers.index(layer)](x, state.text)


class GatedAttention(nn.Module):
  """Attends to patches; its gate begins at 0.

  Attributes:
    width, heads, kv_heads, head_width, dtype: as of `DualAttention`.
  """

  width: int
  heads: int
  kv_heads: int
  head_width: int
  dtype: DTypeLike

  def setup(self) -> None:
    """Makes four products and the gate."""
    self.q = dense((self.heads, self.head_width), self.dtype, spread=0.02, bias=False)
    self.k = dense((self.kv_heads, self.head_width), self.dtype, spread=0.02, bias=False)
    self.v = dense((self.kv_heads, self.head_width), self.dtype, spread=0.02, bias=False)
    self.out = dense(self.width, self.dtype, axis=(-2, -1), spread=0.02, bias=False)
    self.gate = self.param('gate', nn.initializers.zeros, ())

  def entries(self, x: Array, seen: Array) -> Entries:
    """Returns keys and values of patches float[B, S, D], those bool[B, S] of which are seen."""
    return Entries(self.k(x), self.v(x), seen)

  def __call__(self, x: Array, entries: Entries) -> Array:
    """Returns what is added to float[B, T, D], nothing in rows that see no patch."""
    bias = jnp.where(entries.seen, 0.0, attention.HIDDEN_LOGIT)
    mixed = self.out(attention.attend(self.q(x), entries.k, entries.v, bias=bias).out)
    gate = jnp.tanh(self.gate).astype(mixed.dtype)
    return jnp.where(entries.seen.any(axis=1)[:, None, None], gate * mixed, 0)
