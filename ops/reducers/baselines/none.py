"""No reduction: the baseline that every speed-up and accuracy is measured against."""

import dataclasses

from ops.assignments import Assignment
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, identity


@dataclasses.dataclass(frozen=True)
class Nothing(Reducer):
  """Keeps every token, whatever the budget."""

  def fewest(self, slots: int, protected: int) -> int:
    del protected
    return slots

  def __call__(self, tokens: TokenSet, signals: Signals, *, keep: int) -> Assignment:
    del signals, keep
    return identity(tokens)
