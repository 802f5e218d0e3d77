"""Finch: keeps the entries that a question at the end of the prompt attends to.

Axes: B batch, N entries now, M entries after, H heads, K kv heads, W tokens of the question.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.primitives.kv_select import by_kv_head, latest
from ops.reducers.scoring import ScoringReducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Finch(ScoringReducer):
  """Keeps the question and what it attends to, and numbers keys anew.

  FINCH (Corallo and Papotti, 2024), arXiv:2408.00167, as in the kvpress library: attention of each
  token of the question times the number of tokens that it sees before itself, mean over the
  question and the heads that share a key. Keys are turned to the positions that they then have
  (positions='compact'). The question is the last `window` tokens; the library finds it behind a
  delimiter. `chunk` holding this method cuts the prompt part by part.

  Attributes:
    window: W, tokens of the question, which always stay.
  """

  window: Count = 32
  needs = frozenset({'keys', 'window_attention'})
  positions = 'compact'

  @property
  def span(self) -> int:
    return self.window

  def scores(self, tokens: TokenSet, signals: Signals) -> Array:
    """float32[B, K, N], mean weighted attention of the question, 0 within it."""
    before = tokens.real & ~latest(tokens, self.window)
    real = jnp.sum(tokens.real, axis=1, keepdims=True, dtype=jnp.int32)
    rows = signals.window_attention
    seen = real - rows.shape[2] + jnp.arange(rows.shape[2], dtype=jnp.int32)[None]
    rows = (rows * jnp.maximum(seen, 0)[:, None, :, None]).mean(axis=2)
    scores = by_kv_head(rows, signals.keys.shape[2]).mean(axis=2)
    return jnp.where(before[:, None], scores, 0.0)

  def forced(self, tokens: TokenSet, num_slots: int) -> Array:
    """Names the question."""
    del num_slots
    return latest(tokens, self.window)

  def min_slots(self, slots: int, protected: int) -> int:
    del protected
    return min(slots, self.window + 1)
