"""Top-k by attention.

Axes: B batch, N slots now, H heads.
"""

import dataclasses

from ops.assignments import Assignment
from ops.primitives.select import keep_top
from ops.reducers.base import ByAttention
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class TopK(ByAttention):
  """Keeps the tokens with the highest [CLS] attention.

  The Top-K baseline of Which Tokens to Use? (Haurum et al., 2023), Sec. 3.1, arXiv:2308.04657:
  EViT without its fused token. On a backbone without [CLS], `by` the attention of all tokens.

  Attributes:
    order: 'score' puts the most attended first, as the released code; 'slot' keeps the order.
  """

  order: str = 'score'
  drops = 'pruning drops tokens'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    return keep_top(tokens, self.attention(signals).mean(axis=1), num_slots=num_slots,
                    order=self.order)
