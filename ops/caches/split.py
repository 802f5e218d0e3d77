"""A cache in two parts: what is left of the prompt, stored as it likes, and tokens behind it.

Axes: B batch, K kv heads, Q queries of a kv head, S slots, d features a head.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from ops.kv_cache import KV

Array = jax.Array


class Partial(NamedTuple):
  """Holds what queries read from some of their keys, before it is divided by the sum of weights.

  Attributes:
    peak: float32[B, K, Q], the highest logit, -inf where there is no key.
    total: float32[B, K, Q], the sum of exp(logit - peak).
    out: float32[B, K, Q, d], the same sum with values.
  """

  peak: Array
  total: Array
  out: Array


class Prompt(Protocol):
  """Stores the entries of a prompt, which decoding only reads."""

  @property
  def slots(self) -> int:
    """Returns the entries that a row has room for, mean over its heads."""
    ...

  def read(self, q: Array, index: Array, window: int) -> Partial:
    """Attends with queries float[B, K, Q, d] of tokens at int32[B, Q]."""
    ...

  def take(self, rows: Array) -> Prompt:
    """Returns the entries of rows int[R] of the batch, which may repeat."""
    ...


class SplitKV(struct.PyTreeNode):
  """Holds one layer's cache: the prompt's entries, and a plain cache for all that comes later.

  Attributes:
    prompt: entries of the prompt.
    tail: the cache of later tokens, of no prompt.
  """

  prompt: Prompt
  tail: KV

  @classmethod
  def create(cls, prompt: Prompt, kv: KV, start: Array) -> SplitKV:
    """A cache that has no room yet, of the prompt whose keys and values `kv` holds."""
    empty = kv.k[:, :, :0]
    nothing = jnp.zeros((len(empty), 0), jnp.int32)
    return cls(prompt, KV.create(empty, empty, pos=nothing, valid=nothing > 0, start=start,
                                 filled=0))

  @property
  def start(self) -> Array:
    """Returns the position of the first token behind the prompt, int32[B] or [B, P]."""
    return self.tail.start

  @property
  def filled(self) -> int:
    """Returns the slots of the prompt, mean over the heads."""
    return self.prompt.slots

  @property
  def room(self) -> int:
    """Returns the tokens that may follow the prompt."""
    return self.tail.room

  @property
  def upkeep(self) -> None:
    """Returns nothing: it grows."""
    return None

  def with_room(self, room: int) -> SplitKV:
    """Appends empty slots, for tokens to come."""
    return self.replace(tail=self.tail.with_room(room))

  def append(self, k: Array, v: Array, index: Array, step: Array,
             valid: Array | None = None) -> SplitKV:
    """Writes one more token a row, as `KV.append`."""
    return self.replace(tail=self.tail.append(k, v, index, step, valid))

  def position(self, step: Array) -> Array:
    """Returns the position of decoded token `step`, as `KV.position`."""
    return self.tail.position(step)

  def attend(self, q: Array, index: Array, window: int = 0) -> tuple[Array, None]:
    """Attends with the token that was appended last: float[B, H, d], and no weights."""
    return self.attend_chunk(q[:, None], index[:, None], window)[:, 0], None

  def extend(self, k: Array, v: Array, index: Array, valid: Array, step: Array) -> SplitKV:
    """Writes a chunk of tokens, as `KV.extend`."""
    return self.replace(tail=self.tail.extend(k, v, index, valid, step))

  def attend_chunk(self, q: Array, index: Array, window: int = 0) -> Array:
    """Attends with the chunk that was written last, as `KV.attend_chunk`: float[B, C, H, d].

    A chunk's map over the prompt is formed whole.
    """
    batch, chunk, heads, width = q.shape
    kv_heads = self.tail.k.shape[1]
    group = heads // kv_heads
    grouped = jnp.moveaxis(q.reshape(batch, chunk, kv_heads, group, width), 1, 2)
    grouped = grouped.reshape(batch, kv_heads, chunk * group, width)
    index = jnp.repeat(index, group, axis=1)
    out = join(self.prompt.read(grouped, index, window),
               _read_tail(self.tail, grouped, index, window))
    out = jnp.moveaxis(out.reshape(batch, kv_heads, chunk, group, width), 2, 1)
    return out.reshape(q.shape).astype(q.dtype)

  def with_start(self, start: Array) -> SplitKV:
    """Returns the same with another position of the first token behind the prompt."""
    return self.replace(tail=self.tail.with_start(start))

  def take(self, rows: Array) -> SplitKV:
    """Returns the cache of rows int[R] of the batch, which may repeat."""
    return SplitKV(self.prompt.take(rows), self.tail.take(rows))


def read(q: Array, k: Array, v: Array, visible: Array, bias: Array | None = None, *,
         scale: float) -> Partial:
  """Attends to keys.

  Args:
    q: float[B, K, Q, e].
    k, v: float[B, K, S, e], float[B, K, S, d].
    visible: bool that broadcasts to [B, K, Q, S].
    bias: float32 that does, added to logits, or None.
    scale: of the logits.
  """
  logits = weigh(q, k, visible, bias, scale=scale)
  peak = jnp.max(logits, axis=3)
  weights = jnp.exp(logits - _finite(peak)[..., None])
  return Partial(peak, jnp.sum(weights, axis=3), _mix(weights, v))


def weigh(q: Array, k: Array, visible: Array, bias: Array | None, *, scale: float) -> Array:
  """Logits float32[B, K, Q, S], -inf where a key is not visible; as in `read`."""
  logits = jnp.einsum('bkqd,bksd->bkqs', q, k, precision=_precision(q),
                      preferred_element_type=jnp.float32) * scale
  return jnp.where(visible, logits if bias is None else logits + bias, -jnp.inf)


def join(*parts: Partial) -> Array:
  """Returns what queries read from all parts together, float32[B, K, Q, d]; one has a key."""
  peak = jnp.max(jnp.stack([part.peak for part in parts]), axis=0)
  scales = [jnp.exp(part.peak - peak) for part in parts]
  total, out = (functools.reduce(jnp.add, terms) for terms in (
      [part.total * scale for part, scale in zip(parts, scales, strict=True)],
      [part.out * scale[..., None] for part, scale in zip(parts, scales, strict=True)]))
  return out / total[..., None]


def within(index: Array, pos: Array, window: int) -> Array:
  """bool[..., Q, S]: whether tokens at int32[B, Q] see keys at int32[B, ..., S]."""
  apart = index.reshape(len(index), *(1,) * (pos.ndim - 2), -1, 1) - pos[..., None, :]
  return (apart >= 0) & (apart < window) if window else apart >= 0


def _read_tail(tail: KV, q: Array, index: Array, window: int) -> Partial:
  pos, valid = (x if x.ndim == 3 else x[:, None] for x in (tail.pos, tail.valid))
  return read(q, tail.k, tail.v, valid[:, :, None] & within(index, pos, window),
              scale=q.shape[3] ** -0.5)


def _mix(weights: Array, v: Array) -> Array:
  return jnp.einsum('bkqs,bksd->bkqd', weights.astype(v.dtype), v, precision=_precision(v),
                    preferred_element_type=jnp.float32)


def _finite(peak: Array) -> Array:
  """Zero where there is no key, so that exp gives zeros and no NaN."""
  return jnp.where(jnp.isfinite(peak), peak, 0.0)


def _precision(x: Array) -> str:
  return 'highest' if x.dtype == jnp.float32 else 'default'
