"""Attention by fused kernels, and exact rows of its score map beside them.

Axes: B batch, N queries, S keys, R named queries, H heads, K kv heads (H a multiple of K), d
features a head.

A fused kernel never forms the N x S map. It does know the log-sum-exp of every row of logits, and
with it any row is exp(q . k * scale + bias - lse): exact, and as large as the rows asked for.

A per-key bias (log(size) of proportional attention, padding) reaches the fused kernels as a few
extra columns of q and k, because the bias they accept themselves is an N x S buffer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from ops.kernels import columns, short
from ops.kernels.fused import LOWEST_BIAS, cudnn, splash

Array = jax.Array

IMPLEMENTATIONS = ('xla', 'cudnn', 'splash')
# Hides a key, slot or cluster from a softmax. Finite, so that a row where all are hidden stays
# finite too. As a bias in `attend` it counts as LOWEST_BIAS: kernels carry a bias inside q . k,
# where -1e9 would leave float32 no digits for the logits themselves.
HIDDEN_LOGIT = -1e9
# The least weight of a key: a weight of 0 keeps a finite bias and a finite gradient.
TINY = 1e-20
# Of one row and head: the largest map that XLA forms whole, 1,024 x 1,024, and the entries of a
# larger one that it forms at a time (4,096 tokens, 16 heads, two cores: 2.8 s whole, 1.6 s in parts
# of 2 ** 20, 1.2 s of 2 ** 18, 1.1 s of 2 ** 17).
_WHOLE, _PART = 2 ** 20, 2 ** 18

# (causal, scale, q, k, v, bias) -> out, lse.
_FUSED: dict[str, Callable[..., tuple[Array, Array]]] = {'cudnn': cudnn, 'splash': splash}


class Attended(struct.PyTreeNode):
  """Holds the results of attention.

  Attributes:
    out: float[B, N, H, d], in the dtype of the queries.
    lse: float32[B, N, H], log-sum-exp over the keys of the scaled and biased logits.
  """

  out: Array
  lse: Array


class Pairs(struct.PyTreeNode):
  """Names queries and keys between which attention is not as causal attention has it.

  Attributes:
    queries: bool[B, N].
    keys: bool[B, S]; none of them is one of the queries.
    shown: whether all of these queries see all of these keys, wherever they stand, or none sees
      any. Static.
  """

  queries: Array
  keys: Array
  shown: bool = struct.field(pytree_node=False, default=True)

  def of(self, index: Array) -> Pairs:
    """Returns the same of the queries int[B, R]."""
    return self.replace(queries=jnp.take_along_axis(self.queries, index, axis=1))

  def seen(self, causal: Array, keys: Array, last: Array) -> Array:
    """Returns which keys are seen, bool[B, 1, R, S].

    Args:
      causal: bool[B, 1, R, S], those that causal attention sees.
      keys: int32[B, 1, 1, S], their positions.
      last: int32[B, 1, R, 1], the queries' positions.
    """
    del keys, last
    named = self.queries[:, None, :, None] & self.keys[:, None, None]
    return causal | named if self.shown else causal & ~named


class Alone(struct.PyTreeNode):
  """Names queries that see themselves alone: the keys of their own positions.

  Attributes:
    queries: bool[B, N].
  """

  queries: Array

  def of(self, index: Array) -> Alone:
    """Returns the same of the queries int[B, R]."""
    return self.replace(queries=jnp.take_along_axis(self.queries, index, axis=1))

  def seen(self, causal: Array, keys: Array, last: Array) -> Array:
    """Returns which keys are seen, as `Pairs.seen`."""
    return causal & (~self.queries[:, None, :, None] | (keys == last))


class Blocks(struct.PyTreeNode):
  """Numbers the blocks of a sequence in which every query sees every key, wherever it stands.

  Attributes:
    queries: int32[B, N], -1 for none.
    keys: int32[B, S].
  """

  queries: Array
  keys: Array

  def of(self, index: Array) -> Blocks:
    """Returns the same of the queries int[B, R]."""
    return self.replace(queries=jnp.take_along_axis(self.queries, index, axis=1))

  def seen(self, causal: Array, keys: Array, last: Array) -> Array:
    """Returns which keys are seen, as `Pairs.seen`."""
    del keys, last
    own = self.queries[:, None, :, None]
    return causal | ((own >= 0) & (own == self.keys[:, None, None]))


# What causal attention may be changed by.
Exceptions = Pairs | Alone | Blocks


def pick(platform: str, dtype: DTypeLike) -> str:
  """The implementation for a platform ('cpu', 'gpu', 'cuda', 'tpu', ...) and a dtype.

  cuDNN takes half precision only. XLA elsewhere: it forms the map, a part at a time where that is
  large, and is exact in float32.
  """
  half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
  if platform in ('gpu', 'cuda') and half:
    return 'cudnn'
  return 'splash' if platform == 'tpu' else 'xla'


def attend(q: Array, k: Array, v: Array, *, bias: Array | None = None, causal: bool = False,
           positions: Array | None = None, last: Array | None = None, window: int | None = None,
           pairs: Exceptions | None = None, scale: float | None = None,
           implementation: str = 'xla') -> Attended:
  """Softmax attention with the log-sum-exp of its rows.

  Gradients flow through both results. That of `lse` costs the fused kernels one more forward and
  one more backward pass, and nothing where it is not used.

  Args:
    q: float[B, N, H, d].
    k, v: float[B, S, K, d].
    bias: float32[B, S] added to the logits of each key, shared by heads and queries; -inf is fine.
    causal: query i sees the keys 0 to i.
    positions: int32[B, N] of queries and keys: causal attention by these, whatever the slot, so
      that query i sees the keys whose position is not after its own. None where slots are in order.
    last: int32[B, N], the positions of the queries, where those in `positions` int32[B, S] are of
      the keys alone. Only 'xla' has it.
    window: with causal attention, how many positions back from its own a query sees, its own among
      them; None for all. Only 'xla' has it.
    pairs: with causal attention, what some queries see beside that, or do not see of it. For
      `Pairs` a fused kernel runs twice. For what is shown once forwards, and once backwards over
      these keys alone; the log-sum-exps join the two. For what is hidden once over all keys, and
      once without these. For `Alone` it runs once. Only 'xla' has `Blocks`.
    scale: of the logits, a Python number; d ** -0.5 when None.
    implementation: one of `IMPLEMENTATIONS`; see `pick`. 'cudnn' needs a GPU and half precision,
      'splash' a TPU. Over several TPU chips 'splash' must run inside `jax.shard_map`. Few tokens
      that all see each other go through a kernel of their own there (ops/kernels/short.py).
      That of many scales the queries in their own dtype, which rounds them unless scale is a power
      of two, and a bias widens its heads by 8 columns in half precision: little at d = 64, a second
      tile of 128 lanes at d = 128.

  Raises:
    ValueError: an unknown implementation, or shapes or dtypes that do not fit.
  """
  _check(q, k, v, bias)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'unknown attention implementation {implementation!r}; pick one of '
                     f'{", ".join(IMPLEMENTATIONS)}')
  if window is not None and implementation != 'xla':
    raise ValueError(f'implementation {implementation!r} has no window of {window} positions: use '
                     "implementation='xla', or shorter inputs, which need no window")
  if last is not None and implementation != 'xla':
    raise ValueError(f'implementation {implementation!r} takes queries and keys of the same tokens '
                     "alone: use implementation='xla'")
  if implementation == 'xla':
    if last is None:
      last = jnp.arange(q.shape[1])[None] if causal and positions is None else positions
    return Attended(*_xla(q, k, v, bias, scale, last, positions, window, pairs))
  if pairs is not None:
    return _attend_pairs(q, k, v, bias, positions, pairs, scale, implementation)
  in_order = causal or positions is not None
  if implementation == 'splash' and short.fits(q, k, causal=in_order):
    hidden = (jnp.zeros(k.shape[:2]) if bias is None
              else jnp.maximum(bias.astype(jnp.float32), LOWEST_BIAS))
    return Attended(*short.attend(scale, False, q, k, v, hidden))
  fused = _FUSED[implementation]
  if positions is None:
    return Attended(*fused(causal, scale, q, k, v, bias))
  # Kernels mask by slot, so the slots take the order of their positions, and go back.
  order = jnp.argsort(positions, axis=1)
  q, k, v = (_rearranged(x, order) for x in (q, k, v))
  results = fused(True, scale, q, k, v, None if bias is None else _rearranged(bias, order))
  back = jnp.argsort(order, axis=1)
  return Attended(*(_rearranged(x, back) for x in results))


def rows(q: Array, k: Array, lse: Array | None, *, bias: Array | None = None,
         scale: float | None = None, last: Array | None = None,
         positions: Array | None = None, window: int | None = None,
         pairs: Exceptions | None = None) -> Array:
  """Exact rows of the attention map, float32[B, H, R, S], for the named queries only.

  Args:
    q: float[B, R, H, d], the queries of those rows.
    k: float[B, S, K, d].
    lse: float32[B, R, H] from `attend`; None makes every row sum to one by itself, which also fits
      queries that never attended.
    bias, scale: what `attend` had.
    last: int32[R] or [B, R], the last key each row sees in causal attention; None when it sees all.
    positions: int32[B, S], the positions of the keys that `last` speaks of; None for their slots.
    window: how many positions back from its last one a row sees, None for all.
    pairs: what `attend` had, of the named queries.
  """
  chex.assert_rank((q, k), 4)
  if lse is not None:
    chex.assert_shape(lse, q.shape[:3])
  logits = _logits(q, k, bias, scale, last, positions, window, pairs)
  if lse is None:
    return jax.nn.softmax(logits, axis=-1)
  return jnp.exp(logits - jnp.swapaxes(lse, 1, 2)[..., None])


def received(q: Array, k: Array, lse: Array | None, *, bias: Array | None = None,
             query_valid: Array | None = None, scale: float | None = None, causal: bool = False,
             positions: Array | None = None, last: Array | None = None,
             window: int | None = None, pairs: Exceptions | None = None, chunk: int = 32,
             implementation: str = 'xla') -> Array:
  """Mean over queries of the attention each key receives, float32[B, H, S].

  Queries are taken `chunk` at a time, forwards and backwards, so the largest buffer is
  float32[B, H, chunk, S]; or, forwards, by a kernel that holds no row of the map.

  Args:
    q: float[B, N, H, d].
    k: float[B, S, K, d].
    lse: float32[B, N, H] from `attend`, or None as in `rows`.
    bias, scale, causal, positions, window, pairs: what `attend` had, `pairs` of these queries.
    last: int32[B, N], the positions of the queries where these are not all the tokens.
    query_valid: bool[B, N], the queries that count; all when None. A row without any gives zeros.
    chunk: queries at a time.
    implementation: the kernel: that of GPUs for 'cudnn', of TPUs for 'splash', each over one device
      (over several inside `jax.shard_map`); none for 'xla'. Where none fits, a line in the log
      says so.
  """
  counts = jnp.ones(q.shape[:2], bool) if query_valid is None else query_valid
  last = positions if last is None else last
  static = (causal, q.shape[3] ** -0.5 if scale is None else scale, window, chunk)
  if implementation == 'xla' or lse is None:
    total = _total_in_chunks(*static, q, k, lse, bias, counts, last, positions, pairs)
  elif reason := ('exceptions from causal attention' if pairs is not None
                  else columns.unfit(implementation, q, k)):
    columns.announce(reason)
    total = _total_in_chunks(*static, q, k, lse, bias, counts, last, positions, pairs)
  else:
    total = _total_by_kernel(implementation, *static, q, k, lse, bias, counts, last, positions)
  return total / jnp.maximum(jnp.sum(counts, axis=1, dtype=jnp.float32), 1.0)[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _total_by_kernel(implementation: str, causal: bool, scale: float, window: int | None,
                     chunk: int, q: Array, k: Array, lse: Array, bias: Array | None,
                     counts: Array, last: Array | None, positions: Array | None) -> Array:
  """Computes `_total_in_chunks` by a kernel; its gradient is that of the chunks."""
  del chunk
  slots = [jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2]) for x in (q, k)]
  if causal and last is None:
    last = slots[0]
  if last is not None and positions is None:
    positions = slots[1]
  return columns.add_up(implementation, q, k, columns.Columns(
      jnp.where(counts[..., None], lse, jnp.inf),
      None if bias is None else jnp.maximum(bias.astype(jnp.float32), LOWEST_BIAS),
      last, positions, scale, window))


def _chunks_backward(implementation: str, causal: bool, scale: float, window: int | None,
                     chunk: int, saved: tuple[Any, ...], grad: Array) -> tuple[Any, ...]:
  del implementation
  differentiable, rest = saved[:4], saved[4:]
  grads = jax.vjp(lambda *args: _total_in_chunks(
      causal, scale, window, chunk, *args, *rest), *differentiable)[1](grad)
  return (*grads, *(None for _ in rest))


_total_by_kernel.defvjp(lambda *args: (_total_by_kernel(*args), args[5:]), _chunks_backward)


def _total_in_chunks(causal: bool, scale: float, window: int | None, chunk: int, q: Array,
                     k: Array, lse: Array | None, bias: Array | None, counts: Array,
                     last: Array | None, positions: Array | None,
                     pairs: Exceptions | None = None) -> Array:
  """Adds up what each key receives of the queries bool[B, N] that count, float32[B, H, S]."""
  batch, length, heads, _ = q.shape
  chunk = min(chunk, length)

  # Without the checkpoint the gradient would store the rows of all chunks: the map itself.
  @jax.checkpoint
  def step(total: Array, item: tuple[Array, ...]) -> tuple[Array, None]:
    index, q, lse, counts, last, more = item
    if causal and last is None:
      last = index * chunk + jnp.arange(chunk)
    part = rows(q, k, lse, bias=bias, scale=scale, last=last, positions=positions, window=window,
                pairs=pairs and pairs.replace(queries=more))
    return total + jnp.sum(jnp.where(counts[:, None, :, None], part, 0.0), axis=2), None

  chunks = jax.tree.map(lambda x: _cut(x, chunk),
                        (q, lse, counts, last, pairs and pairs.queries))
  # The zeros depend on q so that they vary over the same mesh axes inside a shard_map.
  start = jnp.zeros((batch, heads, k.shape[1]), jnp.float32) + 0.0 * jnp.sum(q[:0])
  return jax.lax.scan(step, start, (jnp.arange(-(-length // chunk)), *chunks))[0]


def eager(q: Array, k: Array, *, bias: Array | None = None, scale: float | None = None,
          causal: bool = False, positions: Array | None = None,
          window: int | None = None, pairs: Exceptions | None = None) -> Array:
  """The whole attention map, float32[B, H, N, S], for methods that act inside attention."""
  last = positions
  if causal and last is None:
    last = jnp.arange(q.shape[1])
  return rows(q, k, None, bias=bias, scale=scale, last=last, positions=positions, window=window,
              pairs=pairs)


def step(q: Array, k: Array, v: Array, visible: Array, *, bias: Array | None = None,
         scale: float | None = None) -> tuple[Array, Array]:
  """Attends with one query a row to a cache of keys and values.

  Args:
    q: float[B, H, d].
    k, v: float[B, K, S, d].
    visible: bool[B, S], or [B, K, S] where the kv heads hold different tokens; one at least.
    bias: float32 of the same shape, added to the logits of each key, or None.
    scale: of the logits; d ** -0.5 when None.

  Returns:
    float[B, H, d], and the weights float32[B, H, S].
  """
  if visible.ndim == 2:
    visible, bias = visible[:, None], bias if bias is None else bias[:, None]
  run = functools.partial(_step, q.shape[-1] ** -0.5 if scale is None else scale)
  if q.shape[1] > k.shape[1] or q.dtype == jnp.float32:
    return run(q, k, v, visible, bias)
  # A TPU multiplies a single query a head by its keys on the vector unit, which takes two to three
  # times as long as the bytes do: written eight times it goes to the matrix unit.
  return cast(tuple[Array, Array], jax.lax.platform_dependent(
      q, k, v, visible, bias, tpu=functools.partial(run, copies=8), default=run))


def _step(scale: float, q: Array, k: Array, v: Array, visible: Array, bias: Array | None,
          copies: int = 1) -> tuple[Array, Array]:
  """Runs `step` with each query of half precision written so many times, which changes nothing."""
  batch, heads, features = q.shape
  kv_heads = k.shape[1]
  grouped = q.reshape(batch, kv_heads, heads // kv_heads, features)
  if copies > 1:
    grouped = jnp.repeat(grouped, copies, axis=2)
  precision = 'highest' if q.dtype == jnp.float32 else 'default'
  logits = jnp.einsum('bkgd,bksd->bkgs', grouped, k, precision=precision,
                      preferred_element_type=jnp.float32) * scale
  if bias is not None:
    logits = logits + bias[:, :, None]
  weights = jax.nn.softmax(jnp.where(visible[:, :, None], logits, -jnp.inf), axis=-1)
  out = jnp.einsum('bkgs,bksd->bkgd', weights.astype(v.dtype), v)
  return (out[:, :, ::copies].reshape(q.shape),
          weights[:, :, ::copies].reshape(batch, heads, -1))


def policy_attend(q: Array, k: Array, v: Array, policy: Array, *, bias: Array | None = None,
                  scale: float | None = None, implementation: str = 'xla',
                  smoothing: float = 0.0) -> Attended:
  """Attention where key j counts `policy_j` times, and every query sees itself in full.

  DynamicViT (Rao et al., 2021), Sec. 3.3, arXiv:2106.02034.

  Args:
    q, k, v: float[B, N, H, d], float[B, N, K, d].
    policy: float[B, N] in 0 to 1; differentiable, also where it is 0.
    bias: float32[B, N] or None, a further per-key bias, which holds for a query's own key too.
    scale, implementation: as in `attend`.
    smoothing: spread evenly over the keys of a row, as a share of the exponential of its largest
      logit, dropped keys included. The released code has 1e-6, the paper none. It is felt only by
      rows whose largest logits were dropped, and costs one more pass over q . k in chunks.
  """
  policy = policy.astype(jnp.float32)
  weight = log_weight(policy)
  attended = attend(q, k, v, bias=weight if bias is None else weight + bias, scale=scale,
                    implementation=implementation)
  attended = self_term(attended, q, k, v, policy, bias=bias, scale=scale)
  if not smoothing:
    return attended
  real = jnp.ones(policy.shape) if bias is None else (bias > LOWEST_BIAS).astype(jnp.float32)
  real = real / jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1.0)
  mean = jnp.einsum('bs,bskd->bkd', real, v.astype(jnp.float32), precision='highest')
  mean = jnp.repeat(mean, q.shape[2] // k.shape[2], axis=1)[:, None]
  return _mix_in(attended, math.log(smoothing) + _highest(q, k, bias, scale), mean)


def self_term(attended: Attended, q: Array, k: Array, v: Array, policy: Array, *,
              bias: Array | None = None, scale: float | None = None) -> Attended:
  """Raises each query's weight on its own key from `policy` to 1, in O(N).

  Args:
    attended: of q, k, v with `log_weight(policy)` (+ `bias`) as per-key bias.
    q, k, v: float[B, N, H, d], float[B, N, K, d].
    policy: float[B, N] in 0 to 1.
    bias, scale: as in `policy_attend`.
  """
  if q.shape[1] != k.shape[1]:
    raise ValueError(f'a query sees itself only where queries and keys are the same tokens, got '
                     f'{q.shape[1]} queries and {k.shape[1]} keys')
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  logit, own_value = _own(q, k, v, bias, scale)
  missing = log_weight(1.0 - policy.astype(jnp.float32))[..., None]
  return _mix_in(attended, logit + missing, own_value)


def log_weight(weight: Array) -> Array:
  """The bias that makes a key count `weight` times; at 0 it hides the key, and has a gradient.

  The gradient there is what straight-through estimators need: how the output would change if the
  key came back.
  """
  # Not log(weight + TINY): the compiler turns 1 - x + TINY into (1 + TINY) - x, which is 1 - x.
  lift = jnp.maximum(weight, TINY) - weight
  return jnp.log(weight + jax.lax.stop_gradient(lift))


def _check(q: Array, k: Array, v: Array, bias: Array | None) -> None:
  fits = (q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[0] == k.shape[0]
          and q.shape[3] == k.shape[3] and q.shape[2] % k.shape[2] == 0)
  if not fits:
    raise ValueError('attention takes q [B, N, H, d] and k, v [B, S, K, d] with H a multiple of '
                     f'K, got {q.shape}, {k.shape}, {v.shape}')
  if not q.dtype == k.dtype == v.dtype:
    raise ValueError(f'q, k and v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}')
  if bias is not None and bias.shape != k.shape[:2]:
    raise ValueError(f'the bias is one number a key, {k.shape[:2]}, got {bias.shape}')


def _logits(q: Array, k: Array, bias: Array | None, scale: float | None,
            last: Array | None, positions: Array | None = None,
            window: int | None = None, pairs: Exceptions | None = None) -> Array:
  """float32[B, H, N, S]; keys after `last`, or `window` or more before it, are hidden, but for
  what `pairs` says."""
  batch, length, heads, features = q.shape
  kv_heads = k.shape[2]
  grouped, order = q.reshape(batch, length, kv_heads, heads // kv_heads, features), 'bnkgd'
  if heads > kv_heads:
    # In the order of the map, or else XLA would turn the map round.
    grouped, order = jnp.moveaxis(grouped, 1, 3), 'bkgnd'
  # Products of half-precision numbers are exact in float32 as they are; 'highest' would widen q, k.
  precision = 'highest' if q.dtype == jnp.float32 else 'default'
  logits = jnp.einsum(f'{order},bskd->bkgns', grouped, k, precision=precision,
                      preferred_element_type=jnp.float32)
  logits = logits.reshape(batch, heads, length, -1)
  logits = logits * (features ** -0.5 if scale is None else scale)
  if bias is not None:
    logits = logits + jnp.maximum(bias.astype(jnp.float32), LOWEST_BIAS)[:, None, None]
  if last is not None:
    keys = jnp.arange(k.shape[1])[None] if positions is None else positions
    last = jnp.atleast_2d(last)[:, None, :, None]
    seen = keys[:, None, None] <= last
    if window is not None:
      seen &= keys[:, None, None] > last - window
    if pairs is not None:
      seen = pairs.seen(seen, keys[:, None, None], last)
    logits = jnp.where(seen, logits, -jnp.inf)
  return logits


def _attend_pairs(q: Array, k: Array, v: Array, bias: Array | None, positions: Array | None,
                  pairs: Exceptions, scale: float, implementation: str) -> Attended:
  """`attend` with `pairs` by a kernel that masks causally alone."""
  if isinstance(pairs, Blocks):
    raise ValueError(f'implementation {implementation!r} has no blocks that are seen both ways: '
                     "use implementation='xla'")
  run = functools.partial(attend, causal=True, scale=scale, implementation=implementation)
  seen = run(q, k, v, bias=bias, positions=positions)
  if isinstance(pairs, Alone):
    logit, value = _own(q, k, v, bias, scale)
    alone = pairs.queries[..., None]
    return Attended(jnp.where(alone[..., None], value.astype(seen.out.dtype), seen.out),
                    jnp.where(alone, logit, seen.lse))
  if not pairs.shown:
    others = jnp.where(pairs.keys, HIDDEN_LOGIT, 0.0 if bias is None else bias)
    without, own = run(q, k, v, bias=others, positions=positions), pairs.queries[..., None]
    return Attended(jnp.where(own[..., None], without.out, seen.out),
                    jnp.where(own, without.lse, seen.lse))
  # Keys behind a query are those before it in the reversed order.
  only = jnp.where(pairs.keys, 0.0 if bias is None else bias, HIDDEN_LOGIT)
  if positions is None:
    behind = run(q[:, ::-1], k[:, ::-1], v[:, ::-1], bias=only[:, ::-1])
    behind = jax.tree.map(lambda x: x[:, ::-1], behind)
  else:
    behind = run(q, k, v, bias=only, positions=-positions)
  logit = jnp.where(pairs.queries[..., None], behind.lse, HIDDEN_LOGIT)
  return _mix_in(seen, logit, behind.out.astype(jnp.float32))


def _own(q: Array, k: Array, v: Array, bias: Array | None,
         scale: float) -> tuple[Array, Array]:
  """The logit of every query on its own key, float32[B, N, H], and its value [B, N, H, d]."""
  own_key, own_value = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2).astype(jnp.float32)
                        for x in (k, v))
  logit = jnp.sum(q.astype(jnp.float32) * own_key, axis=-1) * scale
  if bias is not None:
    logit = logit + jnp.maximum(bias, LOWEST_BIAS)[..., None]
  return logit, own_value


def _rearranged(x: Array, order: Array) -> Array:
  """[B, N, ...] with slots in the order int[B, N]."""
  return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)


def _mix_in(attended: Attended, logit: Array, value: Array) -> Attended:
  """Gives every row one more key, with its logit [B, N, H] and value."""
  # Shares of old and new. Not a sigmoid, whose gradient is 0 where a share rounds to 1.
  old = jnp.exp(-jnp.logaddexp(0.0, logit - attended.lse))[..., None]
  new = jnp.exp(-jnp.logaddexp(0.0, attended.lse - logit))[..., None]
  out = old * attended.out.astype(jnp.float32) + new * value
  return Attended(out.astype(attended.out.dtype), jnp.logaddexp(attended.lse, logit))


def _cut(x: Array, chunk: int) -> Array:
  """[B, N, ...] in chunks [C, B, chunk, ...], the last one padded with zeros."""
  steps = -(-x.shape[1] // chunk)
  x = jnp.pad(x, ((0, 0), (0, steps * chunk - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
  return jnp.moveaxis(x.reshape(x.shape[0], steps, chunk, *x.shape[2:]), 1, 0)


def _joined(chunks: Array) -> Array:
  """[B, N, ...] of chunks [C, B, chunk, ...]."""
  chunks = jnp.moveaxis(chunks, 0, 1)
  return chunks.reshape(chunks.shape[0], -1, *chunks.shape[3:])


def _highest(q: Array, k: Array, bias: Array | None, scale: float | None,
             chunk: int = 64) -> Array:
  """The largest logit of every row, float32[B, N, H]; a constant to gradients."""
  q, k, bias = jax.lax.stop_gradient((q, k, bias))
  largest = jax.lax.map(lambda q: jnp.max(_logits(q, k, bias, scale, None), axis=-1),
                        _cut(q, min(chunk, q.shape[1])))
  largest = jnp.moveaxis(largest, 0, 2).reshape(q.shape[0], q.shape[2], -1)
  return jnp.swapaxes(largest[..., :q.shape[1]], 1, 2)


def _xla(q: Array, k: Array, v: Array, bias: Array | None, scale: float, last: Array | None,
         positions: Array | None, window: int | None,
         pairs: Exceptions | None) -> tuple[Array, Array]:
  """out and lse, of a large map in parts of some queries each; the arguments are `_logits`'."""
  # Not jax.nn.dot_product_attention: it rounds the log-sum-exp to the dtype of the keys, which puts
  # bfloat16 rows wrong by percents, and cuts its gradient.

  def some(item: tuple[Array, Array | None, Array | None]) -> tuple[Array, Array]:
    q, last, more = item
    own = pairs and pairs.replace(queries=more)
    return _weigh(_logits(q, k, bias, scale, last, positions, window, own), q, v)

  length, keys = q.shape[1], k.shape[1]
  every = (q, last, None if pairs is None else pairs.queries)
  if length * keys <= _WHOLE:
    return some(every)
  # Without the checkpoint the gradient would store the rows of all chunks: the map itself.
  some = jax.checkpoint(some)
  chunk = min(length, max(1, _PART // keys))
  # What a whole number of chunks leaves over is a part of its own, so that nothing is padded.
  whole = length - length % chunk
  items = jax.tree.map(lambda x: _cut(x[:, :whole], chunk), every)
  parts = [jax.tree.map(_joined, jax.lax.map(some, items))]
  if whole < length:
    parts.append(some(jax.tree.map(lambda x: x[:, whole:], every)))
  return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *parts)


def _weigh(logits: Array, q: Array, v: Array) -> tuple[Array, Array]:
  """out and lse of whole logits float32[B, H, N, S]."""
  lse = jax.nn.logsumexp(logits, axis=-1)
  weights = jnp.exp(logits - lse[..., None]).astype(v.dtype)
  batch, heads, length, keys = weights.shape
  kv_heads = v.shape[2]
  order = 'bkgnd' if heads > kv_heads else 'bnkgd'  # As in `_logits`.
  out = jnp.einsum(f'bkgns,bskd->{order}',
                   weights.reshape(batch, kv_heads, heads // kv_heads, length, keys), v)
  if heads > kv_heads:
    out = jnp.moveaxis(out, 3, 1)
  return out.reshape(q.shape).astype(q.dtype), jnp.swapaxes(lse, 1, 2)

