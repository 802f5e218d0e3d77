"""Sampling of tokens at quantiles of a distribution over them.

Axes: B batch, N slots now, M slots after, P quantiles.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ops.assignments import Gather, take
from ops.primitives.match import scatter
from ops.primitives.select import ranks, top
from ops.tokens import TokenSet, num_left

Array = jax.Array


def sample_at(quantiles: Array, share: Array, order: Array, counts: Array) -> Array:
  """Samples the slots whose shares are nearest to quantiles.

  Args:
    quantiles: float32[B, P].
    share: float32[B, N], the sums of the distribution, rising, of the slots in `order`.
    order: int32[B, N], slots.
    counts: bool[B, N], the entries of `order` that count.

  Returns:
    bool[B, N], sampled at least once.
  """
  nearest = take(order, jax.vmap(_nearest_share)(jnp.where(counts, share, jnp.inf), quantiles))
  return scatter(jnp.zeros_like(counts), nearest, jnp.ones_like(nearest, bool))


def keep_sampled(tokens: TokenSet, scores: Array, hit: Array, *, num_slots: int,
                 turn: Array | None = None) -> Gather:
  """Keeps the protected tokens, then the sampled ones, then padding.

  Args:
    tokens: N slots.
    scores: float32[B, N]; where more tokens were sampled than fit, the highest stay.
    hit: bool[B, N], the sampled tokens.
    num_slots: M.
    turn: float32[B, N], the order of the sampled tokens; None for the lowest score first.
  """
  picked = top(scores, num_slots, forced=tokens.fixed, excluded=~(tokens.fixed | hit))
  wanted = tokens.fixed | hit
  stays = wanted
  if tokens.budget is not None:
    stays &= ranks(picked, tokens.slots) < num_left(tokens, num_slots)
  rank = jnp.where(tokens.fixed, -jnp.inf,
                   jnp.where(stays, scores if turn is None else turn, jnp.inf))
  src = take(picked, jnp.argsort(take(rank, picked), axis=1))
  return Gather(src, tokens.slots, valid=take(stays, src),
                wanted=jnp.sum(wanted, axis=1, dtype=jnp.int32))


def outliers(values: Array, among: Array) -> Array:
  """Finds what lies above the third quartile by more than 1.5 times the interquartile range.

  Quartiles are interpolated, as numpy does.

  Args:
    values: float32[B, N].
    among: bool[B, N], those that count.

  Returns:
    bool[B, N].
  """
  rising = jnp.sort(jnp.where(among, values, jnp.inf), axis=1)
  last = jnp.maximum(jnp.sum(among, axis=1, keepdims=True, dtype=jnp.int32) - 1, 0)

  def quartile(number: int) -> Array:
    below, above = number * last // 4, jnp.minimum(number * last // 4 + 1, last)
    part = (number * last % 4).astype(jnp.float32) / 4
    return take(rising, below) * (1 - part) + take(rising, above) * part

  first, third = quartile(1), quartile(3)
  return among & (values > third + 1.5 * (third - first))


def _nearest_share(share: Array, quantiles: Array) -> Array:
  """int32[P]: where float32[N], rising, is nearest to float32[P]; the first of equals."""
  above = jnp.minimum(jnp.searchsorted(share, quantiles), share.shape[0] - 1)
  below = jnp.searchsorted(share, share[jnp.maximum(above - 1, 0)])
  lower = jnp.abs(quantiles - share[below]) <= jnp.abs(share[above] - quantiles)
  return jnp.where(lower, below, above).astype(jnp.int32)
