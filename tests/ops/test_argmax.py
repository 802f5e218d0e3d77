"""Extremes: the same places as jnp.argmax and jnp.argmin, ties and infinities included."""

import jax.numpy as jnp
import numpy as np
import pytest

from ops.argmax import max_and_index, min_and_index


@pytest.mark.parametrize('axis', [0, 1, 2, -1])
def test_places_of_argmax_and_argmin(axis):
  rng = np.random.default_rng(0)
  values = jnp.asarray(rng.integers(-2, 3, (5, 7, 9)), jnp.float32)
  values = jnp.where(values == 2, jnp.inf, jnp.where(values == -2, -jnp.inf, values))
  for found, place, value in ((max_and_index(values, axis), jnp.argmax, jnp.max),
                              (min_and_index(values, axis), jnp.argmin, jnp.min)):
    np.testing.assert_array_equal(found.index, place(values, axis=axis))
    np.testing.assert_array_equal(found.value, value(values, axis=axis))
    assert found.index.dtype == jnp.int32


def test_rows_of_one_value_give_the_first_place():
  for value in (0.0, jnp.inf, -jnp.inf):
    row = jnp.full((2, 4), value)
    np.testing.assert_array_equal(max_and_index(row, 1).index, [0, 0])
    np.testing.assert_array_equal(min_and_index(row, 1).index, [0, 0])


def test_a_place_is_always_one_of_the_row():
  row = jnp.array([[1.0, jnp.nan, 3.0]])
  assert int(max_and_index(row, 1).index[0]) == 2
  assert int(min_and_index(row, 1).index[0]) == 2
