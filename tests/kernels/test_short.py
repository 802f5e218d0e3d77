"""Attention over few tokens by a kernel for TPUs, run operation by operation: as XLA's own.

Compiled for devices: tests/targets/test_targets_attention.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_long

from ops import attention
from ops.kernels import short

HEADS, WIDTH = 4, 32


def inputs(length, keys, dtype):
  rng = np.random.default_rng(length)
  q, k, v = (jnp.asarray(rng.normal(size=(2, count, HEADS, WIDTH)), dtype)
             for count in (length, keys, keys))
  bias = np.where(rng.uniform(size=(2, keys)) < 0.2, -30, rng.normal(size=(2, keys)))
  return q, k, v, jnp.asarray(bias, jnp.float32)


@pytest.mark.parametrize(('length', 'keys', 'dtype'), mostly_long([
    (17, 5, 'bfloat16'), (9, 9, 'float32'), (1, 33, 'bfloat16')]))
def test_output_and_gradients_are_those_of_xla(length, keys, dtype):
  arrays = inputs(length, keys, dtype)
  run = functools.partial(short.attend, 0.2, True)

  def plain(q, k, v, bias):
    found = attention.attend(q, k, v, bias=bias, scale=0.2)
    return found.out, found.lse

  rng = np.random.default_rng(0)
  cotangents = (jnp.asarray(rng.normal(size=arrays[0].shape), dtype),
                jnp.asarray(rng.normal(size=arrays[0].shape[:3]), jnp.float32))
  (found, back), (wanted, exact) = (jax.vjp(each, *arrays) for each in (run, plain))
  bound = 1e-5 if dtype == 'float32' else 2e-2
  for one, other in zip((*found, *back(cotangents)), (*wanted, *exact(cotangents)), strict=True):
    assert one.dtype == other.dtype
    size = float(jnp.abs(other.astype(jnp.float32)).max())
    np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=0,
                               atol=bound * max(size, 1.0))


def test_what_it_takes():
  q, k, _, _ = inputs(9, 9, 'bfloat16')
  fits = short.fits
  assert fits(q, k, causal=False)
  assert not fits(q, k, causal=True)
  assert not fits(q, k[:, :, :2], causal=False)
  assert not fits(q[:, :, :3], k[:, :, :3], causal=False)  # 96 lanes.
  assert not fits(q.astype(jnp.float16), k.astype(jnp.float16), causal=False)
  long = jnp.zeros((1, 769, HEADS, WIDTH), jnp.bfloat16)
  assert not fits(long, long, causal=False)


@pytest.mark.parametrize('bias', mostly_long([True, False]))
def test_attention_for_tpus_runs_it(monkeypatch, bias):
  """Where it fits; hidden keys stay hidden."""
  monkeypatch.setattr(short, 'attend', functools.partial(_interpreted,
                                                                   short.attend))
  q, k, v, hidden = inputs(7, 7, 'bfloat16')
  hidden = jnp.where(hidden < -20, -jnp.inf, hidden) if bias else None
  found = attention.attend(q, k, v, bias=hidden, implementation='splash')
  wanted = attention.attend(q, k, v, bias=hidden)
  np.testing.assert_allclose(found.lse, wanted.lse, atol=1e-2)
  np.testing.assert_allclose(found.out.astype(jnp.float32), wanted.out.astype(jnp.float32),
                             atol=2e-2)


def _interpreted(attend, scale, interpret, *arrays):
  del interpret
  return attend(scale, True, *arrays)
