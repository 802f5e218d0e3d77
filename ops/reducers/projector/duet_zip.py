"""DUET-VLM's stage behind the tower: the most attended tokens, and a few that sum up the next.

Axes: B batch, N slots now, H heads, C contextual tokens.
"""

import dataclasses

import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.contextual import zip_tokens
from ops.primitives.select import ranks, top
from ops.reducers.base import ByAttention
from ops.signals import Signals
from ops.tokens import TokenSet, num_left
from ops.values import Count


@dataclasses.dataclass(frozen=True)
class DUETZip(ByAttention):
  """Keeps the tokens with the highest [CLS] attention and merges the next ones into a few tokens.

  The first stage of DUET-VLM (2026), arXiv:2602.18846, as released: `visionzip`, but only the
  `width` * C most attended of the tokens that are not dominant are merged, and the contextual ones
  are spaced evenly in the order of their attention; the others are dropped. Its dominant tokens
  are [CLS], which the tower does not pass on here, and one fewer. The release puts contextual
  tokens in the order of their attention, here they stand in raster order. The second stage is
  `duet_vlm`.

  Attributes:
    contextual: C, among the tokens kept.
    width: tokens that make each contextual one, this one included.
  """

  contextual: Count = 7
  width: Count = 4
  site = 'after'
  drops = 'tokens that are neither dominant nor among the next are dropped'
  merges = True

  @property
  def needs(self) -> frozenset[str]:
    return super().needs | {'keys'}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    count = self.width * self.contextual
    most = min(num_slots - self.contextual + count, tokens.slots)
    order = top(self.attention(signals).mean(axis=1), most, forced=tokens.fixed,
                excluded=~tokens.real)
    rank = ranks(order, tokens.slots) - (num_left(tokens, num_slots) - self.contextual)
    metric = signals.keys.astype(jnp.float32).mean(axis=2)
    return zip_tokens(
        tokens, metric, tokens.real & (rank < 0), tokens.real & (rank >= 0) & (rank < count), rank,
        context=self.contextual, num_slots=num_slots)

  def min_slots(self, slots: int, protected: int) -> int:
    return min(slots, protected + self.contextual + 1)
