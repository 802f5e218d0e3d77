"""KeyDiff: keeps the cache entries whose keys are least like the others.

Axes: B batch, N entries now, M entries after, K kv heads, d features a head.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.reducers.scoring import ScoringReducer
from ops.signals import Signals
from ops.tokens import TokenSet

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class KeyDiff(ScoringReducer):
  """Keeps the entries whose keys point away from the mean direction of all keys, head by head.

  KeyDiff (Park et al., 2025), arXiv:2504.15364, Sec. 3. Like keys receive like attention, so that
  distinct ones carry more. The paper compresses the prompt block by block; here the prompt is cut
  once, as in the kvpress library.
  """

  by_order = False

  def scores(self, tokens: TokenSet, signals: Signals) -> Array:
    """float32[B, K, N], minus the cosine between each key and the mean direction."""
    keys = jnp.swapaxes(signals.keys, 1, 2).astype(jnp.float32)
    return -cosine_to_mean(keys, jnp.broadcast_to(tokens.real[:, None], keys.shape[:3]))


def cosine_to_mean(keys: Array, valid: Array) -> Array:
  """Compares each key with the mean direction of those that are there: float32[B, K, N].

  Args:
    keys: float32[B, K, N, d].
    valid: bool[B, K, N].
  """
  # Products, so that no second copy of the keys is formed: a model that decodes asks every token.
  length = jnp.maximum(jnp.sqrt(jnp.sum(keys * keys, axis=3)), 1e-12)
  anchor = jnp.einsum('bkn,bknd->bkd', valid / length, keys, precision='highest')
  anchor /= jnp.maximum(jnp.sqrt(jnp.sum(anchor * anchor, axis=2, keepdims=True)), 1e-12)
  return jnp.einsum('bknd,bkd->bkn', keys, anchor, precision='highest') / length
