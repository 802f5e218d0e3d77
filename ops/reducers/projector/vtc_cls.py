"""VTC-CLS: keeps the tokens that [CLS] attends to, summed over layers.

Axes: B batch, N slots now, H heads.
"""

import dataclasses

import jax

from ops.assignments import Assignment
from ops.primitives.select import keep_top
from ops.reducers.base import ByAttention
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import CountOrZero

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class VTCCLS(ByAttention):
  """Keeps the tokens with the highest [CLS] attention, summed over layers.

  [CLS] Token Tells Everything Needed for Training-free Efficient MLLMs (Wang et al., 2024),
  arXiv:2412.05819. Scores are means over heads, summed over the layers watched, by default those
  from `start` up to the cut. A cut that no watch comes before goes by its own layer alone. Tokens
  keep their order.

  Attributes:
    start: the first layer watched.
  """

  start: CountOrZero = 14
  site = 'after'
  drops = 'pruning drops tokens'

  @property
  def watch_needs(self) -> frozenset[str]:
    return self.needs

  def watched(self, cuts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(self.start, max(cuts, default=-1) + 1))

  def watch(self, tokens: TokenSet, signals: Signals) -> dict[str, Array]:
    """{'attended': float32[B, N]}, the sum so far."""
    attended = jax.lax.stop_gradient(self.attention(signals).mean(axis=1))
    return {'attended': tokens.stats.get('attended', 0.0) + attended}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    scores = tokens.stats.get('attended')
    if scores is None:
      scores = self.attention(signals).mean(axis=1)
    return keep_top(tokens, scores, num_slots=num_slots)
