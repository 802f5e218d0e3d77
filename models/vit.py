"""Vision transformers: one file for ViT and DeiT at every size.

An Image is Worth 16x16 Words (Dosovitskiy et al., 2021), arXiv:2010.11929; distillation token from
DeiT (Touvron et al., 2021), arXiv:2012.12877; registers from Darcet et al. (2024),
arXiv:2309.16588.

Axes: B batch, N slots, D width, H heads, d width of a head, P patch side in pixels.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from models.plan import Host, Plan
from models.stack import BATCH_AXES, Stack
from ops import attention
from ops.signals import Signals, measure, measure_map
from ops.tokens import SPECIAL, VISUAL, TokenSet, key_bias

Array = jax.Array

# name: (width, depth, MLP width, heads). ViT (arXiv:2010.11929, Table 1), Ti and S from DeiT.
SIZES = {
    'Ti': (192, 12, 768, 3),
    'S': (384, 12, 1536, 6),
    'B': (768, 12, 3072, 12),
    'L': (1024, 24, 4096, 16),
    'H': (1280, 32, 5120, 16),
}
POSITIONS = ('learned', 'sincos')
POOLS = ('cls', 'mean')
OFFERS = frozenset({'keys', 'queries', 'values', 'received_attention', 'attention',
                    'next_received_attention', 'hidden', 'grid', 'layer', 'depth'})


class Heads(nn.Module):
  """Projects features to queries, keys and values of all heads in one product."""

  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, *, first: int = 0, last: int = 3) -> tuple[Array, ...]:
    """float[B, N, D] -> projections first to last - 1 of (q, k, v), each float[B, N, H, d]."""
    width = x.shape[-1]
    shape = (width, 3, self.heads, width // self.heads)
    kernel = self.param('kernel', nn.initializers.xavier_uniform(in_axis=0, out_axis=(1, 2, 3)),
                        shape)
    bias = self.param('bias', nn.initializers.zeros, shape[1:])
    kernel, bias = (jnp.asarray(w[..., first:last, :, :], self.dtype) for w in (kernel, bias))
    out = jnp.einsum('bnd,dkhe->bnkhe', x.astype(self.dtype), kernel) + bias[None, None]
    return tuple(out[:, :, i] for i in range(last - first))


class Block(nn.Module):
  """Pre-norm transformer block; norms and softmax in float32, products in `dtype`."""

  width: int
  heads: int
  mlp: int
  dropout: float = 0.0
  norm_eps: float = 1e-6
  dtype: Any = jnp.float32
  implementation: str = 'xla'
  mesh: Mesh | None = None

  def setup(self) -> None:
    """Two norms, attention's projections and the MLP's."""
    def dense(features: int, axis: int | tuple[int, ...] = -1) -> nn.DenseGeneral:
      return nn.DenseGeneral(features, axis=axis, dtype=self.dtype,
                             kernel_init=nn.initializers.xavier_uniform())

    def norm() -> nn.LayerNorm:
      return nn.LayerNorm(epsilon=self.norm_eps, dtype=jnp.float32, use_fast_variance=False)

    self.norm1, self.norm2 = norm(), norm()
    self.qkv = Heads(self.heads, self.dtype)
    self.out = dense(self.width, axis=(-2, -1))
    self.fc1, self.fc2 = dense(self.mlp), dense(self.width)
    self.drop = nn.Dropout(self.dropout)

  def __call__(self, tokens: TokenSet) -> TokenSet:
    """The plain block; it makes the parameters."""
    return self.feed(self.attend(tokens, needs=frozenset(), proportional=False)[0])

  def attend(self, tokens: TokenSet, *, needs: frozenset[str],
             proportional: bool) -> tuple[TokenSet, Signals]:
    """Attention and its residual, and what `needs` names of it."""
    hidden = self.norm1(tokens.x)
    q, k, v = self.qkv(hidden)
    bias = key_bias(tokens, proportional=proportional)
    read = functools.partial(measure, needs, v=v, bias=bias, hidden=hidden,
                             query_valid=tokens.valid)
    if self.implementation == 'xla':
      # Rows normalised by themselves, and first: XLA keeps its whole map for a log-sum-exp, and
      # the keys beside that map for whoever reads them later.
      signals = read(q=q, k=k, lse=None)
      q, k, signals = jax.lax.optimization_barrier((q, k, signals))
      mixed = self._attend(q, k, v, bias)
    else:
      mixed = self._attend(q, k, v, bias)
      signals = read(q=q, k=k, lse=mixed.lse)
    return self._add(tokens, self.out(mixed.out)), signals

  def _attend(self, q: Array, k: Array, v: Array, bias: Array | None) -> attention.Attended:
    """Attention; a fused kernel on a mesh gets the rows and heads of its own device."""

    def attend(q: Array, k: Array, v: Array, bias: Array | None) -> attention.Attended:
      return attention.attend(q, k, v, bias=bias, implementation=self.implementation)

    if self.mesh is not None and self.implementation != 'xla':
      heads = PartitionSpec(BATCH_AXES, None, 'tensor')
      attend = jax.shard_map(
          attend, mesh=self.mesh, check_vma=False, out_specs=heads,
          in_specs=(heads, heads, heads, PartitionSpec(BATCH_AXES)))
    return attend(q, k, v, bias)

  def inside(self, tokens: TokenSet,
             decide: Callable[[TokenSet, Signals, Array], tuple[TokenSet, Array, bool]], *,
             needs: frozenset[str], proportional: bool) -> TokenSet:
    """Attention that something interrupts between its map and its values.

    `decide` gets the tokens, the signals and the map float32[B, H, N, N], and returns fewer tokens,
    their map, and whether the values are to be those of the new tokens.
    """
    hidden = self.norm1(tokens.x)
    q, k = self.qkv(hidden, last=2)
    bias = key_bias(tokens, proportional=proportional)
    scores = attention.eager(q, k, bias=bias)
    v, = self.qkv(hidden, first=2)
    signals = measure_map(needs, scores, q=q, k=k, v=v, hidden=hidden, query_valid=tokens.valid)
    tokens, scores, renewed = decide(tokens, signals, scores)
    if renewed:
      v, = self.qkv(self.norm1(tokens.x), first=2)
    mixed = jnp.einsum('bhnm,bmhd->bnhd', scores.astype(self.dtype), v)
    return self._add(tokens, self.out(mixed))

  def look(self, tokens: TokenSet, *, needs: frozenset[str], proportional: bool) -> Signals:
    """What this layer's attention would be on today's tokens, without running the layer."""
    q, k = self.qkv(self.norm1(tokens.x), last=2)
    bias = key_bias(tokens, proportional=proportional)
    assert needs == {'next_received_attention'}, needs
    received = attention.received(q, k, None, bias=bias, query_valid=tokens.valid)
    return Signals(next_received_attention=received)

  def feed(self, tokens: TokenSet, **unused: Any) -> TokenSet:
    """MLP and its residual."""
    del unused
    hidden = nn.gelu(self.fc1(self.norm2(tokens.x)), approximate=False)
    return self._add(tokens, self.fc2(hidden))

  def _add(self, tokens: TokenSet, change: Array) -> TokenSet:
    change = self.drop(change, deterministic=not self.has_rng('dropout'))
    return tokens.replace(x=tokens.x + change.astype(tokens.x.dtype))


class ViT(nn.Module):
  """A vision transformer classifier.

  Attributes:
    width, depth, mlp, heads: as in `SIZES`.
    patch: side of a patch in pixels.
    image_size: side of the square input in pixels.
    num_classes: logits; 0 for features only.
    registers: register tokens after [CLS]; they get no position.
    distilled: adds DeiT's distillation token and its own head; the logits are the heads' mean.
    positions: 'learned' or 'sincos' (fixed, 2-D, zero for special tokens; MAE, arXiv:2111.06377).
    pool: 'cls', or 'mean' over the patch tokens, each as often as it has original tokens.
    class_token: whether there is a [CLS] token.
    dtype: of the products; parameters, norms, softmax and logits stay float32.
    plan: what to reduce where (models/plan.py), or None.
    implementation: of attention: 'xla', 'cudnn' or a TPU kernel (ops/attention.py picks).
    mesh, remat, capture: see models/stack.py.
  """

  width: int
  depth: int
  mlp: int
  heads: int
  patch: int
  image_size: int
  num_classes: int
  channels: int = 3
  registers: int = 0
  distilled: bool = False
  class_token: bool = True
  positions: str = 'learned'
  pool: str = 'cls'
  dropout: float = 0.0
  norm_eps: float = 1e-6
  dtype: Any = jnp.float32
  implementation: str = 'xla'
  plan: Plan | None = None
  mesh: Mesh | None = None
  remat: str = 'none'
  capture: bool = False

  @property
  def grid(self) -> tuple[int, int]:
    """(rows, columns) of patches."""
    return (self.image_size // self.patch,) * 2

  @property
  def special(self) -> int:
    """Special tokens; they lead the sequence: [CLS], distillation, registers."""
    return self.class_token + self.distilled + self.registers

  @property
  def host(self) -> Host:
    """What a plan needs to know of this model."""
    slots = self.special + self.grid[0] * self.grid[1]
    offers = OFFERS | {'cls_attention'} if self.class_token else OFFERS
    return Host(self.depth, slots, self.special, offers)

  @nn.compact
  def __call__(self, images: Array) -> tuple[Array, dict[str, Any]]:
    """Classifies images.

    Args:
      images: float[B, S, S, C], normalised, S = image_size.

    Returns:
      Logits float32[B, num_classes] (features float32[B, D] where num_classes is 0), and a dict:
      'tokens' (the final TokenSet, normed), 'pre_logits' float32[B, D], with a distillation token
      'heads' (both heads' logits), and what models/stack.py adds.

    Raises:
      ValueError: for images of another size, or settings that contradict each other.
    """
    self._check(images)
    tokens = self._embed(images)
    block = Block(self.width, self.heads, self.mlp, self.dropout, self.norm_eps, self.dtype,
                  self.implementation, self.mesh, parent=None)
    tokens, out = Stack(block, self.depth, self.plan, self.grid, self.remat, self.mesh,
                        self.capture, name='stack')(tokens)
    norm = nn.LayerNorm(epsilon=self.norm_eps, dtype=jnp.float32, use_fast_variance=False,
                        name='norm')
    tokens = tokens.replace(x=norm(tokens.x))
    pooled = tokens.x[:, 0] if self.pool == 'cls' else _mean(tokens)
    out |= {'tokens': tokens, 'pre_logits': pooled}
    if not self.num_classes:
      return pooled, out

    def head(name: str, x: Array) -> Array:
      return nn.Dense(self.num_classes, dtype=jnp.float32, name=name,
                      kernel_init=nn.initializers.zeros)(x)

    logits = head('head', pooled)
    if self.distilled:
      out['heads'] = logits, head('head_dist', tokens.x[:, 1])
      logits = sum(out['heads']) / 2
    return logits, out

  def _check(self, images: Array) -> None:
    wanted = (self.image_size, self.image_size, self.channels)
    if images.ndim != 4 or images.shape[1:] != wanted:
      raise ValueError(f'images of shape {images.shape} do not fit: expected [batch, '
                       f'{", ".join(map(str, wanted))}]; resize them, or set image_size and '
                       'channels')
    if self.image_size % self.patch:
      raise ValueError(f'image_size={self.image_size} is not a multiple of patch={self.patch}: '
                       'change one of them')
    if self.positions not in POSITIONS or self.pool not in POOLS:
      raise ValueError(f'positions={self.positions!r} must be one of {", ".join(POSITIONS)} and '
                       f'pool={self.pool!r} one of {", ".join(POOLS)}')
    if not self.class_token and (self.pool == 'cls' or self.distilled):
      raise ValueError("without a [CLS] token there is nothing to pool by 'cls' or to distil "
                       "beside: set pool='mean' and distilled=False")

  def _embed(self, images: Array) -> TokenSet:
    batch, (rows, columns), side = images.shape[0], self.grid, self.patch
    patches = images.reshape(batch, rows, side, columns, side, self.channels)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
    x = nn.Dense(self.width, dtype=self.dtype, name='patch',
                 kernel_init=nn.initializers.lecun_normal())(patches)
    placed = self.class_token + self.distilled
    normal = nn.initializers.normal(0.02)
    lead = [self.param(name, normal, (1, 1, self.width))
            for name, wanted in (('cls', self.class_token), ('dist', self.distilled)) if wanted]
    x = jnp.concatenate([jnp.broadcast_to(t, (batch, 1, self.width)).astype(x.dtype)
                         for t in lead] + [x], axis=1)
    if self.positions == 'learned':
      places = self.param('pos', normal, (1, placed + rows * columns, self.width))
    else:
      table = sincos(self.grid, self.width)
      places = jnp.asarray(np.pad(table, ((placed, 0), (0, 0))))[None]
    x = x + places.astype(x.dtype)
    if self.registers:
      extra = self.param('registers', normal, (1, self.registers, self.width)).astype(x.dtype)
      extra = jnp.broadcast_to(extra, (batch, self.registers, self.width))
      x = jnp.concatenate([x[:, :placed], extra, x[:, placed:]], axis=1)
    x = nn.Dropout(self.dropout)(x, deterministic=not self.has_rng('dropout'))
    return TokenSet.create(x, protected=self.special, **self._layout(batch))

  def _layout(self, batch: int) -> dict[str, Array]:
    """Kinds and positions of the sequence: special tokens lead, patches follow in raster order."""
    patches = self.grid[0] * self.grid[1]
    kind = np.repeat(np.array([SPECIAL, VISUAL], np.int8), (self.special, patches))
    pos = np.concatenate([np.full(self.special, -1), np.arange(patches)]).astype(np.int32)
    return {'kind': jnp.broadcast_to(kind, (batch, kind.size)),
            'pos': jnp.broadcast_to(pos, (batch, pos.size))}


def _mean(tokens: TokenSet) -> Array:
  """Mean of the patch tokens, each weighted by how many it stands for: float32[B, D]."""
  weight = jnp.where(tokens.real & (tokens.kind == VISUAL), tokens.sizes, 0.0)
  total = jnp.einsum('bn,bnd->bd', weight, tokens.x)
  return total / jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1e-6)


def sincos(grid: tuple[int, int], width: int) -> np.ndarray:
  """Fixed 2-D positions float32[rows * columns, width]: half for columns, half for rows.

  Each half holds sines, then cosines, at frequencies 10000^(-i / (width / 4)); MAE,
  arXiv:2111.06377, released code.
  """
  if width % 4:
    raise ValueError(f'sin-cos positions need a width divisible by 4, got {width}')
  frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
  rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing='ij')
  parts = []
  for axis in (columns, rows):
    angles = axis.reshape(-1, 1) * frequencies
    parts += [np.sin(angles), np.cos(angles)]
  return np.concatenate(parts, axis=1).astype(np.float32)


def make_vit(variant: str, **overrides: Any) -> ViT:
  """A ViT by name: size/patch, as 'S/16'; overrides are fields of ViT.

  Raises:
    ValueError: for an unknown size or a field that ViT does not have.
  """
  size, _, patch = variant.partition('/')
  if size not in SIZES or not patch.isdigit():
    raise ValueError(f'variant {variant!r} is unknown: write size/patch, as S/16, with a size of '
                     f'{", ".join(SIZES)}')
  fields = [f.name for f in dataclasses.fields(ViT) if f.name not in ('parent', 'name')]
  for key in overrides:
    if key not in fields:
      near = difflib.get_close_matches(key, fields, n=1)
      hint = f' (did you mean {near[0]!r}?)' if near else ''
      raise ValueError(f'a ViT has no setting {key!r}{hint}: choose from {", ".join(fields)}')
  width, depth, mlp, heads = SIZES[size]
  settings = {'width': width, 'depth': depth, 'mlp': mlp, 'heads': heads, 'patch': int(patch),
              'image_size': 224, 'num_classes': 1000}
  return ViT(**(settings | overrides))
