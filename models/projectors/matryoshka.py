"""Matryoshka (M3): means of projected patches, over windows as large as one wants.

Axes: B batch, N patches, C windows, D width of the language model.
"""

from typing import ClassVar

import flax.linen as nn

from models.projectors.base import Array, Beside, Compressor, Names
from models.projectors.mlp import Projector
from ops.primitives import grids
from ops.primitives.grids import Grid
from ops.tokens import TokenSet
from ops.values import Count


class Matryoshka(Compressor):
  """Averages the projected patches of each window.

  Matryoshka Multimodal Models (Cai et al., 2024), arXiv:2405.17430, as released. It has the
  parameters of an MLP and no others, and all sides read the same. In each step of its training the
  language model reads every sample once for each side, and the losses are averaged.

  Attributes:
    side: patches of a window each way; 1, 2, 4, 8 and 24 leave 576, 144, 36, 9 and 1 of 576.
  """

  side: Count = 2
  released: ClassVar[Names] = {'mlp/fc1': '0.*', 'mlp/fc2': '2.*'}

  def grid_after(self, grid: Grid) -> Grid:
    """Returns the grid of windows."""
    return grids.cells(grid, (self.side,) * 2)

  @nn.compact
  def __call__(self, tokens: TokenSet, beside: Beside) -> TokenSet:
    """Compresses, as `Compressor`."""
    self.grid_after(beside.grid)
    x = Projector(self.width, 'gelu', self.dtype, name='mlp')(tokens.x)
    return TokenSet.create(means(x, beside.grid, self.side))


def means(x: Array, grid: Grid, side: int) -> Array:
  """Averages windows of `side` patches each way: float[B, N, D] -> float[B, C, D].

  Raises:
    ValueError: a side that does not divide the grid.
  """
  return grids.windows(x, grid, (side, side)).mean(axis=2)
