"""Products on CPUs: those of bfloat16 are rounded once, and large rows are those of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import assignments, platforms
from ops.moves import rows
from ops.primitives import products


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


def test_other_dtypes_and_platforms_keep_their_product():
  assert products.dot_general(jnp.float32) is None
  with platforms.made_for('gpu'):
    assert products.dot_general(jnp.bfloat16) is None
  assert (products.dot_general(jnp.bfloat16) is None) == (jax.default_backend() != 'cpu')


@pytest.mark.parametrize('large', [1, 2 ** 20])
def test_large_rows_one_after_another_are_those_of_a_batch(monkeypatch, large):
  monkeypatch.setattr(rows, 'LARGE', large)
  jax.clear_caches()  # Forms of a device are traced once.
  random = np.random.default_rng(1)
  x = random.normal(size=(3, 7, 4)).astype(np.float32)
  dst = random.integers(0, 3, (3, 7)).astype(np.int32)
  merge = assignments.Merge(dst[:, :2], dst, x[..., 0])
  program = jax.make_jaxpr(lambda x: (products.pairs(x, x), merge.apply(x)))(x)
  assert ('scan' in str(program)) == (large == 1 and jax.default_backend() == 'cpu')
  alike, merged = jax.core.eval_jaxpr(program.jaxpr, program.consts, x)
  np.testing.assert_allclose(alike, x @ x.swapaxes(1, 2), atol=1e-5)
  one_hot = (dst[:, None] == np.arange(2)[:, None]) * x[:, None, :, 0]
  np.testing.assert_allclose(merged, one_hot @ x, atol=1e-5)
