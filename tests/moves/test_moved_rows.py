"""Rows picked and numbers written, compared with all places as for TPUs, or one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import platforms
from ops.moves import rows

DTYPES = ('float32', 'bfloat16', 'int32', 'int8', 'uint8', 'bool')


@pytest.mark.parametrize('dtype', DTYPES)
def test_comparing_gives_what_picking_does(dtype):
  rng = np.random.default_rng(0)
  values = jnp.asarray(rng.integers(-5 * (dtype[0] != 'u'), 5, (2, 7)), dtype)
  new = jnp.asarray(rng.integers(0, 2, (2, 5)), dtype)
  index = np.stack([rng.permutation(9)[:5] for _ in range(2)]).astype(np.int32)  # Beyond, too.
  found = []
  for platform in ('cpu', 'tpu'):
    with platforms.made_for(platform):
      # Functions of their own, as traced ones are remembered.
      texts = (str(jax.make_jaxpr(lambda *args: rows.take(*args))(values, index)),
               str(jax.make_jaxpr(lambda *args: rows.put(*args))(values, index, new)))
      assert all(('gather' in text or 'scatter' in text) == (platform == 'cpu') for text in texts)
      found.append((rows.take(values, index), rows.put(values, index, new)))
  for one, other in zip(*found, strict=True):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one.astype(jnp.float32), other.astype(jnp.float32))


def test_what_is_written_twice_is_either():
  values, index = jnp.zeros((1, 4), jnp.int32), np.array([[2, 2, 9]], np.int32)
  with platforms.made_for('tpu'):
    found = rows.put(values, index, jnp.array([[5, 7, 8]]))
  assert found[0, 2] in (5, 7)
  assert found.sum() == found[0, 2]


def test_gradients_reach_what_is_picked():
  values, index = jnp.arange(8.0).reshape(2, 4), np.array([[3, 0], [1, 1]], np.int32)
  grads = []
  for platform in ('cpu', 'tpu'):
    with platforms.made_for(platform):
      grads.append(jax.grad(lambda values: jnp.sum(rows.take(values, index) ** 2))(values))
  np.testing.assert_array_equal(*grads)


def test_long_rows_are_not_compared(monkeypatch):
  monkeypatch.setattr(rows, 'COMPARED', 19)
  with platforms.made_for('tpu'):
    text = str(jax.make_jaxpr(rows.take)(jnp.zeros((1, 5)), jnp.zeros((1, 4), jnp.int32)))
  assert 'gather' in text
