"""Attention between queries, keys and values that all tokens made, but not among all of them.

Axes: B batch, N slots, M slots that take part, G groups of heads, H heads, K kv heads, d features a
head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct

from ops.assignments import Gather
from ops.attention import HIDDEN_LOGIT, Attended

Array = jax.Array
# (queries, keys, values, bias of keys, positions) -> what the host's own attention makes of them.
Attend = Callable[[Array, Array, Array, Array | None, Array | None], Attended]


class Pattern(Protocol):
  """Says who attends to whom in one layer: the answer of a method on a branch of 'core'."""

  @property
  def wanted(self) -> Array | None:
    """int32[B], the tokens that an adaptive method would have picked, had it had room."""
    ...

  def values(self, v: Array) -> Array:
    """Returns values float[B, N, K, d] as they are attended to, and cached."""
    ...

  def attend(self, attend: Attend, q: Array, k: Array, v: Array, bias: Array | None,
             positions: Array | None) -> Array:
    """Returns what all tokens read, float[B, N, H, d], zero where one takes no part.

    Args:
      attend: attention as the host runs it.
      q: float[B, N, H, d].
      k, v: float[B, N, K, d], `v` as `values` returned them.
      bias, positions: as the host would give them to `attend` for all tokens.
    """
    ...


class HeadGather(struct.PyTreeNode):
  """Lets some tokens attend to each other, in each group of heads others.

  Attributes:
    src: int32[B, G, M], the slots that take part, in order; G is 1 or H.
    valid: bool[B, G, M] or None, False where a place stays empty; such places come last.
    wanted: as in `Pattern`.
  """

  src: Array
  valid: Array | None = None
  wanted: Array | None = None

  def values(self, v: Array) -> Array:
    """Returns the values as they are."""
    return v

  def attend(self, attend: Attend, q: Array, k: Array, v: Array, bias: Array | None,
             positions: Array | None) -> Array:
    """Attends among the tokens of each group, as `Pattern.attend`."""
    batch, groups, picked = self.src.shape
    slots, heads = q.shape[1:3]
    valid = None if self.valid is None else self.valid.reshape(-1, picked)
    gather = Gather(self.src.reshape(-1, picked), slots, valid=valid)

    def divide(x: Array) -> Array:
      """[B, N, H, d] -> [B * G, M, H / G, d]."""
      x = jnp.repeat(x, max(1, groups // x.shape[2]), axis=2)
      x = jnp.swapaxes(x.reshape(batch, slots, groups, -1, x.shape[-1]), 1, 2)
      return gather.apply(x.reshape(-1, slots, *x.shape[3:]))

    def spread(x: Array) -> Array:
      """[B, N] -> [B * G, M]."""
      return gather.apply(jnp.repeat(x, groups, axis=0))

    bias = None if bias is None else spread(bias)
    if valid is not None:
      bias = jnp.where(valid, 0.0 if bias is None else bias, HIDDEN_LOGIT)
    read = attend(divide(q), divide(k), divide(v), bias,
                  None if positions is None else spread(positions)).out
    read = gather.restore(read).reshape(batch, groups, slots, -1, q.shape[3])
    return jnp.swapaxes(read, 1, 2).reshape(batch, slots, heads, -1)
