"""VisPruner: keeps the tokens that [CLS] attends to, and others that repeat none.

Axes: B batch, N slots now, H heads.
"""

import dataclasses

from ops.assignments import Assignment
from ops.primitives.dedup import keep_diverse
from ops.reducers.base import ByAttention
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Share


@dataclasses.dataclass(frozen=True)
class VisPruner(ByAttention):
  """Keeps the tokens with the highest [CLS] attention, and the most diverse of the others.

  VisPruner (Zhang et al., 2024), the later version of arXiv:2412.01818, as released. What is not
  important loses its repetitions in rounds, eight tokens each: every other token, in the order of
  attention, is compared with those between them by cosine of the features. The release fails where
  an odd number of tokens is left to compare. Kept tokens stay in their order. With several crops an
  image, each keeps equally many.

  Attributes:
    important: the part of the tokens kept that goes by attention.
  """

  important: Share = 0.5
  site = 'after'
  drops = 'pruning drops tokens'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    return keep_diverse(tokens, self.attention(signals).mean(axis=1), tokens.x,
                        num_slots=num_slots, important=self.important)
