"""The block that all backbones share, and the norms, dense layers and activations of it.

Axes: B batch, N slots, M slots after a cut, D width, H heads, K kv heads, d width of a head, F MLP
width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from models import sharded_attention
from ops import attention
from ops.primitives import products
from ops.primitives.sparse_attention import Pattern
from ops.signals import MAP_SIGNALS, Signals, measure, measure_map, projected_norms
from ops.tokens import TokenSet, key_bias

Array = jax.Array
Mixer = Callable[[Array], Array]


# 'swiglu' gates: silu of one half of a twice as wide fc1, times the other (arXiv:2002.05202).
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    'gelu': functools.partial(nn.gelu, approximate=False),
    'gelu_tanh': functools.partial(nn.gelu, approximate=True),
    'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
    'swiglu': lambda x: nn.silu(x[..., 0, :]) * x[..., 1, :],
}


class Heads(nn.Module):
  """Projects features to queries, keys and values of all heads: on CPUs by one product.

  Elsewhere by one each, as one result that is cut apart is laid out anew: on a TPU that takes
  longer than the product itself, on an H100 a layer of ViT-L takes at least 552 us so and 529 us
  apart (64 images; the gradient of a step takes 2 % more apart).
  """

  heads: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Array, *, first: int = 0, last: int = 3) -> tuple[Array, ...]:
    """float[B, N, D] -> projections first to last - 1 of (q, k, v), each float[B, N, H, d]."""
    width = x.shape[-1]
    shape = (width, 3, self.heads, width // self.heads)
    kernel = self.param('kernel', nn.initializers.xavier_uniform(in_axis=0, out_axis=(1, 2, 3)),
                        shape)
    bias = self.param('bias', nn.initializers.zeros, shape[1:])
    kernel, bias = (jnp.asarray(w[..., first:last, :, :], self.dtype) for w in (kernel, bias))
    multiply = products.dot_general(self.dtype)

    def together(x: Array, kernel: Array, bias: Array) -> tuple[Array, ...]:
      out = (multiply(x, kernel, (((2,), (0,)), ((), ()))) if multiply else
             jnp.einsum('bnd,dkhe->bnkhe', x, kernel)) + bias[None, None]
      return tuple(out[:, :, i] for i in range(last - first))

    def apart(x: Array, kernel: Array, bias: Array) -> tuple[Array, ...]:
      # All heads in a row, so that a TPU does not turn the result round.
      flat = (x @ kernel[:, i].reshape(width, -1) + bias[i].reshape(1, 1, -1)
              for i in range(last - first))
      return tuple(each.reshape(*x.shape[:2], self.heads, -1) for each in flat)

    return cast(tuple[Array, ...], jax.lax.platform_dependent(
        x.astype(self.dtype), kernel, bias, cpu=together, default=apart))


def check_heads(width: int, heads: int) -> None:
  """Raises a ValueError unless the heads divide the width."""
  if width % heads:
    raise ValueError(f'heads={heads} does not divide width={width}: each head takes as many '
                     'features as every other; change one of them')


def layer_norm(eps: float, name: str | None = None) -> nn.LayerNorm:
  """The norm of every backbone here: in float32, with the variance as defined."""
  return nn.LayerNorm(epsilon=eps, dtype=jnp.float32, use_fast_variance=False, name=name)


def dense(features: int | tuple[int, ...], dtype: DTypeLike, *, axis: int | tuple[int, ...] = -1,
          name: str | None = None, spread: float | None = None,
          bias: bool = True) -> nn.DenseGeneral:
  """A product as the blocks have it; its kernel may begin with another spread than theirs."""
  return nn.DenseGeneral(features, axis=axis, dtype=dtype, name=name, use_bias=bias,
                         kernel_init=(nn.initializers.normal(spread) if spread else
                                      nn.initializers.xavier_uniform()),
                         dot_general=products.dot_general(dtype))


def hidden_features(mlp: int, activation: str) -> int | tuple[int, int]:
  """Returns the output width of an MLP's first layer; two halves if the activation gates."""
  return (2, mlp) if activation == 'swiglu' else mlp


