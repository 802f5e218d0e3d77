"""ChunkKV: keeps whole chunks of neighbouring entries.

Axes: B batch, N entries now, M entries after, K kv heads, C chunks.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from ops.kv_cache import KVGather
from ops.primitives.kv_select import along_slots, budgets, in_parts, keep_best, packed, share_of
from ops.primitives.select import ranks, top
from ops.reducers.scoring import Wrapper
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, Ratio

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ChunkKV(Wrapper):
  """Keeps the chunks whose entries have the highest mean score, the same in every head.

  ChunkKV (Liu et al., 2025), arXiv:2502.00299, Sec. 3, as in the kvpress library: scores are summed
  over heads, and the chunk at the end may be short. Where whole chunks would exceed the budget, the
  worst of them loses its end. The paper also lets layers share their choice, which is left out.

  Attributes:
    inner: the method that ranks entries.
    length: entries of a chunk.
    share: of chunks that stay; that of the budget where None.
  """

  length: Count = 20
  share: Ratio | None = None
  default: ClassVar[dict[str, str]] = {'inner': 'snapkv'}
  adaptive = 'whole chunks may fill fewer slots than a budget allows'

  def with_ratio(self, ratio: Fraction) -> Self:
    told = super().with_ratio(ratio)
    return told if told.share is not None else dataclasses.replace(told, share=float(ratio))

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVGather:
    scores = self.inner.ranking(tokens, signals, num_slots=num_slots)
    order, place = packed(tokens)
    real = jnp.sum(tokens.real, axis=1, keepdims=True, dtype=jnp.int32)
    total = jnp.where(tokens.real[:, None], scores, 0.0).sum(axis=1, keepdims=True)
    parts = in_parts(along_slots(total, order), self.length)[:, 0]
    sizes = jnp.clip(real - self.length * jnp.arange(parts.shape[1])[None], 0, self.length)
    means = jnp.where(sizes > 0, parts.sum(axis=2) / jnp.maximum(sizes, 1), -jnp.inf)
    chunk_rank = ranks(top(means, parts.shape[1]), parts.shape[1])
    chunks = -(-real // self.length)
    if self.share is None:
      stay = chunks * budgets(tokens, num_slots) // jnp.maximum(real, 1)
    else:
      stay = share_of(chunks, self.share, parts.shape[1])
    own = jnp.take_along_axis(chunk_rank, place // self.length, axis=1)
    wanted = tokens.real & (own < jnp.maximum(stay, 1))
    by_chunk = -(own * self.length + place % self.length).astype(jnp.float32)
    by_chunk = jnp.where(wanted, by_chunk, -jnp.inf)
    kept = keep_best(tokens, jnp.broadcast_to(by_chunk[:, None], scores.shape),
                     num_slots=num_slots)
    return kept.only(wanted)
