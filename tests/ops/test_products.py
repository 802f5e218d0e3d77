"""Products of bfloat16 on CPUs are those of float32, rounded once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import products


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='other devices keep their own product')
def test_products_and_gradients_are_rounded_once():
  random = np.random.default_rng(0)
  x, kernel, grad = (jnp.asarray(random.normal(size=shape), jnp.bfloat16)
                     for shape in ((2, 5, 3, 8), (3, 8, 4, 6), (2, 5, 4, 6)))
  dimensions = (((2, 3), (0, 1)), ((), ()))
  multiply = products.dot_general(jnp.bfloat16)
  made, back = jax.vjp(lambda x, kernel: multiply(x, kernel, dimensions), x, kernel)
  whole = [each.astype(jnp.float32) for each in (x, kernel)]
  wanted, exact = jax.vjp(lambda x, kernel: jax.lax.dot_general(x, kernel, dimensions), *whole)
  for found, reference in ((made, wanted), *zip(back(grad), exact(grad.astype(jnp.float32)),
                                                strict=True)):
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), reference, rtol=2 ** -8, atol=1e-3)


def test_other_dtypes_keep_their_product():
  assert products.dot_general(jnp.float32) is None
