"""Selection: which slots stay, given a score a slot. One selection a reduction.

Axes: B batch, N slots now, M slots after.

Scores are float32 and ties go to the lowest slot, on every device: `lax.top_k` promises both.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from ops.assignments import Gather
from ops.moves.rows import put, take
from ops.tokens import TokenSet, filled

Array = jax.Array


def top(scores: Array, num_slots: int, *, forced: Array | None = None,
        excluded: Array | None = None) -> Array:
  """Picks the `num_slots` best slots, best first.

  Args:
    scores: float[B, N], higher is better; NaN counts as worst.
    num_slots: M, slots to pick, at most N.
    forced: bool[B, N], slots that come first whatever their score, in slot order.
    excluded: bool[B, N], slots that come last whatever their score, even where forced.

  Returns:
    int32[B, M]. Excluded slots are picked only when nothing else is left.
  """
  chex.assert_rank(scores, 2)
  scores = scores.astype(jnp.float32)
  # Finite limits keep the three classes apart even from scores that are infinite themselves.
  limit = jnp.finfo(jnp.float32).max / 4
  scores = jnp.clip(jnp.where(jnp.isnan(scores), -limit, scores), -limit, limit)
  if forced is not None:
    scores = jnp.where(forced, 2 * limit, scores)
  if excluded is not None:
    scores = jnp.where(excluded, -2 * limit, scores)
  return jax.lax.top_k(scores, num_slots)[1].astype(jnp.int32)


def ranks(order: Array, slots: int) -> Array:
  """Inverts a selection: int32[B, M] picked slots -> int32[B, N], the place of each, M if none."""
  batch, picked = order.shape
  start = jnp.full((batch, slots), picked, jnp.int32)
  place = jnp.broadcast_to(jnp.arange(picked, dtype=jnp.int32), (batch, picked))
  return put(start, order, place)


def keep_top(tokens: TokenSet, scores: Array, *, num_slots: int, order: str = 'slot') -> Gather:
  """Prunes to the `num_slots` best tokens; those that may not be touched always stay.

  Args:
    tokens: N slots. Protected and other-kind tokens stay; padding goes first.
    scores: float[B, N], higher stays.
    num_slots: M, slots left, protected ones included; a row with a budget fills no more than that.
    order: 'slot' keeps the tokens in their order, 'score' puts the best first (protected ones
      lead, in slot order).

  Raises:
    ValueError: for another `order`.
  """
  if order not in ('slot', 'score'):
    raise ValueError(f"order={order!r} is unknown: choose 'slot' or 'score'")
  chex.assert_equal_shape((scores, tokens.kind))
  picked = top(scores, num_slots, forced=tokens.fixed, excluded=~tokens.real)
  stays = filled(tokens, num_slots)
  if order == 'slot':
    picked = sort_picked(picked, stays, tokens.slots)
  return Gather(picked, tokens.slots, valid=stays)


def keep_flagged(tokens: TokenSet, flags: Array, *, num_slots: int) -> Gather:
  """Prunes to the flagged tokens and those that may not be touched, in slot order.

  What is left of the slots is padding; of more tokens than fit the last go.

  Args:
    tokens: N slots.
    flags: bool[B, N], free tokens that stay.
    num_slots: M, slots left; a row with a budget fills no more than that.
  """
  stays = tokens.fixed | flags
  if tokens.budget is not None:
    stays = tokens.fixed | (flags & (rank_of(flags) < tokens.budget[:, None]))
  order = jnp.where(tokens.fixed, 0, jnp.where(stays, 1, 2))
  picked = jnp.argsort(order, axis=1, stable=True)[:, :num_slots].astype(jnp.int32)
  there = take(stays, picked)
  picked = sort_picked(picked, there, tokens.slots)
  return Gather(picked, tokens.slots, valid=jnp.arange(num_slots)[None] < jnp.sum(
      there, axis=1, keepdims=True))


def sort_picked(picked: Array, valid: Array | None, slots: int) -> Array:
  """Sorts picked slots, int32[..., M], those that are not valid behind the others."""
  if valid is None:
    return jnp.sort(picked, axis=-1)
  return jnp.minimum(jnp.sort(jnp.where(valid, picked, slots), axis=-1), slots - 1)


def rank_of(flags: Array) -> Array:
  """bool[B, N] -> int32[B, N]: how many True come before each slot."""
  return jnp.cumsum(flags, axis=1, dtype=jnp.int32) - flags.astype(jnp.int32)


def above_elbow(scores: Array, among: Array) -> Array:
  """Names the slots whose scores are above the elbow of the sorted scores.

  The elbow is the first of the places that are farthest from the line between the highest score, at
  place 0, and the lowest, at the last place. Where all are equal all count as above.

  Args:
    scores: int32[B, N], of which the largest times N fits into int32.
    among: bool[B, N], slots that count.

  Returns:
    bool[B, N].
  """
  number = jnp.sum(among, axis=1, keepdims=True, dtype=jnp.int32)
  falling = -jnp.sort(jnp.where(among, -scores, jnp.iinfo(jnp.int32).max), axis=1)
  place = jnp.arange(scores.shape[1], dtype=jnp.int32)[None]
  first = falling[:, :1]
  last = jnp.take_along_axis(falling, jnp.maximum(number - 1, 0), axis=1)
  distance = jnp.abs((number - 1) * (first - falling) - place * (first - last))
  at = jnp.argmax(jnp.where(place < number, distance, -1), axis=1)[:, None]
  elbow = jnp.take_along_axis(falling, at, axis=1)
  return among & ((scores > elbow) | (first == last))


def apportion(shares: Array, number: Array, among: Array | None = None) -> Array:
  """Divides a number into whole parts: each its share, rounded down, the largest one more.

  Args:
    shares: float[B, P], not negative, of a sum of at most 1.
    number: int32[B, 1]; the last few of it are given to the largest shares, one each.
    among: bool[B, P], the parts that get any; None for all.

  Returns:
    int32[B, P].
  """
  if among is None:
    among = jnp.ones(shares.shape, bool)
  given = jnp.floor(jnp.where(among, shares, 0.0) * number).astype(jnp.int32)
  rest = number - jnp.sum(given, axis=1, keepdims=True)
  parts = shares.shape[1]
  return given + (among & (ranks(top(shares, parts, excluded=~among), parts) < rest))


def apportion_room(shares: Array, number: Array, room: Array) -> Array:
  """Divides a number as `apportion`; what a part has no room for goes to the others.

  Args:
    shares: float[B, P], not negative.
    number: int32[B, 1], at most the sum of `room`.
    room: int32[B, P], the most that each part takes.

  Returns:
    int32[B, P], of a sum of `number`.
  """
  def left(given: Array) -> Array:
    return number - jnp.sum(given, axis=1, keepdims=True)

  def give(given: Array) -> Array:
    among = given < room
    open_shares = jnp.where(among, shares, 0.0)
    total = jnp.maximum(jnp.sum(open_shares, axis=1, keepdims=True), 1e-20)
    return jnp.minimum(given + apportion(open_shares / total, left(given), among), room)

  return jax.lax.while_loop(lambda given: jnp.any(left(given) > 0), give, jnp.zeros_like(room))
