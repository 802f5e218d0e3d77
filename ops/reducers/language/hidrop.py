"""HiDrop: a concave pyramid of visual tokens between the layers where they enter and leave.

Axes: B batch, N slots now, H heads.
"""

import dataclasses

from ops.assignments import Assignment
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class HiDrop(Reducer):
  """Keeps the tokens with the highest attention from the last token, in the next layer.

  HiDrop (Wu et al., 2026), arXiv:2602.23699, from the paper's text (the code came later, and was
  not read): scores are means over heads; in training a threshold on their ranks is learned softly,
  which is not here, and in evaluation the same share stays everywhere. Tokens keep their positions.
  In the paper's 32 layers `late_injection` stands before layer 9, cuts before layers 10, 14, 16 and
  18, fast at first and slowly later, and everything leaves before layer 25 (keep=0). Its counts are
  not known here, only that the mean over all layers is 64 of 576.
  """

  reconstructed = "the paper's text"
  needs = frozenset({'next_last_attention'})
  site = 'before'
  positions = 'keep'
  drops = 'pruning drops tokens'
  can_empty = True

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    return keep_top(tokens, signals.next_last_attention.mean(axis=1), num_slots=num_slots)
