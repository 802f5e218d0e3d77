"""What soft methods share: protected tokens pass, learned mixtures of the others follow.

Axes: B batch, N slots now, M slots after, K mixtures, P protected, D features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ops.assignments import Mix
from ops.primitives.select import rank_of
from ops.tokens import TokenSet

Array = jax.Array

# Hides a slot from a softmax. Finite, so that a row where all are hidden stays finite too.
HIDDEN = -1e9


def mixtures(tokens: TokenSet, weights: Array, features: Array) -> Mix:
  """A Mix of the P protected tokens, unchanged and in slot order, and K mixtures of the free ones.

  A row with n free tokens keeps its first min(n, K) mixtures; the others are padding.

  Args:
    tokens: N slots, of which at most P = tokens.protected in a row are not free.
    weights: float32[B, K, N]; only those of free slots count.
    features: float[B, N, D], what is mixed in place of the free tokens' own features.
  """
  kept, free, count = tokens.fixed, tokens.free, weights.shape[1]
  same = rank_of(kept)[:, None] == jnp.arange(tokens.protected)[None, :, None]
  lead = (same & kept[:, None]).astype(jnp.float32)
  weights = jnp.where(free[:, None], weights, 0.0)
  valid = None
  if tokens.valid is not None:
    filled = jnp.arange(count)[None] < jnp.sum(free, axis=1, keepdims=True)
    valid = jnp.concatenate([jnp.any(lead > 0, axis=2), filled], axis=1)
  features = jnp.where(kept[..., None], tokens.x, features.astype(tokens.x.dtype))
  return Mix(jnp.concatenate([lead, weights], axis=1), valid=valid, features=features)
