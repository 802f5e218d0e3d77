"""A TPU kernel of attention over few tokens: a row of the batch at a time, as it lies.

Below a thousand tokens what stands around a TPU's shipped kernel costs more than the arithmetic:
heads moved in front, lengths padded to its blocks, a bias as further columns. This one reads
queries, keys and values of all heads [N, H d] as their product leaves them, any number of tokens,
takes a bias of each key, and gives gradients of the output and of the log-sum-exp. One image's
logits of one head are there at a time.

Axes: B batch, N queries, S keys, H heads, d features a head.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
# Queries times keys of a row: a head's logits and weights, and a row's inputs and outputs, fit a
# TPU's vector memory.
MOST = 768 ** 2
_VECTOR_MEMORY = 64 * 2 ** 20
_DIMENSIONS = (((1,), (1,)), ((), ()))  # Of a @ b.T.


def fits(q: Array, k: Array, *, causal: bool) -> bool:
  """Tells whether the kernel takes these: as many heads of keys, few tokens, none hidden by order.

  Args:
    q, k: float[B, N, H, d], float[B, S, K, d].
    causal: whether a query sees only what stands before it.
  """
  (_, length, heads, width), (_, keys, kv_heads, _) = q.shape, k.shape
  return (not causal and heads == kv_heads and length * keys <= MOST and heads * width % 128 == 0
          and q.dtype in (jnp.bfloat16, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(scale: float, interpret: bool, q: Array, k: Array, v: Array,
           bias: Array) -> tuple[Array, Array]:
  """Attends: output [B, N, H, d] and log-sum-exp float32[B, N, H].

  Args:
    scale: of the logits.
    interpret: whether to run it anywhere, operation by operation.
    q, k, v: float[B, N, H, d], float[B, S, H, d], of which `fits` says that they fit.
    bias: float32[B, S], finite.
  """
  heads, width = q.shape[2:]

  def body(q_ref: Any, k_ref: Any, v_ref: Any, bias_ref: Any, out_ref: Any, lse_ref: Any) -> None:
    for head in range(heads):
      at = slice(head * width, (head + 1) * width)
      logits = _logits(q_ref[0, :, at], k_ref[0, :, at], bias_ref[0], scale)
      most = jnp.max(logits, axis=1, keepdims=True)
      weights = jnp.exp(logits - most)
      total = jnp.sum(weights, axis=1, keepdims=True)
      mixed = _multiply(weights.astype(v_ref.dtype), v_ref[0, :, at], (((1,), (0,)), ((), ())))
      out_ref[0, :, at] = (mixed / total).astype(out_ref.dtype)
      lse_ref[0, :, head:head + 1] = most + jnp.log(total)

  out, lse = _call(body, interpret, (_flat(q), _flat(k), _flat(v), bias[:, None]),
                   (jax.ShapeDtypeStruct(_flat(q).shape, q.dtype),
                    jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)))
  return out.reshape(q.shape), lse


def _forward(scale: float, interpret: bool, *inputs: Array) -> tuple[tuple[Array, Array], Any]:
  out, lse = attend(scale, interpret, *inputs)
  return (out, lse), (inputs, out, lse)


def _backward(scale: float, interpret: bool, saved: Any,
              grads: tuple[Array, Array]) -> tuple[Array, ...]:
  (q, k, v, bias), out, lse = saved
  heads, width = q.shape[2:]

  def body(q_ref: Any, k_ref: Any, v_ref: Any, bias_ref: Any, out_ref: Any, lse_ref: Any,
           grad_ref: Any, grad_lse_ref: Any, *results: Any) -> None:
    grad_q_ref, grad_k_ref, grad_v_ref, grad_bias_ref = results
    grad_bias = jnp.zeros(bias_ref.shape[1:], jnp.float32)
    for head in range(heads):
      at = slice(head * width, (head + 1) * width)
      one = slice(head, head + 1)
      grad = grad_ref[0, :, at]
      weights = jnp.exp(_logits(q_ref[0, :, at], k_ref[0, :, at], bias_ref[0], scale)
                        - lse_ref[0, :, one])
      # What a row's weights may change by, since they add up to one; its log-sum-exp adds to it.
      row = grad_lse_ref[0, :, one] - jnp.sum(
          grad.astype(jnp.float32) * out_ref[0, :, at].astype(jnp.float32), axis=1, keepdims=True)
      grad_logits = weights * (_multiply(grad, v_ref[0, :, at], _DIMENSIONS) + row)
      grad_bias += jnp.sum(grad_logits, axis=0, keepdims=True)
      small = grad_logits.astype(q_ref.dtype)
      grad_q_ref[0, :, at] = (scale * _multiply(
          small, k_ref[0, :, at], (((1,), (0,)), ((), ())))).astype(grad_q_ref.dtype)
      over_queries = (((0,), (0,)), ((), ()))
      grad_k_ref[0, :, at] = (scale * _multiply(
          small, q_ref[0, :, at], over_queries)).astype(grad_k_ref.dtype)
      grad_v_ref[0, :, at] = _multiply(
          weights.astype(grad.dtype), grad, over_queries).astype(grad_v_ref.dtype)
    grad_bias_ref[0] = grad_bias

  arrays = (*(_flat(x) for x in (q, k, v)), bias[:, None], _flat(out), lse, _flat(grads[0]),
            grads[1].astype(jnp.float32))
  shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[:4])
  *found, grad_bias = _call(body, interpret, arrays, shapes)
  return (*(made.reshape(x.shape) for made, x in zip(found, (q, k, v), strict=True)),
          grad_bias[:, 0])


attend.defvjp(_forward, _backward)


def _flat(x: Array) -> Array:
  """Puts all heads in a row: [B, N, H, d] -> [B, N, H d]."""
  return x.reshape(*x.shape[:2], -1)


def _logits(q: Array, k: Array, bias: Array, scale: float) -> Array:
  """Computes the logits of one head, float32[N, S]."""
  return _multiply(q, k, _DIMENSIONS) * scale + bias


def _multiply(one: Array, other: Array, dimensions: Any) -> Array:
  """Multiplies into float32, exact where its factors are of float32."""
  precision = 'highest' if one.dtype == jnp.float32 else None
  return jax.lax.dot_general(one, other, dimensions, precision=precision,
                             preferred_element_type=jnp.float32)


def _call(body: Any, interpret: bool, arrays: tuple[Array, ...], shapes: Any) -> Any:
  """Runs a kernel over rows of the batch; of every array it sees a whole row."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  def whole(x: Any) -> Any:
    return pl.BlockSpec((1, *x.shape[1:]), lambda row: (row, 0, 0))

  return pl.pallas_call(
      body, grid=(len(arrays[0]),), interpret=interpret, in_specs=[whole(x) for x in arrays],
      out_specs=tuple(whole(x) for x in shapes), out_shape=shapes,
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel',), vmem_limit_bytes=_VECTOR_MEMORY))(*arrays)
