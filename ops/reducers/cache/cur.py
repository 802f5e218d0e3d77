"""CUR: keeps the entries of highest leverage, by the lengths of keys and values.

Axes: B batch, N entries now, M entries after, K kv heads, d features a head.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.primitives.kv_select import along_slots, in_parts, packed
from ops.primitives.select import rank_of
from ops.reducers.scoring import ScoringReducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import CountOrZero, OneOf, check_fields

Array = jax.Array
LEVERAGES = ('key', 'value', 'mean', 'product')


@dataclasses.dataclass(frozen=True)
class CUR(ScoringReducer):
  """Keeps the entries with the highest approximate leverage scores, and the first few.

  Value-Guided KV Compression via Approximated CUR Decomposition (Sengupta et al., 2025),
  arXiv:2509.15038, as in the kvpress library: squared lengths, as shares of those of a window of
  neighbours. The paper's random projection before lengths are taken is left out.

  Attributes:
    leverage: of the 'key', of the 'value', their 'mean' or their 'product'.
    window: neighbouring entries that lengths are shares of; 0 for all.
    sinks: first entries, which always stay.
  """

  leverage: Annotated[str, OneOf(LEVERAGES)] = 'product'
  window: CountOrZero = 16
  sinks: CountOrZero = 4
  needs = frozenset({'keys', 'values'})

  def __post_init__(self) -> None:
    check_fields(self)

  def scores(self, tokens: TokenSet, signals: Signals) -> Array:
    """float32[B, K, N], from 0 to 1, and 1 for sinks."""
    key, value = (self._shares(tokens, x) for x in (signals.keys, signals.values))
    scores = {'key': key, 'value': value, 'mean': (key + value) / 2,
              'product': key * value}[self.leverage]
    scores /= jnp.maximum(scores.sum(axis=2, keepdims=True), jnp.finfo(jnp.float32).tiny)
    sinks = tokens.real & (rank_of(tokens.real) < self.sinks)
    return jnp.where(sinks[:, None], 1.0, scores)

  def _shares(self, tokens: TokenSet, x: Array) -> Array:
    """Squared lengths, as shares of their window's: float32[B, K, N]."""
    squares = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=3).swapaxes(1, 2)
    squares = jnp.where(tokens.real[:, None], squares, 0.0)
    if not self.window:
      return squares
    order, place = packed(tokens)
    parts = in_parts(along_slots(squares, order), self.window)
    sums = jnp.maximum(parts.sum(axis=3, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return along_slots((parts / sums).reshape(*squares.shape[:2], -1), place)
