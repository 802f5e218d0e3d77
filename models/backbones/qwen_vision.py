"""Vision towers of Qwen2-VL and Qwen2.5-VL: images of any size, rotary positions, merged patches.

Qwen2-VL (Wang et al., 2024), Sec. 2.1, arXiv:2409.12191; Qwen2.5-VL (Bai et al., 2025), Sec. 2.1,
arXiv:2502.13923: RMSNorm, a gated MLP, and attention in windows but for a few layers.

A row is one image, or two frames of a video that share patches. Its patches fill the upper left of
a static grid; the rest is padding. lib/data/preprocess.py makes them.

Axes: F rows, R, C rows and columns of the grid, N = R * C patches, m side of a merged cell, M
cells, P numbers of a patch, D width, O width of the language model, H heads, d features a head.
"""

from __future__ import annotations

from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from models.backbones.vit import OFFERS, Block
from models.backbones.windows import Windows, WindowStack
from models.blocks import ACTIVATIONS, check_heads, dense, layer_norm
from models.plans.events import Plan
from models.plans.hosts import Host
from models.stack import Outputs, Stack
from ops import tokens as tk
from ops import values
from ops.tokens import TokenSet

Array = jax.Array

NORMS = ('layer', 'rms')
THETA = 10000.0


def make_norm(norm: str, eps: float, name: str | None = None) -> nn.Module:
  """A norm in float32, by its name in `NORMS`."""
  if norm == 'rms':
    return nn.RMSNorm(epsilon=eps, dtype=jnp.float32, name=name)
  return layer_norm(eps, name)


def rotate(x: Array, patches: Array) -> Array:
  """Turns float[F, N, H, d] by rows and columns int[F, N, 2]: a half of the angles each.

  Features turn in pairs (i, i + d / 2), at frequencies 10000^(-4 i / d) of the row for the first
  d / 4 pairs, and of the column for the others.
  """
  quarter = x.shape[-1] // 4
  frequencies = (THETA ** (-np.arange(quarter) / quarter)).astype(np.float32)
  angles = patches[..., None].astype(jnp.float32) * frequencies[None, None, None]
  angles = angles.reshape(*patches.shape[:2], 1, 2 * quarter)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x.dtype)


class RotaryBlock(Block):
  """A ViT block whose queries and keys turn with the patch's place, `stats['patch']` int[F, N, 2].

  Attributes:
    norm: a name in `NORMS`.
  """

  norm: str = 'layer'

  def make_norm(self) -> nn.Module:
    """The norm before attention and before the MLP."""
    return make_norm(self.norm, self.norm_eps)

  def rotate_qk(self, tokens: TokenSet, q: Array, k: Array) -> tuple[Array, Array]:
    """Rotated queries and keys; a group turns with its anchor's place."""
    patches = tokens.stats['patch']
    return rotate(q, patches), rotate(k, patches)

  def plain_keys(self, tokens: TokenSet, k: Array) -> Array:
    """Turns keys back."""
    return rotate(k, -tokens.stats['patch'])


