"""FoPru: keeps the most attended tokens, or the most attended rows of patches.

Axes: B batch, N slots now, H heads, R rows of the grid.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.moves.rows import take
from ops.primitives.select import keep_top, ranks, top
from ops.reducers.base import ByAttention
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import OneOf

STRATEGIES = ('rank', 'row')


@dataclasses.dataclass(frozen=True)
class FoPru(ByAttention):
  """Keeps the tokens with the highest received attention, or those of the rows with the most.

  FoPru (Jiang et al., 2024), arXiv:2411.14164. There is no release: this is built from the paper's
  abstract. Significance is taken as the mean over heads and queries of the layer that makes the
  features; a row's is the sum of its tokens'. Where the count is not of whole rows, the last row
  gives its most attended tokens. Kept tokens stay in their order.

  Attributes:
    by: the attention that says how significant a token is.
    strategy: 'rank' or 'row'.
  """

  by: str = 'received_attention'
  strategy: Annotated[str, OneOf(STRATEGIES)] = 'rank'
  reconstructed = 'the abstract'
  site = 'after'
  drops = 'pruning drops tokens'

  @property
  def needs(self) -> frozenset[str]:
    return super().needs | ({'grid'} if self.strategy == 'row' else frozenset())

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    scores = jax.lax.stop_gradient(self.attention(signals).mean(axis=1))
    if self.strategy == 'rank':
      return keep_top(tokens, scores, num_slots=num_slots)
    rows, columns = signals.grid
    row = jnp.where(tokens.free, tokens.pos // columns, rows)
    sums = jax.vmap(lambda s, r: jax.ops.segment_sum(s, r, num_segments=rows))(scores, row)
    place = take(ranks(top(sums, rows), rows), jnp.minimum(row, rows - 1))
    order = jnp.lexsort((-scores, jnp.where(tokens.free, place, rows)), axis=1)
    return keep_top(tokens, -ranks(order.astype(jnp.int32), tokens.slots), num_slots=num_slots)
