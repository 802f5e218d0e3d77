"""Virtual unmerging: attention as if merged tokens were still apart, each at its own position.

DyMU (Wang et al., 2025), Sec. 3, arXiv:2504.17040. Whatever works on single tokens (projections,
MLPs, norms) runs on the M slots; only attention sees the T positions, for which queries, keys and
values of a slot repeat, and the caches of keys and values stay as long as T. Where a slot stands
for a single token, nothing differs from ordinary attention.

Axes: B batch, M slots, T original tokens, H heads, K kv heads, d features a head (even).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ops.attention import HIDDEN_LOGIT, Attended
from ops.moves.rows import take

Array = jax.Array


def rotate(x: Array, cos: Array, sin: Array) -> Array:
  """Rotary positions: float[B, T, H, d], cos and sin float32[B or 1, T, d] -> float[B, T, H, d].

  RoFormer (Su et al., 2021), Sec. 3.2, arXiv:2104.09864, with the two features of a pair d / 2
  apart, as in LLaMA.
  """
  first, second = jnp.split(x, 2, axis=3)
  turned = jnp.concatenate([-second, first], axis=3)
  return (x * cos[:, :, None] + turned * sin[:, :, None]).astype(x.dtype)


def expand(values: Array, owner: Array) -> Array:
  """Copies each slot's values to its original tokens: [B, M, ...], int32[B, T] -> [B, T, ...]."""
  return take(values, jnp.maximum(owner, 0))


def collapse(values: Array, owner: Array, *, slots: int) -> Array:
  """The mean over the original tokens of each slot: [B, T, ...] -> [B, M, ...], zero for none."""
  index = jnp.where(owner >= 0, owner, slots)
  total, count = (jax.vmap(lambda v, i: jax.ops.segment_sum(v, i, num_segments=slots))(v, index)
                  for v in (values.astype(jnp.float32), jnp.ones(owner.shape)))
  count = jnp.maximum(count, 1).reshape(count.shape + (1,) * (values.ndim - 2))
  return (total / count).astype(values.dtype)


def scores(q: Array, k: Array, owner: Array, cos: Array, sin: Array, *,
           scale: float | None = None) -> Array:
  """Attention logits of all original tokens, before any mask.

  Args:
    q, k: float[B, M, H, d], of the slots, not rotated.
    owner: int32[B, T], the slot of each original token (`TokenSet.owner`).
    cos, sin: float32[B or 1, T, d], see `rotate`.
    scale: of the logits; d ** -0.5 when None.

  Returns:
    float32[B, H, T, T].
  """
  q, k = (rotate(expand(x, owner), cos, sin) for x in (q, k))
  logits = jnp.einsum('bnhd,bmhd->bhnm', q, k, precision='highest',
                      preferred_element_type=jnp.float32)
  return logits * (q.shape[3] ** -0.5 if scale is None else scale)


def attend(q: Array, k: Array, v: Array, owner: Array, turn: Callable[[Array], Array], *,
           mix: Callable[..., Attended]) -> Array:
  """Attention among all original tokens, averaged over those of each slot.

  Args:
    q: float[B, M, H, d], of the slots.
    k, v: float[B, M, K, d].
    owner: int32[B, T], -1 for tokens that no slot holds: nobody sees them.
    turn: [B, T, ...] -> the same, which turns what a slot has to the position of each original
      token, as `rotate` does.
    mix: q, k, v, bias float32[B, T] -> what attention among so many tokens gives.

  Returns:
    float[B, M, H, d].
  """
  bias = jnp.where(owner >= 0, 0.0, HIDDEN_LOGIT)
  mixed = mix(turn(expand(q, owner)), turn(expand(k, owner)), expand(v, owner), bias)
  return collapse(mixed.out, owner, slots=q.shape[1])
