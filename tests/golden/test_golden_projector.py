"""Projectors that compress against the outputs of released code, through its parameters' names."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import recorded

from models.checkpoints.compressors import from_release
from models.projectors.base import Beside
from models.projectors.tokenpacker import TokenPacker
from ops.primitives import grids
from ops.tokens import TokenSet

CLOSE = {'atol': 1e-5, 'rtol': 0}


def weights(raw, prefix='w/'):
  """The tensors of a file whose names begin with a prefix, without it."""
  return {name.removeprefix(prefix): value for name, value in raw.items()
          if name.startswith(prefix)}


def compressed(module, x, tensors, grid, **beside):
  """What a module with released parameters makes of float[B, N, W]."""
  params = from_release(module, tensors, grid=grid, width=x.shape[-1])
  return module.apply({'params': params}, TokenSet.create(jnp.asarray(x)),
                      Beside(grid, **beside)).x


@pytest.mark.parametrize('side', [2, 3, 4])
def test_tokenpacker(side):
  raw = recorded.arrays('learned/tokenpacker')
  module = TokenPacker(24, side=side, heads=4)
  levels = tuple(jnp.split(jnp.asarray(raw['x_multi']), 4, axis=-1))
  out = compressed(module, raw['x'], weights(raw), (12, 12), levels=levels)
  np.testing.assert_allclose(out, raw[f'out_s{side}'], **CLOSE)


def test_pieces_of_tokenpacker():
  raw = recorded.arrays('learned/tokenpacker')
  np.testing.assert_allclose(grids.resample(jnp.asarray(raw['x']), (12, 12), (6, 6), 'linear'),
                             raw['point_query_s2'], atol=1e-6)
