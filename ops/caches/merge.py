"""Entries that leave a cache, whose values are averaged with those that stay.

Axes: B batch, N entries now, M entries after, K kv heads, d features a head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from ops.kv_cache import KV, KVGather
from ops.rope import Rope

Array = jax.Array


class KVMerge(struct.PyTreeNode):
  """Selects entries of one layer's cache, and averages the values of the others with theirs.

  A value that stays weighs 1. A sum would grow with every entry that leaves: with a quarter of
  1,024 kept, the values of SmolLM2-135M came out several times as long, and it wrote nonsense.

  Attributes:
    kept: the entries that stay.
    first: int32[B, K, N], the first place that gets an entry's value; M for none.
    weight: float32[B, K, N], of the value in the mean of each of these places.
    span: places from the first on, as far as there are some. Static.
  """

  kept: KVGather
  first: Array
  weight: Array
  span: int = struct.field(pytree_node=False)

  def shrink(self, kv: KV, *, positions: str, rope: Rope) -> KV:
    """Reduces a cache to the entries that stay, as `ops.kv_cache.KVAnswer`."""
    shrunk = self.kept.shrink(kv, positions=positions, rope=rope)
    # The last of the features is the sum of the weights.
    gifts = jnp.pad(kv.v.astype(jnp.float32), ((0, 0),) * 3 + ((0, 1),), constant_values=1.0)
    gifts *= self.weight[..., None]
    places = self.kept.src.shape[2]
    starts = jax.vmap(jax.vmap(lambda x, at: jax.ops.segment_sum(x, at, places)))(gifts, self.first)
    added = jax.lax.reduce_window(
        starts, 0.0, jax.lax.add, (1, 1, self.span, 1), (1, 1, 1, 1),
        ((0, 0), (0, 0), (self.span - 1, 0), (0, 0)))
    mean = (shrunk.v.astype(jnp.float32) + added[..., :-1]) / (1 + added[..., -1:])
    return shrunk.with_values(mean.astype(shrunk.v.dtype))
