"""Vision transformers: one file for ViT, DeiT, MAE, DINOv2 and the image towers of CLIP and SigLIP.

An Image is Worth 16x16 Words (Dosovitskiy et al., 2021), arXiv:2010.11929; distillation token from
DeiT (Touvron et al., 2021), arXiv:2012.12877; registers from Darcet et al. (2024),
arXiv:2309.16588; layer scale from CaiT (Touvron et al., 2021), arXiv:2103.17239; attention pooling
from Zhai et al. (2022), arXiv:2106.04560. What a family sets is data, in models/families.py.

Axes: B batch, N slots, D width, H heads, d width of a head, P patch side in pixels.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from models.backbones.windows import Windows, WindowStack
from models.blocks import (
  ACTIVATIONS,
  Heads,
  ReducibleBlock,
  check_heads,
  dense,
  hidden_features,
  layer_norm,
)
from models.families import NAMED, SIZES
from models.plans.events import Plan
from models.plans.hosts import Host
from models.stack import REMAT, Outputs, Stack
from ops import attention, choices, values
from ops.primitives.grids import sincos
from ops.primitives.select import keep_top
from ops.tokens import SPECIAL, VISUAL, TokenSet, key_bias, reduce

Array = jax.Array

POSITIONS = ('learned', 'sincos')
POOLS = ('cls', 'mean', 'cls_mean', 'map')
LAST_NORMS = ('tokens', 'pooled')
RESAMPLINGS = ('bicubic', 'bicubic_antialiased', 'bilinear_antialiased')
OFFERS = frozenset({'keys', 'queries', 'values', 'plain_keys', 'received_attention', 'attention',
                    'next_received_attention', 'next_hidden', 'hidden', 'grid', 'layer', 'depth',
                    'slots', 'one_sequence'})


class Block(ReducibleBlock):
  """Pre-norm transformer block; norms and softmax in float32, products in `dtype`.

  Attributes:
    activation: of the MLP, a name in `ACTIVATIONS`; 'swiglu' makes fc1 two products.
    layer_scale: what a learned factor a feature starts from, on each branch; None for none.
    causal: whether a token sees only tokens whose `pos` is not after its own, whatever their slots.
  """

  width: int
  heads: int
  mlp: int
  dropout: float = 0.0
  norm_eps: float = 1e-6
  dtype: DTypeLike = jnp.float32
  implementation: str = 'xla'
  mesh: Mesh | None = None
  activation: str = 'gelu'
  layer_scale: float | None = None
  causal: bool = False

  def setup(self) -> None:
    """Two norms, attention's projections and the MLP's."""
    super().setup()
    self.qkv = Heads(self.heads, self.dtype)
    self.fc1 = dense(hidden_features(self.mlp, self.activation), self.dtype)
    self.fc2 = dense(self.width, self.dtype)
    self.drop = nn.Dropout(self.dropout)
    scales: list[Array | None] = [None, None]
    if self.layer_scale is not None:
      start = nn.initializers.constant(self.layer_scale)
      scales = [self.param(name, start, (self.width,)) for name in ('ls1', 'ls2')]
    self.scale1, self.scale2 = scales

  def make_norm(self) -> nn.Module:
    """Makes the norm that stands before attention, and before the MLP."""
    return layer_norm(self.norm_eps)

  def make_out(self) -> nn.Module:
    """Makes the product of what attention reads."""
    return dense(self.width, self.dtype, axis=(-2, -1))

  def rotate_qk(self, tokens: TokenSet, q: Array, k: Array) -> tuple[Array, Array]:
    """Queries and keys as attention takes them: a block with rotary positions turns them."""
    del tokens
    return q, k

  @property
  def is_causal(self) -> bool:
    """Returns whether a token sees only those before it."""
    return self.causal

  def project(self, hidden: Array, tokens: TokenSet) -> tuple[Array, Array, Array, Array]:
    """Returns queries, keys, queries before rotation, and values, by one product."""
    q, k, v = self.qkv(hidden)
    return (*self.rotate_qk(tokens, q, k), q, v)

  def queries_and_keys(self, hidden: Array, tokens: TokenSet) -> tuple[Array, Array, Array]:
    """Returns queries and keys float[B, N, H, d], and queries before rotation."""
    q, k = self.qkv(hidden, last=2)
    return (*self.rotate_qk(tokens, q, k), q)

  def values(self, hidden: Array) -> Array:
    """Returns values float[B, N, H, d]."""
    v, = self.qkv(hidden, first=2)
    return v

  def order(self, tokens: TokenSet) -> dict[str, Any]:
    """Returns the positions that order causal attention, None for full attention."""
    return {'positions': tokens.pos if self.causal else None}

  def inner(self, hidden: Array) -> Array:
    """Returns the MLP's inner activations, float[B, N, F]."""
    return ACTIVATIONS[self.activation](self.fc1(hidden))

  def outer(self, inner: Array) -> Array:
    """Returns the MLP's output, float[B, N, D]."""
    return self.fc2(inner)

  def residual(self, x: Array, made: Array, branch: int) -> Array:
    """Returns what was made, with the layer scale of its branch, and dropout."""
    del x
    scale = (self.scale1, self.scale2)[branch]
    if scale is not None:
      made = made * scale.astype(made.dtype)[None, None]
    return self.drop(made, deterministic=not self.has_rng('dropout'))


