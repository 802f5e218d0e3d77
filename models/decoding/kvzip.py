"""KVzip: cuts the cache of a context by what a model looks at while it repeats the context.

  kvzip = KVzip(keep_ratio=0.3, ask=ids_of('Repeat the previous context exactly.'),
                ask_part=ids_of('Repeat the part of the previous context, starting with'))
  logits, cache = kvzip(lm, {'params': params}, ids, valid, room=64)
  logits, cache = lm.apply({'params': params}, question, cache, method='extend')
  generator = Generator(lm, params, kvzip=kvzip)     # models/decoding/generator.py

It stands beside the methods of ops/reducers/cache, which see a prompt once and layer by layer: here
the context is read, then repeated behind its whole cache, and cut when all layers have been seen.

Axes: B batch, N slots of a context, C tokens that repeat a piece, L entries of a piece, H heads, K
kv heads, S entries that are seen at once, d features a head.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from models.backbones.lm import LM
from models.decoding.sampling import padded
from models.storage import layer_of
from ops import attention
from ops.caches.heads import KVHeads
from ops.kv_cache import KV, Cache, KVGather
from ops.moves.rows import take
from ops.primitives.kv_select import best_of_all_heads, by_kv_head
from ops.signals import Signals, projected_norms
from ops.tokens import count
from ops.values import Count, CountOrZero, OneOf, Ratio, check_fields

Array = jax.Array
Variables = Mapping[str, Any]
ACROSS = ('layers', 'heads')
WEIGHTS = ('none', 'output')
# Queries whose rows are formed at a time.
_ROWS = 64


@dataclasses.dataclass(frozen=True)
class KVzip:
  """Keeps the entries that get much attention while the model repeats the context.

  KVzip (Kim et al., 2025), arXiv:2505.23416, as in the kvpress library. The context is repeated in
  pieces, each behind the whole cache and a request; an entry's score is the most attention that it
  gets from any token of its own piece's repetition, in any head that shares it, among the first
  entries, the piece and the repetition. What rows keep depends on themselves alone, whatever their
  lengths; no map is larger than 64 queries by one piece and its repetition. A context costs two to
  three times what reading it costs, once, whatever is asked about it later.

  Attributes:
    keep_ratio: the share of entries that stay.
    ask: ids of a request to repeat the context, which stands before the first piece.
    ask_part: ids of a request to repeat a part, which the part's first tokens follow: the last
      `behind` of the piece before.
    opening: ids between a request and the repetition, as those that begin an answer in a chat.
    across: what shares the entries that stay: all heads of all 'layers', as published; a layer then
      holds as many as its scores earn, which no static shape can follow, so that the others are
      hidden and the cache is as large as before. Or the 'heads' of each layer, which then all hold
      equally many, in memory as large as what they hold.
    weigh: 'output' divides attention by the length of what enters the layer at a query, and
      multiplies it with that of what the output projection makes of the value (KVzip+,
      arXiv:2601.07891); or 'none'.
    sinks: first entries, which always stay and are seen with every piece.
    piece: L.
    behind: tokens of the piece before that say where a part begins.

  Raises:
    ValueError: a value outside its range.
  """

  keep_ratio: Ratio
  ask: tuple[int, ...]
  ask_part: tuple[int, ...]
  opening: tuple[int, ...] = ()
  across: Annotated[str, OneOf(ACROSS)] = 'layers'
  weigh: Annotated[str, OneOf(WEIGHTS)] = 'none'
  sinks: CountOrZero = 4
  piece: Count = 2048
  behind: CountOrZero = 8

  def __post_init__(self) -> None:
    check_fields(self)
    if not self.ask or not self.ask_part:
      raise ValueError('ask and ask_part are requests to repeat the context: give ids of some text')

  def __call__(self, lm: LM, variables: Variables, ids: np.ndarray,
               valid: np.ndarray | None = None, *, room: int) -> tuple[Array, Cache]:
    """Reads a context, and returns logits float32[B, V] after it and what is left of its cache.

    Args:
      lm: without plans.
      variables: {'params': ...}; with the blocks as a tuple none of them is copied.
      ids: int[B, N].
      valid: bool[B, N], False for padding, wherever it is; None for none.
      room: number of tokens that may follow.

    Raises:
      ValueError: plans, or a context that with its repetition exceeds that of the model.
    """
    if lm.plan or lm.cache_plan:
      raise ValueError('KVzip cuts a whole cache: give a model without plans')
    valid = np.ones(ids.shape, bool) if valid is None else np.asarray(valid)
    longest = int(valid.sum(axis=1).max())
    length, slots = min(self.piece, longest), self.slots(longest)
    if ids.shape[1] + max(slots, room) > lm.context:
      raise ValueError(f'{ids.shape[1]} tokens and {slots} that repeat some of them exceed the '
                       f'context of {lm.context}: shorten them, or set piece={self.piece} lower')
    logits, cache = _read(lm, variables, ids, valid)
    rows = [row[real].tolist() for row, real in zip(np.asarray(ids), valid, strict=True)]
    scores = []
    for start in range(0, max(map(len, rows)), length):
      asked = padded([self._request(row, start, length) for row in rows], slots, side='right')
      scores.append(_repeat(self, lm, variables, cache, *asked, jnp.int32(start), length=length))
    return logits, _cut(self, lm, cache, tuple(scores), room=room)

  def slots(self, longest: int) -> int:
    """Returns the slots that repeating takes behind a context of so many tokens."""
    asked = max(len(self.ask), len(self.ask_part) + self.behind)
    return asked + len(self.opening) + min(self.piece, longest)

  def _request(self, row: Sequence[int], start: int, length: int) -> list[int]:
    """Returns a request to repeat a piece, and the piece."""
    ask = (*self.ask_part, *row[max(start - self.behind, 0):start]) if start else self.ask
    return [*ask, *self.opening, *row[start:start + length]]

  def scores(self, kv: KV, signals: Signals, start: Array, real: Array, kernel: Array,
             length: int) -> Array:
    """Scores the entries of a piece in one layer, float32[B, K, L].

    Args:
      kv: with the repetition behind the context.
      signals: keys of all slots, values, and queries and hidden features of the repetition.
      start: int32[], the first entry.
      real: bool[B, N], of the context.
      kernel: float[H, d, D] of the output projection.
      length: L.
    """
    slots, chunk = real.shape[1], signals.queries.shape[1]
    order = jnp.pad(jnp.argsort(~real, axis=1, stable=True), ((0, 0), (0, length)))
    piece = jax.lax.dynamic_slice_in_dim(order, start, length, axis=1)
    behind = jnp.broadcast_to(slots + jnp.arange(chunk)[None], (len(real), chunk))
    index = jnp.concatenate([order[:, :self.sinks], piece, behind], axis=1)
    number = jnp.arange(self.sinks + length)[None]
    place = jnp.where(number < self.sinks, number, number - self.sinks + start)
    # A piece that begins with the first entries has them already.
    there = (place < count(real)) & ((number >= self.sinks) | (place < start))
    asked = kv.valid[:, slots:slots + chunk]
    bias = jnp.where(jnp.concatenate([there, asked], axis=1), 0.0, attention.HIDDEN_LOGIT)
    keys, pos = take(signals.keys, index), take(kv.pos, index)
    weight = jnp.where(asked, 1.0, 0.0)
    if self.weigh == 'output':
      norms = jnp.linalg.norm(signals.hidden.astype(jnp.float32), axis=2)
      weight /= jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)

    def most(best: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
      """The most of what was, and of some more queries."""
      queries, last, weight = (jnp.moveaxis(x, 0, 1) for x in part)
      rows = attention.rows(queries, keys, None, bias=bias, positions=pos, last=last)
      rows = rows[..., self.sinks:self.sinks + length]
      weight = weight[:, None, :, None]
      return jnp.maximum(best, jnp.where(weight > 0, rows * weight, 0.0).max(axis=2)), None

    heads = signals.queries.shape[2]
    parts = tuple(_parts(x) for x in (signals.queries, pos[:, -chunk:], weight))
    best, _ = jax.lax.scan(most, jnp.zeros((len(real), heads, length)), parts)
    if self.weigh == 'output':
      best *= projected_norms(take(signals.values, piece), kernel, order=2)
    return by_kv_head(best, keys.shape[2]).max(axis=2)


def check_text_alone(model: object) -> None:
  """Raises a ValueError for a model that reads more than text."""
  if not isinstance(model, LM):
    raise ValueError('KVzip has a model repeat text, and this one sees images too: leave it out')


@functools.partial(jax.jit, static_argnums=0)
def _read(lm: LM, variables: Variables, ids: Array, valid: Array) -> tuple[Array, Cache]:
  return cast(tuple[Array, Cache], lm.apply(variables, ids, valid, room=0, method='prefill'))


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames='length')
def _repeat(zip_: KVzip, lm: LM, variables: Variables, cache: Cache, ids: Array, valid: Array,
            start: Array, *, length: int) -> tuple[Array, ...]:
  """Scores of a piece, layer by layer."""
  wide = cache.replace(layers=tuple(kv.with_room(ids.shape[1]) for kv in cache.layers))
  needs = frozenset({'keys', 'values', 'queries', 'hidden'})
  probed = lm.apply(variables, ids, wide, valid, needs=needs, method='probe')
  weights, real = variables['params']['stack']['blocks'], cast(KV, cache.layers[0]).valid
  return tuple(zip_.scores(cast(KV, kv), signals, start, real,
                           layer_of(weights, layer)['out']['kernel'], length)
               for layer, (kv, signals) in enumerate(probed))


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames='room')
def _cut(zip_: KVzip, lm: LM, cache: Cache, scores: tuple[tuple[Array, ...], ...], *,
         room: int) -> Cache:
  """The cache without the entries of low scores."""
  real = cast(KV, cache.layers[0]).valid
  batch, slots = real.shape
  place = jnp.cumsum(real, axis=1) - 1
  by_place = jnp.stack([jnp.concatenate(pieces, axis=2) for pieces in zip(*scores, strict=True)],
                       axis=1)
  index = jnp.clip(place, 0, by_place.shape[3] - 1)[:, None, None]
  scored = jnp.take_along_axis(by_place, index, axis=3)
  scored = jnp.where(real[:, None, None], scored, -jnp.inf)
  depth, heads = scored.shape[1:3]
  together = heads * (depth if zip_.across == 'layers' else 1)
  grouped = scored.reshape(-1, together, slots)
  gone = 1 - Fraction(str(zip_.keep_ratio))
  left = jnp.asarray([together * n - int(together * n * gone) for n in range(slots + 1)], jnp.int32)
  first = jnp.broadcast_to((real & (place < zip_.sinks))[:, None, None], scored.shape)
  most = together * slots - int(together * slots * gone)
  counts = jnp.repeat(left[count(real)], len(grouped) // batch, axis=0)
  keep = best_of_all_heads(grouped, counts, most, first.reshape(grouped.shape))
  keep = keep.reshape(scored.shape)
  layers = []
  for layer, kv in enumerate(cache.layers):
    if zip_.across == 'heads':
      answer: Any = KVHeads.create(keep[:, layer], most)
    else:
      every = jnp.arange(slots, dtype=jnp.int32)[None, None]
      answer = KVGather(jnp.broadcast_to(every, (batch, heads, slots))).only(keep[:, layer])
    cut = answer.shrink(cast(KV, kv), positions='keep', rope=lm.rotation)
    layers.append(cut.with_room(room))
  return cache.replace(layers=tuple(layers))


def _parts(x: Array) -> Array:
  """[B, C, ...] as some queries at a time, [parts, rows, B, ...], zeros at the end."""
  rows = min(_ROWS, x.shape[1])
  x = jnp.pad(x, [(0, -x.shape[1] % rows if axis == 1 else 0) for axis in range(x.ndim)])
  return jnp.moveaxis(x, 1, 0).reshape(-1, rows, len(x), *x.shape[2:])
