"""Products where XLA's own are slow on CPUs.

On those that multiply bfloat16, XLA uses these instructions for products that give float32, and
converts both factors of one that gives bfloat16: several times slower.

Axes: B batch, A and C vectors compared, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Array = jax.Array
T = TypeVar('T')
# Features of a row's two factors from which it is multiplied by itself.
LARGE = 2 ** 20


def dot_general(dtype: DTypeLike) -> Callable[..., Array] | None:
  """Returns the `dot_general` of dense layers of a dtype here, None for JAX's own."""
  on_cpu = jax.default_backend() == 'cpu'
  return _of_bfloat16 if on_cpu and jnp.dtype(dtype) == jnp.bfloat16 else None


def by_row(function: Callable[..., T], *rows: Any) -> T:
  """Returns what a function of one row makes of each: a CPU takes one row after another.

  What a row is compared with then stays in its cache: greedy selections of a batch of 16 images
  take 2 to 8 times as long otherwise.

  Args:
    function: of arrays [...], without control over other rows.
    *rows: its arrays [B, ...], or trees of them.
  """
  if jax.default_backend() == 'cpu':
    return cast(T, jax.lax.map(lambda row: function(*row), rows))
  return cast(T, jax.vmap(function)(*rows))


def pairs(one: Array, other: Array) -> Array:
  """Multiplies each vector with each other: [B, A, D], [B, C, D] -> float32[B, A, C].

  The precision is the highest. A CPU takes large rows one after another: 577 vectors of 4,096
  features with each other take 27 ms so, and 48 ms in a batch.
  """
  one, other = one.astype(jnp.float32), other.astype(jnp.float32)
  if (one.shape[1] + other.shape[1]) * one.shape[2] < LARGE:
    return jnp.einsum('bad,bcd->bac', one, other, precision='highest')
  return by_row(lambda one, other: jnp.einsum('ad,cd->ac', one, other, precision='highest'),
                one, other)


def _of_bfloat16(x: Array, kernel: Array, dimensions: Any, precision: Any = None,
                 **unused: Any) -> Array:
  """`jax.lax.dot_general` of the last axes of one with the first ones of the other."""
  del precision, unused
  count = len(dimensions[0][0])
  inner = math.prod(kernel.shape[:count])
  flat = _product(x.reshape(-1, inner), kernel.reshape(inner, -1))
  return flat.reshape(*x.shape[:x.ndim - count], *kernel.shape[count:])


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
  """bfloat16[N, D] times bfloat16[D, F]."""
  return _into_float32(x, kernel, 1, 0)


def _into_float32(one: Array, other: Array, axis: int, other_axis: int) -> Array:
  made = jax.lax.dot_general(one, other, (((axis,), (other_axis,)), ((), ())),
                             preferred_element_type=jnp.float32)
  return made.astype(one.dtype)


def _backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
  x, kernel = saved
  return _into_float32(grad, kernel, 1, 1), _into_float32(x, grad, 0, 0)


# By hand: JAX's own would multiply the float32 gradient.
_product.defvjp(lambda x, kernel: (_product(x, kernel), (x, kernel)), _backward)
