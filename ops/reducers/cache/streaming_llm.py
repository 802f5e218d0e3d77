"""StreamingLLM: keeps attention sinks and the latest tokens.

Axes: B batch, N slots now, M slots after, K kv heads, d features a head.
"""

import dataclasses

import jax.numpy as jnp

from ops.kv_cache import KVGather
from ops.primitives.kv_select import broadcast_to_heads, keep_best
from ops.primitives.select import rank_of
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import CountOrZero


@dataclasses.dataclass(frozen=True)
class StreamingLLM(Reducer):
  """Keeps the first few tokens (attention sinks) and the latest ones.

  Efficient Streaming Language Models with Attention Sinks (Xiao et al., 2024), Sec. 3.2,
  arXiv:2309.17453. The paper counts positions within the cache: positions='compact'.

  Attributes:
    sinks: first tokens that stay.
  """

  sinks: CountOrZero = 4
  site = 'cache'
  needs = frozenset({'keys'})
  drops = 'pruning drops tokens'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVGather:
    real = tokens.real
    rank, count = rank_of(real), jnp.sum(real, axis=1, keepdims=True)
    first = rank < self.sinks
    # Of the others the latest: a later token scores higher.
    scores = broadcast_to_heads(rank - count, signals.keys.shape[2])
    return keep_best(tokens, scores, num_slots=num_slots, forced=first, order='slot')
