"""Heads that hold different numbers of entries, in memory as large as what they hold.

A row's entries lie in one flat buffer, head behind head, in pages of equal length that belong to
one head each. How many pages a head has is data, how many there are in all is not: a head wastes
less than one page. A step gathers queries page by page and multiplies each page by its own head's,
so that it reads every entry once, and none twice or for nothing.

The alternatives: queries gathered by entry would be as large as the cache, times H / K; all queries
times all entries, and masked, needs K times the products, and logits of H numbers an entry.

Axes: B batch, N entries now, M entries a head after, on average, K kv heads, P pages, S entries of
a page, Q queries of a kv head, d features a head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from ops.caches.split import Partial, SplitKV, _finite, _mix, weigh, within
from ops.kv_cache import KV, turned
from ops.rope import Rope

Array = jax.Array
# Entries of a page, at most: more save little, as a page also reads queries and writes a result.
MOST_ENTRIES = 256
INDEX_BYTES = 4
# Part of the entries that empty ends of pages may add.
MOST_WASTE = 1 / 20


class KVHeads(struct.PyTreeNode):
  """Selects the entries of one layer's cache, of which kv heads may keep different numbers.

  Attributes:
    src: int32[B, P, S], entries by their number among all heads' (head N + slot), those of a head
      in the order of slots.
    valid: bool[B, P, S], False for the empty end of a head's last page, and for pages of no head.
    head: int32[B, P], to which head a page belongs.
    first: int32[B, K], the first page of each head.
  """

  src: Array
  valid: Array
  head: Array
  first: Array

  @classmethod
  def create(cls, keep: Array, total: int) -> KVHeads:
    """Lays out the entries that stay.

    Args:
      keep: bool[B, K, N], those that stay.
      total: the most entries that a row keeps in all heads together.
    """
    batch, heads, slots = keep.shape
    size = page_size(total, heads)
    pages = (total + heads * (size - 1)) // size
    counts = jnp.sum(keep, axis=2, dtype=jnp.int32)
    needed = -(-counts // size)
    first = jnp.cumsum(needed, axis=1) - needed
    rank = jnp.cumsum(keep, axis=2, dtype=jnp.int32) - 1
    place = jnp.where(keep, first[..., None] * size + rank, pages * size).reshape(batch, -1)
    number = jnp.arange(1, heads * slots + 1, dtype=jnp.int32)
    src = jax.vmap(lambda at: jnp.zeros(pages * size, jnp.int32).at[at].set(number, mode='drop'))(
        place).reshape(batch, pages, size)
    page = jnp.arange(pages, dtype=jnp.int32)
    head = jnp.sum(first[:, None] <= page[None, :, None], axis=2, dtype=jnp.int32) - 1
    return cls(jnp.maximum(src - 1, 0), src > 0, head, first)

  @staticmethod
  def stored_bytes(total: int, heads: int, width: int, itemsize: int) -> tuple[int, int]:
    """Returns the bytes of a row, as `CacheReducer.stored_bytes`, of `total` entries."""
    size = page_size(total, heads)
    pages = (total + heads * (size - 1)) // size
    entry = 2 * width * itemsize
    return total * entry, pages * (size * (entry + INDEX_BYTES + 1) + INDEX_BYTES)

  def mask(self, slots: int) -> Array:
    """Names the entries that stay among N = `slots`, bool[B, K, N]."""
    batch, heads = self.first.shape
    flags = jax.vmap(lambda at, there: jnp.zeros(heads * slots, bool).at[at].max(there))(
        self.src.reshape(batch, -1), self.valid.reshape(batch, -1))
    return flags.reshape(batch, heads, slots)

  def shrink(self, kv: KV, *, positions: str, rope: Rope) -> SplitKV:
    """Reduces a cache to these entries, as `ops.kv_cache.KVAnswer`."""
    slots = kv.k.shape[2]

    def pick(x: Array) -> Array:
      """[B, K, N, d] -> [B, P, S, d]."""
      flat = x.reshape(len(x), -1, x.shape[3])
      index = self.src.reshape(len(x), -1, 1)
      return jnp.take_along_axis(flat, index, axis=1).reshape(*self.src.shape, -1)

    def shared(x: Array) -> Array:
      """[B, N] -> [B, P, S]."""
      index = self.src.reshape(len(x), -1) % slots
      return jnp.take_along_axis(x, index, axis=1).reshape(self.src.shape)

    keys, pos, start = pick(kv.k), shared(kv.pos), kv.start
    valid = self.valid & shared(kv.valid)
    if positions == 'compact':
      pages, size = self.src.shape[1:]
      own = jnp.take_along_axis(self.first, self.head, axis=1)
      place = (jnp.arange(pages)[None] - own)[..., None] * size + jnp.arange(size)[None, None]
      place = place.astype(jnp.int32)
      keys = turned(keys, place - pos, start, rope)
      pos, start = place, jnp.max(jnp.where(valid, place + 1, 0), axis=(1, 2))
    bias = None if kv.bias is None else shared(kv.bias)
    prompt = Pages(keys, pick(kv.v), pos, valid, self.head, kv.k.shape[1], bias)
    return SplitKV.create(prompt, kv, start)


class Pages(struct.PyTreeNode):
  """Stores the entries of a prompt in pages, each of one kv head.

  Attributes:
    keys, values: float[B, P, S, d].
    pos, valid: int32, bool[B, P, S].
    head: int32[B, P].
    heads: K. Static.
    bias: float32[B, P, S] or None, added to logits.
  """

  keys: Array
  values: Array
  pos: Array
  valid: Array
  head: Array
  heads: int = struct.field(pytree_node=False)
  bias: Array | None = None

  @property
  def slots(self) -> int:
    """Returns the entries that a row has room for, mean over its heads, rounded up."""
    return -(-self.valid.shape[1] * self.valid.shape[2] // self.heads)

  def read(self, q: Array, index: Array, window: int) -> Partial:
    """Attends with queries float[B, K, Q, d] of tokens at int32[B, Q]."""
    own = jnp.take_along_axis(q, self.head[:, :, None, None], axis=1)
    visible = self.valid[:, :, None]
    if window:
      visible &= within(index, self.pos, window)
    bias = None if self.bias is None else self.bias[:, :, None]
    logits = weigh(own, self.keys, visible, bias, scale=q.shape[3] ** -0.5)
    belongs = self.head[:, None] == jnp.arange(self.heads)[None, :, None]
    peak = jnp.max(jnp.where(belongs[..., None], jnp.max(logits, axis=3)[:, None], -jnp.inf),
                   axis=2)
    level = jnp.take_along_axis(_finite(peak), self.head[..., None], axis=1)
    weights = jnp.exp(logits - level[..., None])
    belongs = belongs.astype(jnp.float32)
    total = jnp.einsum('bkp,bpq->bkq', belongs, jnp.sum(weights, axis=3), precision='highest')
    out = jnp.einsum('bkp,bpqd->bkqd', belongs, _mix(weights, self.values), precision='highest')
    return Partial(peak, total, out)

  def take(self, rows: Array) -> Pages:
    """Returns the entries of rows int[R] of the batch, which may repeat."""
    return jax.tree.map(lambda x: x[rows], self)


def page_size(total: int, heads: int) -> int:
  """Returns a power of two: the most entries of a page whose empty ends cost little."""
  size = 1
  while 2 * size <= MOST_ENTRIES and heads * (2 * size - 1) <= MOST_WASTE * total:
    size *= 2
  return size
