"""TimeSuite: neighbours of a video become one token, and convolutions over time add its place.

Axes: B batch, N tokens of the tower, M tokens that are left, W width of the tower, C width of the
convolutions, D width of the language model.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from models.blocks import ACTIVATIONS, dense, layer_norm
from models.projectors.base import Array, Beside, Compressor, Names, identity
from ops import choices
from ops.primitives import products
from ops.primitives.grids import Grid
from ops.tokens import TokenSet
from ops.values import Count, OneOf

EPS = 1e-5
POSITIONS = ('adaptive', 'none')
# Each of two convolutions leaves one place of so many; C is so many times narrower than W.
STRIDE, NARROWER = 4, 4


def _stage(path: str, name: str) -> dict[str, str]:
  """Names of a stage's parameters in the release."""
  return {f'{path}/{own}': f'{name}.{theirs}' for own, theirs in (
      ('along/weight', '0.weight'), ('along/shift', '0.bias'), ('across/weight', '1.weight'),
      ('across/shift', '1.bias'), ('norm', '2.*'))}


class TimeSuite(Compressor):
  """Joins neighbours of a video's tokens to one, and adds what convolutions make of their places.

  TimeSuite (Zeng et al., 2024), arXiv:2410.19702, VideoChat-T as released. Tokens go
  through a product of their own width, the identity at first, `join` in a row are laid side by side
  and projected: the token shuffle. Beside it the temporal adaptive position encoding (TAPE): a
  narrow copy of the tokens, averaged by `join`, runs down two depthwise convolutions of stride 4
  and up again, with a sum at each length; as its borders see zeros it can tell places. What it adds
  is nothing at first. An image has no time, and keeps all tokens: each stands `join` times in a
  row, and nothing is added. The release starts the product of `join` tokens from that of one,
  repeated and divided; here it starts at random.

  It reads a grid (frames, rows, columns) as one row of tokens. In the release these are 96 of a
  Q-Former for each clip of 8 frames, a grid (16, 1, 96).

  Attributes:
    join: neighbours in a token, an even number.
    reach: places beside its own that the middle convolution reads, an even number; the release has
      one for each clip.
    positions: 'adaptive', or 'none' for the token shuffle alone.
  """

  join: Count = 4
  reach: Count = 16
  positions: Annotated[str, OneOf(POSITIONS)] = 'adaptive'
  released: ClassVar[Names] = {
      'tokens': 'clip_proj.*', 'joined': 'merge_proj.*',
      'places/narrow': 'temp_adap.linear_input.*', 'places/wide': 'temp_adap.linear_output.*',
      **_stage('places/down1', 'temp_adap.DwConv1'), **_stage('places/down2', 'temp_adap.DwConv2'),
      'places/middle/weight': 'temp_adap.fc.0.weight',
      'places/middle/shift': 'temp_adap.fc.0.bias', 'places/norm': 'temp_adap.fc.1.*',
      **_stage('places/up1', 'temp_adap.UpConv1'), **_stage('places/up0', 'temp_adap.UpConv0')}

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.join % 2 or self.reach % 2:
      raise ValueError(f'join={self.join} and reach={self.reach} have convolutions with a middle '
                       'only where both are even: change them')

  def grid_after(self, grid: Grid) -> Grid | None:
    """Returns the grid with fewer columns, of an image as it is; None where runs break over rows.

    Raises:
      ValueError: a video with a number of tokens that it cannot divide.
    """
    if len(grid) == 2:
      return grid
    self._check(grid)
    return None if grid[-1] % self.join else (*grid[:-1], grid[-1] // self.join)

  def slots(self, grid: Grid) -> int:
    """Returns M: of an image all tokens."""
    if len(grid) == 2:
      return math.prod(grid)
    self._check(grid)
    return math.prod(grid) // self.join

  def _check(self, grid: Grid) -> None:
    """Raises unless a video's tokens can be joined, and their places halved and doubled again."""
    whole = self.join * (STRIDE ** 2 if self.positions == 'adaptive' else 1)
    if math.prod(grid) % whole:
      raise ValueError(f'TimeSuite with join={self.join} and positions={self.positions!r} takes a '
                       f'multiple of {whole} tokens, and {grid} has {math.prod(grid)}: choose '
                       "another number of frames, or positions='none'")

  @nn.compact
  def __call__(self, tokens: TokenSet, beside: Beside) -> TokenSet:
    """Compresses, as `Compressor`."""
    width, grid = tokens.x.shape[-1], beside.grid
    x = nn.Dense(width, dtype=self.dtype, name='tokens', kernel_init=identity,
                 dot_general=products.dot_general(self.dtype))(tokens.x)
    join = dense(self.width, self.dtype, name='joined')
    if len(grid) == 2:
      return TokenSet.create(join(jnp.tile(x, self.join)))
    self._check(grid)
    joined = join(x.reshape(len(x), -1, self.join * width))
    if self.positions == 'none':
      return TokenSet.create(joined)
    places = Places(self.width, self.join, self.reach, self.dtype, name='places')(x)
    return TokenSet.create(joined + places)


class Places(nn.Module):
  """Makes of tokens what says where in time every `join` of them are.

  Attributes:
    width: D.
    join, reach: as of `TimeSuite`.
    dtype: of the products.
  """

  width: int
  join: int
  reach: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Convolves: float[B, N, W] -> float[B, N / join, D]."""
    narrow = x.shape[-1] // NARROWER
    short, long = self.join + 1, 2 * self.join + 1
    x = dense(narrow, self.dtype, name='narrow')(x)
    first = x.reshape(len(x), -1, self.join, narrow).mean(axis=2)
    second = Stage(long, STRIDE, self.dtype, name='down1')(first)
    third = Stage(long, STRIDE, self.dtype, name='down2')(second)
    third = Convolution(self.reach + 1, 1, 'all', self.dtype, name='middle')(third)
    third = ACTIVATIONS['gelu'](layer_norm(EPS, name='norm')(third)).astype(self.dtype)
    second = Stage(short, 1, self.dtype, name='up1')(jnp.repeat(third, STRIDE, axis=1) + second)
    first = Stage(short, 1, self.dtype, name='up0')(jnp.repeat(second, STRIDE, axis=1) + first)
    return nn.Dense(self.width, dtype=self.dtype, name='wide',
                    kernel_init=nn.initializers.zeros,
                    dot_general=products.dot_general(self.dtype))(first)


class Stage(nn.Module):
  """Convolves each feature along time and mixes all features, then a norm and an activation.

  Attributes:
    taps, stride: of the convolution.
    dtype: of the products.
  """

  taps: int
  stride: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Convolves: float[B, N, C] -> float[B, N / stride, C]."""
    x = Convolution(self.taps, self.stride, 'each', self.dtype, name='along')(x)
    x = Convolution(1, 1, 'all', self.dtype, name='across')(x)
    return ACTIVATIONS['gelu'](layer_norm(EPS, name='norm')(x)).astype(self.dtype)


class Convolution(nn.Module):
  """Convolves along time, with zeros around, so that a stride alone leaves fewer places.

  Attributes:
    taps: an odd number.
    stride: from one place to the next.
    inputs: what features an output reads, 'all' or 'each' its own.
    dtype: of the product.
  """

  taps: int
  stride: int
  inputs: str
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Convolves: float[B, N, C] -> float[B, N / stride, C]."""
    choices.check('inputs=', self.inputs, ('all', 'each'))
    width = x.shape[-1]
    groups = width if self.inputs == 'each' else 1
    spread: Any = nn.initializers.lecun_normal(in_axis=(1, 2), out_axis=0)
    weight = self.param('weight', spread, (width, width // groups, self.taps))
    shift = self.param('shift', nn.initializers.zeros, (width,))
    made = jax.lax.conv_general_dilated(
        x.astype(self.dtype), weight.astype(self.dtype), (self.stride,),
        [(self.taps // 2,) * 2], dimension_numbers=('NWC', 'OIW', 'NWC'),
        feature_group_count=groups,
        precision='highest' if jnp.dtype(self.dtype) == jnp.float32 else None)
    return made + shift.astype(self.dtype)[None, None]
