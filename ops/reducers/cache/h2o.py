"""H2O: keeps heavy hitters (entries with much accumulated attention) and the latest entries.

Axes: B batch, N entries now, M entries after, K kv heads, R heads of all rows, S slots.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.kv_cache import KVGather
from ops.primitives.kv_select import by_kv_head, keep_best, latest, newest, num_entries, stays
from ops.reducers.scoring import ScoringReducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class H2O(ScoringReducer):
  """Keeps the latest entries and those with the highest accumulated attention.

  H2O (Zhang et al., 2023), Algorithm 1, arXiv:2306.14048, as released. Attention is summed over
  all queries so far and over the heads that share a key; the release also sums it over the batch,
  whose rows are apart here. Entries keep their order. While a model decodes, sums go on (`capacity`
  in the config): a token sees all entries and itself, then one leaves.

  Attributes:
    recent: latest entries that always stay; half of those that stay where None, as in the paper.
  """

  recent: Count | None = None
  needs = frozenset({'keys', 'received_attention'})
  tracks = ('heavy',)
  update_needs = frozenset({'received_attention'})
  evict_needs = frozenset()

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVGather:
    return keep_best(tokens, self.scores(tokens, signals), num_slots=num_slots,
                     forced=self.forced(tokens, num_slots), order='slot')

  def forced(self, tokens: TokenSet, num_slots: int) -> Array:
    """Names the latest entries."""
    half = num_entries(tokens, num_slots) // 2
    return latest(tokens, half if self.recent is None else self.recent)

  def scores(self, tokens: TokenSet, signals: Signals) -> Array:
    """float32[B, K, N], attention that each entry got from all queries."""
    real = jnp.sum(tokens.real, axis=1, dtype=jnp.float32)[:, None, None]
    received = by_kv_head(signals.received_attention, signals.keys.shape[2])
    return received.sum(axis=2) * real

  def min_slots(self, slots: int, protected: int) -> int:
    del protected
    return min(slots, (self.recent or 1) + 1)


  def update(self, tokens: TokenSet, signals: Signals, queries: Array) -> dict[str, Array]:
    """Adds the attention of new tokens to the sums."""
    received = signals.received_attention.sum(axis=1) * queries[:, None]
    return {'heavy': tokens.stats['heavy'] + received}

  def evict(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Array:
    """Lets the entry with the smallest sum go that is none of the latest."""
    del signals
    recent = newest(tokens, num_slots // 2 if self.recent is None else self.recent)
    return stays(tokens, tokens.stats['heavy'], num_slots, recent)
