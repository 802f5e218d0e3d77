"""Fused attention: inputs, outputs and gradients of cuDNN and TPU kernels.

Axes: B batch, N queries, S keys, H heads, K kv heads, d features a head."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

Array = jax.Array


# A lower bias counts as this. It hides a key from any row that has another one, while a row with
# hidden keys only keeps finite logits whose differences float32 still resolves: so it is no lower,
# and another number than HIDDEN_LOGIT (ops/attention.py), which no kernel adds to a logit.
LOWEST_BIAS = -3e4
# (causal, scale, q, k, v) -> out, lse.
Kernel = Callable[[bool, float, Array, Array, Array], tuple[Array, Array]]
_LANES = 128  # Block lengths on a TPU are multiples of this.
_GROUP_ROWS = 2 ** 15  # Heads times queries that one call of a TPU kernel takes, or one row of it.


def augment(q: Array, k: Array, bias: Array, *, scale: float) -> tuple[Array, Array]:
  """A per-key bias as extra columns: the new q . k * scale is the old one plus the bias.

  Half precision takes three columns, whose sum holds the bias to all 24 bits of a float32. The
  queries' side is a power of two, exact in every dtype; the odd rest of 1 / scale is in the keys'.

  Args:
    q: float[B, N, H, d].
    k: float[B, S, K, d].
    bias: float32[B, S].
    scale: of the logits.

  Returns:
    q, k: float[B, N, H, d + c], float[B, S, K, d + c]; c is 1 in float32, else 3.
  """
  power = 2.0 ** math.ceil(-math.log2(scale))
  rest = jnp.maximum(bias.astype(jnp.float32), LOWEST_BIAS) / (scale * power)
  parts = []
  for _ in range(1 if k.dtype == jnp.float32 else 3):
    part = rest.astype(k.dtype)
    parts.append(part)
    # The first column alone carries the gradient: all columns get the same one.
    rest = jax.lax.stop_gradient(rest - part.astype(jnp.float32))
  columns = jnp.broadcast_to(jnp.stack(parts, axis=-1)[:, :, None], (*k.shape[:3], len(parts)))
  powers = jnp.full((*q.shape[:3], len(parts)), power, q.dtype)
  return jnp.concatenate([q, powers], axis=-1), jnp.concatenate([k, columns], axis=-1)


def cudnn(causal: bool, scale: float, q: Array, k: Array, v: Array,
          bias: Array | None) -> tuple[Array, Array]:
  """Runs cuDNN's fused attention in half precision: output [B, N, H, d], log-sum-exp [B, N, H]."""
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    raise ValueError(f"implementation 'cudnn' takes bfloat16 or float16, got {q.dtype}; use 'xla'")
  return _fused(_cudnn_kernel, causal, scale, q, k, v, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def splash(causal: bool, scale: float, q: Array, k: Array, v: Array,
           bias: Array | None) -> tuple[Array, Array]:
  """Runs the TPU's splash attention kernel: output [B, N, H, d], log-sum-exp [B, N, H]."""
  # The kernel has no scale. It goes in before the bias, which it would round.
  run = functools.partial(_fused, _splash_residuals, causal, 1.0)
  return _in_groups(lambda q, *rest: run(_scaled(q, scale), *rest), q, k, v, bias)


def _splash_forward(causal: bool, scale: float,
                    *args: Any) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
  args = jax.tree.map(lambda arg: arg.value, args,
                      is_leaf=lambda arg: isinstance(arg, CustomVJPPrimal))
  return splash(causal, scale, *args), args


def _splash_backward(causal: bool, scale: float, saved: tuple[Array, ...],
                     grads: tuple[Array | SymbolicZero, ...]) -> tuple[Array | None, ...]:
  grad_out, grad_lse = (None if isinstance(grad, SymbolicZero) else grad for grad in grads)

  def run(q: Array, k: Array, v: Array,
          bias: Array | None) -> tuple[Array | None, Array | None]:
    out, lse = _fused(_splash_gradients, causal, 1.0, _scaled(q, scale), k, v, bias)
    return None if grad_out is None else out, None if grad_lse is None else lse

  # The shipped kernel gives either its log-sum-exp or its gradient, so the forward pass runs again.
  return _in_groups(lambda *args: jax.vjp(run, *args[:4])[1](args[4]), *saved, (grad_out, grad_lse))


splash.defvjp(_splash_forward, _splash_backward, symbolic_zeros=True)


def _scaled(q: Array, scale: float) -> Array:
  return (q.astype(jnp.float32) * scale).astype(q.dtype)


def _in_groups(function: Callable[..., Any], q: Array, *args: Any) -> Any:
  """Runs over a few rows of the batch at a time.

  A TPU kernel wants heads first, lengths padded and heads widened, and returns the log-sum-exp 128
  times over. Such copies of a whole batch would cost a tenth of the score map; a core takes the
  heads one by one anyway.
  """
  batch, length, heads, _ = q.shape
  sizes = [size for size in range(1, batch + 1)
           if batch % size == 0 and size * heads * length <= _GROUP_ROWS]
  size = max(sizes, default=1)
  items = jax.tree.map(lambda x: x.reshape(batch // size, size, *x.shape[1:]), (q, *args))
  with jax.default_matmul_precision('highest' if q.dtype == jnp.float32 else None):
    results = jax.lax.map(lambda item: function(*item), items)
  return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), results)


def _fused(kernel: Kernel, causal: bool, scale: float, q: Array, k: Array, v: Array,
           bias: Array | None) -> tuple[Array, Array]:
  """A kernel with what kernels lack: a per-key bias, any head width, a gradient of the lse."""
  if bias is not None:
    q, k = augment(q, k, bias, scale=scale)
  width = -(-q.shape[-1] // 8) * 8
  q, k = _widen(q, width), _widen(k, width)
  out, lse = kernel(causal, scale, q, k, v)
  return out, _give_gradient(kernel, causal, scale, jax.lax.stop_gradient(lse), q, k)


def _widen(x: Array, features: int) -> Array:
  """Zero columns up to `features`; they change no logit, and are cut off the output."""
  return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _give_gradient(kernel: Kernel, causal: bool, scale: float, lse: Array, q: Array,
                   k: Array) -> Array:
  """The log-sum-exp as it is, with the gradient that the kernel does not give."""
  del kernel, causal, scale, q, k
  return lse


def _give_gradient_forward(kernel: Kernel, causal: bool, scale: float, lse: Array, q: Array,
                           k: Array) -> tuple[Array, tuple[Array, Array]]:
  del kernel, causal, scale
  return lse, (q, k)


def _give_gradient_backward(kernel: Kernel, causal: bool, scale: float, saved: tuple[Array, Array],
                            grad: Array) -> tuple[None, Array, Array]:
  # d lse_i = sum_j p_ij d logit_ij: for q this is attention over the keys as values, for k what
  # such attention sends back to its values.
  q, k = saved
  keys, pull = jax.vjp(lambda values: kernel(causal, scale, q, k, values)[0], k)
  grad = scale * grad[..., None]
  grad_q = (grad * keys.astype(jnp.float32)).astype(q.dtype)
  grad_k, = pull((grad * q.astype(jnp.float32)).astype(keys.dtype))
  return None, grad_q, grad_k


_give_gradient.defvjp(_give_gradient_forward, _give_gradient_backward)


def _cudnn_kernel(causal: bool, scale: float, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
  if q.shape[1] % 2 or k.shape[1] % 2:
    return _cudnn_odd(causal, scale, q, k, v)
  return _run_cudnn(causal, scale, q, k, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cudnn_odd(causal: bool, scale: float, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
  """Runs cuDNN over odd lengths, such as 196 patches and a class token, as they are.

  Its gradient refuses them, so that where one is asked for, both passes have an empty slot more.
  """
  return _run_cudnn(causal, scale, q, k, v)


def _cudnn_odd_forward(causal: bool, scale: float, q: Array, k: Array,
                       v: Array) -> tuple[tuple[Array, Array], Callable[..., Any]]:
  return jax.vjp(functools.partial(_run_padded_cudnn, causal, scale), q, k, v)


def _cudnn_odd_backward(causal: bool, scale: float, pull: Callable[..., Any],
                        grads: tuple[Array, Array]) -> tuple[Array, Array, Array]:
  del causal, scale
  return cast(tuple[Array, Array, Array], pull(grads))


_cudnn_odd.defvjp(_cudnn_odd_forward, _cudnn_odd_backward)


def _run_padded_cudnn(causal: bool, scale: float, q: Array, k: Array,
                      v: Array) -> tuple[Array, Array]:
  batch, length, keys = len(q), q.shape[1], k.shape[1]
  q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
  out, lse = _run_cudnn(causal, scale, q, k, v, lengths=(
      jnp.full((batch,), length, jnp.int32), jnp.full((batch,), keys, jnp.int32)))
  return out[:, :length], lse[:, :length]


def _run_cudnn(causal: bool, scale: float, q: Array, k: Array, v: Array,
               lengths: tuple[Array, Array] | None = None) -> tuple[Array, Array]:
  # The public jax.nn.dot_product_attention rounds the log-sum-exp to the dtype of the output.
  from jax._src.cudnn import fused_attention_stablehlo as cudnn
  masks = {(False, False): 'NO_MASK', (True, False): 'CAUSAL',
           (False, True): 'PADDING', (True, True): 'PADDING_CAUSAL'}
  q_length, kv_length = lengths or (None, None)
  out, lse = cudnn.dot_product_attention(
      q, k, _widen(v, q.shape[3]), scale=scale,
      mask_type=cudnn.MaskType[masks[causal, lengths is not None]],
      q_seqlen=q_length, kv_seqlen=kv_length, return_residual=True)
  return out[..., :v.shape[3]], jnp.swapaxes(lse, 1, 2)


def _splash_residuals(causal: bool, scale: float, q: Array, k: Array,
                      v: Array) -> tuple[Array, Array]:
  """One kernel for both results; it has no gradient."""
  assert scale == 1.0
  return _run_splash(causal, q, k, v, residuals=True)


def _splash_gradients(causal: bool, scale: float, q: Array, k: Array,
                      v: Array) -> tuple[Array, Array]:
  """One kernel a result, for a caller who needs gradients and so neither value."""
  assert scale == 1.0
  out = _run_splash(causal, q, k, v, residuals=False)
  return out, _run_splash(causal, *jax.lax.stop_gradient((q, k, v)), residuals=True)[1]


def _run_splash(causal: bool, q: Array, k: Array, v: Array, *, residuals: bool) -> Any:
  """out [B, N, H, d], or out and lse [B, N, H] with `residuals`."""
  # Imported here: Pallas takes a second to load, and only TPU runs need it.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash
  batch, length, heads, _ = q.shape
  keys = k.shape[1]
  (block_q, total_q), (block_kv, total_kv) = _blocks(length), _blocks(keys)
  mask = splash.CausalMask if causal else splash.FullMask
  kernel = splash.make_splash_mha_single_device(
      splash.MultiHeadMask([mask((total_q, total_kv))] * (batch * heads)),
      block_sizes=splash.BlockSizes(
          block_q=block_q, block_kv=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv,
          block_q_dq=block_q, block_kv_dq=block_kv),
      save_residuals=residuals)

  def lay(x: Array, total: int) -> Array:
    """[B, N, H, d] -> [B * H, total, d]: the kernel has no batch, and heads are as independent."""
    x = jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], x.shape[3])
    return jnp.pad(x, ((0, 0), (0, total - x.shape[1]), (0, 0)))

  def unlay(x: Array) -> Array:
    return jnp.swapaxes(x[:, :length].reshape(batch, heads, length, *x.shape[2:]), 1, 2)

  segments = None
  if total_kv > keys:
    # A query sees keys of its own segment: those that pad the length form another.
    padding = (jnp.arange(total_kv) >= keys).astype(jnp.int32)
    segments = splash.SegmentIds(jnp.zeros(total_q, jnp.int32), padding)
  result = kernel(lay(q, total_q), lay(k, total_kv), lay(v, total_kv), segments)
  if not residuals:
    return unlay(result)
  out, (lse,) = result
  return unlay(out), unlay(lse)


def _blocks(length: int) -> tuple[int, int]:
  """(block, padded length): the least padding, then the largest block of 256 to 640 rows.

  Larger blocks of wide heads overflow the vector memory of a TPU v5p in the backward pass.
  """
  options = []
  for count in range(-(-length // 640), -(-length // 256) + 1):
    block = -(-length // (count * _LANES)) * _LANES
    options.append((count * block, -block))
  padded, block = min(options)
  return -block, padded
