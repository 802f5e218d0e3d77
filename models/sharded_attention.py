"""Attention over a mesh: a kernel runs on the rows and heads of its own device.

Axes: B batch, N queries, S keys, H heads, K kv heads, d features a head.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from models.reduction import BATCH_AXES
from ops import attention

Array = jax.Array


def attend(q: Array, k: Array, v: Array, bias: Array | None, positions: Array | None, *,
           mesh: Mesh | None, implementation: str, pairs: attention.Exceptions | None = None,
           **settings: Any) -> attention.Attended:
  """Attends with rows divided over the batch axes of a mesh, and heads over its axis 'tensor'.

  Args:
    q: float[B, N, H, d].
    k, v: float[B, S, K, d].
    bias: float32[B, S] or None.
    positions: int32[B, N] or None.
    mesh: of the devices, or None.
    pairs: as `ops.attention.attend` takes it.
    implementation: of `ops.attention`; XLA's own is divided by the compiler.
    **settings: other arguments of `ops.attention.attend`.
  """

  def local(q: Array, k: Array, v: Array, bias: Array | None,
            positions: Array | None, pairs: attention.Exceptions | None) -> attention.Attended:
    return attention.attend(q, k, v, bias=bias, positions=positions, pairs=pairs,
                            implementation=implementation, **settings)

  if mesh is None or implementation == 'xla':
    return local(q, k, v, bias, positions, pairs)
  heads, rows = PartitionSpec(BATCH_AXES, None, 'tensor'), PartitionSpec(BATCH_AXES)
  divided = jax.shard_map(local, mesh=mesh, check_vma=False, out_specs=heads,
                          in_specs=(heads, heads, heads, rows, rows, rows))
  return divided(q, k, v, bias, positions, pairs)


def received(q: Array, k: Array, lse: Array | None, *, mesh: Mesh | None, implementation: str,
             bias: Array | None = None, query_valid: Array | None = None,
             positions: Array | None = None, last: Array | None = None,
             window: int | None = None, pairs: attention.Exceptions | None = None) -> Array:
  """Tells what each key receives, float32[B, H, S], divided as `attend` divides.

  Args:
    q, k, lse, bias, query_valid, positions, last, window, pairs: as `ops.attention.received` takes
      them.
    mesh, implementation: as of `attend`.
  """

  def local(q: Array, k: Array, lse: Array | None, bias: Array | None, query_valid: Array | None,
            positions: Array | None, last: Array | None,
            pairs: attention.Exceptions | None) -> Array:
    return attention.received(q, k, lse, bias=bias, query_valid=query_valid, positions=positions,
                              last=last, window=window, pairs=pairs, implementation=implementation)

  arrays = (q, k, lse, bias, query_valid, positions, last, pairs)
  if mesh is None or implementation == 'xla':
    return local(*arrays)
  heads, rows = PartitionSpec(BATCH_AXES, None, 'tensor'), PartitionSpec(BATCH_AXES)
  divided = jax.shard_map(local, mesh=mesh, check_vma=False,
                          out_specs=PartitionSpec(BATCH_AXES, 'tensor'),
                          in_specs=(heads, heads, heads, rows, rows, rows, rows, rows))
  return divided(*arrays)
