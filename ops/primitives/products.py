"""Products where XLA's own are slow on CPUs.

On those that multiply bfloat16, XLA uses these instructions for products that give float32, and
converts both factors of one that gives bfloat16: several times slower.

Axes: B batch, A and C vectors compared, D features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ops import platforms
from ops.moves.rows import by_large_row

Array = jax.Array
HALF = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def dot_general(dtype: DTypeLike) -> Callable[..., Array] | None:
  """Returns the `dot_general` of dense layers of a dtype here, None for JAX's own."""
  on_cpu = platforms.current() == 'cpu'
  return _of_bfloat16 if on_cpu and jnp.dtype(dtype) == jnp.bfloat16 else None


def pairs(one: Array, other: Array, scale: Callable[[Array], Array] | None = None) -> Array:
  """Multiplies each vector with each other: [B, A, D], [B, C, D] -> float32[B, A, C].

  As exact as float32. A CPU takes large rows one after another: 577 vectors of 4,096 features with
  each other take 27 ms so, and 48 ms in a batch. Elsewhere vectors of half precision are multiplied
  as they are, since their products are exact in float32, and factors come afterwards: one pass
  instead of six on a TPU's matrix unit, and no copy in float32.

  Args:
    one, other: float[B, A, D], float[B, C, D].
    scale: what each vector is multiplied with, float[..., D] -> float32[...]; 1 where None.
  """
  def made(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x if scale is None else x * scale(x)[..., None]

  def exact(one: Array, other: Array) -> Array:
    return by_large_row(lambda one, other: jnp.einsum('ad,cd->ac', made(one), made(other),
                                                      precision='highest'), one, other)

  if not (one.dtype == other.dtype and one.dtype in HALF):
    return exact(one, other)
  return jax.lax.platform_dependent(
      one, other, cpu=exact, default=functools.partial(of_half, scale=scale))


def of_half(one: Array, other: Array, scale: Callable[[Array], Array] | None = None) -> Array:
  """Returns the `pairs` of vectors of half precision, in one pass of a matrix unit."""
  products = jnp.einsum('bad,bcd->bac', one, other, preferred_element_type=jnp.float32)
  return products if scale is None else products * scale(one)[:, :, None] * scale(other)[:, None]


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
