"""SimLayerKV: lazy layers keep the first and the last entries, the others all.

Axes: B batch, N entries now, M entries after, H heads, K kv heads, W last queries.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import jax.numpy as jnp

from ops.kv_cache import KVGather
from ops.primitives.kv_select import broadcast_to_heads, earliest, keep_best, latest
from ops.reducers.base import CacheReducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, Rate


@dataclasses.dataclass(frozen=True)
class SimLayerKV(CacheReducer):
  """Keeps the first and the last entries of lazy layers, which attend to hardly anything else.

  SimLayerKV (Zhang et al., 2024), arXiv:2410.13846, as in the kvpress library, but row by row. A
  layer is lazy by what the last queries attend to, which is known when the prompt is read: its
  cache then has places for all entries, of which most stay empty. With threshold=0 every layer
  named in `layers` is lazy, and its cache small: calibrate once, then name them.

  Attributes:
    threshold: attention on the first and the last entries above which a layer is lazy; 0 for
      always.
    first: entries at the start that stay.
    recent: entries at the end that stay, the last queries' own but one among them.
    window: W, last queries that are asked.
  """

  threshold: Rate = 0.9
  first: Count = 4
  recent: Count = 1024
  window: Count = 1
  needs = frozenset({'keys', 'window_attention'})
  adaptive = 'layers that are lazy keep a few entries alone'
  allocates = True

  @property
  def span(self) -> int:
    return self.window

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVGather:
    before = tokens.real & ~latest(tokens, self.window)
    seen = jnp.where(before, signals.window_attention.mean(axis=(1, 2)), 0.0)
    ends = earliest(tokens, self.first) | (before & latest(tokens, self.recent + self.window))
    lazy = jnp.sum(jnp.where(ends, seen, 0.0), axis=1, keepdims=True) > self.threshold
    real = jnp.sum(tokens.real, axis=1, keepdims=True)
    short = real <= self.first + self.recent + self.window
    stays = earliest(tokens, self.first) | latest(tokens, self.recent - self.window)
    if not self.threshold:
      lazy = jnp.ones_like(lazy)
    wanted = tokens.real & (stays | short | ~lazy)
    scores = broadcast_to_heads(jnp.where(wanted, 0.0, -1.0), signals.keys.shape[2])
    return keep_best(tokens, scores, num_slots=num_slots, order='slot').only(wanted)

  def allocate(self, layer: int, depth: int, slots: int, asked: Fraction | None) -> int:
    """Returns the places of a layer, as `CacheReducer.allocate`."""
    del layer, depth
    if asked is not None:
      raise ValueError('simlayerkv keeps `first` and `recent` entries of lazy layers and all of '
                       'others: leave keep_ratio, keep and remove out')
    # Rows that are as short as this keep all.
    return slots if self.threshold else min(slots, self.first + self.recent + self.window)
