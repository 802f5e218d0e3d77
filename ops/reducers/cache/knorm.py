"""KNorm: keeps the cache entries with the shortest keys.

Axes: B batch, N entries now, M entries after, K kv heads, d features a head.
"""

import dataclasses

import jax.numpy as jnp

from ops.reducers.scoring import ScoringReducer
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class KNorm(ScoringReducer):
  """Keeps the entries with the shortest keys, head by head.

  Short keys receive most attention. A Simple and Effective L2 Norm-Based Strategy for KV Cache
  Compression (Devoto et al., 2024), arXiv:2406.11430. Rotation leaves the length of a key as it is.
  """

  by_order = False

  def scores(self, tokens: TokenSet, signals: Signals) -> jnp.ndarray:
    """float32[B, K, N], minus the length of each key."""
    del tokens
    keys = signals.keys.astype(jnp.float32)
    return -jnp.sqrt(jnp.sum(keys * keys, axis=3)).swapaxes(1, 2)
