"""VLoRA: an image becomes weights of a language model, in place of tokens.

Axes: B batch, N patches, K kinds of products, S layers that get weights, Q queries (one a layer),
W width of the tower, F features of a query, D width of the language model, R rank.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from models.blocks import ACTIVATIONS, dense, layer_norm
from models.memory import MLP, Changes, Factors, Memory, Reader, Sizes, States
from models.projectors.attention import CrossAttention
from models.projectors.base import Array, Beside, Compressor, Names
from ops.primitives.grids import Grid
from ops.tokens import TokenSet
from ops.values import Count, Positive, Width

EPS = 1e-5
# Products of queries, keys, values, of what attention reads, and a whole MLP; by their names.
NAMES = {'q': 'q', 'k': 'k', 'v': 'v', 'o': 'out', 'm': MLP}
KINDS = ''.join(NAMES)


class LowRank(Memory):
  """Holds changes of low rank to the products of a language model.

  Attributes:
    a: float[B, K, S, D, R], of each image.
    b: float[1, K, S, D, R], of all images, scaled.
    every: layers of which the last one gets a change.
  """

  a: Array
  b: Array
  every: int = struct.field(pytree_node=False)

  def of(self, kind: str, layer: int) -> tuple[Array, Array] | None:
    """Returns the two factors of a change, float[B, D, R] and [1, D, R]; None where there is none.

    Args:
      kind: one of `KINDS`.
      layer: of the language model, from 0 on.
    """
    if (layer + 1) % self.every:
      return None
    place = KINDS.index(kind), layer // self.every
    return self.a[:, *place], self.b[:, *place]


  def of_rows(self, there: Array, slots: int) -> LowRank:
    """Returns the changes of each row's one image, none where it has none, as `Memory`."""
    del slots
    if there.shape[1] > 1:
      raise ValueError(f'VLoRA makes weights of one image a row, and rows have {there.shape[1]}: '
                       'give one, or choose another compressor')
    shape = len(there), *(1,) * (self.a.ndim - 1)
    return self.replace(tokens=None, a=jnp.where(there.reshape(shape), self.a, 0))


class LowRankReader(Reader):
  """Changes the products of some layers by what was made of an image."""

  site: ClassVar[str] = 'products'

  def states(self, memory: LowRank) -> States:
    """Returns both factors of each product, as `Reader`."""

    def changes(layer: int) -> Changes:
      made = {name: memory.of(kind, layer) for kind, name in NAMES.items()}
      return Changes({name: Factors(each[0], each[1].astype(each[0].dtype))
                      for name, each in made.items() if each})

    return {layer: changes(layer) for layer in self.layers}

  def kept(self, states: Any) -> States:
    """Returns all: what is decoded goes through the same products."""
    return states


