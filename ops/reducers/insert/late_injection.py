"""Late injection: visual tokens enter a language model at a later layer than text.

Axes: B batch, N slots now.
"""

import dataclasses

from ops.assignments import Assignment
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, identity


@dataclasses.dataclass(frozen=True)
class LateInjection(Reducer):
  """Lets tokens of a kind, by default the visual ones, join before the layer that a config names.

  HiDrop (Wu et al., 2026), arXiv:2602.23699, from the paper's text (the code came later, and was
  not read): the layers above run on text alone, and hold no visual entries in their caches; the
  tokens join as the projector made them, at the positions that are theirs from the start. In the
  paper before layer 9 of 32 (15 of 32 in MobileLLaMA). What it prunes behind that is `hidrop`.
  """

  reconstructed = "the paper's text"
  kind = 'insert'
  site = 'before'
  positions = 'keep'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals, num_slots
    return identity(tokens)
