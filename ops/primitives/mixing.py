"""What methods that mix softly share: protected tokens pass, mixtures of the others follow.

Axes: B batch, N slots now, M slots after, K mixtures, P protected.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ops.assignments import Mix
from ops.primitives.select import rank_of
from ops.tokens import TokenSet

Array = jax.Array


def mix(tokens: TokenSet, weights: Array) -> Mix:
  """A Mix of the P protected tokens, unchanged and in slot order, and K mixtures of the free ones.

  A row of no more free tokens than mixtures has nothing to lose: there each stays as it is.

  Args:
    tokens: N slots, of which P = tokens.protected in a row are not free.
    weights: float32[B, K, N], zero where a slot is not free.
  """
  kept, free, count = tokens.fixed, tokens.free, weights.shape[1]
  output = jnp.arange(max(count, tokens.protected))[None, :, None]
  lead = kept[:, None] & (rank_of(kept)[:, None] == output[:, :tokens.protected])
  alone = free[:, None] & (rank_of(free)[:, None] == output[:, :count])
  total = jnp.sum(free, axis=1, keepdims=True)
  rest = jnp.where(total[:, :, None] > count, weights, alone)
  valid = None
  if tokens.valid is not None:
    filled = jnp.arange(count)[None] < total
    valid = jnp.concatenate([jnp.any(lead, axis=2), filled], axis=1)
  return Mix(jnp.concatenate([lead.astype(jnp.float32), rest], axis=1), valid=valid)