class QwenVision(nn.Module):
  """Patches to one token for every cell of 2 x 2 of them, in the width of the language model.

  A reduction inside the tower takes patches; the merger needs cells whole, so every patch gets its
  group's features back, and a dropped one zeros. A cell without any patch left is padding.

  Attributes:
    width, depth, mlp, heads: of the blocks.
    projection: O.
    grid: (R, C), which every image must fit into; a multiple of `merge`, and of `window`.
    patch, temporal, channels: side of a patch in pixels, frames and channels of one: P is their
      product, with `patch` squared.
    merge: m.
    norm: 'layer' (Qwen2-VL) or 'rms' (Qwen2.5-VL).
    activation: of the MLP: 'quick_gelu' or 'swiglu'.
    window: side in patches of the windows of attention, 0 for none.
    whole_layers: with windows, the layers whose attention sees the whole image all the same.
    norm_eps, dtype, implementation, plan, mesh, remat, capture: as in ViT.
  """

  width: values.Width
  depth: values.Depth
  mlp: values.Width
  heads: values.Count
  projection: values.Width
  grid: tuple[values.Count, values.Count]
  patch: values.Pixels = 14
  temporal: values.Count = 2
  channels: values.Count = 3
  merge: values.Count = 2
  norm: Annotated[str, values.OneOf(NORMS)] = 'layer'
  activation: Annotated[str, values.OneOf(ACTIVATIONS)] = 'quick_gelu'
  window: values.CountOrZero = 0
  whole_layers: tuple[values.CountOrZero, ...] = ()
  norm_eps: values.NotNegative = 1e-6
  dtype: DTypeLike = jnp.float32
  implementation: str = 'xla'
  plan: Plan | None = None
  mesh: Mesh | None = None
  remat: str = 'none'
  capture: bool = False

  def __post_init__(self) -> None:
    values.check_fields(self)
    check_heads(self.width, self.heads)
    super().__post_init__()

  @property
  def numbers(self) -> int:
    """P."""
    return self.channels * self.temporal * self.patch ** 2

  @property
  def cells(self) -> tuple[int, int]:
    """(rows, columns) of merged cells."""
    return self.grid[0] // self.merge, self.grid[1] // self.merge

  @property
  def host(self) -> Host:
    """Describes this model to plans; it has no [CLS] token."""
    return Host(self.depth, self.grid[0] * self.grid[1], 0, OFFERS)

  @nn.compact
  def __call__(self, patches: Array, sizes: Array) -> tuple[TokenSet, Outputs]:
    """Encodes images.

    Args:
      patches: float[F, R, C, P], a patch's numbers by channel, frame, row and column.
      sizes: int[F, 2], rows and columns of each image's own patches, multiples of `merge`.

    Returns:
      Tokens float[F, M, O] in raster order, `pos` their place in the grid of cells, `valid` False
      beyond the image, with the stats that a plan's method left, averaged over the cell; and what
      models/stack.py tells, with 'tokens', the TokenSet of patches.

    Raises:
      ValueError: patches that do not fit, or settings that contradict each other.
    """
    self._check(patches)
    batch, (rows, columns) = len(patches), self.grid
    x = nn.Dense(self.width, use_bias=False, dtype=self.dtype, name='patch',
                 kernel_init=nn.initializers.lecun_normal())(
                     patches.reshape(batch, rows * columns, -1))
    indices = jnp.asarray(np.moveaxis(np.indices(self.grid), 0, -1).reshape(1, -1, 2), jnp.int32)
    valid = (indices < sizes[:, None]).all(axis=-1)
    indices = jnp.broadcast_to(indices, (batch, rows * columns, 2))
    tokens, out = self._stack()(TokenSet.create(x, valid=valid, stats={'patch': indices}))
    return self._merged(tokens, valid), out | {'tokens': tokens}

  def _merged(self, tokens: TokenSet, valid: Array) -> TokenSet:
    """One token a cell."""
    present = valid & (tokens.owner >= 0)
    hidden = make_norm(self.norm, self.norm_eps, 'merger_norm')(tk.restore(tokens, tokens.x))
    # Not what the norm makes of nothing.
    hidden = self._cells(jnp.where(present[..., None], hidden, 0.0).astype(self.dtype))
    batch, count = hidden.shape[:2]
    hidden = hidden.reshape(batch, count, -1)
    hidden = ACTIVATIONS['gelu'](dense(hidden.shape[-1], self.dtype, name='merger_fc1')(hidden))
    hidden = dense(self.projection, self.dtype, name='merger_fc2')(hidden)
    share = self._cells(present[..., None].astype(jnp.float32))
    real = share.sum(axis=2)[..., 0]

    def mean(values: Array) -> Array:
      """Of a cell's patches that are there."""
      values = tk.restore(tokens, values).astype(jnp.float32)
      mask = present.reshape(present.shape + (1,) * (values.ndim - 2))
      cells = self._cells(jnp.where(mask, values, 0.0))
      return cells.sum(axis=2) / jnp.maximum(real, 1.0).reshape(
          real.shape + (1,) * (values.ndim - 2))

    stats = {name: mean(values) for name, values in tokens.stats.items() if name != 'patch'}
    return TokenSet.create(hidden, valid=real > 0, stats=stats)

  def _cells(self, values: Array) -> Array:
    """[F, N, ...] in raster order -> [F, M, m * m, ...], a cell's patches row by row."""
    (rows, columns), side = self.cells, self.merge
    values = values.reshape(len(values), rows, side, columns, side, *values.shape[2:])
    values = jnp.swapaxes(values, 2, 3)
    return values.reshape(len(values), rows * columns, side * side, *values.shape[5:])

  def _stack(self) -> Stack:
    block = RotaryBlock(self.width, self.heads, self.mlp, 0.0, self.norm_eps, self.dtype,
                        self.implementation, self.mesh, self.activation, norm=self.norm,
                        parent=None)
    settings: dict[str, Any] = {
        'block': block, 'depth': self.depth, 'plan': self.plan, 'remat': self.remat,
        'mesh': self.mesh, 'capture': self.capture, 'name': 'stack'}
    if not self.window:
      return Stack(**settings, grid=self.grid)
    window = (self.window, self.window)
    return WindowStack(**settings, grid=window, windows=Windows(self.grid, window),
                       whole=self.whole_layers)

  def _check(self, patches: Array) -> None:
    wanted = (*self.grid, self.numbers)
    if patches.ndim != 4 or patches.shape[1:] != wanted:
      raise ValueError(f'patches of shape {patches.shape} do not fit: expected [rows, '
                       f'{", ".join(map(str, wanted))}]; make them with lib/data/preprocess.py, or '
                       'set grid')
    unit = self.window or self.merge
    if any(side % unit for side in self.grid) or unit % self.merge:
      raise ValueError(f'grid={self.grid} must be a multiple of {unit} each way (windows of '
                       f'{self.window} patches, cells of {self.merge})')
