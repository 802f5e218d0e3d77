"""H2O: keeps heavy hitters (entries with much accumulated attention) and the latest entries.

`follow` and `evict` are for decoding at constant memory: after each new token one updates the sums
of attention, the other names the entry that makes room.

Axes: B batch, N entries now, M entries after, S entries of a full cache (M + 1), H heads, K kv
heads.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.kv_cache import KVGather
from ops.primitives.kv_select import by_kv_head, keep_best, latest
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
  whose rows are apart here. Entries keep their order. While a model decodes, `follow` adds up the
  sums (`scores`) of the entries, and `evict` names the one that makes room.

  Attributes:
    recent: latest entries that always stay; half of those that stay where None, as in the paper.
  """

  recent: Count | None = None
  needs = frozenset({'keys', 'received_attention'})

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVGather:
    return keep_best(tokens, self.scores(tokens, signals), num_slots=num_slots,
                     forced=self.forced(tokens, num_slots), order='slot')

  def forced(self, tokens: TokenSet, num_slots: int) -> Array:
    """Names the latest entries."""
    return latest(tokens, num_slots // 2 if self.recent is None else self.recent)

  def scores(self, tokens: TokenSet, signals: Signals) -> Array:
    """float32[B, K, N], attention that each entry got from all queries."""
    real = jnp.sum(tokens.real, axis=1, dtype=jnp.float32)[:, None, None]
    received = by_kv_head(signals.received_attention, signals.keys.shape[2])
    return received.sum(axis=2) * real

  def min_slots(self, slots: int, protected: int) -> int:
    del protected
    return min(slots, (self.recent or 1) + 1)


def follow(heavy: Array, rows: Array) -> Array:
  """Adds the row of one more query to the sums: float32[B, K, S], [B, H, S] -> [B, K, S]."""
  return heavy + by_kv_head(rows, heavy.shape[1]).sum(axis=2)


def evict(heavy: Array, pos: Array, valid: Array, *, recent: int) -> Array:
  """Picks the slot of a full cache that its next entry takes.

  Args:
    heavy: float32[B, K, S], sums of attention, the newest entry's included.
    pos: int32[B, K, S], positions of the entries.
    valid: bool[B, K, S], places that hold an entry.
    recent: latest entries that stay.

  Returns:
    int32[B, K]: an empty place where there is one, the lowest; else that of the smallest sum
    outside the latest entries, and the latest of equals.
  """
  place = jnp.where(valid, pos, jnp.iinfo(jnp.int32).min)
  oldest = jnp.sort(place, axis=2)[:, :, -recent, None] if recent else jnp.max(
      place, axis=2, keepdims=True) + 1
  lightest = jnp.where(valid & (place < oldest), heavy, jnp.inf)
  equal = lightest == jnp.min(lightest, axis=2, keepdims=True)
  victim = jnp.argmax(jnp.where(equal, place, jnp.iinfo(jnp.int32).min), axis=2)
  return jnp.where(jnp.all(valid, axis=2), victim, jnp.argmin(valid, axis=2)).astype(jnp.int32)
