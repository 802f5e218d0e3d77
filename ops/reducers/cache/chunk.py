"""Chunk: compresses each part of the prompt by itself.

Axes: B batch, N entries now, M entries after, K kv heads, C parts, S entries of a part.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from ops import signals as sg
from ops.attention import HIDDEN_LOGIT
from ops.kv_cache import KVGather
from ops.moves.rows import take
from ops.primitives.kv_select import (
  budgets,
  keep_best,
  packed,
  share_of,
)
from ops.primitives.select import ranks, top
from ops.reducers.scoring import Wrapper
from ops.rope import sequence_index
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, Ratio

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Chunk(Wrapper):
  """Keeps the best entries of each part of the prompt, as scored within that part.

  FINCH (Corallo and Papotti, 2024), arXiv:2408.00167, compresses a long prompt part by part; here,
  as in the kvpress library's ChunkPress, the prompt is read whole and its cache cut part by part.
  Attention that the held method reads is measured among the entries of a part; that library turns
  the queries of every part by the prompt's last positions instead.

  Attributes:
    inner: the method that ranks entries.
    length: S, entries of a part.
    share: of a part that stays, one entry at least; that of the budget where None.
  """

  length: Count = 1024
  share: Ratio | None = None
  default: ClassVar[dict[str, str]] = {'inner': 'snapkv'}
  reads: ClassVar[frozenset[str]] = frozenset({'queries', 'keys', 'values'})
  adaptive = 'shares of parts are rounded down'

  def __post_init__(self) -> None:
    super().__post_init__()
    unknown = sorted(self.inner.needs - _ENTRIES - _MEASURED - sg.STATIC)
    if unknown:
      raise ValueError(f'chunk cannot hold {type(self.inner).__name__}, which reads '
                       f'{", ".join(unknown)}, not known of a part alone: hold a method that reads '
                       f'{", ".join(sorted(_ENTRIES | _MEASURED))}')

  @property
  def needs(self) -> frozenset[str]:
    return self.reads | (self.inner.needs - _MEASURED)

  @property
  def span(self) -> int:
    return 0

  def with_ratio(self, ratio: Fraction) -> Self:
    told = super().with_ratio(ratio)
    return told if told.share is not None else dataclasses.replace(told, share=float(ratio))

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVGather:
    (batch, slots), heads = tokens.kind.shape, signals.keys.shape[2]
    order, place = packed(tokens)
    count = -(-slots // self.length)
    length = min(self.length, slots)

    def parts(values: Array, axis: int = 1) -> Array:
      """[B, N, ...] as rows [B C, S, ...], real entries first."""
      values = take(jnp.moveaxis(values, axis, 1), order)
      rest = [(0, count * length - slots if i == 1 else 0) for i in range(values.ndim)]
      values = jnp.pad(values, rest).reshape(batch * count, length, *values.shape[2:])
      return jnp.moveaxis(values, 1, axis)

    rows = TokenSet.create(jnp.zeros((batch * count, length, 1)), pos=parts(tokens.pos),
                           kind=parts(tokens.kind), valid=parts(tokens.real))
    local = self._signals(rows, signals.replace(**{
        name: parts(getattr(signals, name), sg.AXES[name].index('N'))
        for name in self.needs - sg.STATIC}))
    scores = self.inner.ranking(rows, local, num_slots=length)
    rank = ranks(top(scores.reshape(-1, length), length), length)
    rank = rank.reshape(batch, count, heads, length).swapaxes(1, 2).reshape(batch, heads, -1)
    real = jnp.sum(tokens.real, axis=1, keepdims=True, dtype=jnp.int32)
    sizes = jnp.clip(real - length * jnp.arange(count)[None], 0, length)
    if self.share is None:
      stay = sizes * budgets(tokens, num_slots) // jnp.maximum(real, 1)
    else:
      stay = share_of(sizes, self.share, length)
    rank = jnp.take_along_axis(rank, jnp.broadcast_to(place[:, None], (batch, heads, slots)), 2)
    stay = jnp.take_along_axis(jnp.maximum(stay, 1), place // length, axis=1)
    wanted = tokens.real[:, None] & (rank < stay[:, None])
    kept = keep_best(tokens, jnp.where(wanted, -rank.astype(jnp.float32), -jnp.inf),
                     num_slots=num_slots)
    return kept.only(wanted)

  def _signals(self, rows: TokenSet, signals: Signals) -> Signals:
    """Signals of parts, with the attention within them."""
    asked = self.inner.needs & _MEASURED
    if not asked:
      return signals
    within = sg.measure(
        asked, q=signals.queries, k=signals.keys, v=signals.values, lse=None,
        bias=jnp.where(rows.real, 0.0, HIDDEN_LOGIT), positions=sequence_index(rows.pos),
        query_valid=rows.real, span=min(self.inner.span, rows.slots))
    return signals.replace(**{name: getattr(within, name) for name in asked})


# What is known of an entry by itself, and what is measured among those of a part.
_ENTRIES = frozenset({'keys', 'values', 'queries', 'plain_queries', 'hidden', 'projected_norms'})
_MEASURED = frozenset({'last_attention', 'window_attention', 'received_attention'})
