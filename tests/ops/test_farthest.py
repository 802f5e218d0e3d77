"""Greedy choices by cosine: where all cosines are computed first, the choices are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_long

from ops.primitives import farthest


@pytest.mark.parametrize(('dtype', 'far_from'), mostly_long([
    ('bfloat16', 'nearest'), ('float32', 'all'), ('float32', 'nearest'), ('bfloat16', 'all')],
    short=2))
def test_a_table_of_cosines_chooses_as_rows_do(trace_for, dtype, far_from):
  rng = np.random.default_rng(0)
  x = jnp.asarray(3 * rng.normal(size=(3, 40, 16)), dtype)
  x = x.at[1, 5].set(0)
  among = np.arange(40) < np.array([[40], [31], [9]])
  weight = rng.uniform(0.5, 1, (3, 40)).astype(np.float32)
  first = np.array([3, 30, 8], np.int32)

  def found():
    def run(x, among, first, weight):
      return (farthest.farthest_first(x, among, first, count=12, weight=weight, far_from=far_from),
              farthest.largest_cosine(x, among, chunk=16), farthest.largest_later_cosine(x, among),
              farthest.num_similar(x, among, threshold=0.1))
    return jax.tree.map(np.asarray, jax.jit(run)(x, among, first, weight))

  rows = found()
  for platform in ('cuda', 'tpu'):
    trace_for(platform)
    table = found()
    for one, other in zip(rows, table, strict=True):
      np.testing.assert_allclose(one, other, atol=1e-6)
  # By hand: what is largest beside a slot itself.
  wide = np.asarray(x, np.float64)
  unit = wide / np.maximum(np.linalg.norm(wide, axis=2, keepdims=True), 1e-12)
  cosines = unit @ unit.swapaxes(1, 2)
  seen = among[:, None] & ~np.eye(40, dtype=bool)
  np.testing.assert_allclose(rows[1], np.where(seen, cosines, -2).max(axis=2), atol=1e-6)


def test_long_rows_hold_no_table(trace_for, monkeypatch):
  monkeypatch.setattr(farthest, 'MOST', 39)
  trace_for('cuda')
  shapes = [jax.ShapeDtypeStruct((1, 40, 4), jnp.float32), jax.ShapeDtypeStruct((1, 40), bool),
            jax.ShapeDtypeStruct((1,), jnp.int32)]
  text = str(jax.make_jaxpr(lambda x, among, first: (
      farthest.farthest_first(x, among, first, count=3),
      farthest.largest_cosine(x, among, chunk=8)))(*shapes))
  assert '40,40' not in text
