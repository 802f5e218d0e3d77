"""TokenFLEX: adaptively averaged patches through a gated MLP, as many as one wants.

Axes: B batch, N patches, M tokens that are left, W width of the tower, F of the MLP, D of the
language model.
"""

import flax.linen as nn

from models.blocks import ACTIVATIONS, dense, hidden_features, layer_norm
from models.projectors.base import Beside, Compressor
from ops.primitives import grids
from ops.primitives.grids import Grid
from ops.tokens import TokenSet
from ops.values import Count, Width

EPS = 1e-5
GATED = 'swiglu'


class TokenFLEX(Compressor):
  """Averages the patches to a square of tokens, and projects them through a gated MLP.

  TokenFLEX (Hu et al., 2025), arXiv:2504.03154, of which no code is known. The paper names the
  parts, an adaptive average pooling to n x n and a SwiGLU. Reconstructed are their order (norm,
  pooling, MLP), the norm's epsilon, and the MLP's width. Its training draws 64, 144 or 256 tokens
  for each step; in a ratio of 2:3:5 these are the 28 % fewer tokens that the paper counts.

  Attributes:
    side: tokens each way; 8, 12 and 16 leave 64, 144 and 256. It need not divide the grid.
    hidden: F, None for D.
  """

  side: Count = 12
  hidden: Width | None = None

  def grid_after(self, grid: Grid) -> Grid:
    """Returns the square of tokens; frames stay.

    Raises:
      ValueError: more tokens than patches along an axis.
    """
    if self.side > min(grid[-2:]):
      raise ValueError(f'side={self.side} asks for more tokens each way than a grid of {grid} has '
                       f'patches: choose at most {min(grid[-2:])}')
    return (*grid[:-2], self.side, self.side)

  @nn.compact
  def __call__(self, tokens: TokenSet, beside: Beside) -> TokenSet:
    """Compresses, as `Compressor`."""
    x = layer_norm(EPS, name='norm')(tokens.x)
    x = grids.resample(x, beside.grid, self.grid_after(beside.grid), 'area')
    hidden = hidden_features(self.hidden or self.width, GATED)
    x = ACTIVATIONS[GATED](dense(hidden, self.dtype, name='fc1')(x))
    return TokenSet.create(dense(self.width, self.dtype, name='fc2')(x))
