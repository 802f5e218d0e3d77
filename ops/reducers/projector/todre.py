"""ToDRE's stage behind the tower: starts from the most attended token, and adds unlike ones.

Axes: B batch, N slots now, H heads, D features.
"""

import dataclasses
from typing import Annotated

import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.farthest import farthest_first
from ops.primitives.select import keep_top
from ops.reducers.base import ByAttention
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import OneOf

# What a token is far from, by the selection's name.
SELECTIONS = {'max_sum': 'all', 'k_center': 'nearest'}


@dataclasses.dataclass(frozen=True)
class ToDRE(ByAttention):
  """Keeps the most attended token and, one by one, whichever is least like those picked before.

  The first stage of ToDRE (Li et al., 2025), arXiv:2505.18757; it has no release. Tokens are
  compared by cosine, as the language model gets them: in the paper's second version by the sum over
  all that were picked, in the first, which speaks of a greedy k-center, by the nearest of them. It
  starts from the token with the highest [CLS] attention; the paper starts at random where there is
  no [CLS], here `by` the attention received. Of several crops the paper starts in the thumbnail.
  Kept tokens stay in their order.

  Attributes:
    selection: 'max_sum', the second version, or 'k_center', the first.
  """

  selection: Annotated[str, OneOf(SELECTIONS)] = 'max_sum'
  reconstructed = "the paper's text"
  site = 'after'
  drops = 'pruning drops tokens'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    attention = jnp.where(tokens.free, self.attention(signals).mean(axis=1), -jnp.inf)
    turn = farthest_first(tokens.x, tokens.free, jnp.argmax(attention, axis=1).astype(jnp.int32),
                          count=max(num_slots - tokens.protected, 0),
                          far_from=SELECTIONS[self.selection])
    return keep_top(tokens, -turn, num_slots=num_slots)
