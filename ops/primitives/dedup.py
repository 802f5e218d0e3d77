"""Attended tokens beside diverse ones: those are left that repeat no other, by rounds of pairs.

Axes: B batch, N slots now, M slots after, D features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ops.assignments import Gather
from ops.moves.rows import by_row
from ops.primitives.match import cosine
from ops.primitives.select import keep_top, ranks, top
from ops.tokens import TokenSet, num_kept, of_kept

Array = jax.Array
# Tokens that one round drops.
DROPS = 8


def keep_diverse(tokens: TokenSet, scores: Array, features: Array, *, num_slots: int,
                 important: float) -> Gather:
  """Keeps the best tokens by score, and of the others those that repeat no other.

  Args:
    tokens: N slots.
    scores: float[B, N].
    features: float[B, N, D], compared by cosine.
    num_slots: M.
    important: the part of the free tokens kept that goes by score, rounded down; from 0 to 1.

  Returns:
    A Gather in slot order.
  """
  attended = of_kept(tokens, num_slots, lambda kept: int(kept * important))
  rank = ranks(top(scores, tokens.slots, excluded=~tokens.free), tokens.slots)
  first = tokens.free & (rank < attended)
  diverse = drop_repeats(features, tokens.free & ~first, rank - attended,
                         keep=num_kept(tokens, num_slots) - attended)
  return keep_top(tokens, jnp.where(first | diverse, 1.0, 0.0), num_slots=num_slots)


def drop_repeats(features: Array, among: Array, rank: Array, *, keep: Array) -> Array:
  """Drops the tokens most like others, a few a round: the pruning loop of VisPruner.

  A round lays the tokens left out in a row, of which the even ones are compared with the odd ones.
  The `DROPS` even tokens with the largest cosine go; the other even ones, the most similar first,
  and then the odd ones are the next round's row. Each row of the batch runs as many rounds as it
  needs.

  Args:
    features: float[B, N, D].
    among: bool[B, N], n tokens in each row.
    rank: int32[B, N], 0 to n - 1 among these: the first row that is laid out.
    keep: int32[B, 1], tokens wanted; less than none counts as none.

  Returns:
    bool[B, N], the tokens left: all n where no more are wanted.
  """
  return by_row(_drop_repeats, jax.lax.stop_gradient(features), among, rank,
                jnp.maximum(keep[:, 0], 0))


def _drop_repeats(features: Array, among: Array, rank: Array, keep: Array) -> Array:
  """Drops those of one row: float[N, D], bool[N], int32[N], int32[] -> bool[N]."""
  alike = cosine(features[None], features[None])[0]

  def more(state: tuple[Array, Array]) -> Array:
    return jnp.sum(state[0]) > keep

  def drop(state: tuple[Array, Array]) -> tuple[Array, Array]:
    left, rank = state
    odd = left & (rank % 2 == 1)
    even = left & ~odd
    evens = jnp.sum(even, dtype=jnp.int32)
    most = jnp.max(alike + jnp.where(odd, 0.0, -4.0)[:, None], axis=0)
    by_most = jnp.argsort(jnp.argsort(jnp.where(even, -most, jnp.inf)))
    drops = jnp.minimum(jnp.minimum(jnp.sum(left, dtype=jnp.int32) - keep, DROPS), evens)
    rank = jnp.where(odd, evens - drops + rank // 2, by_most - drops)
    return odd | (even & (by_most >= drops)), rank.astype(jnp.int32)

  return jax.lax.while_loop(more, drop, (among, rank))[0]
