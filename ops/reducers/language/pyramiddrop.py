"""PyramidDrop: the deeper the layer, the fewer visual tokens.

Axes: B batch, N slots now, H heads.
"""

import dataclasses

from ops.assignments import Assignment
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class PyramidDrop(Reducer):
  """Keeps the tokens with the highest attention from the last token, in the next layer.

  PyramidDrop (Xing et al., 2024), arXiv:2410.17247. Scores are means over heads, by the queries
  and keys of the layer that the cut stands before. Its ratios are of the visual tokens that there
  were at the start (ratio_of='start'), rounded down. Tokens keep their order; positions are
  numbered anew after every cut, as released. In training the release scores by the tokens before
  each answer; here the last token of the row counts.
  """

  needs = frozenset({'next_last_attention'})
  site = 'before'
  positions = 'compact'
  drops = 'pruning drops tokens'
  can_empty = True

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    return keep_top(tokens, signals.next_last_attention.mean(axis=1), num_slots=num_slots)
