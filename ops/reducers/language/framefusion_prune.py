"""FrameFusion's pruning: tokens that get little attention leave, once a video's frames are merged.

Axes: B batch, N slots now, H heads.
"""

import dataclasses

from ops.assignments import Assignment
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class FrameFusionPrune(Reducer):
  """Keeps the tokens with the highest attention, a mean over all heads and all queries.

  The second stage of FrameFusion (2025), arXiv:2501.01986, as released: the attention is that of
  the layer before the cut. The first stage is `framefusion`, before the language model. The release
  merges in the first layers, and works out from a share of the whole model's cost how many tokens
  the layers behind the cut may have, as if cost were in proportion to tokens; a config's budget
  says how many. Tokens keep their order and their positions.
  """

  needs = frozenset({'received_attention'})
  site = 'before'
  positions = 'keep'
  drops = 'pruning drops tokens'
  can_empty = True

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    return keep_top(tokens, signals.received_attention.mean(axis=1), num_slots=num_slots)