class VLoRA(Compressor):
  """Makes a change of low rank to the products of some layers out of an image's patches.

  VLoRA (Ma et al., 2024), arXiv:2405.20339, as released. For each kind of products one query a
  layer goes through blocks that attend among the queries and to the patches, and becomes the first
  factor; the second one is learned, the same for all images, and 0 at first. It leaves no tokens.

  Attributes:
    layers: of the language model.
    every: of so many layers the last one gets a change.
    rank: R.
    alpha: the second factor is scaled by alpha / rank.
    inner: F; 512 in the released script of fine-tuning, 1024 in that of pretraining.
    depth: blocks.
    heads: of their attention.
    mlp: width inside of their MLP.
  """

  layers: Count = 32
  every: Count = 4
  rank: Count = 64
  alpha: Positive = 64.0
  inner: Width = 512
  depth: Count = 8
  heads: Count = 16
  mlp: Width = 2048

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.layers % self.every:
      raise ValueError(f'every={self.every} does not divide layers={self.layers}: choose one that '
                       'does')

  @property
  def released(self) -> Names:  # type: ignore[override]
    """Returns names in the release, as `Compressor.released`."""
    names = {'patches': 'visual_proj.*', 'places': 'pos_embed', 'shared': 'Bs'}
    for i, kind in enumerate(KINDS):
      names |= {f'{kind}_queries': f'gen.{i}.queries', f'norm_{kind}': f'gen.{i}.norm.*',
                f'{kind}_factors': f'gen.{i}.weights_head.*'}
      for j in range(self.depth):
        ours, theirs = f'{kind}_{j}', f'gen.{i}.decoders.{j}'
        names |= {
            f'{ours}/norm{part}': f'{theirs}.norm{part}.*' for part in (1, 2, 3)} | {
            f'{ours}/fc{part}': f'{theirs}.linear{part}.*' for part in (1, 2)}
        for own, other in (('queries', 'self_attn'), ('patches', 'multihead_attn')):
          names |= {f'{ours}/{own}/qkv': f'{theirs}.{other}.in_proj_*',
                    f'{ours}/{own}/out': f'{theirs}.{other}.out_proj.*'}
    return names

  def grid_after(self, grid: Grid) -> None:
    """Returns None: no tokens are left."""

  def slots(self, grid: Grid) -> int:
    """Returns 0, whatever the grid."""
    return 0

  def reader(self, sizes: Sizes) -> LowRankReader:
    """Returns what changes the products of every so many layers.

    Raises:
      ValueError: a language model of another depth, or of products that are not of D to D features.
    """
    if sizes.depth != self.layers:
      raise ValueError(f'VLoRA makes weights for layers={self.layers}, and the language model has '
                       f'{sizes.depth}: set compressor.args.layers={sizes.depth}')
    if {sizes.heads * sizes.head_width, sizes.kv_heads * sizes.head_width} != {sizes.width}:
      raise ValueError(f'VLoRA makes weights of width x width={sizes.width}, and this language '
                       f'model has heads={sizes.heads}, kv_heads={sizes.kv_heads} and head_width='
                       f'{sizes.head_width}: choose one whose heads, kv heads too, make up the '
                       'width')
    return LowRankReader(tuple(range(self.every - 1, self.layers, self.every)), parent=None)

  @nn.compact
  def __call__(self, tokens: TokenSet, beside: Beside) -> LowRank:
    """Makes the changes.

    Args:
      tokens: x float[B, N, W], all patches, of as many as at first.
      beside: not read.
    """
    del beside
    number, features = self.layers // self.every, self.width * self.rank
    x, normal = tokens.x, nn.initializers.normal(0.02)
    x = dense(self.inner, self.dtype, name='patches')(x)
    x = x + self.param('places', normal, (1, x.shape[1], self.inner))
    made = []
    for kind in KINDS:
      query = self.param(f'{kind}_queries', normal, (1, number, self.inner))
      query = jnp.broadcast_to(query, (len(x), *query.shape[1:]))
      for i in range(self.depth):
        query = Decoder(self.heads, self.mlp, self.dtype, name=f'{kind}_{i}')(query, x)
      made.append(dense(features, self.dtype, name=f'{kind}_factors')(
          layer_norm(EPS, name=f'norm_{kind}')(query)))
    shared = self.param('shared', nn.initializers.zeros, (1, len(KINDS) * number, features))
    shape = (-1, len(KINDS), number, self.width, self.rank)
    none = TokenSet.create(jnp.zeros((len(x), 0, self.width), x.dtype))
    return LowRank(none, jnp.stack(made, axis=1).reshape(shape),
                   (self.alpha / self.rank * shared).reshape(shape), self.every)


class Decoder(nn.Module):
  """Lets queries attend to each other and to patches, in front of an MLP; attributes as `VLoRA`."""

  heads: int
  mlp: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, query: Array, x: Array) -> Array:
    """float[B, Q, F], float[B, N, F] -> float[B, Q, F]."""
    own = layer_norm(EPS, name='norm1')(query)
    query = query + CrossAttention(self.heads, self.dtype, name='queries')(own, own, own)
    query = query + CrossAttention(self.heads, self.dtype, name='patches')(
        layer_norm(EPS, name='norm2')(query), x, x)
    inner = dense(self.mlp, self.dtype, name='fc1')(layer_norm(EPS, name='norm3')(query))
    return query + dense(query.shape[-1], self.dtype, name='fc2')(ACTIVATIONS['gelu'](inner))
