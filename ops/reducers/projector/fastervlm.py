"""FasterVLM: keeps the tokens that [CLS] attends to, for a language model.

Axes: B batch, N slots now, H heads.
"""

import dataclasses

from ops.assignments import Assignment
from ops.primitives.select import keep_top
from ops.reducers.base import ByAttention
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class FasterVLM(ByAttention):
  """Keeps the tokens with the highest [CLS] attention, in raster order.

  [CLS] Attention is All You Need for Training-Free Visual Token Pruning (Zhang et al., 2024),
  arXiv:2412.01818, as released (the paper speaks of a threshold). Scores are means over the heads
  of the layer that makes the features: LLaVA's last but one. With several crops an image, each
  keeps equally many.
  """

  site = 'after'
  drops = 'pruning drops tokens'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    return keep_top(tokens, self.attention(signals).mean(axis=1), num_slots=num_slots)
