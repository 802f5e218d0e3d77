"""HoloV: shares the budget out among parts of the image, by attention and by how tokens vary.

Axes: B batch, N slots now, M slots after, H heads, P chunks, C tokens compared at once, D features.
"""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.assignments import Assignment, Gather
from ops.moves.rows import by_row, take
from ops.primitives.select import apportion, apportion_room, rank_of, ranks
from ops.reducers.base import ByAttention
from ops.signals import Signals
from ops.tokens import TokenSet, count, filled, num_kept
from ops.values import Count, NotNegative, OneOf

Array = jax.Array
EPS = 1e-6
VARIANTS = ('release', 'paper')


@dataclasses.dataclass(frozen=True)
class HoloV(ByAttention):
  """Keeps the most attended tokens of each chunk of the image, more of a chunk that says more.

  HoloV (Zou et al., 2025), arXiv:2510.02912. Chunks are runs of tokens in raster order. A token
  scores its attention plus the variance of its cosines with the others of its chunk, scaled to the
  attention's mean; a chunk keeps tokens in proportion to its mean score. Chunks stand in order, the
  best token of each first, a chunk that stays whole in its own order.

  As released the variance counts 0.09, a chunk's tokens are ranked by attention alone, and what a
  chunk has no room for is lost, so that rows fill fewer slots. variant='paper' weighs both alike,
  ranks by the score, and gives such a rest to chunks that have room. The release's Qwen2.5-VL has
  scores in the order of its windows, and tokens in raster order; here both are in the latter. The
  paper's refetching inside the language model is left out, as in the release.

  Attributes:
    chunks: P, 16 in the release for LLaVA. None for its rule for Qwen2.5-VL: a row that keeps k of
      n tokens has floor(16 n / 9 k), or one.
    power: of a chunk's mean score, before chunks are compared.
    variant: 'release' or 'paper'.
  """

  chunks: Count | None = None
  power: NotNegative = 1.0
  variant: Annotated[str, OneOf(VARIANTS)] = 'release'
  site = 'after'
  drops = 'pruning drops tokens'

  @property
  def adaptive(self) -> str:
    return 'what a chunk has no room for is lost' if self.variant == 'release' else ''

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    slots, released = tokens.slots, self.variant == 'release'
    raster, number, kept = rank_of(tokens.free), count(tokens.free), num_kept(tokens, num_slots)
    # The rule's chunks have at most 9 k / 8 tokens.
    parts = min(self.chunks or slots, slots)
    wide = -(-slots // parts) if self.chunks else min(slots, 9 * num_slots // 8 + 1)
    chunk = chunk_of(raster, number, self.chunks or jnp.maximum(
        16 * number // jnp.maximum(9 * kept, 1), 1))
    chunk = jnp.where(tokens.free, chunk, parts)

    def total(values: Array) -> Array:
      return jax.vmap(lambda v, c: jax.ops.segment_sum(v, c, num_segments=parts))(values, chunk)

    def own(values: Array) -> Array:
      return take(values, jnp.minimum(chunk, parts - 1))

    members = total(tokens.free.astype(jnp.int32))
    room = jnp.maximum(members, 1).astype(jnp.float32)
    attention = jax.lax.stop_gradient(self.attention(signals).mean(axis=1))
    variance = cosine_variance(tokens, chunk, own(members), wide=wide)
    scale, weight = (1000.0, 0.09) if released else (1.0, 1.0)
    spread = scale * total(attention) / room / (total(variance) / room + EPS)
    scores = scale * attention + weight * own(spread) * variance
    means = total(scores) / room
    if released:
      means = jnp.where(members > 1, means, total(attention) / room)
    shares = means ** self.power
    shares = shares / (jnp.sum(shares, axis=1, keepdims=True) + EPS)
    quota = (jnp.where(kept < number, apportion(shares, kept), members) if released
             else apportion_room(shares, kept, members))

    start, best = jnp.cumsum(members, axis=1) - members, attention if released else scores
    place = ranks(jnp.lexsort((-best, chunk), axis=1), slots) - own(start)
    stays = tokens.free & (place < own(quota))
    place = jnp.where(own(quota >= members), raster - own(start), place)
    turn = jnp.where(stays, slots + own(start) + place, 3 * slots)
    slot = jnp.arange(slots, dtype=jnp.int32)[None]
    src = jnp.argsort(jnp.where(tokens.fixed, slot, turn), axis=1)[:, :num_slots]
    valid = take(stays | tokens.fixed, src) if released else filled(tokens, num_slots)
    return Gather(src.astype(jnp.int32), slots, valid=valid)


def chunk_of(rank: Array, number: Array, chunks: Array | int) -> Array:
  """Cuts runs of almost equal lengths, the first ones longer by one: int32[B, N], each in [0, P).

  Args:
    rank, number: int32[B, N], from 0, and int32[B, 1], how many of them count.
    chunks: P, or int32[B, 1].
  """
  short, longer = number // chunks, number % chunks
  before = longer * (short + 1)
  return jnp.where(rank < before, rank // (short + 1),
                   longer + (rank - before) // jnp.maximum(short, 1))


def cosine_variance(tokens: TokenSet, chunk: Array, members: Array, *, wide: int) -> Array:
  """Measures how a token's cosines with its chunk vary, that with itself as 0: float32[B, N].

  Args:
    tokens: N slots.
    chunk, members: int32[B, N], each slot's chunk, a run of free tokens, and how many it has.
    wide: C, the most tokens that a chunk can have.
  """
  order = jnp.argsort(~tokens.free, axis=1, stable=True)
  x = take(jax.lax.stop_gradient(tokens.x), order).astype(jnp.float32)
  vectors = x / (jnp.linalg.norm(x, axis=2, keepdims=True) + EPS)
  others = jnp.maximum(take(members, order) - 1, 1).astype(jnp.float32)
  variance = by_row(functools.partial(_variance, wide=wide), vectors, take(chunk, order), others)
  return jnp.where(tokens.free, take(variance, rank_of(tokens.free)), 0.0)


def _variance(vectors: Array, chunk: Array, others: Array, *, wide: int) -> Array:
  """That of one row: float32[N, D], int32[N], float32[N], how many others -> float32[N]."""
  def blocks(values: Array, fill: int) -> Array:
    tail = [(0, -len(vectors) % wide), *[(0, 0)] * (values.ndim - 1)]
    return jnp.pad(values, tail, constant_values=fill).reshape(-1, wide, *values.shape[1:])

  def around(values: Array) -> Array:
    """Each block [N / C, C, ...] between those beside it, [N / C, 3 C, ...]."""
    ends = jnp.pad(values, [(1, 1), *[(0, 0)] * (values.ndim - 1)], constant_values=-1)
    return jnp.concatenate([ends[:-2], values, ends[2:]], axis=1)

  mine, chunks, number = blocks(vectors, 0), blocks(chunk, -1), blocks(others, 1)
  alike = jnp.einsum('ncd,nmd->ncm', mine, around(mine), precision='highest')
  itself = jnp.arange(wide)[:, None] + wide == jnp.arange(3 * wide)[None]
  beside = (chunks[..., None] == around(chunks)[:, None]) & ~itself[None]
  mean = jnp.sum(jnp.where(beside, alike, 0.0), axis=2) / number
  squares = jnp.sum(jnp.where(beside, alike - mean[..., None], 0.0) ** 2, axis=2) + mean ** 2
  return (squares / number).reshape(-1)[:len(vectors)]
