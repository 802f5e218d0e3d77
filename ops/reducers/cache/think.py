"""ThinK: removes channels of keys.

Axes: B batch, N entries now, M entries after, H heads, K kv heads, d features a head.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import ClassVar

import jax
import jax.numpy as jnp

from ops.caches.channels import INDEX_BYTES, KVChannels
from ops.primitives.kv_select import by_kv_head, latest
from ops.reducers.scoring import ScoringReducer, Wrapper
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, Ratio

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ThinK(Wrapper):
  """Keeps the channels of keys that matter most to the last queries, head by head.

  ThinK: Thinner Key Cache by Query-Driven Pruning (Xu et al., 2024), arXiv:2407.21018, Sec. 3, as
  in the kvpress library, which only zeroes them: here the cache is that much smaller. Keys of
  tokens that are decoded later have all channels. The release leaves the last queries' own keys
  whole.

  Attributes:
    inner: a method that also chooses entries, by the config's budget; None to keep all, without a
      budget.
    prune: the share of channels that goes.
    window: last queries that are asked.
  """

  inner: ScoringReducer | None = None  # type: ignore[assignment]
  prune: Ratio = 0.4
  window: Count = 32
  reads: ClassVar[frozenset[str]] = frozenset({'queries'})
  default: ClassVar[dict[str, str]] = {'inner': ''}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVChannels:
    keys = signals.keys.astype(jnp.float32)
    width = keys.shape[3]

    def mean_square(x: Array, counts: Array) -> Array:
      total = jnp.einsum('bn,bnhd->bhd', counts.astype(jnp.float32), jnp.square(x),
                         precision='highest')
      return total / jnp.maximum(jnp.sum(counts, axis=1), 1)[:, None, None]

    queries = mean_square(signals.queries.astype(jnp.float32), latest(tokens, self.window))
    importance = by_kv_head(queries, keys.shape[2]).mean(axis=2) * mean_square(keys, tokens.real)
    left = self._left(width)
    channels = jnp.sort(jax.lax.top_k(importance, left)[1], axis=2).astype(jnp.int32)
    entries = None if self.inner is None else self.inner(tokens, signals, num_slots=num_slots)
    return KVChannels(channels, entries)

  def _left(self, width: int) -> int:
    """Returns the channels that stay."""
    return width - int(width * self.prune)

  def stored_bytes(self, num_slots: int, heads: int, width: int,
                   itemsize: int) -> tuple[int, int]:
    left = self._left(width)
    numbers = num_slots * heads * (left + width) * itemsize
    places = num_slots * (1 if self.inner is None else heads)
    return numbers, numbers + places * (INDEX_BYTES + 1) + heads * left * INDEX_BYTES

  @property
  def allocates(self) -> bool:
    return self.inner is None

  def allocate(self, layer: int, depth: int, slots: int, asked: Fraction | None) -> int:
    """Returns the entries of a layer, as `CacheReducer.allocate`: all without a held method."""
    del layer, depth
    if asked is not None:
      raise ValueError('think keeps all entries unless it holds a method that chooses: set '
                       'args.inner, or leave keep_ratio, keep and remove out')
    return slots
