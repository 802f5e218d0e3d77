"""No reduction: the baseline that every speed-up and accuracy is measured against."""

import dataclasses

from ops.assignments import Assignment
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, identity


@dataclasses.dataclass(frozen=True)
class Identity(Reducer):
  """Keeps every token, whatever the budget."""

  def min_slots(self, slots: int, protected: int) -> int:
    del protected
    return slots

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals, num_slots
    return identity(tokens)
