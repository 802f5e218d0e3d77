"""DUET-VLM's stage behind the tower: the most attended tokens, and a few that sum up the next.

Axes: B batch, N slots now, C contextual tokens.
"""

import dataclasses

import jax

from ops.primitives.select import ranks, top
from ops.reducers.projector.visionzip import VisionZip
from ops.signals import Signals
from ops.tokens import TokenSet

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DUETZip(VisionZip):
  """Keeps the tokens with the highest [CLS] attention and merges the next ones into a few tokens.

  The first stage of DUET-VLM (2026), arXiv:2602.18846, as released: `visionzip`, but only the
  `width` * C most attended of the tokens that are not dominant are merged, and the contextual ones
  are spaced evenly in the order of their attention; the others are dropped. Its dominant tokens
  are [CLS], which the tower does not pass on here, and one fewer. The release puts contextual
  tokens in the order of their attention, here they stand in raster order. The second stage is
  `duet_vlm`.

  Attributes:
    width: tokens that are merged into each contextual one, this one included.
  """

  contextual: int = 7
  width: int = 4
  drops = 'tokens that are neither dominant nor near them are dropped'
  merges = True

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.width < 1:
      raise ValueError(f'width={self.width} must be at least 1')

  def candidates(self, tokens: TokenSet, signals: Signals, most: int,
                 dominant: Array | int) -> tuple[Array, Array, Array]:
    """Returns the same as `VisionZip.candidates`, of the most attended tokens."""
    count = self.width * self.contextual
    order = top(self.attention(signals).mean(axis=1), min(most + count, tokens.slots),
                forced=tokens.fixed, excluded=~tokens.real)
    rank = ranks(order, tokens.slots) - dominant
    return tokens.real & (rank < 0), tokens.real & (rank >= 0) & (rank < count), rank
