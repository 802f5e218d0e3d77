"""Entries that stay in a cache, but say nothing.

Axes: B batch, N entries, K kv heads, d features a head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from ops.kv_cache import KV
from ops.rope import Rope

Array = jax.Array


class KVBlank(struct.PyTreeNode):
  """Makes keys and values of some entries zeros: their logits are 0, and they are still seen.

  Attributes:
    stays: bool[B, N], entries that stay as they are.
  """

  stays: Array

  def shrink(self, kv: KV, *, positions: str, rope: Rope) -> KV:
    """Blanks the others, as `ops.kv_cache.KVAnswer`; no entry goes, so that none is renumbered."""
    del positions, rope
    k, v = (jnp.where(self.stays[:, None, :, None], x, 0) for x in (kv.k, kv.v))
    return KV.create(k, v, pos=kv.pos, valid=kv.valid, bias=kv.bias, start=kv.start,
                     filled=kv.filled, stats=kv.stats, recent=kv.recent)
