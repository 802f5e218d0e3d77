"""Keys with fewer channels.

Axes: B batch, N entries now, M entries after, K kv heads, Q queries of a kv head, d features a
head, e channels that are left.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from ops.caches.split import Partial, SplitKV, read, within
from ops.kv_cache import KV, KVGather
from ops.rope import Rope

Array = jax.Array
INDEX_BYTES = 4


class KVChannels(struct.PyTreeNode):
  """Selects the channels that keys of one layer's cache keep, for each kv head.

  Attributes:
    channels: int32[B, K, e], of the rotated keys.
    entries: which entries stay, None for all.
  """

  channels: Array
  entries: KVGather | None = None

  def shrink(self, kv: KV, *, positions: str, rope: Rope) -> SplitKV:
    """Reduces a cache to these channels, as `ops.kv_cache.KVAnswer`."""
    if self.entries is not None:
      kv = self.entries.shrink(kv, positions=positions, rope=rope)
    keys = jnp.take_along_axis(kv.k, self.channels[:, :, None], axis=3)
    prompt = ThinKeys(keys, kv.v, self.channels, kv.pos, kv.valid, kv.bias)
    return SplitKV.create(prompt, kv, kv.start)


class ThinKeys(struct.PyTreeNode):
  """Stores the entries of a prompt, whose keys have some channels alone.

  Attributes:
    keys, values: float[B, K, M, e], float[B, K, M, d].
    channels: int32[B, K, e].
    pos, valid: int32, bool[B, M] or [B, K, M].
    bias: float32 of the same shape, or None, added to logits.
  """

  keys: Array
  values: Array
  channels: Array
  pos: Array
  valid: Array
  bias: Array | None = None

  @property
  def slots(self) -> int:
    """Returns the entries that a row has room for."""
    return self.keys.shape[2]

  def read(self, q: Array, index: Array, window: int) -> Partial:
    """Attends with queries float[B, K, Q, d] of tokens at int32[B, Q]."""

    def each_head(x: Array) -> Array:
      return (x if x.ndim == 3 else x[:, None])[:, :, None]

    visible = each_head(self.valid)
    if window:
      visible &= within(index, each_head(self.pos)[:, :, 0], window)
    thin = jnp.take_along_axis(q, self.channels[:, :, None], axis=3)
    return read(thin, self.keys, self.values, visible,
                None if self.bias is None else each_head(self.bias), scale=q.shape[3] ** -0.5)

  def take(self, rows: Array) -> ThinKeys:
    """Returns the entries of rows int[R] of the batch, which may repeat."""
    return jax.tree.map(lambda x: x[rows], self)