class AttentionPool(nn.Module):
  """One learned query attends to all tokens, then an MLP: a head for a model without [CLS].

  Scaling Vision Transformers (Zhai et al., 2022), arXiv:2106.04560; SigLIP, arXiv:2303.15343.
  """

  heads: int
  mlp: int
  activation: str
  norm_eps: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, tokens: TokenSet, *, proportional: bool) -> Array:
    """The pooled features float[B, D]; `proportional` as in the blocks."""
    batch, _, width = tokens.x.shape
    probe = self.param('probe', nn.initializers.xavier_uniform(), (1, 1, width))
    qkv = Heads(self.heads, self.dtype, name='qkv')
    q, = qkv(jnp.broadcast_to(probe, (batch, 1, width)), last=1)
    k, v = qkv(tokens.x, first=1)
    # One row: no kernel gains anything on it.
    mixed = attention.attend(q, k, v, bias=key_bias(tokens, proportional=proportional))
    pooled = dense(width, self.dtype, axis=(-2, -1), name='out')(mixed.out)
    hidden = layer_norm(self.norm_eps, name='norm')(pooled)
    hidden = dense(hidden_features(self.mlp, self.activation), self.dtype, name='fc1')(hidden)
    change = dense(width, self.dtype, name='fc2')(ACTIVATIONS[self.activation](hidden))
    return (pooled + change)[:, 0].astype(jnp.float32)


