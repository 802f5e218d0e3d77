"""Kernels that add up the columns of an attention map, in memory linear in its sides.

Beside a fused kernel that gives the log-sum-exp of every row, the weight of query i on key j is
exp(q_i . k_j * scale + bias_j - lse_i): a block of keys meets one block of queries after another,
and no more of the map is ever there than two blocks' product. What causal attention hides whole is
skipped.

Axes: B batch, N queries, S keys, H heads, K kv heads, d features a head, I and J blocks of queries
and of keys.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array
HALF = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
# Queries and keys of a block: what a GPU's registers hold, and a TPU's vector memory.
GPU_BLOCK, TPU_BLOCK = 64, 512
_LANES = 128


class Columns(struct.PyTreeNode):
  """Holds what a kernel reads beside queries and keys.

  Attributes:
    lse: float32[B, N, H], inf where a query does not count.
    bias: float32[B, S], or None.
    last: int32[B, N], the last position that each query sees; None where it sees all.
    positions: int32[B, S], of the keys; None where `last` is.
    scale: of the logits. Static.
    window: how many positions back from its last one a query sees, None for all. Static.
  """

  lse: Array
  bias: Array | None
  last: Array | None
  positions: Array | None
  scale: float = struct.field(pytree_node=False)
  window: int | None = struct.field(pytree_node=False, default=None)


def unfit(implementation: str, q: Array, k: Array) -> str:
  """Says why no kernel takes these queries and keys; '' where one does.

  Args:
    implementation: of `ops.attention`: 'cudnn' where a GPU is meant, 'splash' for a TPU.
    q, k: float[B, N, H, d], float[B, S, K, d].
  """
  heads, kv_heads, width = q.shape[2], k.shape[2], q.shape[3]
  if q.dtype not in HALF or k.dtype != q.dtype:
    return f'{q.dtype} queries and {k.dtype} keys, not bfloat16 or float16'
  if implementation == 'cudnn':
    if width not in (32, 64, 128):
      return f'heads of {width} features, not 32, 64 or 128'
    if min(q.shape[1], k.shape[1]) < GPU_BLOCK:
      return f'{q.shape[1]} queries and {k.shape[1]} keys, fewer than a block of {GPU_BLOCK}'
    return ''
  together = max(1, _LANES // width)
  if width * together % _LANES or heads % together or (together > 1 and heads != kv_heads):
    return (f'{heads} heads of {width} features over {kv_heads} of keys, which fill no '
            f'{_LANES} lanes')
  return ''


@functools.cache
def announce(reason: str) -> None:
  """Logs once that columns are added up without a kernel, and why."""
  logging.getLogger(__name__).warning(
      'received attention is added up by XLA, a few queries at a time: no kernel takes %s', reason)


def add_up(implementation: str, q: Array, k: Array, told: Columns, *,
           interpret: bool = False) -> Array:
  """Adds up the columns of an attention map by a kernel, float32[B, H, S]; it has no gradient.

  Args:
    implementation: 'cudnn' for the GPU's kernel, 'splash' for the TPU's.
    q, k: float[B, N, H, d], float[B, S, K, d], which `unfit` has nothing against.
    told: what else it reads.
    interpret: whether to run it anywhere, operation by operation.
  """
  kernel = {'cudnn': _on_gpu, 'splash': _on_tpu}[implementation]
  return kernel(q, k, told, interpret)


def _weights(products: Array, lse: Array, told: Mapping[str, Array], scale: float,
             window: int | None, counts: Array) -> Array:
  """Computes exp(logit - lse) of a block [keys, queries], 0 where `counts` or what is seen says so.

  Args:
    products: float32[keys, queries].
    lse: float32[1, queries].
    told: 'bias' and 'positions' [keys, 1], 'last' [1, queries], those that there are.
    scale, window: as of `Columns`.
    counts: bool[keys, queries].
  """
  logits = products * scale
  if 'bias' in told:
    logits = logits + told['bias']
  if 'last' in told:
    counts &= told['positions'] <= told['last']
    if window is not None:
      counts &= told['positions'] > told['last'] - window
  return jnp.where(counts, jnp.exp(logits - lse), 0.0)


def _on_gpu(q: Array, k: Array, told: Columns, interpret: bool) -> Array:
  """Runs a program a block of keys of a head, which walks over the queries that may see it."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton as plgpu
  batch, length, heads, width = q.shape
  keys, group, block = k.shape[1], heads // k.shape[2], GPU_BLOCK
  # The last block of an odd length begins earlier, so that none reaches beyond the end.
  starts = [jnp.minimum(jnp.arange(-(-size // block)) * block, size - block)
            for size in (length, keys)]
  first = jnp.zeros((batch, len(starts[1])), jnp.int32)
  arrays = {'lse': jnp.swapaxes(told.lse, 1, 2)}
  if told.bias is not None:
    arrays['bias'] = told.bias.astype(jnp.float32)
  if told.last is not None and told.positions is not None:
    arrays |= {'last': told.last, 'positions': told.positions}
    first = _first_seeing(told.last, told.positions, starts, block)
  names = tuple(arrays)

  def body(*refs: Any) -> None:
    q_ref, k_ref, first_ref, *told_refs, out_ref = refs
    own = dict(zip(names, told_refs, strict=True))
    j = pl.program_id(2)
    of_keys = pl.ds(jnp.minimum(j * block, keys - block), block)
    key_rows = k_ref[0, of_keys, 0, :]
    fixed = {name: own[name][0, of_keys][:, None] for name in ('bias', 'positions') if name in own}

    def step(i: Array, total: Array) -> Array:
      start = jnp.minimum(i * block, length - block)
      of_queries = pl.ds(start, block)
      products = jax.lax.dot_general(
          key_rows, q_ref[0, of_queries, 0, :], (((1,), (1,)), ((), ())),
          preferred_element_type=jnp.float32)
      seen = {'last': own['last'][0, of_queries][None]} if 'last' in own else {}
      # A query of two blocks counts in the first.
      new = start + jax.lax.broadcasted_iota(jnp.int32, (block, block), 1) >= i * block
      weights = _weights(products, own['lse'][0, 0, of_queries][None], fixed | seen, told.scale,
                         told.window, new)
      return total + jnp.sum(weights, axis=1)

    out_ref[0, 0, of_keys] = jax.lax.fori_loop(
        first_ref[0, j], len(starts[0]), step, jnp.zeros((block,), jnp.float32))

  def of_row(size: int) -> Any:
    return pl.BlockSpec((1, size), lambda b, h, j: (b, 0))

  def of_head(size: int) -> Any:
    return pl.BlockSpec((1, 1, size), lambda b, h, j: (b, h, 0))

  return pl.pallas_call(
      body, grid=(batch, heads, len(starts[1])), interpret=interpret,
      in_specs=[pl.BlockSpec((1, length, 1, width), lambda b, h, j: (b, 0, h, 0)),
                pl.BlockSpec((1, keys, 1, width), lambda b, h, j: (b, 0, h // group, 0)),
                of_row(len(starts[1])),
                *(of_head(length) if name == 'lse' else of_row(arrays[name].shape[1])
                  for name in names)],
      out_specs=of_head(keys), out_shape=jax.ShapeDtypeStruct((batch, heads, keys), jnp.float32),
      compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2))(
          q, k, first, *arrays.values())


def _first_seeing(last: Array, positions: Array, starts: list[Array], block: int) -> Array:
  """Finds the first block of queries that may see any of a block of keys: int32[B, J], or I."""
  latest = jnp.stack([jnp.max(jax.lax.dynamic_slice_in_dim(last, start, block, 1), axis=1)
                      for start in starts[0]], axis=1)
  earliest = jnp.stack([jnp.min(jax.lax.dynamic_slice_in_dim(positions, start, block, 1), axis=1)
                        for start in starts[1]], axis=1)
  sees = latest[:, None] >= earliest[:, :, None]
  number = jnp.arange(len(starts[0]), dtype=jnp.int32)[None, None]
  return jnp.min(jnp.where(sees, number, len(starts[0])), axis=2)


def _on_tpu(q: Array, k: Array, told: Columns, interpret: bool) -> Array:
  """Runs a grid of blocks; sums stay in vector memory while a block of keys meets all queries.

  Heads narrower than 128 lanes go together, as many as fill them.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu
  batch, length, heads, width = q.shape
  keys, group = k.shape[1], heads // k.shape[2]
  together = max(1, _LANES // width)
  of_queries, of_keys = (min(TPU_BLOCK, -(-size // _LANES) * _LANES) for size in (length, keys))
  parts, steps = heads // together, -(-length // of_queries)
  arrays = {'lse': jnp.swapaxes(told.lse, 1, 2).reshape(batch * parts, together, length)}
  specs = {'lse': pl.BlockSpec((1, together, of_queries), lambda b, h, j, i: (b * parts + h, 0, i))}
  column = pl.BlockSpec((1, of_keys, 1), lambda b, h, j, i: (b, j, 0))
  if told.bias is not None:
    arrays['bias'], specs['bias'] = told.bias.astype(jnp.float32)[:, :, None], column
  if told.last is not None and told.positions is not None:
    arrays['positions'], specs['positions'] = told.positions[:, :, None], column
    arrays['last'] = told.last[:, None]
    specs['last'] = pl.BlockSpec((1, 1, of_queries), lambda b, h, j, i: (b, 0, i))
  names = tuple(arrays)

  def body(*refs: Any) -> None:
    q_ref, k_ref, *told_refs, out_ref, total_ref = refs
    own = dict(zip(names, told_refs, strict=True))
    i, j = pl.program_id(3), pl.program_id(2)

    @pl.when(i == 0)
    def _() -> None:
      total_ref[...] = jnp.zeros_like(total_ref)

    seen = {name: own[name][0] for name in names if name != 'lse'}
    query = i * of_queries + jax.lax.broadcasted_iota(jnp.int32, (1, of_queries), 1)
    key = j * of_keys + jax.lax.broadcasted_iota(jnp.int32, (of_keys, 1), 0)
    # Beyond the ends lies anything.
    there = (query < length) & (key < keys)
    sees: Any = True
    if 'last' in seen:
      latest = jnp.max(jnp.where(query < length, seen['last'], jnp.iinfo(jnp.int32).min))
      sees = latest >= jnp.min(jnp.where(key < keys, seen['positions'], jnp.iinfo(jnp.int32).max))

    @pl.when(sees)
    def _() -> None:
      for head in range(together):
        lanes = slice(head * width, (head + 1) * width)
        products = jax.lax.dot_general(
            k_ref[0, :, lanes], q_ref[0, :, lanes], (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32)
        weights = _weights(products, own['lse'][0, head:head + 1], seen, told.scale, told.window,
                           there)
        total_ref[head] += jnp.broadcast_to(jnp.sum(weights, axis=1, keepdims=True),
                                            total_ref.shape[1:])

    @pl.when(i == steps - 1)
    def _() -> None:
      for head in range(together):
        out_ref[0, head:head + 1] = total_ref[head].T[:1]

  wide = together * width
  sums = pl.pallas_call(
      body, grid=(batch, parts, -(-keys // of_keys), steps), interpret=interpret,
      in_specs=[pl.BlockSpec((1, of_queries, wide), lambda b, h, j, i: (b, i, h)),
                pl.BlockSpec((1, of_keys, wide), lambda b, h, j, i: (b, j, jax.lax.div(h, group))),
                *specs.values()],
      out_specs=pl.BlockSpec((1, together, of_keys), lambda b, h, j, i: (b * parts + h, 0, j)),
      out_shape=jax.ShapeDtypeStruct((batch * parts, together, keys), jnp.float32),
      scratch_shapes=[pltpu.VMEM((together, of_keys, _LANES), jnp.float32)])(
          q.reshape(batch, length, -1), k.reshape(batch, keys, -1), *arrays.values())
  return sums.reshape(batch, heads, keys)
