"""KV caches: read by decoding, reduced by methods.

Axes: B batch, N slots now, M slots after, C tokens of a chunk, H heads, K kv heads, S slots of a
buffer, d features a head, P numbers in a position.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from ops import attention
from ops.rope import Rope

Array = jax.Array


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
      by_position = jnp.argsort(jnp.where(valid, pos, jnp.iinfo(jnp.int32).max), axis=2,
                                stable=True)
      rank = jnp.argsort(by_position, axis=2).astype(jnp.int32)
      k = jnp.swapaxes(turned(jnp.swapaxes(k, 1, 2), jnp.swapaxes(rank - pos, 1, 2), start, rope),
                       1, 2)
      # Where the heads keep different numbers, the fullest says where decoding goes on.
      pos, start = rank, jnp.max(jnp.sum(valid, axis=2, dtype=jnp.int32), axis=1)
    return KV.create(k, v, pos=pos, valid=valid, bias=bias, start=start, filled=k.shape[2])


class KV(struct.PyTreeNode):
  """Holds one layer's cache: entries of the prompt, then room for decoded tokens.

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
  """

  keys: Array
  values: Array
  pos: Array
  valid: Array
  start: Array
  filled: int = struct.field(pytree_node=False)
  bias: Array | None = None

  @classmethod
  def create(cls, k: Array, v: Array, **fields: Any) -> KV:
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
    """Tokens that can be decoded."""
    return self.keys.shape[-2] - self.filled

  def _unfolded(self, x: Array) -> Array:
    return x.reshape(len(self.start), -1, *x.shape[-2:])

  def with_room(self, room: int) -> KV:
    """Appends empty slots, for tokens to decode."""

    def pad(x: Array, axis: int) -> Array:
      return jnp.pad(x, [(0, room if i == axis else 0) for i in range(x.ndim)])

    axis = self.pos.ndim - 1
    # A token that is decoded stands for one: its bias is the zero that is padded here.
    bias = None if self.bias is None else pad(self.bias, axis)
    keys, values = (pad(x, x.ndim - 2) for x in (self.keys, self.values))
    return self.replace(keys=keys, values=values, pos=pad(self.pos, axis),
                        valid=pad(self.valid, axis), bias=bias)

  def with_start(self, start: Array) -> KV:
    """Returns the same with another position of the first token behind the prompt."""
    return self.replace(start=start)

  def with_values(self, v: Array) -> KV:
    """Returns the same with other values float[B, K, S, d]."""
    return self.replace(values=_folded(v))

  def append(self, k: Array, v: Array, index: Array, step: Array) -> KV:
    """Writes one more token a row, in place where the cache is donated.

    Args:
      k, v: float[B, K, d], its keys (rotated) and values.
      index: int32[B], its place in the sequence.
      step: int32[], the tokens that were written before it.
    """
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

  def attend(self, q: Array, index: Array, window: int = 0) -> Array:
    """Attends with the token that was appended last: float[B, H, d].

    Args:
      q: float[B, H, d], its queries, rotated.
      index: int32[B], its place in the sequence.
      window: number of positions up to its own that it sees; 0 for all.
    """
    visible = self.valid
    if window:
      visible &= index.reshape(index.shape + (1,) * (self.pos.ndim - 1)) - self.pos < window
    return attention.step(q, self.k, self.v, visible, bias=self.bias)

  def extend(self, k: Array, v: Array, index: Array, valid: Array, step: Array) -> KV:
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

  def take(self, rows: Array) -> KV:
    """Returns the cache of rows int[R] of the batch, which may repeat."""
    fields = {name: None if x is None else x[rows]
              for name, x in ((name, getattr(self, name)) for name in ('pos', 'valid', 'bias'))}
    return KV.create(self.k[rows], self.v[rows], start=self.start[rows], filled=self.filled,
                     **fields)

  def _each_head(self, x: Array) -> Array:
    """[B, ...] as [B, K, ...] where the heads hold different tokens."""
    heads = self.pos.shape[1:-1]
    return jnp.broadcast_to(jnp.expand_dims(x, tuple(range(1, 1 + len(heads)))),
                            x.shape[:1] + heads + x.shape[1:])


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

  def with_room(self, room: int) -> LayerCache:
    """Appends empty slots, for tokens to decode."""
    ...

  def append(self, k: Array, v: Array, index: Array, step: Array) -> LayerCache:
    """Writes one more token a row."""
    ...

  def attend(self, q: Array, index: Array, window: int = 0) -> Array:
    """Attends with the token that was appended last: float[B, H, d]."""
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
  """

  layers: tuple[LayerCache, ...]
  steps: Array

  @property
  def room(self) -> int:
    """Tokens that can be decoded in all."""
    return self.layers[0].room

  def take(self, rows: Array) -> Cache:
    """Returns the cache of rows int[R] of the batch, which may repeat: one context, R questions."""
    return self.replace(layers=tuple(kv.take(rows) for kv in self.layers))

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
    raise ValueError("positions='compact' has no meaning for positions of several numbers "
                     "(M-RoPE): choose 'keep'")
  turn = dataclasses.replace(rope, temperature=1.0)  # Keys have their amplitude already.
  return turn.rotate(keys[..., None, :], by)[..., 0, :]