class ViT(nn.Module):
  """A vision transformer classifier.

  Attributes:
    width, depth, mlp, heads: as in `SIZES`.
    patch: side of a patch in pixels.
    image_size: side of the square input in pixels, or (height, width).
    num_classes: logits; 0 for features only.
    registers: register tokens after [CLS]; they get no position.
    special_positions: whether [CLS] and distillation tokens get one.
    distilled: adds DeiT's distillation token and its own head; the logits are the heads' mean.
    positions: 'learned' or 'sincos' (fixed, 2-D, zero for special tokens; MAE, arXiv:2111.06377).
    pool: 'cls'; 'mean' over the patch tokens, each as often as it has original tokens; 'cls_mean',
      one after the other; or 'map', an `AttentionPool`.
    last_norm: of 'tokens', or of what was 'pooled' from them.
    projection: features after pooling by a product without bias (CLIP), 0 for none.
    class_token: whether there is a [CLS] token.
    patch_bias: whether the patch embedding has a bias.
    pre_norm: whether a norm stands before the first block (CLIP).
    activation, layer_scale: see `Block`.
    dtype: of the products; parameters, norms, softmax and logits stay float32.
    plan: what to reduce where (models/plans/), or None.
    implementation: of attention: 'xla', 'cudnn' or a TPU kernel (ops/attention.py picks).
    mesh, remat, capture: see models/stack.py.
    window: (rows, columns) of windows that attention and reductions stay in
      (models/backbones/windows.py), None for none.
    whole_layers: with a window, the layers whose attention sees the whole image all the same.
    layers: (start, stop) to run a part of the model (models/decoding/buckets.py), None for all of
      it.
    training_patches: patches that each image keeps in training, drawn anew in every step; 0 for
      all. PatchDropout (Liu et al., 2023), arXiv:2208.07220; evaluation sees every patch.
    position_resampling: how the release resamples positions for images of another size, one of
      `RESAMPLINGS` (models/checkpoints/positions.py); the model itself does not.
  """

  width: values.Width
  depth: values.Depth
  mlp: values.Width
  heads: values.Count
  patch: values.Pixels
  image_size: values.Pixels | tuple[values.Pixels, values.Pixels]
  num_classes: values.CountOrZero
  channels: values.Count = 3
  registers: values.CountOrZero = 0
  special_positions: bool = True
  distilled: bool = False
  class_token: bool = True
  positions: Annotated[str, values.OneOf(POSITIONS)] = 'learned'
  pool: Annotated[str, values.OneOf(POOLS)] = 'cls'
  last_norm: Annotated[str, values.OneOf(LAST_NORMS)] = 'tokens'
  projection: values.WidthOrZero = 0
  patch_bias: bool = True
  pre_norm: bool = False
  activation: Annotated[str, values.OneOf(ACTIVATIONS)] = 'gelu'
  layer_scale: float | None = None
  dropout: values.Rate = 0.0
  norm_eps: values.NotNegative = 1e-6
  dtype: DTypeLike = jnp.float32
  implementation: str = 'xla'
  plan: Plan | None = None
  mesh: Mesh | None = None
  remat: Annotated[str, values.OneOf(REMAT)] = 'none'
  capture: bool = False
  window: tuple[values.Count, values.Count] | None = None
  whole_layers: tuple[values.CountOrZero, ...] = ()
  layers: tuple[values.CountOrZero, values.CountOrZero] | None = None
  training_patches: values.CountOrZero = 0
  position_resampling: Annotated[str, values.OneOf(RESAMPLINGS)] = 'bicubic_antialiased'

  def __post_init__(self) -> None:
    values.check_fields(self)
    check_heads(self.width, self.heads)
    if any(side % self.patch for side in self.input_shape[:2]):
      raise ValueError(f'image_size={self.image_size} is not a multiple of patch={self.patch}: '
                       'change one of them')
    super().__post_init__()

  @property
  def grid(self) -> tuple[int, int]:
    """(rows, columns) of patches."""
    height, width, _ = self.input_shape
    return height // self.patch, width // self.patch

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of an image."""
    size = self.image_size
    return (*((size, size) if isinstance(size, int) else size), self.channels)

  @property
  def classes(self) -> int:
    """Number of classes of the logits."""
    return self.num_classes

  @property
  def special(self) -> int:
    """Special tokens; they lead the sequence: [CLS], distillation, registers."""
    return self.class_token + self.distilled + self.registers

  @property
  def host(self) -> Host:
    """Describes this model to plans."""
    slots = self.special + self.grid[0] * self.grid[1]
    offers = OFFERS | {'cls_attention', 'cls_logits'} if self.class_token else OFFERS
    return Host(self.depth, slots, self.special, offers)

  @nn.compact
  def __call__(self, images: Array | TokenSet) -> tuple[Array | TokenSet, Outputs]:
    """Classifies images.

    Args:
      images: float[B, height, width, C], normalised, of image_size; or, where `layers` starts
        after layer 0, the TokenSet that the part before returned. All parts but the last return
        one.

    Returns:
      Logits float32[B, num_classes] (features float32[B, D'] where num_classes is 0, with D' the
      projection, 2 D under pool='cls_mean', else D), and a dict: 'tokens' (the final TokenSet,
      normed under last_norm='tokens'), 'pre_logits' float32[B, D'], with a distillation token
      'heads' (both heads' logits), with `capture` 'embedded' float[B, N, D], what enters the first
      block, and what models/stack.py adds.

    Raises:
      ValueError: for images of another size, or settings that contradict each other.
    """
    tokens = images
    if not isinstance(tokens, TokenSet):
      self._check(tokens)
      tokens = self._embed(tokens)
      if self.training_patches and self.has_rng('dropout'):
        tokens = self._drop_patches(tokens)
    embedded = tokens.x
    tokens, out = self._stack()(tokens)
    if self.capture:
      out['embedded'] = embedded
    if self.layers and self.layers[1] < self.depth:
      return tokens, out
    norm = layer_norm(self.norm_eps, name='norm')
    if self.last_norm == 'tokens':
      tokens = tokens.replace(x=norm(tokens.x))
    pooled = self._pool(tokens)
    if self.last_norm == 'pooled':
      pooled = norm(pooled)
    if self.projection:
      pooled = nn.Dense(self.projection, use_bias=False, dtype=jnp.float32, name='projection',
                        kernel_init=nn.initializers.lecun_normal())(pooled)
    out |= {'tokens': tokens, 'pre_logits': pooled}
    if not self.num_classes:
      return pooled, out

    def head(name: str, x: Array) -> Array:
      return nn.Dense(self.num_classes, dtype=jnp.float32, name=name,
                      kernel_init=nn.initializers.zeros)(x)

    logits = head('head', pooled)
    if self.distilled:
      out['heads'] = logits, head('head_dist', tokens.x[:, 1])
      logits = cast(Array, sum(out['heads']) / 2)
    return logits, out

  def _stack(self) -> Stack:
    """The blocks, in windows or not."""
    block = Block(self.width, self.heads, self.mlp, self.dropout, self.norm_eps, self.dtype,
                  self.implementation, self.mesh, self.activation, self.layer_scale, parent=None)
    settings: dict[str, Any] = {
        'block': block, 'depth': self.depth, 'plan': self.plan, 'remat': self.remat,
        'mesh': self.mesh, 'capture': self.capture, 'name': 'stack'}
    if self.window is None:
      return Stack(**settings, grid=self.grid, layers=self.layers)
    windows = Windows(self.grid, self.window, self.special)
    return WindowStack(**settings, grid=self.window, windows=windows, whole=self.whole_layers)

  def _pool(self, tokens: TokenSet) -> Array:
    """float[B, D]; [B, 2 D] for 'cls_mean'."""
    if self.pool == 'map':
      proportional = bool(self.plan and self.plan.proportional)
      return AttentionPool(self.heads, self.mlp, self.activation, self.norm_eps, self.dtype,
                           name='pool')(tokens, proportional=proportional)
    if self.pool == 'cls':
      return tokens.x[:, 0]
    mean = _mean(tokens)
    return mean if self.pool == 'mean' else jnp.concatenate([tokens.x[:, 0], mean], axis=1)

  def _check(self, images: Array) -> None:
    wanted = self.input_shape
    if images.ndim != 4 or images.shape[1:] != wanted:
      raise ValueError(f'images of shape {images.shape} do not fit: expected [batch, '
                       f'{", ".join(map(str, wanted))}]; resize them, or set image_size and '
                       'channels')
    patches = self.host.slots - self.special
    if not 0 <= self.training_patches <= patches or (self.training_patches and self.window):
      raise ValueError(f'training_patches={self.training_patches} is impossible: give 1 to '
                       f'{patches}, or 0 for all of them, and window=None')
    if self.window and self.layers:
      raise ValueError(f'layers={self.layers} cannot be run alone in windows: set window=None, or '
                       'layers=None')
    if not self.class_token and ('cls' in self.pool or self.distilled):
      raise ValueError("without a [CLS] token there is nothing to pool by 'cls' or to distil "
                       "beside: set pool='mean' or 'map' and distilled=False")

  def _drop_patches(self, tokens: TokenSet) -> TokenSet:
    scores = jax.random.uniform(self.make_rng('dropout'), (tokens.x.shape[0], tokens.slots))
    return reduce(tokens, keep_top(tokens, scores, num_slots=self.special + self.training_patches))

  def _embed(self, images: Array) -> TokenSet:
    batch, (rows, columns), side = images.shape[0], self.grid, self.patch
    patches = images.reshape(batch, rows, side, columns, side, self.channels)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
    x = nn.Dense(self.width, dtype=self.dtype, name='patch', use_bias=self.patch_bias,
                 kernel_init=nn.initializers.lecun_normal())(patches)
    leading = self.class_token + self.distilled
    placed = leading if self.special_positions else 0
    normal = nn.initializers.normal(0.02)
    lead = [self.param(name, normal, (1, 1, self.width))
            for name, wanted in (('cls', self.class_token), ('dist', self.distilled)) if wanted]
    x = jnp.concatenate([jnp.broadcast_to(t, (batch, 1, self.width)).astype(x.dtype)
                         for t in lead] + [x], axis=1)
    if self.positions == 'learned':
      embedding = self.param('pos', normal, (1, placed + rows * columns, self.width))
    else:
      table = sincos(self.grid, self.width)
      embedding = jnp.asarray(np.pad(table, ((placed, 0), (0, 0))))[None]
    if placed < leading:
      embedding = jnp.pad(embedding, ((0, 0), (leading, 0), (0, 0)))
    x = x + embedding.astype(x.dtype)
    if self.registers:
      extra = self.param('registers', normal, (1, self.registers, self.width)).astype(x.dtype)
      extra = jnp.broadcast_to(extra, (batch, self.registers, self.width))
      x = jnp.concatenate([x[:, :leading], extra, x[:, leading:]], axis=1)
    x = nn.Dropout(self.dropout)(x, deterministic=not self.has_rng('dropout'))
    if self.pre_norm:
      x = layer_norm(self.norm_eps, name='norm_pre')(x).astype(x.dtype)
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


def make_vit(variant: str, **overrides: Any) -> ViT:
  """A ViT by name: size/patch, as 'S/16', or one of models/families.py, as 'dinov2_s14'.

  Args:
    variant: the name.
    **overrides: fields of ViT that differ.

  Raises:
    ValueError: for an unknown size or name, or a field that ViT does not have.
  """
  size, _, patch = variant.partition('/')
  if variant in NAMED:
    named = dict(NAMED[variant])
    size, patch = named.pop('size'), named.pop('patch')
  elif size in SIZES and patch.isdigit():
    named = {}
  else:
    raise ValueError(f'variant {variant!r} is unknown{choices.near(variant, NAMED)}: write '
                     f'size/patch, as S/16, with a size of {", ".join(SIZES)}, or one '
                     f'of {", ".join(NAMED)}')
  fields = [f.name for f in dataclasses.fields(ViT) if f.name not in ('parent', 'name')]
  for key in overrides:
    choices.check_key('a ViT has no setting ', key, fields)
  width, depth, mlp, heads = SIZES[size]
  settings: dict[str, Any] = {
      'width': width, 'depth': depth, 'mlp': mlp, 'heads': heads, 'patch': int(patch),
      'image_size': 224, 'num_classes': 1000}
  settings |= named | overrides
  if not isinstance(settings['image_size'], int):  # A list where it comes of JSON.
    settings['image_size'] = tuple(settings['image_size'])
  return ViT(**settings)
