"""KV caches: read by decoding, reduced by methods.

Axes: B batch, N slots now, M slots after, C tokens of a chunk, H heads, K kv heads, S slots of a
buffer, d features a head, P numbers in a position.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from flax import struct

from ops import attention
from ops.rope import Rope

Array = jax.Array
# The room of a cache that evicts.
ENDLESS = 2 ** 31 - 1
COMPACT_OF_SEVERAL = ("positions='compact' has no meaning for positions of several numbers "
                      "(M-RoPE): choose 'keep'")


class KVGather(struct.PyTreeNode):
  """Selects the slots that a method keeps of one layer's cache, for each kv head.

  Attributes:
    src: int32[B, K, M], the slot kept in each place; distinct among valid places.
    valid: bool[B, K, M] or None, False where a place stays empty (adaptive budgets).
  """

  src: Array
  valid: Array | None = None

  def apply(self, values: Array) -> Array:
    """[B, K, N, ...] -> [B, K, M, ...]."""
    return jnp.take_along_axis(
        values, self.src.reshape(self.src.shape + (1,) * (values.ndim - 3)), axis=2)

  def only(self, wanted: Array) -> KVGather:
    """Returns the same with places empty that hold others than bool[B, N] or [B, K, N] names."""
    if wanted.ndim == 2:
      wanted = jnp.broadcast_to(wanted[:, None], (*self.src.shape[:2], wanted.shape[1]))
    wanted = jnp.take_along_axis(wanted, self.src, axis=2)
    return self.replace(valid=wanted if self.valid is None else self.valid & wanted)

  def shrink(self, kv: KV, *, positions: str, rope: Rope) -> KV:
    """Reduces a layer's cache to these entries, as `KVAnswer`."""
    heads, slots = kv.k.shape[1:3]

    def pick(x: Array) -> Array:
      return self.apply(jnp.broadcast_to(x[:, None], (x.shape[0], heads, slots)))

    pos, valid = pick(kv.pos), pick(kv.valid)
    bias = None if kv.bias is None else pick(kv.bias)
    k, v = self.apply(kv.k), self.apply(kv.v)
    if self.valid is not None:
      valid &= self.valid
    start = kv.start
    if positions == 'compact':
      rank = _ranks(pos, valid)
      k = turned(k, rank - pos, start, rope)
      # Where the heads keep different numbers, the fullest says where decoding goes on.
      pos, start = rank, jnp.max(jnp.sum(valid, axis=2, dtype=jnp.int32), axis=1)
    stats = {name: self.apply(x) for name, x in kv.stats.items()}
    return KV.create(k, v, pos=pos, valid=valid, bias=bias, start=start, filled=k.shape[2],
                     stats=stats, recent=kv.recent)


@dataclasses.dataclass(frozen=True)
class Upkeep:
  """Says how a layer's cache stays within bounds while a model decodes.

  Attributes:
    method: an `EvictingMethod` (ops/reducers/method.py).
    capacity: entries that a head may hold once the method has been asked.
    rope: how keys are turned where entries are renumbered from 0 as others leave (positions
      'compact'); None where they keep their positions.
  """

  method: Any
  capacity: int
  rope: Rope | None


class Recent(struct.PyTreeNode):
  """Holds the queries of the latest tokens, for methods that score entries by them.

  Attributes:
    queries: float[B, W, H, d], rotated, the latest last.
    pos: int32[B, W], their places in the sequence; -1 for none.
  """

  queries: Array
  pos: Array


