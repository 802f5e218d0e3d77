"""LLaVA-SP: tokens of ever larger parts of an image stand before its patches.

Axes: B batch, N patches, C features of a spatial token, K places of a convolution, R patches under
it, W width of the tower, D width of the language model.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from models.blocks import ACTIVATIONS, dense, layer_norm
from models.projectors.attention import attend
from models.projectors.base import Array, Beside, Compressor, Names
from models.projectors.mlp import Projector
from ops.primitives import grids
from ops.primitives.grids import Grid
from ops.tokens import TokenSet
from ops.values import OneOf, Width

EPS = 1e-5
FORMS = ('pooling', 'cropping')
PATCHES = ('mlp', 'linear')
# Spatial tokens; in the release's grid of 24 x 24 patches they have 4, 8, … 24 each way.
NUMBER, RELEASED_PART = 6, 4
# Of the convolution that makes the details that tokens of crops attend to: how many sixths of the
# grid it has each way, and how many patches apart its places are.
DETAIL, STRIDE = 4, 2
READ = ('query', 'key', 'value')


class LLaVASP(Compressor):
  """Puts six spatial tokens before all patches, so that there are more tokens, not fewer.

  LLaVA-SP (Lou et al., 2025), arXiv:2507.00505, as released. Spatial token i of 6 is a convolution
  over all of a map of i / 6 of the grid's patches each way, and a product behind an activation.
  Patches are projected as in LLaVA.

  Attributes:
    form: 'pooling', where the maps are adaptive averages of all patches; or 'cropping', where they
      are crops around the centre, and each token attends once to a convolution of 2 / 3 of the
      grid each way, at every other patch.
    inner: C.
    patches: what projects the patches, 'mlp' (two products) or 'linear' (one).
  """

  form: Annotated[str, OneOf(FORMS)] = 'pooling'
  inner: Width = 512
  patches: Annotated[str, OneOf(PATCHES)] = 'mlp'
  released: ClassVar[Names] = {
      **{f'pooled_{i}/patch': f'conv_{RELEASED_PART * i}.1.*' for i in range(1, NUMBER)},
      f'pooled_{NUMBER}/patch': f'conv_{RELEASED_PART * NUMBER}.*',
      **{f'cropped_{i}/patch': f'conv_{RELEASED_PART * i}.*' for i in range(1, NUMBER + 1)},
      'detail/patch': 'conv_CM.*', 'spatial': 'conv_linear.1.*',
      **{f'norm_{name}': f'{name}_projector.0.*' for name in READ},
      **{name: f'{name}_projector.1.*' for name in READ},
      'patches': 'mm_projector.*',
      'patches/fc1': 'mm_projector.0.*', 'patches/fc2': 'mm_projector.2.*'}

  def grid_after(self, grid: Grid) -> None:
    """Returns None: spatial tokens are of no grid."""
    sixth(grid)

  def slots(self, grid: Grid) -> int:
    """Returns the patches and six more."""
    sixth(grid)
    return math.prod(grid) + NUMBER

  @nn.compact
  def __call__(self, tokens: TokenSet, beside: Beside) -> TokenSet:
    """Compresses, as `Compressor`: spatial tokens, of the smallest part first, then patches."""
    x, grid, unit = tokens.x, beside.grid, sixth(beside.grid)
    made = []
    for i in range(1, NUMBER + 1):
      part = (i * unit[0], i * unit[1])
      if self.form == 'pooling':
        whole = np.arange(math.prod(part))[None]
        made.append(Convolution(self.inner, self.dtype, name=f'pooled_{i}')(
            grids.resample(x, grid, part, 'area'), whole))
      else:
        made.append(Convolution(self.inner, self.dtype, name=f'cropped_{i}')(
            x, centre(grid, part)))
    spatial = jnp.concatenate(made, axis=1)
    if self.form == 'cropping':
      detail = Convolution(self.inner, self.dtype, name='detail')(
          x, places(grid, (DETAIL * unit[0], DETAIL * unit[1])))
      read = attend(*(self.product(name, part) for name, part in
                      zip(READ, (spatial, detail, detail), strict=True)))
      spatial = jnp.concatenate([spatial, read], axis=-1)
    spatial = dense(self.width, self.dtype, name='spatial', bias=self.form == 'cropping')(
        ACTIVATIONS['gelu'](spatial))
    project = (Projector(self.width, 'gelu', self.dtype, name='patches') if self.patches == 'mlp'
               else dense(self.width, self.dtype, name='patches'))
    return TokenSet.create(jnp.concatenate([spatial, project(x)], axis=1))

  def product(self, name: str, x: Array) -> Array:
    """Returns normed features behind a product, float[B, ..., C]."""
    return dense(self.inner, self.dtype, name=name)(layer_norm(EPS, name=f'norm_{name}')(x))


class Convolution(nn.Module):
  """Convolves patches at given places, as one product.

  Attributes:
    features: C.
    dtype: of the product.
  """

  features: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Array, index: np.ndarray) -> Array:
    """float[B, N, W], int[K, R] -> float[B, K, C]."""
    under = x[:, index].reshape(len(x), len(index), -1)
    return dense(self.features, self.dtype, name='patch', bias=False)(under)


def sixth(grid: Grid) -> Grid:
  """Returns the patches in a sixth of each side of an image.

  Raises:
    ValueError: a grid of which there is none.
  """
  if len(grid) != 2 or any(side % NUMBER for side in grid):
    raise ValueError(f'LLaVA-SP takes sixths of (rows, columns) of patches, and {grid} has none: '
                     f'choose an image size that gives a multiple of {NUMBER} each way, as 24')
  return tuple(side // NUMBER for side in grid)


def centre(grid: Grid, part: Grid) -> np.ndarray:
  """Returns the patches of a crop around the centre, int[1, R]."""
  first = tuple((side - own) // 2 for side, own in zip(grid, part, strict=True))
  rows, columns = (slice(at, at + own) for at, own in zip(first, part, strict=True))
  return np.arange(math.prod(grid)).reshape(grid)[rows, columns].reshape(1, -1)


def places(grid: Grid, part: Grid) -> np.ndarray:
  """Returns the patches of a window at every other place, int[K, R]."""
  index = np.arange(math.prod(grid)).reshape(grid)
  every = np.lib.stride_tricks.sliding_window_view(index, part)[::STRIDE, ::STRIDE]
  return every.reshape(-1, math.prod(part))
