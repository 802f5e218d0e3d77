"""TextMonkey's token filter: keeps tokens that no later token repeats.

Axes: B batch, N slots now, D features.
"""

import dataclasses

from ops.assignments import Gather
from ops.primitives.farthest import largest_later_cosine
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class TextMonkey(Reducer):
  """Keeps the tokens least similar to any later token.

  The token filter of TextMonkey (Liu et al., 2024), Sec. 3.2, arXiv:2403.04473, as released:
  cosines of the features. Tokens stay in their order. Of several alike the last stays, and the last
  token of all always does. Its resampler, which keeps these and lets them attend to all, is
  `textmonkey_resampler`.
  """

  site = 'after'
  drops = 'pruning drops tokens'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Gather:
    del signals
    return keep_top(tokens, -largest_later_cosine(tokens.x, tokens.free), num_slots=num_slots)