class ReducibleBlock(nn.Module):
  """Block whose attention and MLP return the change that they make; a stack adds it.

  It does not know that reductions exist. A family fills the hooks: `make_norm`, `make_out`,
  `queries_and_keys`, `values`, `inner` and `outer`; and where they differ `project`, `entering`,
  `residual`, `order` and `kernel_order`. Norms stand in front unless these two say otherwise.
  """

  @property
  def implementation(self) -> str:
    """Returns which attention to run: 'xla', 'cudnn' or 'splash'; a field of every family."""
    raise NotImplementedError

  @property
  def mesh(self) -> Mesh | None:
    """Returns the devices, or None; a field of every family."""
    raise NotImplementedError

  def setup(self) -> None:
    """Makes two norms and attention's output projection."""
    self.norm1, self.norm2, self.out = self.make_norm(), self.make_norm(), self.make_out()

  def make_norm(self) -> nn.Module:
    """Makes the norm of attention, and that of the MLP."""
    raise NotImplementedError

  def make_out(self) -> nn.Module:
    """Makes the product of what attention reads, float[B, N, H, d] -> float[B, N, D]."""
    raise NotImplementedError

  def queries_and_keys(self, hidden: Array, tokens: TokenSet) -> tuple[Array, Array, Array]:
    """Returns queries float[B, N, H, d], keys float[B, N, K, d], and queries before rotation."""
    raise NotImplementedError

  def values(self, hidden: Array) -> Array:
    """Returns values float[B, N, K, d] of the normed input."""
    raise NotImplementedError

  def inner(self, hidden: Array) -> Array:
    """Returns the MLP's inner activations, float[B, N, F], of the normed input."""
    raise NotImplementedError

  def outer(self, inner: Array) -> Array:
    """Returns the MLP's output, float[B, N, D]."""
    raise NotImplementedError

  def project(self, hidden: Array, tokens: TokenSet) -> tuple[Array, Array, Array, Array]:
    """Returns queries, keys, queries before rotation, and values, where one product makes all."""
    return (*self.queries_and_keys(hidden, tokens), self.values(hidden))

  def entering(self, x: Array, branch: int) -> Array:
    """Returns features float[..., D] as attention (0) or the MLP (1) reads them: normed."""
    return (self.norm1, self.norm2)[branch](x)

  def residual(self, x: Array, made: Array, branch: int) -> Array:
    """Returns the change that is added to features x for what attention (0) or the MLP (1) made."""
    del x, branch
    return made

  def order(self, tokens: TokenSet) -> dict[str, Any]:
    """Returns what a token sees: `positions` that make attention causal, or None; `window` and
    `pairs` of `ops.attention.attend`, where a family has them."""
    del tokens
    return {'positions': None}

  def kernel_order(self, tokens: TokenSet, bias: Array | None,
                   proportional: bool) -> tuple[Array | None, Array | None]:
    """Returns bias and positions for a fused kernel, fewer than `order` says where they do."""
    del proportional
    return bias, self.order(tokens)['positions']

  @property
  def is_causal(self) -> bool:
    """Returns whether a token sees only those before it."""
    raise NotImplementedError

  def plain_keys(self, tokens: TokenSet, k: Array) -> Array:
    """Returns keys float[B, N, H, d] as they were before rotation: of a block without, as is."""
    del tokens
    return k

  def __call__(self, tokens: TokenSet) -> TokenSet:
    """Runs the plain block; it makes the parameters."""
    change, _ = self.attend(tokens, needs=frozenset(), proportional=False)
    tokens = add(tokens, change)
    return add(tokens, self.feed_forward(tokens)[0])

  def attend(self, tokens: TokenSet, *, needs: frozenset[str], proportional: bool,
             choose: Callable[[Signals], Pattern] | None = None,
             **query_rows: Any) -> tuple[Array, Signals]:
    """Returns what attention adds, float[B, N, D], and the signals that `needs` names.

    Args:
      tokens: [B, N].
      needs: names of `Signals` fields.
      proportional: whether a slot counts as often in attention as it has tokens.
      choose: gets the signals of the layer, and says who attends to whom; None for all.
      **query_rows: which rows some signals are of (`ops.signals.measure`: span, rows, max_rows).
    """
    hidden = self.entering(tokens.x, 0)
    q, k, plain, v = self.project(hidden, tokens)
    bias, order = key_bias(tokens, proportional=proportional), self.order(tokens)
    read = functools.partial(measure, needs, v=v, bias=bias, hidden=hidden,
                             query_valid=tokens.valid, **order, **query_rows)
    mix = functools.partial(sharded_attention.attend, causal=self.is_causal, mesh=self.mesh,
                            window=order.get('window'), pairs=order.get('pairs'),
                            implementation=self.implementation)
    if choose is not None:
      signals = read(q=q, k=k, lse=None)
      pattern = choose(signals)
      v = pattern.values(v, q.shape[2])
      signals = signals.replace(values=v) if 'values' in needs else signals
      taken = ((bias, order['positions']) if self.implementation == 'xla'
               else self.kernel_order(tokens, bias, proportional))
      out = pattern.attend(mix, q, k, v, *taken, causal=self.is_causal,
                           window=order.get('window'))
    elif self.implementation == 'xla':
      # Rows normalised by themselves, and first: XLA keeps its whole map for a log-sum-exp, and
      # the keys beside that map for whoever reads them later.
      signals = read(q=q, k=k, lse=None)
      q, k, signals = jax.lax.optimization_barrier((q, k, signals))
      out = mix(q, k, v, bias, order['positions']).out
    else:
      mixed = mix(q, k, v, *self.kernel_order(tokens, bias, proportional))
      received = functools.partial(sharded_attention.received, mesh=self.mesh,
                                   implementation=self.implementation)
      out, signals = mixed.out, read(q=q, k=k, lse=mixed.lse, received=received)
    change = self.residual(tokens.x, self.out(out), 0)
    more = {'plain_queries': plain, 'attention_out': change}
    if 'plain_keys' in needs:
      more['plain_keys'] = self.plain_keys(tokens, k)
    if 'projected_norms' in needs:
      more['projected_norms'] = projected_norms(v, self.out.variables['params']['kernel'])
    return change, signals.replace(**{name: x for name, x in more.items() if name in needs})

  def attend_and_cut(self, tokens: TokenSet,
                     decide: Callable[[TokenSet, Signals, Array], tuple[TokenSet, Mixer, bool]], *,
                     needs: frozenset[str], proportional: bool,
                     **query_rows: Any) -> tuple[TokenSet, Array]:
    """Attends, but lets something cut the tokens between the map and the values.

    Args:
      tokens: [B, N].
      decide: gets the tokens, the signals and the map float32[B, H, N, N], and returns fewer
        tokens, what they make of values [B, S, H, d], and whether these are those of the new
        tokens.
      needs, proportional, **query_rows: as in `attend`.

    Returns:
      The tokens that are left, and what attention adds to them, float[B, M, D].
    """
    hidden = self.entering(tokens.x, 0)
    q, k, plain = self.queries_and_keys(hidden, tokens)
    bias, order = key_bias(tokens, proportional=proportional), self.order(tokens)
    scores = attention.eager(q, k, bias=bias, **order)
    v = self.values(hidden)
    signals = measure_map(needs, scores, q=q, k=k, v=v, hidden=hidden, query_valid=tokens.valid)
    rest = needs - MAP_SIGNALS
    if rest:
      rows = measure(rest, q=q, k=k, v=v, lse=None, bias=bias, query_valid=tokens.valid, **order,
                     **query_rows)
      told = {name: getattr(rows, name) for name in rest} | (
          {'plain_queries': plain} if 'plain_queries' in rest else {}) | (
          {'plain_keys': self.plain_keys(tokens, k)} if 'plain_keys' in rest else {})
      signals = signals.replace(**told)
    tokens, mix, renewed = decide(tokens, signals, scores)
    if renewed:
      v = self.values(self.entering(tokens.x, 0))
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2) if v.shape[2] < q.shape[2] else v
    return tokens, self.residual(tokens.x, self.out(mix(v)), 0)

  def probe(self, tokens: TokenSet, *, needs: frozenset[str], proportional: bool,
            **query_rows: Any) -> Signals:
    """Measures what this layer's attention would be on the current tokens, without running it."""
    hidden = self.entering(tokens.x, 0)
    q, k, _ = self.queries_and_keys(hidden, tokens)
    measured = measure(
        frozenset(name.removeprefix('next_') for name in needs), q=q, k=k, v=k, lse=None,
        hidden=hidden,
        bias=key_bias(tokens, proportional=proportional), query_valid=tokens.valid,
        **self.order(tokens), **query_rows)
    return Signals(**{name: getattr(measured, name.removeprefix('next_')) for name in needs})

  def feed_forward(self, tokens: TokenSet, *, needs: frozenset[str] = frozenset(),
                   **unused: object) -> tuple[Array, Signals]:
    """Returns what the MLP adds, float[B, N, D], and the signals that `needs` names."""
    del unused
    hidden = self.entering(tokens.x, 1)
    inner = self.inner(hidden)
    change = self.residual(tokens.x, self.outer(inner), 1)
    measured: dict[str, Any] = {'mlp_in': hidden, 'mlp_hidden': inner, 'mlp_out': change}
    return change, Signals(**{name: measured[name] for name in needs})


def add(tokens: TokenSet, change: Array) -> TokenSet:
  """Returns tokens with a change float[B, N, D] added to their features."""
  return tokens.replace(x=tokens.x + change.astype(tokens.x.dtype))
