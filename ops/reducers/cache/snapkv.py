"""SnapKV: keeps the cache entries that the end of the prompt attends to, and their neighbours.

Axes: B batch, N entries now, M entries after, H heads, K kv heads, W last queries.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.kv_cache import KVGather
from ops.primitives.kv_select import by_kv_head, latest, pool_neighbours
from ops.reducers.base import Checked
from ops.reducers.scoring import ScoringReducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import OneOf

Array = jax.Array
POOLS = ('avg', 'max')
VARIANTS = ('release', 'kvpress')


@dataclasses.dataclass(frozen=True)
class SnapKV(Checked, ScoringReducer):
  """Keeps the last entries and those with their highest attention, pooled over neighbours.

  SnapKV (Li et al., 2024), arXiv:2404.14469. The scores of heads that share a key are averaged;
  the release repeats keys instead, and so keeps as many caches as there are heads.

  Attributes:
    window: W, last queries that are asked, and entries that always stay.
    kernel: neighbouring entries that are pooled, an odd number; the ends count as zeros.
    pool: 'avg' or 'max'.
    variant: 'release' puts the best entry first and the window last; 'kvpress', as that library
      does, the window first.
  """

  window: int = 64
  kernel: int = 5
  pool: Annotated[str, OneOf(POOLS)] = 'avg'
  variant: Annotated[str, OneOf(VARIANTS)] = 'release'
  needs = frozenset({'keys', 'window_attention'})

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
      raise ValueError(f'window={self.window} must be at least 1 and kernel={self.kernel} odd')

  @property
  def span(self) -> int:
    return self.window

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVGather:
    assignment = super().__call__(tokens, signals, num_slots=num_slots)
    if self.variant == 'kvpress':
      return assignment
    if assignment.valid is None:
      return KVGather(jnp.roll(assignment.src, -self.window, axis=2))
    left = jnp.sum(assignment.valid, axis=2, keepdims=True, dtype=jnp.int32)
    place = jnp.arange(num_slots, dtype=jnp.int32)[None, None]
    place = jnp.where(place < left, (place + self.window) % jnp.maximum(left, 1), place)
    return assignment.replace(src=jnp.take_along_axis(assignment.src, jnp.broadcast_to(
        place, assignment.src.shape), axis=2))

  def scores(self, tokens: TokenSet, signals: Signals) -> Array:
    """float32[B, K, N], mean over the window's queries and a key's heads, 0 in the window."""
    before = tokens.real & ~latest(tokens, self.window)
    rows = jnp.where(before[:, None], signals.window_attention.mean(axis=2), 0.0)
    pooled = pool_neighbours(rows, tokens, kernel=self.kernel, pool=self.pool)
    pooled = by_kv_head(pooled, signals.keys.shape[2]).mean(axis=2)
    return jnp.where(before[:, None], pooled, 0.0)

  def forced(self, tokens: TokenSet, num_slots: int) -> Array:
    """Names the window."""
    del num_slots
    return latest(tokens, self.window)

  def min_slots(self, slots: int, protected: int) -> int:
    del protected
    return min(slots, self.window + 1)