class KV(struct.PyTreeNode):
  """Holds one layer's cache: entries of the prompt, then room for decoded tokens.

  With `upkeep` it stays as large as it is: a decoded token takes an empty slot, another in every
  head, and a method empties slots. Shapes are then a head's: [B, K, S].

  Attributes:
    keys, values: as `create` takes them, but without axes of one before S: XLA takes those off in
      front of a product, and on CPUs copies a buffer that is written with them and read without.
    pos: int32[B, S], or [B, K, S] where the heads hold different tokens: places in the sequence,
      which a sliding window goes by.
    valid: bool, of the same shape, False for padding and for room that is still empty.
    start: int32[B] or [B, P], what the number of a slot that is filled after the prompt is added to
      for the position of its token in this layer: that of the first, until chunks have padding.
    bias: float32, as `pos`, what is added to the logits of each slot (proportional attention), or
      None.
    filled: slots of the prompt; decoded token t goes to slot filled + t. Static.
    stats: {name: float32[B, K, S]}, what the method of `upkeep` takes down of entries.
    turned: int32[B, K, S], the positions that keys are rotated by, where they are renumbered; None
      where these are `pos`.
    recent: queries of the latest tokens, or None.
    since: int32[B], tokens that came since the method of `upkeep` was asked, or None without it.
    upkeep: how it stays within bounds, None for a cache that grows. Static.
  """

  keys: Array
  values: Array
  pos: Array
  valid: Array
  start: Array
  filled: int = struct.field(pytree_node=False)
  bias: Array | None = None
  stats: dict[str, Array] = struct.field(default_factory=dict)
  turned: Array | None = None
  recent: Recent | None = None
  since: Array | None = None
  upkeep: Upkeep | None = struct.field(pytree_node=False, default=None)

  @classmethod
  def create(cls, k: Array, v: Array, **fields: Any) -> Self:
    """A cache of keys (rotated) and values float[B, K, S, d], and the other fields."""
    return cls(_folded(k), _folded(v), **fields)

  @property
  def k(self) -> Array:
    """Keys float[B, K, S, d], rotated."""
    return self._unfolded(self.keys)

  @property
  def v(self) -> Array:
    """Values float[B, K, S, d]."""
    return self._unfolded(self.values)

  @property
  def room(self) -> int:
    """Tokens that can be decoded; `ENDLESS` where others leave."""
    return ENDLESS if self.upkeep else self.keys.shape[-2] - self.filled

  def _unfolded(self, x: Array) -> Array:
    return x.reshape(len(self.start), -1, *x.shape[-2:])

  def position(self, step: Array) -> Array:
    """Returns the position of decoded token `step`: int32[B] or [B, P]."""
    if self.turned is None:
      return self.start + step
    # Where the heads hold different numbers, the fullest says.
    return jnp.max(jnp.sum(self.valid, axis=2, dtype=jnp.int32), axis=1)

  def with_room(self, room: int) -> Self:
    """Appends empty slots, for tokens to decode; with `upkeep` there are enough."""
    return self if self.upkeep else self._with_slots(room)

  def _with_slots(self, count: int) -> Self:

    def pad(x: Array, axis: int) -> Array:
      return jnp.pad(x, [(0, count if i == axis else 0) for i in range(x.ndim)])

    axis = self.pos.ndim - 1
    # A token that is decoded stands for one: its bias is the zero that is padded here.
    bias = None if self.bias is None else pad(self.bias, axis)
    keys, values = (pad(x, x.ndim - 2) for x in (self.keys, self.values))
    return self.replace(keys=keys, values=values, pos=pad(self.pos, axis),
                        valid=pad(self.valid, axis), bias=bias,
                        stats={name: pad(x, 2) for name, x in self.stats.items()})

  def with_start(self, start: Array) -> KV:
    """Returns the same with another position of the first token behind the prompt."""
    return self.replace(start=start)

  def with_values(self, v: Array) -> KV:
    """Returns the same with other values float[B, K, S, d]."""
    return self.replace(values=_folded(v))

  def append(self, k: Array, v: Array, index: Array, step: Array,
             valid: Array | None = None) -> Self:
    """Writes one more token a row, in place where the cache is donated.

    With `upkeep` it goes to the first empty slot of each head.

    Args:
      k, v: float[B, K, d], its keys (rotated) and values.
      index: int32[B], its place in the sequence.
      step: int32[], the tokens that were written before it.
      valid: bool[B], False for rows that have none; only with `upkeep`.
    """
    if self.upkeep:
      return self._append_at(jnp.argmin(self.valid, axis=2), k, v, index, valid)
    at = self.filled + step

    def write(buffer: Array, new: Array, axis: int) -> Array:
      return jax.lax.dynamic_update_slice_in_dim(
          buffer, jnp.expand_dims(new, axis).astype(buffer.dtype), at, axis)

    pos = self._each_head(index)
    axis = self.pos.ndim - 1
    row = self.keys.ndim - 2
    return self.replace(
        keys=write(self.keys, k.reshape(*self.keys.shape[:row], -1), row),
        values=write(self.values, v.reshape(*self.keys.shape[:row], -1), row),
        pos=write(self.pos, pos, axis),
        valid=write(self.valid, jnp.ones(pos.shape, bool), axis))

  def _append_at(self, at: Array, k: Array, v: Array, index: Array, valid: Array | None) -> Self:
    """Writes one more token a row to slots int32[B, K], which stay empty where it is not valid."""

    def write(buffer: Array, new: Array) -> Array:
      heads = buffer.shape[:-2]
      update = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
      for _ in heads:
        update = jax.vmap(update)
      return update(buffer, new.reshape(*heads, -1).astype(buffer.dtype), at.reshape(heads))

    here = jnp.arange(self.valid.shape[2])[None, None] == at[..., None]
    since = None if self.since is None else self.since + (1 if valid is None else valid)
    if valid is not None:
      here &= valid[:, None, None]

    def put(x: Array | None, new: Array | float) -> Array | None:
      return None if x is None else jnp.where(here, new, x)

    index = index[:, None, None]
    return self.replace(
        keys=write(self.keys, k), values=write(self.values, v), pos=put(self.pos, index),
        valid=self.valid | here, bias=put(self.bias, 0.0), turned=put(self.turned, index),
        since=since, stats={name: put(x, 0.0) for name, x in self.stats.items()})

  def attend(self, q: Array, index: Array, window: int = 0) -> tuple[Array, Array | None]:
    """Attends with the token that was appended last.

    Args:
      q: float[B, H, d], its queries, rotated.
      index: int32[B], its place in the sequence.
      window: number of positions up to its own that it sees; 0 for all.

    Returns:
      float[B, H, d], and the weights of the slots, float32[B, H, S]; None where some are not read.
    """
    visible = self.valid
    if window:
      visible &= index.reshape(index.shape + (1,) * (self.pos.ndim - 1)) - self.pos < window
    k = self.k
    if self.turned is not None and self.upkeep and self.upkeep.rope:
      k = turned(k, self.pos - self.turned, self.start, self.upkeep.rope)
    return attention.step(q, k, self.v, visible, bias=self.bias)

  def absorb(self, stays: Array, part: Array) -> KV:
    """Adds parts of the value of the entry that leaves, at most one a head, to those of others.

    Args:
      stays: bool[B, K, S].
      part: float32[B, K, S], what each of them takes of it.
    """
    gone = jnp.argmax(self.valid & ~stays, axis=2)[:, :, None, None]
    value = jnp.take_along_axis(self.v, gone, axis=2).astype(jnp.float32)
    return self.with_values((self.v + value * part[..., None]).astype(self.v.dtype))

  def drop(self, stays: Array) -> KV:
    """Empties the slots of entries that do not stay, bool[B, K, S], and renumbers those behind."""
    pos, valid = self.pos, self.valid & stays
    if self.turned is not None and self.upkeep:
      if self.valid.shape[2] == self.upkeep.capacity + 1:  # One leaves at most.
        gone = jnp.min(jnp.where(self.valid & ~stays, pos, ENDLESS), axis=2, keepdims=True)
        pos -= (pos > gone).astype(jnp.int32)
      else:
        pos = _ranks(pos, valid)
    return self.replace(valid=valid, pos=pos)

  def remember(self, q: Array, valid: Array | None) -> KV:
    """Puts queries float[B, H, d] of the token that was appended last behind the recent ones."""
    if self.recent is None:
      return self
    index = jnp.max(jnp.where(self.valid, self.pos, -1), axis=(1, 2))
    later = Recent(*(jnp.concatenate([old[:, 1:], new[:, None].astype(old.dtype)], axis=1)
                     for old, new in ((self.recent.queries, q), (self.recent.pos, index))))
    if valid is not None:
      later = jax.tree.map(lambda new, old: jnp.where(
          valid.reshape(-1, *(1,) * (new.ndim - 1)), new, old), later, self.recent)
    return self.replace(recent=later)

  def extend(self, k: Array, v: Array, index: Array, valid: Array, step: Array) -> Self:
    """Writes a chunk of tokens, in place where the cache is donated.

    Args:
      k, v: float[B, C, K, d], their keys (rotated) and values.
      index: int32[B, C], their places in the sequence.
      valid: bool[B, C], False for padding, which takes slots that nobody sees.
      step: int32[], the tokens that were written before them.
    """
    at = self.filled + step

    def write(buffer: Array, new: Array, axis: int) -> Array:
      return jax.lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), at, axis)

    row, axis = self.keys.ndim - 2, self.pos.ndim - 1
    keys, values = (write(buffer, _folded(jnp.swapaxes(new, 1, 2)), row)
                    for buffer, new in ((self.keys, k), (self.values, v)))
    return self.replace(keys=keys, values=values,
                        pos=write(self.pos, self._each_head(index), axis),
                        valid=write(self.valid, self._each_head(valid), axis))

  def attend_chunk(self, q: Array, index: Array, window: int = 0) -> Array:
    """Attends with the chunk that was written last: float[B, C, H, d].

    Large maps are formed in parts (`attention.attend`), each of some tokens over all S slots.

    Args:
      q: float[B, C, H, d], its queries, rotated.
      index: int32[B, C], its places in the sequence.
      window: number of positions up to its own that a token sees; 0 for all.
    """
    (batch, chunk, heads, width), (_, kv_heads, slots, _) = q.shape, self.k.shape

    def rows(x: Array) -> Array:
      """Heads that share keys as rows of a batch, as those may hold different tokens."""
      x = x.reshape(batch, -1, slots)
      return jnp.broadcast_to(x, (batch, kv_heads, slots)).reshape(-1, slots)

    k, v = (x.reshape(-1, slots, 1, width) for x in (self.k, self.v))
    q = jnp.swapaxes(q.reshape(batch, chunk, kv_heads, -1, width), 1, 2)
    out = attention.attend(
        q.reshape(-1, chunk, heads // kv_heads, width), k, v, bias=rows(self.visible_bias),
        positions=rows(self.pos), last=jnp.repeat(index, kv_heads, axis=0),
        window=window or None).out
    return jnp.swapaxes(out.reshape(q.shape), 1, 2).reshape(batch, chunk, heads, width)

  @property
  def visible_bias(self) -> Array:
    """float32, as `pos`: `bias`, and for slots that hold no token what hides them."""
    return jnp.where(self.valid, 0.0 if self.bias is None else self.bias, attention.HIDDEN_LOGIT)

  def take(self, rows: Array) -> Self:
    """Returns the cache of rows int[R] of the batch, which may repeat."""
    others = jax.tree.map(lambda x: x[rows], self.replace(keys=None, values=None))
    return others.replace(keys=_folded(self.k[rows]), values=_folded(self.v[rows]))

  def _each_head(self, x: Array) -> Array:
    """[B, ...] as [B, K, ...] where the heads hold different tokens."""
    heads = self.pos.shape[1:-1]
    return jnp.broadcast_to(jnp.expand_dims(x, tuple(range(1, 1 + len(heads)))),
                            x.shape[:1] + heads + x.shape[1:])


  def unless(self, runs: Array, before: KV, *, compact: bool) -> KV:
    """Returns the cache without the last token of the rows that skipped its layer.

    Args:
      runs: bool[B], False where a row skipped it.
      before: the cache before that token.
      compact: whether positions go on from what the layer holds, and so do not count that token.
    """
    rows = runs.reshape(-1, *(1,) * (self.valid.ndim - 1))
    start = jnp.where(runs, self.start, self.start - 1) if compact else self.start
    return self.replace(valid=jnp.where(rows, self.valid, before.valid), start=start)


def _folded(x: Array) -> Array:
  """[B, K, S, d] without axes of one before S."""
  return x.reshape(*(n for n in x.shape[:2] if n > 1), *x.shape[2:])


class KVAnswer(Protocol):
  """Says what becomes of one layer's cache: what a method on the cache returns."""

  def shrink(self, kv: KV, *, positions: str, rope: Rope) -> LayerCache:
    """Reduces a layer's cache, which has no room yet.

    Args:
      kv: of N slots, `pos` and `valid` shared by the heads.
      positions: 'keep', or 'compact': the kept keys of a head are turned to positions 0, 1, … in
        their order, and decoding goes on from there (FINCH, arXiv:2408.00167).
      rope: of the model; only 'compact' asks.
    """
    ...


class LayerCache(Protocol):
  """Holds one layer's cache: `KV` says what the members do."""

  @property
  def start(self) -> Array:
    """Returns the position of the first token behind the prompt, int32[B] or [B, P]."""
    ...

  @property
  def filled(self) -> int:
    """Returns the slots of the prompt; where heads have different numbers, their mean."""
    ...

  @property
  def room(self) -> int:
    """Returns the tokens that may follow the prompt."""
    ...

  @property
  def upkeep(self) -> Upkeep | None:
    """Returns how it stays within bounds while a model decodes, None for a cache that grows."""
    ...

  def with_room(self, room: int) -> LayerCache:
    """Appends empty slots, for tokens to decode."""
    ...

  def position(self, step: Array) -> Array:
    """Returns the position of decoded token `step`: int32[B] or [B, P]."""
    ...

  def append(self, k: Array, v: Array, index: Array, step: Array,
             valid: Array | None = None) -> LayerCache:
    """Writes one more token a row."""
    ...

  def attend(self, q: Array, index: Array, window: int = 0) -> tuple[Array, Array | None]:
    """Attends with the token that was appended last: float[B, H, d], and weights where told."""
    ...

  def extend(self, k: Array, v: Array, index: Array, valid: Array, step: Array) -> LayerCache:
    """Writes a chunk of tokens."""
    ...

  def attend_chunk(self, q: Array, index: Array, window: int = 0) -> Array:
    """Attends with the chunk that was written last: float[B, C, H, d]."""
    ...

  def take(self, rows: Array) -> LayerCache:
    """Returns the cache of rows int[R] of the batch, which may repeat."""
    ...

  def with_start(self, start: Array) -> LayerCache:
    """Returns the same with another position of the first token behind the prompt."""
    ...


class Cache(struct.PyTreeNode):
  """Holds the caches of all layers.

  Attributes:
    layers: one cache a layer, each of its own length.
    steps: int32[], tokens decoded so far, at most the room.
    memory: what layers read beside the tokens of the prompt, with a `take` as `Cache` has it; None
      for nothing.
  """

  layers: tuple[LayerCache, ...]
  steps: Array
  memory: Any = None

  @property
  def room(self) -> int:
    """Tokens that can be decoded in all; `ENDLESS` where every layer evicts."""
    return min(kv.room for kv in self.layers)

  def take(self, rows: Array) -> Cache:
    """Returns the cache of rows int[R] of the batch, which may repeat: one context, R questions."""
    return self.replace(layers=tuple(kv.take(rows) for kv in self.layers),
                        memory=self.memory and self.memory.take(rows))

  def check_room(self, tokens: int) -> None:
    """Raises a ValueError if so many more tokens do not fit; while traced, if they never do."""
    used = 0 if isinstance(self.steps, jax.core.Tracer) else int(self.steps)
    if used + tokens > self.room:
      raise ValueError(f'{tokens} more tokens do not fit: the cache has room for {self.room} after '
                       f'the prompt, of which {used} are taken; prefill with more room')


def turned(keys: Array, by: Array, start: Array, rope: Rope) -> Array:
  """Returns keys float[..., d] at other positions, `by` int32[...] further on.

  Raises:
    ValueError: positions of several numbers, which `start` int32[B, P] has.
  """
  if start.ndim > 1:
    raise ValueError(COMPACT_OF_SEVERAL)
  turn = dataclasses.replace(rope, temperature=1.0)  # Keys have their amplitude already.
  return turn.rotate(keys[..., None, :], by)[..., 0, :]


def _ranks(pos: Array, valid: Array) -> Array:
  """int32[B, K, S], how many entries of a head come before each."""
  order = jnp.argsort(jnp.where(valid, pos, ENDLESS), axis=2, stable=True)
  return jnp.argsort(order, axis=2).astype(jnp.int32)


def with_upkeep(kv: KV, method: Any, *, capacity: int, positions: str, rope: Rope) -> KV:
  """Makes a cache stay within bounds from here on, with the slots that it takes.

  Args:
    kv: of one prompt, without room.
    method: as in `Upkeep`.
    capacity: entries of a head that stay; `method.every` more come before it is asked.
    positions, rope: as in `KVAnswer.shrink`.
  """
  compact = positions == 'compact'
  if kv.pos.ndim == 2:
    everything = jnp.broadcast_to(jnp.arange(kv.k.shape[2])[None, None], kv.k.shape[:3])
    kv = KVGather(everything).shrink(kv, positions=positions, rope=rope)
  kv = kv._with_slots(max(capacity - kv.filled, 0) + method.every)
  return kv.replace(upkeep=Upkeep(method, capacity, rope if compact else None),
                    turned=kv.pos if compact else None,
                    since=jnp.zeros(kv.start.shape[:1], jnp.int32))
