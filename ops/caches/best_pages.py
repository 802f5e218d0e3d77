"""Caches of which a step reads the pages alone whose keys may match its queries best.

The entries of a row, in their order, stand in pages of equal length; of every page the least and
the largest number in each channel of its keys are known. No key of a page has a larger product with
a query than the numbers that suit it best. All is static but which pages are read, and they are
gathered, so that a step moves no others.

Axes: B batch, N entries now, K kv heads, H heads, G heads that share one, S slots of a buffer, P
pages, L entries of a page, C pages that are read, d features a head.
"""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct

from ops import attention
from ops.kv_cache import KV
from ops.moves.rows import take
from ops.primitives.kv_select import by_kv_head
from ops.rope import Rope

Array = jax.Array
# Stands for what `bounded` sets.
_MISSING: Any = None


class KVBestPages(struct.PyTreeNode):
  """Keeps a layer's cache as it is, and says how a step reads it.

  Attributes:
    page: L. Static.
    read: C. Static.
    shared: whether heads that share keys read the same pages. Static.
  """

  page: int = struct.field(pytree_node=False)
  read: int = struct.field(pytree_node=False)
  shared: bool = struct.field(pytree_node=False)

  def shrink(self, kv: KV, *, positions: str, rope: Rope) -> BestPagesKV:
    """Returns the cache with bounds of its pages, as `ops.kv_cache.KVAnswer`."""
    del positions, rope  # Nothing goes.
    return BestPagesKV.create(
        kv.k, kv.v, pos=kv.pos, valid=kv.valid, start=kv.start, filled=kv.filled, bias=kv.bias,
        page=self.page, read=self.read, shared=self.shared).bounded()


class BestPagesKV(KV):
  """Holds one layer's cache, and what its pages may hold; a chunk of tokens reads it whole.

  Attributes:
    order: int32[B, S], slots of the entries in their order, empty ones last.
    low, high: float[B, K, P, d], of the keys of each page; 0 where it has none.
    page, read, shared: as in `KVBestPages`.
  """

  order: Array = _MISSING
  low: Array = _MISSING
  high: Array = _MISSING
  page: int = struct.field(pytree_node=False, default=1)
  read: int = struct.field(pytree_node=False, default=1)
  shared: bool = struct.field(pytree_node=False, default=False)

  def bounded(self) -> Self:
    """Returns the same with the bounds of what it holds now."""
    k, slots = self.k, self.valid.shape[1]
    order = jnp.argsort(~self.valid, axis=1, stable=True).astype(jnp.int32)
    rest = -slots % self.page
    keys = jnp.pad(jnp.take_along_axis(k, order[:, None, :, None], axis=2),
                   ((0, 0), (0, 0), (0, rest), (0, 0)))
    there = jnp.pad(take(self.valid, order), ((0, 0), (0, rest)))
    keys = keys.reshape(*k.shape[:2], -1, self.page, k.shape[3])
    there = there.reshape(len(k), 1, -1, self.page, 1)
    some = there.any(axis=3)
    low = jnp.where(some, jnp.min(jnp.where(there, keys, jnp.inf), axis=3), 0.0)
    high = jnp.where(some, jnp.max(jnp.where(there, keys, -jnp.inf), axis=3), 0.0)
    return self.replace(order=order, low=low.astype(k.dtype), high=high.astype(k.dtype))

  def with_room(self, room: int) -> Self:
    """Appends empty slots, for tokens to decode."""
    return super().with_room(room).bounded()

  def append(self, k: Array, v: Array, index: Array, step: Array,
             valid: Array | None = None) -> Self:
    """Writes one more token a row, as `KV.append`."""
    place = jnp.sum(self.valid, axis=1, dtype=jnp.int32)

    def put(order: Array, low: Array, high: Array, place: Array,
            k: Array) -> tuple[Array, Array, Array]:
      """Widens the bounds of a row's page, [K, P, d], or begins one."""
      page, new = place // self.page, k[:, None].astype(low.dtype)
      begins = place % self.page == 0
      old = (jax.lax.dynamic_slice_in_dim(x, page, 1, axis=1) for x in (low, high))
      ends = (jnp.where(begins, new, pick(x, new))
              for x, pick in zip(old, (jnp.minimum, jnp.maximum), strict=True))
      low, high = (jax.lax.dynamic_update_slice_in_dim(x, end, page, axis=1)
                   for x, end in zip((low, high), ends, strict=True))
      return order.at[place].set(self.filled + step), low, high

    order, low, high = jax.vmap(put)(self.order, self.low, self.high, place, k)
    return super().append(k, v, index, step, valid).replace(order=order, low=low, high=high)

  def extend(self, k: Array, v: Array, index: Array, valid: Array, step: Array) -> Self:
    """Writes a chunk of tokens, as `KV.extend`."""
    return super().extend(k, v, index, valid, step).bounded()

  def attend(self, q: Array, index: Array, window: int = 0) -> tuple[Array, Array | None]:
    """Attends with the token that was appended last to the best pages: float[B, H, d]."""
    (pages, width), slots = self.low.shape[2:], self.order.shape[1]
    if self.read >= pages:
      return super().attend(q, index, window)
    count = jnp.sum(self.valid, axis=1, dtype=jnp.int32)[:, None, None, None]
    best = self.bounds(q)
    if self.shared:
      best = best.max(axis=2, keepdims=True)
    first = jnp.arange(pages, dtype=jnp.int32)[None, None, None] * self.page
    begun = first < count
    if window:
      last = jnp.clip(count - 1, first, first + self.page - 1)[:, 0, 0]
      last = take(self.pos, take(self.order, jnp.minimum(last, slots - 1)))
      begun &= (index[:, None] - last < window)[:, None, None]
    best = jax.lax.top_k(jnp.where(begun, best, -jnp.inf), self.read)[1].astype(jnp.int32)
    within = jnp.arange(self.page, dtype=jnp.int32).reshape(1, 1, 1, 1, -1)
    place = (best[..., None] * self.page + within).reshape(*best.shape[:3], -1)
    at = jnp.take_along_axis(self.order[:, None, None], jnp.minimum(place, slots - 1), axis=3)

    def pick(x: Array) -> Array:
      """[B, S] as each group of heads reads it, [B, K groups, C L]."""
      x = jnp.take_along_axis(x[:, None, None], at, axis=3)
      return x.reshape(len(x), -1, at.shape[3])

    def entries(x: Array) -> Array:
      """[B, K, S, d] the same way."""
      found = jnp.take_along_axis(x, at.reshape(*at.shape[:2], -1, 1), axis=2)
      return found.reshape(len(x), -1, at.shape[3], width)

    visible = (place < count).reshape(len(q), -1, at.shape[3])
    if window:
      visible &= index[:, None, None] - pick(self.pos) < window
    bias = None if self.bias is None else pick(self.bias)
    return attention.step(q, entries(self.k), entries(self.v), visible, bias=bias)[0], None

  def bounds(self, q: Array) -> Array:
    """Returns the most that products of queries float[B, H, d] with a page can be: [B, K, G, P]."""
    q = by_kv_head(q, self.low.shape[1]).astype(jnp.float32)
    low, high = (x.astype(jnp.float32) for x in (self.low, self.high))
    return (jnp.einsum('bkgd,bkpd->bkgp', jnp.maximum(q, 0.0), high, precision='highest')
            + jnp.einsum('bkgd,bkpd->bkgp', jnp.minimum(q, 0.0), low, precision='highest'))
