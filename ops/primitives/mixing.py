"""Soft mixing: protected tokens pass unchanged, mixtures of the free tokens follow.

Axes: B batch, N slots now, M slots after, K mixtures, P protected, D features.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from ops.assignments import Mix
from ops.primitives.select import rank_of
from ops.tokens import TokenSet, num_kept

Array = jax.Array


def mix_free(tokens: TokenSet, weights: Array, features: Array | None = None) -> Mix:
  """Makes a Mix of the P protected tokens, in slot order, and K mixtures of the free ones.

  A row with n free tokens keeps its first min(n, K) mixtures, or as many as its budget says; the
  others are padding.

  Args:
    tokens: N slots, of which at most P = tokens.protected in a row are not free.
    weights: float32[B, K, N]; only the weights of free slots count.
    features: float[B, N, D] to mix in place of the free tokens' own features, or None for these.
  """
  chex.assert_shape(weights, (len(tokens.x), None, tokens.slots))
  fixed, free, count = tokens.fixed, tokens.free, weights.shape[1]
  in_turn = rank_of(fixed)[:, None] == jnp.arange(tokens.protected)[None, :, None]
  protected_rows = (in_turn & fixed[:, None]).astype(jnp.float32)
  weights = jnp.where(free[:, None], weights, 0.0)
  valid = None
  if tokens.valid is not None:
    filled = jnp.arange(count)[None] < num_kept(tokens, tokens.protected + count)
    valid = jnp.concatenate([jnp.any(protected_rows > 0, axis=2), filled], axis=1)
  if features is not None:
    features = jnp.where(fixed[..., None], tokens.x, features.astype(tokens.x.dtype))
  return Mix(jnp.concatenate([protected_rows, weights], axis=1), valid=valid, features=features)


def mix_where_too_many(tokens: TokenSet, weights: Array) -> Mix:
  """Mixes as `mix_free`, but only in rows with more free tokens than the K mixtures.

  In any other row each free token stays as it is, in slot order.

  Args:
    tokens: N slots, of which at most P = tokens.protected in a row are not free.
    weights: float32[B, K, N]; only the weights of free slots count.
  """
  free, count = tokens.free, weights.shape[1]
  in_turn = rank_of(free)[:, None] == jnp.arange(count)[None, :, None]
  most = count if tokens.budget is None else num_kept(tokens, tokens.protected + count)[:, :, None]
  too_many = jnp.sum(free, axis=1)[:, None, None] > most
  return mix_free(tokens, jnp.where(too_many, weights, in_turn & free[:, None]))
