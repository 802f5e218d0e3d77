"""VFlowOpt's stage behind the tower: keeps important tokens, and recycles the others by place.

Axes: B batch, N slots now, M slots after, H heads, d features a head, C cells at most, P patches.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp

from ops import attention
from ops.assignments import Assignment, Merge
from ops.moves.rows import take
from ops.primitives.crops.cells import cell_along, cells_of_crops
from ops.primitives.select import ranks, top
from ops.reducers.base import Reducer
from ops.signals import CROP_SIGNALS, Signals
from ops.tokens import TokenSet, count, key_bias, num_kept
from ops.values import NotNegative, OneOf, Range

Array = jax.Array
TINY = 1e-20
OVERS = ('grid', 'crops')
# Of red, green and blue, in the grey that entropy is of.
GREY = (0.333, 0.333, 0.334)


@dataclasses.dataclass(frozen=True)
class VFlowOpt(Reducer):
  """Keeps the most important tokens and averages the others cell by cell.

  The stage of VFlowOpt (Yang et al., 2025), arXiv:2508.05211, behind the vision tower, as released.
  A token's importance is the attention it gets from those tokens that get more than `threshold`
  times the mean (the paper adds these rows up, which ranks alike); where none does, which gives NaN
  in the release, from the one that gets most. The others are averaged, weighted by importance,
  over each square of `cell` x `cell` patches, and stand at the place of the most important of them.
  Tokens keep their order. The release keeps int(N / cell ** 2) fewer tokens than its share asks,
  and has as many more as there are cells; here both together are what a budget asks, and a cell
  without tokens fills no slot. A cut that no watch comes before goes by the attention received.
  The release's next two cuts are in the language model.

  With over='crops' an image has one budget for all its crops, as released for LLaVA-OneVision: each
  crop has its own mean attention and threshold, and cells are those of the whole image in small and
  those of its crops put together, without their padding. A newline is in the column behind its
  row's last, and of no importance.

  Attributes:
    threshold: t. The release has 39.26, 34.76 and 28.68 where a tenth, a quarter and a half stay.
    cell: side of a cell in patches; 17.39, 15.58 and 11.76.
    over: 'grid', one image a row, or 'crops'.
    alpha: what entropy counts: stats['entropy'] float32[B, N], of `patch_entropy`, after a softmax;
      0 in the release.
  """

  threshold: NotNegative = 34.76
  cell: Annotated[float, Range(1)] = 15.58
  alpha: NotNegative = 0.0
  over: Annotated[str, OneOf(OVERS)] = 'grid'
  watch_needs = frozenset({'received_attention', 'queries', 'keys'})
  site = 'after'
  adaptive = 'a cell of which every token stays fills no slot'

  @property
  def needs(self) -> frozenset[str]:
    return CROP_SIGNALS | {'received_attention'} if self.over == 'crops' else frozenset({
        'received_attention', 'grid'})

  def watched(self, cuts: tuple[int, ...]) -> tuple[int, ...]:
    return cuts

  def watch(self, tokens: TokenSet, signals: Signals) -> dict[str, Array]:
    """{'importance': float32[B, N]}, by the attention of important tokens."""
    received = jnp.where(tokens.free, signals.received_attention.mean(axis=1), 0.0)
    mean = jnp.sum(received, axis=1, keepdims=True) / jnp.maximum(count(tokens.free), 1)
    most, limit = jnp.max(received, axis=1, keepdims=True), self.threshold * mean
    important = tokens.free & jnp.where(most > limit, received > limit, received == most)
    rows = attention.received(signals.queries, signals.keys, None, query_valid=important,
                              bias=key_bias(tokens, proportional=False))
    return {'importance': jax.lax.stop_gradient(rows.mean(axis=1))}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    importance = tokens.stats.get('importance')
    if importance is None:
      importance = jax.lax.stop_gradient(signals.received_attention.mean(axis=1))
    if self.alpha:
      if 'entropy' not in tokens.stats:
        raise ValueError(f'alpha={self.alpha} weighs an entropy that these tokens do not have: '
                         "give stats['entropy'] (patch_entropy), or alpha=0")
      entropy = jnp.where(tokens.free, tokens.stats['entropy'], -jnp.inf)
      importance += self.alpha * jax.nn.softmax(entropy, axis=1)
    if self.over == 'crops':
      cell, number, most = cells_of_crops(tokens, signals, self.cell)
      return recycle(tokens, importance, cell, num_slots=num_slots, cells=most, number=number)
    rows, columns = signals.grid
    across = math.ceil(columns / self.cell)
    row, column = (cell_along(place, self.cell)
                   for place in (tokens.pos // columns, tokens.pos % columns))
    return recycle(tokens, importance, row * across + column, num_slots=num_slots,
                   cells=math.ceil(rows / self.cell) * across)


def recycle(tokens: TokenSet, importance: Array, cell: Array, *, num_slots: int,
            cells: int, number: Array | None = None) -> Merge:
  """Keeps the most important tokens, and of those of each cell that are left one average.

  Args:
    tokens: N slots.
    importance: float32[B, N], the weights of the average.
    cell: int32[B, N], each from 0 to C - 1.
    num_slots: M, slots left; where there are more cells than slots, the last ones are one.
    cells: C.
    number: int32[B, 1], cells of each row; None for C.
  """
  slots, kept = tokens.slots, num_kept(tokens, num_slots)
  own = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), cell.shape)
  apart = cells if number is None else number
  alone = jnp.where(kept < count(tokens.free), jnp.maximum(kept - apart, 0), kept)
  high = tokens.free & (ranks(top(importance, slots, excluded=~tokens.free), slots) < alone)
  low = tokens.free & ~high
  cell = jnp.where(low, jnp.minimum(cell, jnp.maximum(kept - 1, 0)), cells)
  order = jnp.lexsort((-importance, cell), axis=1).astype(jnp.int32)
  members = jax.vmap(lambda c: jnp.bincount(c, length=cells + 1))(cell).astype(jnp.int32)
  first = take(order, jnp.minimum(take(jnp.cumsum(members, axis=1) - members, cell), slots - 1))
  anchor = jnp.where(low, first, own)
  stays = tokens.fixed | (tokens.free & (anchor == own))
  src = jnp.argsort(~stays, axis=1, stable=True)[:, :num_slots].astype(jnp.int32)
  weight = jnp.where(low, jnp.maximum(importance, TINY), tokens.real.astype(jnp.float32))
  return Merge.mean(src, take(ranks(src, slots), anchor), weight, valid=take(stays, src))


def patch_entropy(patches: Array) -> Array:
  """Measures the entropy in bits of each patch's 256 grey levels, float32[P].

  The release takes it of pixels that are already normalised for the tower, times 255 as uint8,
  which wraps what is negative; here of the picture itself.

  Args:
    patches: float[P, 3, rows, columns], from 0 to 255.
  """
  grey = jnp.einsum('pcrs,c->prs', patches.astype(jnp.float32), jnp.asarray(GREY),
                    precision='highest')
  level = jnp.round(grey).astype(jnp.int32).reshape(len(patches), -1)
  part = jax.vmap(lambda row: jnp.bincount(row, length=256))(level) / level.shape[1]
  return -jnp.sum(part * jnp.log2(jnp.where(part > 0, part, 1.0)), axis=1)
