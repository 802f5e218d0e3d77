"""Observed attention: keeps the cache entries that the prompt attended to.

Axes: B batch, N entries now, M entries after, H heads, K kv heads.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.primitives.kv_select import by_kv_head
from ops.primitives.select import rank_of
from ops.reducers.scoring import ScoringReducer
from ops.signals import Signals
from ops.tokens import TokenSet

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ObservedAttention(ScoringReducer):
  """Keeps the entries with the highest mean attention from later tokens.

  H2O's score (Zhang et al., 2023), arXiv:2306.14048, as the kvpress library has it: each column
  of the causal map over the number of queries that see it, mean over the heads that share a key,
  no window. `h2o` is the authors' own form.
  """

  needs = frozenset({'keys', 'received_attention'})

  def scores(self, tokens: TokenSet, signals: Signals) -> Array:
    """float32[B, K, N], attention a query that sees the key."""
    real = jnp.sum(tokens.real, axis=1, keepdims=True, dtype=jnp.float32)
    seen = jnp.maximum(real - rank_of(tokens.real), 1.0)
    received = by_kv_head(signals.received_attention, signals.keys.shape[2]).mean(axis=2)
    return received * (real / seen)[:, None]
