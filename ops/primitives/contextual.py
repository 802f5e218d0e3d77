"""Dominant tokens that stay, and contextual ones that sum up others.

Axes: B batch, N slots now, M slots after, C contextual tokens, R recycled tokens, d features of a
metric, I crops.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp

from ops.assignments import Merge
from ops.moves.rows import put, take
from ops.primitives.cluster import distances, nearest, peaks
from ops.primitives.match import cosine
from ops.primitives.select import ranks, top
from ops.tokens import SPECIAL, TokenSet, count, filled, num_kept, num_left

Array = jax.Array


def zip_tokens(tokens: TokenSet, metric: Array, stay: Array, rest: Array, rank: Array, *,
               context: Array | int, num_slots: int, most: int | None = None,
               adds: str = 'mean') -> Merge:
  """Merges tokens into evenly spaced ones among them.

  Each joins the one that is most like it, by cosine.

  Args:
    tokens: N slots.
    metric: float[B, N, d].
    stay: bool[B, N], of which those outside `rest` are dominant: they stay as they are, in slot
      order in front. M - C of them, or as many as the row has.
    rest: bool[B, N], those that are merged.
    rank: int32[B, N], their order, by which contextual ones are spaced.
    context: C; or int32[B, 1], each row's own.
    num_slots: M.
    most: C where rows have their own.
    adds: what becomes of a contextual token: 'mean' adds the mean of what joins to its own
      features, 'members' takes the mean of it and what joins.
  """
  most = context if isinstance(context, int) else cast(int, most)
  slots, left = tokens.slots, num_left(tokens, num_slots)
  own = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), tokens.kind.shape)
  step = jnp.maximum(jnp.sum(rest, axis=1, keepdims=True, dtype=jnp.int32) // context, 1)
  target = rest & (rank % step == 0) & (rank // step < context)
  group = jnp.where(rest, jnp.where(target, 1, 3), jnp.where(stay, 0, 2))
  src = jnp.argsort(slots * group + own, axis=1)[:, :num_slots].astype(jnp.int32)
  metric = jax.lax.stop_gradient(metric)
  at = jnp.maximum(left - context + jnp.arange(most, dtype=jnp.int32)[None], 0)
  at = at if isinstance(context, int) else jnp.minimum(at, num_slots - 1)
  targets = take(src, jnp.broadcast_to(at, (len(src), most)))
  alike = jnp.where(take(target, targets)[:, None], cosine(metric, take(metric, targets)), -2.0)
  merges = rest & ~target
  partner = jnp.where(merges, take(targets, jnp.argmax(alike, axis=2)), own)
  dst = take(ranks(src, slots), partner)
  members = merges if adds == 'mean' else rest
  number = Merge(src, dst, jnp.ones(dst.shape)).apply(members.astype(jnp.float32))
  shares = take(jnp.pad(1 / jnp.maximum(number, 1.0), ((0, 0), (0, 1))), dst)
  return Merge(src, dst, jnp.where(members, shares, jnp.where(tokens.real, 1.0, 0.0)),
               valid=filled(tokens, num_slots))


def num_recycled(pruned: int) -> int:
  """Counts those of pruned tokens that are recycled: 30 %, and one more."""
  return pruned * 3 // 10 + 1 if pruned else 0


def num_clusters(pruned: int) -> int:
  """Counts the clusters that they are recycled in."""
  return num_recycled(pruned) // 10 + 1 if pruned else 0


def recycle(tokens: TokenSet, scores: Array, *, num_slots: int, stay: Array | None = None) -> Merge:
  """Keeps the best tokens, and means of clusters of the best others behind them.

  SparseVLM, arXiv:2410.04417, Sec. 3.4, as released: clusters by DPC-KNN, of which each looks at as
  many neighbours as there are clusters.

  Args:
    tokens: N slots.
    scores: float[B, N], higher stays.
    num_slots: M, with the clusters: as many tokens stay as leave room for those that they make.
    stay: int32[B, 1], the most free tokens that stay, where an adaptive method says it.
  """
  slots, fixed = tokens.slots, count(tokens.fixed)
  most = slots - min(tokens.protected, slots)
  free, left = count(tokens.free), num_kept(tokens, num_slots)
  recycled, clusters = (jnp.asarray([rule(pruned) for pruned in range(most + 1)], jnp.int32)
                        for rule in (num_recycled, num_clusters))
  wanted = free
  if stay is not None:
    wanted = stay + clusters[free - stay]
    left = jnp.minimum(left, wanted)
  counts = jnp.arange(most + 1, dtype=jnp.int32)[None]
  fits = (counts <= free) & (counts + clusters[jnp.maximum(free - counts, 0)] <= left)
  kept = jnp.max(jnp.where(fits, counts, 0), axis=1, keepdims=True)
  made, used = left - kept, recycled[free - kept]

  order = top(scores, slots, forced=tokens.fixed, excluded=~tokens.real)
  stays = tokens.real & (ranks(order, slots) < fixed + kept)
  size = min(num_recycled(most), slots)
  number = jnp.arange(size, dtype=jnp.int32)[None]
  there = number < used
  at = take(order, jnp.minimum(fixed + kept + number, slots - 1))
  distance = distances(take(tokens.x, at)) * tokens.x.shape[2] ** -0.5
  peak = top(peaks(distance, there, neighbours=made), min(num_clusters(most), size),
             excluded=~there)
  is_made = jnp.arange(peak.shape[1])[None] < made
  group = nearest(distance, peak, is_made, is_made)

  at = jnp.where(there, at, slots)
  cluster = ranks(jnp.where(is_made, take(at, peak), slots), slots)
  centre = cluster < peak.shape[1]
  own = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), tokens.kind.shape)
  key = jnp.where(stays, own, jnp.where(centre, slots + cluster, 2 * slots + own))
  src = jnp.argsort(key, axis=1)[:, :num_slots].astype(jnp.int32)
  joins = jnp.where(group < peak.shape[1], fixed + kept + group, num_slots)
  dst = put(jnp.full(own.shape, num_slots, jnp.int32), at, joins)
  dst = jnp.where(stays, ranks(src, slots), dst)
  valid = filled(tokens, num_slots)
  if stay is not None:
    valid = jnp.arange(num_slots, dtype=jnp.int32)[None] < fixed + left
  return Merge.mean(src, dst, jnp.ones(own.shape), valid=valid).replace(
      behind=centre, wanted=None if stay is None else (fixed + wanted)[:, 0])


def order_over_crops(pos: Array, kind: Array, *, contextual: int) -> Array:
  """Orders what is left of an image's crops: dominant tokens of all, special ones, contextual ones.

  Args:
    pos: int32[I, M], places in the whole image; the last tokens of each crop are contextual.
    kind: int8[I, M].
    contextual: how many.

  Returns:
    int32[I * M], tokens numbered crop by crop: dominant ones by their place, the others by crop.
  """
  last = jnp.arange(pos.shape[1])[None] >= pos.shape[1] - contextual
  group = jnp.where(last, 2, jnp.where(kind == SPECIAL, 1, 0))
  place = jnp.where(group == 0, pos, 0)
  return jnp.lexsort((place.reshape(-1), group.reshape(-1))).astype(jnp.int32)
