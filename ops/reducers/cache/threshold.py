"""Threshold: lets the cache entries go whose score is low, however many there are.

Axes: B batch, N entries now, M entries after, K kv heads, R heads of all rows, S slots.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from ops.kv_cache import KVGather
from ops.primitives.kv_select import filled, latest, newest, stays
from ops.reducers.scoring import EvictingWrapper
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Threshold(EvictingWrapper):
  """Lets entries go once they leave a window of the latest ones, if their score is low.

  DMS (Lancucki et al., 2025), Sec. 3, arXiv:2506.05345, with the scores of another method in place
  of its trained decisions, as the kvpress library has it (DMSPress). Shapes are static, so that the
  budget is a capacity here: where more entries have high scores, the lowest go too. The library
  scores a token once, beside those that came with it; here all entries are scored whenever the
  cache is cut, which is the same for scores that go by an entry alone.

  Attributes:
    inner: the method that ranks entries, by what a decoded token tells.
    threshold: entries with scores below it leave.
    window: latest entries, which stay.
  """

  threshold: float = 0.0
  window: Count = 128
  default: ClassVar[dict[str, str]] = {'inner': 'knorm'}
  adaptive = 'entries with low scores leave'

  @property
  def min_capacity(self) -> int:
    return self.window + 1

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVGather:
    scores = self.inner.ranking(tokens, signals, num_slots=num_slots)
    recent = latest(tokens, self.window)[:, None]
    scores = jnp.where(recent, jnp.inf, scores)
    best, src = jax.lax.top_k(scores, num_slots)
    valid, own = best >= self.threshold, filled(tokens, num_slots, scores.shape[1])
    return KVGather(src.astype(jnp.int32), valid=valid if own is None else valid & own)

  def evict(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Array:
    """Lets entries with low scores go, and the lowest of the others where they are too many."""
    scores, forced = self.inner.scores_while_decoding(tokens, signals, num_slots=num_slots)
    forced |= newest(tokens, self.window)
    return stays(tokens, scores, num_slots, forced) & (forced | (scores >= self.threshold))

  def min_slots(self, slots: int, protected: int) -> int:
    return min(slots, max(super().min_slots(slots, protected), self.window + 1))
