"""Dominant tokens that stay, and contextual ones that sum up others.

Axes: B batch, N slots now, M slots after, C contextual tokens, d features of a metric.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ops.assignments import Merge, take
from ops.primitives.match import cosine
from ops.primitives.select import ranks
from ops.tokens import TokenSet, filled, num_left

Array = jax.Array


def zip_tokens(tokens: TokenSet, metric: Array, stay: Array, rest: Array, rank: Array, *,
               context: int, num_slots: int) -> Merge:
  """Merges tokens into evenly spaced ones among them, whose own features count whole.

  Each joins the one that is most like it, by cosine; the mean of what joins is added.

  Args:
    tokens: N slots.
    metric: float[B, N, d].
    stay: bool[B, N], of which those outside `rest` are dominant: they stay as they are, in slot
      order in front. M - C of them, or as many as the row has.
    rest: bool[B, N], those that are merged.
    rank: int32[B, N], their order, by which contextual ones are spaced.
    context: C.
    num_slots: M.
  """
  slots, left = tokens.slots, num_left(tokens, num_slots)
  own = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), tokens.kind.shape)
  step = jnp.maximum(jnp.sum(rest, axis=1, keepdims=True, dtype=jnp.int32) // context, 1)
  target = rest & (rank % step == 0) & (rank // step < context)
  group = jnp.where(rest, jnp.where(target, 1, 3), jnp.where(stay, 0, 2))
  src = jnp.argsort(slots * group + own, axis=1)[:, :num_slots].astype(jnp.int32)
  metric = jax.lax.stop_gradient(metric)
  at = jnp.maximum(left - context + jnp.arange(context, dtype=jnp.int32)[None], 0)
  targets = take(src, jnp.broadcast_to(at, (len(src), context)))
  alike = jnp.where(take(target, targets)[:, None], cosine(metric, take(metric, targets)), -2.0)
  merges = rest & ~target
  partner = jnp.where(merges, take(targets, jnp.argmax(alike, axis=2)), own)
  dst = take(ranks(src, slots), partner)
  count = Merge(src, dst, jnp.ones(dst.shape)).apply(merges.astype(jnp.float32))
  shares = take(jnp.pad(1 / jnp.maximum(count, 1.0), ((0, 0), (0, 1))), dst)
  return Merge(src, dst, jnp.where(merges, shares, jnp.where(tokens.real, 1.0, 0.0)),
               valid=filled(tokens, num_slots))
