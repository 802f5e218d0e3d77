"""VTW: no visual token is left from some layer on.

Axes: B batch, N slots now.
"""

import dataclasses
from collections.abc import Mapping

from ops.assignments import Assignment
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.rope import sequence_index
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class VTW(Reducer):
  """Lets all tokens leave before one layer.

  Visual Tokens Withdrawal (Lin et al., 2024), arXiv:2405.05803, as released, where positions stay
  or are numbered anew (positions='compact'). Without a budget everything leaves before layer 15 of
  32, or as far into another depth. The release finds the layer on samples: the logits behind the
  prompt must hardly differ from those of the whole model. A budget that leaves some tokens, which
  the paper never does, keeps the first ones.
  """

  # Elsewhere nothing would be left.
  needs = frozenset({'rope'})
  site = 'before'
  positions = 'keep'
  drops = 'pruning drops tokens'
  can_empty = True

  def default_shares(self, depth: int) -> Mapping[int, float]:
    """Returns the layer before which all leave."""
    return {depth * 15 // 32: 0.0}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    return keep_top(tokens, -sequence_index(tokens.pos), num_slots=num_slots)
