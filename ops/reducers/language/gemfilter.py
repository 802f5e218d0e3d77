"""GemFilter: an early layer selects the tokens of the prompt that the model then reads.

Axes: B batch, N slots now, H heads, K kv heads, G heads that share one (H / K), d features a head.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.moves.rows import take
from ops.primitives.kv_select import by_kv_head, latest, pool_neighbours
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class GemFilter(Reducer):
  """Keeps the tokens with the highest scores by the last query, then runs the model again on them.

  GemFilter (Shi et al., 2024), arXiv:2409.17422, as released: products of the last query with all
  keys, without scale or softmax, summed over heads and averaged over neighbours. The whole model
  then runs again on what is left, as a prompt of its own (positions='restart'); nothing makes the
  first or the last token stay. The release cuts once, in layer 13 of Llama 3.1 8B.

  Attributes:
    kernel: neighbouring tokens whose scores are averaged, an odd number; beyond the ends they count
      as zeros.
  """

  kernel: int = 5
  needs = frozenset({'queries', 'keys'})
  positions = 'restart'
  drops = 'pruning drops tokens'

  def __post_init__(self) -> None:
    if self.kernel < 1 or self.kernel % 2 == 0:
      raise ValueError(f'kernel={self.kernel} must be an odd number, 1 for no pooling')

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    return keep_top(tokens, self.scores(tokens, signals), num_slots=num_slots)

  def scores(self, tokens: TokenSet, signals: Signals) -> Array:
    """float32[B, N]."""
    queries, keys = (x.astype(jnp.float32) for x in (signals.queries, signals.keys))
    last = jnp.argmax(latest(tokens, 1), axis=1)[:, None]
    last_query = by_kv_head(take(queries, last)[:, 0], keys.shape[2]).sum(axis=2)
    scores = jnp.einsum('bkd,bnkd->bn', last_query, keys, precision='highest')
    scores = jnp.where(tokens.real, scores, 0.0)[:, None]
    return pool_neighbours(scores, tokens, kernel=self.kernel, pool='avg')[:, 0]
