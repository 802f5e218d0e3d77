"""Norms, dense layers and activations that the blocks of all backbones share.

Axes: B batch, N slots, D width, H heads, d width of a head."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Array = jax.Array


# 'swiglu' gates: silu of one half of a twice as wide fc1, times the other (arXiv:2002.05202).
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    'gelu': functools.partial(nn.gelu, approximate=False),
    'gelu_tanh': functools.partial(nn.gelu, approximate=True),
    'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
    'swiglu': lambda x: nn.silu(x[..., 0, :]) * x[..., 1, :],
}


class Heads(nn.Module):
  """Projects features to queries, keys and values of all heads in one product."""

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
    out = jnp.einsum('bnd,dkhe->bnkhe', x.astype(self.dtype), kernel) + bias[None, None]
    return tuple(out[:, :, i] for i in range(last - first))


def check_heads(width: int, heads: int) -> None:
  """Raises a ValueError unless the heads divide the width."""
  if width % heads:
    raise ValueError(f'heads={heads} does not divide width={width}: each head takes as many '
                     'features as every other; change one of them')


def layer_norm(eps: float, name: str | None = None) -> nn.LayerNorm:
  """The norm of every backbone here: in float32, with the variance as defined."""
  return nn.LayerNorm(epsilon=eps, dtype=jnp.float32, use_fast_variance=False, name=name)


def dense(features: int | tuple[int, ...], dtype: DTypeLike, *, axis: int | tuple[int, ...] = -1,
          name: str | None = None) -> nn.DenseGeneral:
  """A product as the blocks have it."""
  return nn.DenseGeneral(features, axis=axis, dtype=dtype, name=name,
                         kernel_init=nn.initializers.xavier_uniform())


def hidden_features(mlp: int, activation: str) -> int | tuple[int, int]:
  """Returns the output width of an MLP's first layer; two halves if the activation gates."""
  return (2, mlp) if activation == 'swiglu' else mlp
