"""Periodic: compresses the cache by any ranking of its entries while a model decodes."""

import dataclasses
from typing import ClassVar

import jax

from ops.kv_cache import KVGather
from ops.reducers.scoring import Wrapper
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count


@dataclasses.dataclass(frozen=True)
class Periodic(Wrapper):
  """Lets the entries go that another method ranks lowest, every so many decoded tokens.

  As the kvpress library has it (DecodingPress; Devoto et al., 2025, arXiv:2510.00636). Between two
  evictions the cache grows by `every` entries. A prompt is cut by the inner method, to as many as
  the config's budget says: keep_ratio=1 leaves it whole, as the library does, until the first
  eviction.

  Attributes:
    inner: the method that ranks entries, by what a decoded token tells.
    every: tokens between two evictions.
  """

  every: Count = 128
  default: ClassVar[dict[str, str]] = {'inner': 'knorm'}

  @property
  def shared(self) -> bool:
    return self.inner.shared

  @property
  def evict_needs(self) -> frozenset[str]:
    return self.inner.evict_needs

  @property
  def update_needs(self) -> frozenset[str]:
    return self.inner.update_needs

  @property
  def tracks(self) -> tuple[str, ...]:
    return self.inner.tracks

  @property
  def min_capacity(self) -> int:
    return self.inner.min_capacity

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVGather:
    return self.inner(tokens, signals, num_slots=num_slots)

  def update(self, tokens: TokenSet, signals: Signals, queries: jax.Array) -> dict[str, jax.Array]:
    return self.inner.update(tokens, signals, queries)

  def evict(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> jax.Array:
    """Lets the entries go that are over the count and that the inner method ranks lowest."""
    return self.inner.evict(tokens, signals, num_slots=num_slots)
