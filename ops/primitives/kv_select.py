"""Entries of a layer's cache of keys and values: which of them stay, head by head.

Axes: B batch, N entries now, M entries after, H heads, K kv heads, G heads that share one (H / K).

All real tokens count here, of whatever kind. Heads need not agree on those that stay, and the order
of entries means nothing to attention.
"""

from __future__ import annotations

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp

from ops.kv_cache import KVGather
from ops.moves.rows import take
from ops.primitives.select import rank_of, ranks, sort_picked, top
from ops.signals import Signals
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


def stays(tokens: TokenSet, scores: Array, num_slots: int, forced: Array | None = None) -> Array:
  """Flags the entries of a cache that stay while a model decodes: bool[R, S].

  Of equals those at lower positions stay.

  Args:
    tokens: S entries, in no order.
    scores: float[R, S], higher stays.
    num_slots: the most that stay.
    forced: bool[R, S], entries that stay whatever their score, or None.
  """
  real, pos = tokens.real, tokens.pos
  scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
  forced = jnp.zeros(real.shape, bool) if forced is None else forced
  if tokens.slots == num_slots + 1:  # One goes at most: no need to sort.
    free = real & ~forced
    lowest = jnp.min(jnp.where(free, scores, jnp.inf), axis=1, keepdims=True)
    last = jnp.max(jnp.where(free & (scores == lowest), pos, -1), axis=1, keepdims=True)
    return real & ~((pos == last) & jnp.all(real, axis=1, keepdims=True))
  scores = jnp.where(forced, jnp.inf, jnp.where(real, scores, -jnp.inf))
  iota = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), pos.shape)
  order = jax.lax.sort((-scores, pos, iota), dimension=1, num_keys=2)[2]
  return real & (jnp.argsort(order, axis=1) < num_slots)


def newest(tokens: TokenSet, count: int) -> Array:
  """bool[R, S], True for entries less than `count` positions before the last, in no order."""
  last = jnp.max(jnp.where(tokens.real, tokens.pos, -1), axis=1, keepdims=True)
  return tokens.real & (tokens.pos > last - count)


def oldest(tokens: TokenSet, count: int) -> Array:
  """bool[R, S], True for the `count` real entries at the lowest positions, in no order."""
  if not count:
    return jnp.zeros(tokens.pos.shape, bool)
  before = jax.lax.top_k(jnp.where(tokens.real, -tokens.pos, jnp.iinfo(jnp.int32).min), count)[0]
  return tokens.real & (-tokens.pos >= before[:, -1:])


def in_order(tokens: TokenSet, signals: Signals) -> tuple[TokenSet, Signals, Array]:
  """Sorts entries by position, empty slots last; and int32[R, S], the place of each slot there."""
  order = jnp.argsort(jnp.where(tokens.real, tokens.pos, jnp.iinfo(jnp.int32).max), axis=1)
  pos, valid = (take(x, order) for x in (tokens.pos, tokens.real))
  stats = {name: take(x, order) for name, x in tokens.stats.items()}
  queries = signals.window_queries
  return (tokens.replace(pos=pos, valid=valid, stats=stats),
          signals.of(order).replace(window_queries=queries), jnp.argsort(order, axis=1))


def budgets(tokens: TokenSet, num_slots: int) -> Array:
  """int32[B, 1], entries that each row keeps a head: as many as asked, or all that it has."""
  return jnp.minimum(count(tokens.real), num_entries(tokens, num_slots))


def share_of(counts: Array, share: float, most: int) -> Array:
  """Rounds a share of counts int32[...], of at most `most`, down: exactly, as 0.7 means 7/10."""
  exact = Fraction(str(share))
  return jnp.asarray([int(n * exact) for n in range(most + 1)], jnp.int32)[counts]


def share_with_floor(counts: Array, share: float, most: int) -> Array:
  """Returns `share_of`, but one at least of what is there, unless the share is 0."""
  if not share:
    return jnp.zeros_like(counts)
  return jnp.maximum(share_of(counts, share, most), jnp.minimum(counts, 1))


def best_of_each_head(scores: Array, counts: Array, forced: Array | None = None) -> Array:
  """Flags the best entries of each head: bool[B, K, N].

  Args:
    scores: float32[B, K, N], -inf at padding.
    counts: int32[B, K], or [B, 1] for all heads, how many.
    forced: bool[B, K, N], entries that come first, or None.
  """
  slots = scores.shape[2]
  flat = None if forced is None else forced.reshape(-1, slots)
  order = top(scores.reshape(-1, slots), slots, forced=flat)
  return (ranks(order, slots).reshape(scores.shape) < counts[..., None]) & (scores > -jnp.inf)


def best_of_all_heads(scores: Array, counts: Array, most: int,
                      forced: Array | None = None) -> Array:
  """Flags the best entries of all heads together: bool[B, K, N].

  Args:
    scores: float32[B, K, N], -inf at padding.
    counts: int32[B, 1], how many.
    most: of any row.
    forced: bool[B, K, N], entries that come first, or None.
  """
  batch = len(scores)
  order = top(scores.reshape(batch, -1), most,
              forced=None if forced is None else forced.reshape(batch, -1))
  place = ranks(order, scores.size // batch).reshape(scores.shape)
  return (place < jnp.minimum(counts, most)[..., None]) & (scores > -jnp.inf)


def packed(tokens: TokenSet) -> tuple[Array, Array]:
  """int32[B, N] twice: slots with real ones first, in order; and the place of each slot there."""
  order = jnp.argsort(~tokens.real, axis=1, stable=True).astype(jnp.int32)
  return order, jnp.argsort(order, axis=1).astype(jnp.int32)


def along_slots(values: Array, index: Array) -> Array:
  """Takes slots int32[B, M] of every head: float[B, K, N, ...] -> [B, K, M, ...]."""
  index = index.reshape(index.shape[0], 1, index.shape[1], *(1,) * (values.ndim - 3))
  return jnp.take_along_axis(values, index, axis=2)


def in_parts(values: Array, length: int, fill: float = 0.0) -> Array:
  """Cuts float[B, K, N, ...] into [B, K, ceil(N / length), length, ...], `fill` at the end."""
  rest = -values.shape[2] % length
  padding = [(0, rest if axis == 2 else 0) for axis in range(values.ndim)]
  values = jnp.pad(values, padding, constant_values=fill)
  return values.reshape(*values.shape[:2], -1, length, *values.shape[3:])


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


def standardized(scores: Array, tokens: TokenSet) -> Array:
  """Standardizes scores over the heads of a row and its real tokens: float32[B, K, N].

  Args:
    scores: float32[B, K, N].
    tokens: N entries; those that are not real become 0.
  """
  real = tokens.real[:, None]
  number = jnp.sum(real, axis=(1, 2), keepdims=True) * scores.shape[1]

  def total(x: Array) -> Array:
    return jnp.sum(jnp.where(real, x, 0.0), axis=(1, 2), keepdims=True)

  apart = scores - total(scores) / jnp.maximum(number, 1)
  spread = jnp.sqrt(total(jnp.square(apart)) / jnp.maximum(number - 1, 1))
  return jnp.where(real, apart / jnp.maximum(spread, 1e-6), 0.0)


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
