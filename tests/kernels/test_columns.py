"""Kernels that add up columns of attention: as chunks of rows do, run operation by operation.

Compiled for devices: tests/targets/test_targets_attention.py.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_long

from ops import attention
from ops.kernels import columns

# Heads of queries and keys, features, queries, keys: lengths that fill no block, and several.
SHAPES = {'cudnn': [(4, 2, 32, 130, 130), (2, 2, 64, 64, 200)],
          'splash': [(2, 1, 128, 130, 130), (4, 4, 32, 70, 600), (2, 2, 64, 530, 40)]}
CASES = [case for name, shapes in SHAPES.items()
         for case in mostly_long([(name, shape) for shape in shapes])]
CAUSAL = [(name, shapes[0]) for name, shapes in SHAPES.items()]


@pytest.fixture
def interpreted(monkeypatch):
  """Kernels run operation by operation."""
  monkeypatch.setattr(columns, 'add_up',
                      functools.partial(columns.add_up, interpret=True))


def arrays(shape, dtype=jnp.bfloat16, batch=2):
  heads, kv_heads, width, length, keys = shape
  rng = np.random.default_rng(0)
  q = jnp.asarray(rng.normal(size=(batch, length, heads, width)), dtype)
  k = jnp.asarray(rng.normal(size=(batch, keys, kv_heads, width)), dtype)
  bias = np.where(rng.uniform(size=(batch, keys)) < 0.2, -np.inf, rng.normal(size=(batch, keys)))
  counts = rng.uniform(size=(batch, length)) < 0.8
  return q, k, bias.astype(np.float32), counts


@pytest.mark.parametrize(('name', 'shape'), CASES)
def test_all_to_all(interpreted, name, shape):
  q, k, bias, counts = arrays(shape)
  for settings in ({}, {'bias': bias, 'query_valid': counts}):
    rows = attention.eager(q, k, bias=settings.get('bias'))
    lse = attention.attend(q, k, k, bias=settings.get('bias')).lse
    weight = counts if settings else np.ones_like(counts)
    wanted = np.einsum('bhns,bn->bhs', rows, weight / weight.sum(axis=1, keepdims=True))
    found = attention.received(q, k, lse, implementation=name, **settings)
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-3)
    np.testing.assert_allclose(found.sum(axis=2), 1, rtol=1e-3)


@pytest.mark.parametrize(('name', 'shape'), CAUSAL)
@pytest.mark.parametrize('window', mostly_long([9, None]))
def test_causal(interpreted, name, shape, window):
  """In the order of slots, and in another one with gaps."""
  q, k, _, counts = arrays(shape)
  rng = np.random.default_rng(1)
  places = np.stack([rng.permutation(2 * shape[3])[:shape[3]] for _ in q]).astype(np.int32)
  for positions in (None, places):
    settings = {'causal': True, 'positions': positions, 'window': window}
    lse = attention.attend(q, k, k, **settings).lse
    wanted = attention.received(q, k, lse, query_valid=counts, **settings)
    found = attention.received(q, k, lse, query_valid=counts, implementation=name, **settings)
    np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=1e-3)


@pytest.mark.long
def test_queries_that_are_some_of_the_tokens(interpreted):
  q, k, _, counts = arrays((2, 2, 64, 64, 200))
  last = np.sort(np.random.default_rng(0).integers(0, 200, (2, 64)), axis=1).astype(np.int32)
  places = np.broadcast_to(np.arange(200, dtype=np.int32), (2, 200))
  settings = {'causal': True, 'positions': places, 'last': last, 'query_valid': counts}
  lse = attention.attend(q, k, k, causal=True, positions=places, last=last).lse
  wanted = attention.received(q, k, lse, **settings)
  for name in SHAPES:
    found = attention.received(q, k, lse, implementation=name, **settings)
    np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=1e-3)


@pytest.mark.long
def test_gradients_are_those_of_rows(interpreted):
  q, k, bias, counts = arrays((2, 2, 64, 70, 70))
  lse = attention.attend(q, k, k, bias=bias).lse

  def loss(implementation, q, k, lse, bias):
    return jnp.sum(attention.received(q, k, lse, bias=bias, query_valid=counts,
                                      implementation=implementation) ** 2)

  wanted, *found = (jax.grad(functools.partial(loss, name), argnums=(0, 1, 2, 3))(
      q, k, lse, np.maximum(bias, -9)) for name in ('xla', 'cudnn', 'splash'))
  for grads in found:
    for one, other in zip(grads, wanted, strict=True):
      np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=2e-2,
                                 atol=1e-4)


@pytest.mark.parametrize(('name', 'shape', 'dtype', 'said'), [
    ('cudnn', (2, 2, 64, 70, 70), jnp.float32, 'float32'),
    ('cudnn', (2, 2, 48, 70, 70), jnp.bfloat16, '48 features'),
    ('cudnn', (2, 2, 64, 63, 70), jnp.bfloat16, '63 queries'),
    ('splash', (2, 1, 64, 70, 70), jnp.bfloat16, '2 heads of 64 features over 1'),
    ('splash', (2, 2, 80, 70, 70), jnp.bfloat16, '80 features')])
def test_what_no_kernel_takes_is_said_once_and_added_up_all_the_same(
    monkeypatch, caplog, name, shape, dtype, said):
  monkeypatch.setattr(columns, 'add_up', None)
  columns.announce.cache_clear()
  q, k, *_ = arrays(shape, dtype)
  lse = attention.attend(q, k, k).lse
  with caplog.at_level(logging.WARNING):
    for _ in range(2):
      found = attention.received(q, k, lse, implementation=name)
  np.testing.assert_array_equal(found, attention.received(q, k, lse))
  assert len(caplog.records) == 1
  assert said in caplog.text
