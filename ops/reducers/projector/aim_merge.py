"""AIM's stage before the language model: repeated merging of the most similar tokens.

Axes: B batch, N slots now, M slots after.
"""

import dataclasses

import jax.numpy as jnp

from ops import tokens as tk
from ops.assignments import Assignment
from ops.primitives.match import bipartite
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, count


@dataclasses.dataclass(frozen=True)
class AIMMerge(Reducer):
  """Merges the most similar pairs of even and odd tokens, in as many rounds as it takes.

  AIM (Zhong et al., 2024), arXiv:2412.03248, as released: of each frame's features themselves, by
  cosine; a round merges at most half of the tokens, by a plain mean over what its pairs have become
  (sizes do not count). What is left of the even tokens leads, the most similar first. The release
  keeps a quarter, in two rounds. The stage in the language model is `aim`.
  """

  site = 'after'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    rounds = [tokens.slots - (tokens.slots - tokens.protected) // 2]
    while rounds[-1] > num_slots:
      rounds.append(rounds[-1] - (rounds[-1] - tokens.protected) // 2)
    # A row that is shorter than the slots may need one more.
    rounds = [max(slots, num_slots) for slots in rounds] + [num_slots] * (tokens.budget is not None)
    budget = tokens.budget
    whole: Assignment | None = None
    for slots in rounds:
      free = count(tokens.free)[:, 0]
      now = tokens.replace(
          size=None, budget=None if budget is None else jnp.maximum(budget, free - free // 2))
      # Every other one of those that may go, whatever stands among them.
      order = jnp.argsort(jnp.where(now.free, 0, jnp.where(now.fixed, 1, 2)), axis=1, stable=True)
      answer = tk.whole_rows(bipartite(now, now.x, order[:, ::2], order[:, 1::2], num_slots=slots,
                                       order='score'), now, slots)
      tokens, whole = tk.reduce(now, answer), tk.compose(whole, answer) if whole else answer
    assert whole
    return whole
