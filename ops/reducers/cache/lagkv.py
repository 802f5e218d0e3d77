"""LagKV: scores entries by how they spread within the range of the entries after them.

Axes: B batch, N entries now, M entries after, K kv heads, d features a head, C parts, S entries of
a part.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.primitives.kv_select import along_slots, in_parts, packed
from ops.reducers.scoring import ScoringReducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, CountOrZero, OneOf, check_fields

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LagKV(ScoringReducer):
  """Keeps the entries of each part that spread most, measured by the ranges of the next part.

  LagKV (Liang et al., 2025), arXiv:2504.04704, Eq. 1 to 6, as in the kvpress library: sinks, the
  last whole part and what is behind it stay. Scores are ranks within a part, so parts keep equal
  numbers, to one; among equal ranks the earlier part comes first. Prompts without two parts keep
  sinks and the latest.

  Attributes:
    sinks: first entries, which always stay.
    lag: S, entries of a part.
    compare: scores 'within' their part, or 'across' parts (for AdaKV).
  """

  sinks: CountOrZero = 4
  lag: Count = 128
  compare: Annotated[str, OneOf(('within', 'across'))] = 'within'
  needs = frozenset({'keys', 'values'})

  def __post_init__(self) -> None:
    check_fields(self)

  def scores(self, tokens: TokenSet, signals: Signals) -> Array:
    """float32[B, K, N], from 0 to 1."""
    order, place = packed(tokens)
    real = jnp.sum(tokens.real, axis=1, keepdims=True, dtype=jnp.int32)
    key, value = (self._spread(along_slots(jnp.swapaxes(x, 1, 2), order).astype(jnp.float32))
                  for x in (signals.keys, signals.values))
    spread = (key + value) / 2
    if self.compare == 'within':
      spread = jnp.argsort(jnp.argsort(spread, axis=3, stable=True), axis=3) / self.lag
    # Of all entries, in the order of the prompt; the last part of any row has none after it.
    slots = tokens.slots
    flat = spread.reshape(*spread.shape[:2], -1)
    flat = jnp.pad(flat, ((0, 0), (0, 0), (self.sinks, max(slots - self.sinks - flat.shape[2], 0))))
    flat = along_slots(flat[:, :, :slots], place)
    parts = (real - self.sinks) // self.lag
    scored = (place >= self.sinks) & (place < self.sinks + (parts - 1) * self.lag)
    later = (place - self.sinks) / jnp.maximum(real - self.sinks, 1)
    few = jnp.where(place < self.sinks, 1.0, later)
    whole = jnp.where(scored[:, None], flat, 1.0)
    return jnp.where((real < self.sinks + 2 * self.lag)[..., None], few[:, None], whole)

  def _spread(self, x: Array) -> Array:
    """float32[B, K, C, S]: deviation over features of entries within the next part's range."""
    parts = in_parts(x[:, :, self.sinks:], self.lag)
    # The last part is its own range, and never read.
    after = jnp.concatenate([parts[:, :, 1:], parts[:, :, -1:]], axis=2)
    low, high = after.min(axis=3, keepdims=True), after.max(axis=3, keepdims=True)
    return jax.nn.softmax(jnp.std((parts - low) / (high - low), axis=4, ddof=1), axis=3)
