"""Matching tokens into pairs and groups, for the methods that merge.

Axes: B batch, N slots now, M slots after, A and C the two sides of a matching, D features, H heads,
d features of one.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from ops.argmax import max_and_index
from ops.assignments import Merge
from ops.moves.rows import put, take
from ops.primitives.products import pairs
from ops.primitives.select import ranks, top
from ops.tokens import TokenSet, count, filled, num_kept

Array = jax.Array


def inverse_norm(x: Array, *, eps: float = 1e-12) -> Array:
  """float[..., D] -> float32[...], one over the length; finite, with finite gradients, at zero."""
  x = x.astype(jnp.float32)
  return jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1), eps * eps))


def l2_normalize(x: Array, *, eps: float = 1e-12) -> Array:
  """Vectors of length one along the last axis; zero vectors stay zero and keep finite gradients."""
  return x.astype(jnp.float32) * inverse_norm(x, eps=eps)[..., None]


def cosine(a: Array, b: Array) -> Array:
  """float[B, A, D], float[B, C, D] -> float32[B, A, C]; highest precision, so that the best match
  does not depend on the device."""
  chex.assert_rank((a, b), 3)
  return pairs(a, b, inverse_norm)


def parity_order(tokens: TokenSet) -> Array:
  """int32[B, N], slots in the order kept, free, padding, each in slot order.

  Methods that pair by parity number the slots so: no padding then shifts who meets whom, nor does
  the place where tokens of another kind stand.
  """
  order = jnp.where(tokens.free, 1, jnp.where(tokens.fixed, 0, 2))
  return jnp.argsort(order, axis=1, stable=True).astype(jnp.int32)


def num_excess(tokens: TokenSet, num_slots: int) -> Array:
  """int32[B, 1], tokens that each row has too many, at most half of its free ones."""
  free = count(tokens.free)
  if tokens.budget is not None:
    return jnp.minimum(free - num_kept(tokens, num_slots), free // 2)
  return jnp.clip(count(tokens.real) - num_slots, 0, free // 2)


def evenly_spaced(rank: Array, count: Array, picks: Array, *, late: int = 0) -> Array:
  """bool[B, N], True where rank is floor((i + late / 2) * count / picks) for some whole i."""
  if not late:
    return (-rank * picks) % jnp.maximum(count, 1) < picks
  return (late * count - 2 * rank * picks) % (2 * jnp.maximum(count, 1)) < 2 * picks


def nearest(metric: Array, a: Array, b: Array, *, use_a: Array,
            use_b: Array) -> tuple[Array, Array]:
  """The most similar slot of `b` for each slot of `a`, by cosine.

  Args:
    metric: float[B, N, D].
    a, b: int32[B, A] and [B, C], slots.
    use_a, use_b: bool[B, A] and [B, C], those that take part.

  Returns:
    float32[B, A], the similarity, -inf where there is none; int32[B, A], the slot.
  """
  chex.assert_equal_shape((a, use_a))
  chex.assert_equal_shape((b, use_b))
  # Or else what the metric is made of, as the keys of all heads, would be picked and read twice.
  metric = jax.lax.optimization_barrier(metric)
  scores = cosine(take(metric, a), take(metric, b))
  scores = jnp.where(use_a[:, :, None] & use_b[:, None], scores, -jnp.inf)
  best, index = max_and_index(scores, axis=2)
  return best, take(b, index)


def pairwise_cosine(metric: Array, among: Array) -> Array:
  """Cosines of all pairs of slots, -inf outside `among` and between a slot and itself.

  Exactly symmetric, as a product of matrices need not be: methods that look at whole graphs meet a
  pair from both sides, and the two must tie.

  Args:
    metric: float[B, N, D].
    among: bool[B, N].

  Returns:
    float32[B, N, N].
  """
  chex.assert_equal_shape_prefix((metric, among), 2)
  scores = cosine(metric, metric)
  scores = jnp.minimum(scores, scores.swapaxes(1, 2))
  other = ~jnp.eye(metric.shape[1], dtype=bool)[None]
  return jnp.where(among[:, :, None] & among[:, None] & other, scores, -jnp.inf)


def bipartite(tokens: TokenSet, metric: Array, a: Array, b: Array, *, num_slots: int,
              order: str) -> Merge:
  """Merges slots of `a` into their most similar slots of `b`, the most similar pairs first.

  Args:
    tokens: N slots, all of them in either `a` or `b`; only free ones are merged.
    metric: float[B, N, D], compared by cosine.
    a, b: int32[B, A] and [B, C], slots.
    num_slots: M slots left; a row of n real tokens loses max(0, n - M).
    order: of what is left of `a`: 'given', or 'score' for the most similar first.

  Returns:
    A Merge by size-weighted mean: kept tokens lead, then what is left of `a`, then `b`.
  """
  best, match = nearest(metric, a, b, use_a=take(tokens.free, a), use_b=take(tokens.free, b))
  place = ranks(top(best, a.shape[1]), a.shape[1])
  source = (place < num_excess(tokens, num_slots)) & (best > -jnp.inf)
  own = _iota(tokens)
  if order == 'given':
    place = own[:, :a.shape[1]]
  turn = put(own, a, place)
  turn = put(turn, b, tokens.slots + own[:, :b.shape[1]])
  return join(tokens, put(own, a, jnp.where(source, match, a)), turn, num_slots=num_slots)


def join(tokens: TokenSet, partner: Array, turn: Array, *, num_slots: int) -> Merge:
  """Merges every slot with its partner, by size-weighted mean.

  Args:
    tokens: N slots.
    partner: int32[B, N], the slot that each slot joins; itself where it stays.
    turn: int32[B, N] in [0, 2N), the order of the free slots that stay. Kept tokens lead.
    num_slots: M slots left; as many real slots as that, or all where there are fewer, must stay.
  """
  chex.assert_equal_shape((partner, turn, tokens.kind))
  slots, own = tokens.slots, _iota(tokens)
  gone = 3 * slots + own
  turn = jnp.where(tokens.free & (partner == own), slots + turn, gone)
  src = jnp.argsort(jnp.where(tokens.fixed, own, turn), axis=1)[:, :num_slots].astype(jnp.int32)
  dst = take(ranks(src, slots), partner)
  # Under a budget of its own a row may lose more.
  most_moved = tokens.slots - num_slots if tokens.budget is None else None
  return Merge.mean(src, dst, jnp.where(tokens.real, tokens.sizes, 0.0),
                    valid=filled(tokens, num_slots), most_moved=most_moved)


def even_matches(tokens: TokenSet, keys: Array) -> tuple[Array, Array, Array, Array]:
  """Splits slots into even and odd ones, and finds the best match of each even one.

  Args:
    tokens: N slots.
    keys: float[B, N, H, d], compared by the cosine of their mean over heads.

  Returns:
    int32[B, A] and [B, N - A], slots; float32[B, A], the best cosine, -inf where nothing may merge;
    int32[B, A], the slot that has it.
  """
  order = parity_order(tokens)
  a, b = order[:, ::2], order[:, 1::2]
  metric = jax.lax.stop_gradient(keys).astype(jnp.float32).mean(axis=2)
  return a, b, *nearest(metric, a, b, use_a=take(tokens.free, a), use_b=take(tokens.free, b))


def find_threshold(tokens: TokenSet, keys: Array, *, remove: int) -> Array:
  """Finds the threshold at which the images of a batch lose `remove` tokens each, on average.

  It is the similarity of the best pair that stays apart when the most similar pairs of the whole
  batch merge. Run over many batches, layer after layer with the thresholds found so far, and take
  the mean of what each batch gives.

  Args:
    tokens: N slots.
    keys: float[B, N, H, d].
    remove: tokens; counts as half of the slots that are not protected where it is more.

  Returns:
    float32[], not negative.
  """
  best = even_matches(tokens, keys)[2].reshape(-1)
  number = min(remove, (tokens.slots - tokens.protected) // 2) * len(tokens.x)
  first_left = jnp.sort(best, descending=True)[min(number, best.size - 1)]
  return jnp.maximum(first_left, 0.0)


def _iota(tokens: TokenSet) -> Array:
  return jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), tokens.kind.shape)
