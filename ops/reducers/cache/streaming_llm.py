"""StreamingLLM: keeps attention sinks and the latest tokens.

Axes: B batch, N slots now, M slots after, K kv heads, d features a head.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.kv_cache import KVGather
from ops.primitives.kv_select import broadcast_to_heads, earliest, keep_best, oldest, stays
from ops.primitives.select import rank_of
from ops.reducers.scoring import ScoringReducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import CountOrZero

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class StreamingLLM(ScoringReducer):
  """Keeps the first few tokens (attention sinks) and the latest ones.

  Efficient Streaming Language Models with Attention Sinks (Xiao et al., 2024), Sec. 3.2,
  arXiv:2309.17453. The paper counts positions within the cache: positions='compact'. With
  `capacity` in the config it goes on so while a model decodes, and keys are then turned anew for
  every token; the release keeps them unturned instead.

  Attributes:
    sinks: first tokens that stay.
  """

  sinks: CountOrZero = 4
  shared = True
  evict_needs = frozenset()

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVGather:
    # Chosen once: all heads keep the same entries.
    scores = self.scores(tokens, signals)
    chosen = keep_best(tokens, scores[:, :1], num_slots=num_slots,
                       forced=self.forced(tokens, num_slots), order='slot')
    return jax.tree.map(lambda x: jnp.repeat(x, scores.shape[1], axis=1), chosen)

  def scores(self, tokens: TokenSet, signals: Signals) -> Array:
    """float32[B, K, N]: a later token scores higher."""
    real = tokens.real
    from_end = rank_of(real) - jnp.sum(real, axis=1, keepdims=True)
    return broadcast_to_heads(from_end.astype(jnp.float32), signals.keys.shape[2])

  def forced(self, tokens: TokenSet, num_slots: int) -> Array:
    """Names the sinks."""
    return earliest(tokens, self.sinks)

  def evict(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Array:
    """Lets the oldest entry go that is no sink."""
    del signals
    since = tokens.pos - jnp.max(tokens.pos, axis=1, keepdims=True)
    return stays(tokens, since.astype(jnp.float32), num_slots, oldest(tokens, self.sinks))

  @property
  def min_capacity(self) -> int:
    return self.sinks + 1
