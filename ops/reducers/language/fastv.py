"""FastV: prunes visual tokens after the first layers of a language model.

Axes: B batch, N slots now, H heads.
"""

import dataclasses

from ops.assignments import Assignment
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class FastV(Reducer):
  """Keeps the tokens with the highest attention from the last token of the prompt.

  An Image is Worth 1/2 Tokens After Layer 2 (Chen et al., 2024), arXiv:2403.06764. Scores are
  means over heads, in the layer before the cut. Its K is the layer that the cut stands before; its
  R is the share of visual tokens removed. Tokens keep their order and their positions.
  """

  needs = frozenset({'last_attention'})
  site = 'before'
  positions = 'keep'
  drops = 'pruning drops tokens'
  can_empty = True

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    return keep_top(tokens, signals.last_attention.mean(axis=1), num_slots=num_slots)
