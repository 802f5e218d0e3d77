"""Entries of a layer's cache of keys and values: which of them stay, head by head.

Axes: B batch, N entries now, M entries after, H heads, K kv heads, G heads that share one (H / K).

All real tokens count here, of whatever kind. Heads need not agree on those that stay, and the order
of entries means nothing to attention.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ops.kv_cache import KVGather
from ops.primitives.select import rank_of, sort_picked, top
from ops.tokens import TokenSet, count

Array = jax.Array


def keep_best(tokens: TokenSet, scores: Array, *, num_slots: int, forced: Array | None = None,
              order: str = 'score') -> KVGather:
  """Keeps the `num_slots` best entries of every kv head; padding goes first.

  Args:
    tokens: N entries.
    scores: float[B, K, N], higher stays.
    num_slots: M, entries left.
    forced: bool[B, N] or None, entries that stay whatever their score, as far as they fit.
    order: 'score' puts forced entries first, in their order, then the best; 'slot' keeps the
      order.

  Raises:
    ValueError: for another `order`.
  """
  if order not in ('slot', 'score'):
    raise ValueError(f"order={order!r} is unknown: choose 'slot' or 'score'")
  batch, heads, slots = scores.shape

  def each_head(flags: Array | None) -> Array | None:
    return None if flags is None else jnp.repeat(flags, heads, axis=0)

  picked = top(scores.reshape(-1, slots), num_slots, forced=each_head(forced),
               excluded=each_head(~tokens.real))
  picked = picked.reshape(batch, heads, num_slots)
  valid = filled(tokens, num_slots, heads)
  if order == 'slot':
    picked = sort_picked(picked, valid, slots)
  return KVGather(picked, valid)


def num_entries(tokens: TokenSet, num_slots: int) -> Array | int:
  """Counts the entries that stay: M, or int32[B, 1] where rows have budgets of their own."""
  if tokens.budget is None:
    return num_slots
  return jnp.minimum(tokens.budget[:, None], count(tokens.real))


def filled(tokens: TokenSet, num_slots: int, heads: int) -> Array | None:
  """Names the places that get an entry, bool[B, K, M]; None where rows have no budgets."""
  if tokens.budget is None:
    return None
  stays = jnp.arange(num_slots, dtype=jnp.int32)[None] < num_entries(tokens, num_slots)
  return jnp.broadcast_to(stays[:, None], (len(stays), heads, num_slots))


def by_kv_head(attention: Array, heads: int) -> Array:
  """float[B, H, ...] -> float[B, K, G, ...]: heads beside those that they share keys with."""
  return attention.reshape(attention.shape[0], heads, -1, *attention.shape[2:])


def broadcast_to_heads(scores: Array, heads: int) -> Array:
  """float[B, N] -> float[B, K, N]: one score for all heads."""
  return jnp.broadcast_to(scores[:, None], (scores.shape[0], heads, scores.shape[1]))


def latest(tokens: TokenSet, number: Array | int) -> Array:
  """bool[B, N], True for the last `number` real entries, one for all rows or int32[B, 1]."""
  return tokens.real & (rank_of(tokens.real) >= count(tokens.real) - number)


def earliest(tokens: TokenSet, number: Array | int) -> Array:
  """bool[B, N], True for the first `number` real entries, one for all rows or int32[B, 1]."""
  return tokens.real & (rank_of(tokens.real) < number)


def pool_neighbours(values: Array, tokens: TokenSet, *, kernel: int, pool: str) -> Array:
  """Means or maxima over `kernel` neighbouring real entries, zeros beyond both ends.

  Args:
    values: float32[B, H, N], 0 at padding; for maxima 0 or more.
    tokens: N entries.
    kernel: an odd number; means divide by it at the ends, too.
    pool: 'avg' or 'max'.
  """
  if tokens.valid is not None:
    # Neighbours are neighbours whatever padding lies between them.
    packed = jnp.argsort(~tokens.valid, axis=1, stable=True)[:, None]
    back = jnp.argsort(packed, axis=2)
    values = jnp.take_along_axis(values, packed, axis=2)
  ends = jnp.pad(values, ((0, 0), (0, 0), (kernel // 2, kernel // 2)))
  shifted = [ends[:, :, i:i + values.shape[2]] for i in range(kernel)]
  pooled = (functools.reduce(jnp.add, shifted) / kernel if pool == 'avg'
            else jnp.stack(shifted).max(axis=0))
  return pooled if tokens.valid is None else jnp.take_along_axis(pooled, back, axis=2)
