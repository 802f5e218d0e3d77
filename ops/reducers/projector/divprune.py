"""DivPrune: keeps the most diverse tokens.

Axes: B batch, N slots now, M slots after, D features.
"""

import dataclasses

import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.farthest import farthest_first, largest_cosine
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class DivPrune(Reducer):
  """Keeps the most diverse tokens: each is far from the others by cosine of the features.

  DivPrune (Alvar et al., 2025), arXiv:2503.02175, made for visual tokens behind the projector.
  The first is the one whose nearest neighbour is farthest; then, one by one, whichever is
  farthest from all that were picked. Its count of tokens is round(ratio N), half to even.
  """

  site = 'after'
  drops = 'pruning drops tokens'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    alike = jnp.where(tokens.free, largest_cosine(tokens.x, tokens.free), jnp.inf)
    turn = farthest_first(tokens.x, tokens.free, jnp.argmin(alike, axis=1).astype(jnp.int32),
                          count=max(num_slots - tokens.protected, 0))
    return keep_top(tokens, -turn, num_slots=num_slots)
