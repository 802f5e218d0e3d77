"""Projectors that compress against the outputs of released code, through its parameters' names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_long, recorded

from models.checkpoints.compressors import from_release
from models.compressors.projector.base import Beside
from models.compressors.projector.hicom import HICom
from models.compressors.projector.llava_sp import LLaVASP
from models.compressors.projector.tokenpacker import TokenPacker
from models.compressors.projector.vlora import KINDS, VLoRA, add_low_rank
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
  return jax.jit(module.apply)({'params': params}, TokenSet.create(jnp.asarray(x)),
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


# Of the recorded compressor of windows: how what is asked enters, and what is adapted.
HICOM = {'direct': ('key', 'value', 'guide'), 'coarse': ('key', 'value'), 'fine': (),
         'none': ('query', 'key', 'value')}


@pytest.mark.parametrize(('guide', 'clip', 'out'), [
    pytest.param('direct', '', 'direct', marks=pytest.mark.long), ('direct', '_odd', 'direct_odd'),
    pytest.param('direct', '_image', 'direct_image', marks=pytest.mark.long),
    ('coarse', '', 'coarse'), ('fine', '', 'fine'), ('none', '', 'noguide')])
def test_windows_of_hicom(guide, clip, out):
  raw = recorded.arrays('learned/hicom_local')
  source = '' if clip == '_image' else clip
  feat, embed = (raw[name + source][None] for name in ('feat', 'embed'))
  if clip == '_image':
    feat, embed = feat[:, 0], embed[:, 0]
  grid, width = feat.shape[1:-1], feat.shape[-1]
  module = HICom(20, guide=guide, adapted=HICOM[guide], queries=0, heads=4)
  tensors = {f'local_compressor.{name}': value for name, value in weights(
      raw, f'w_local_{"noguide" if guide == "none" else guide}/').items()}
  # Without a question the recorded compressor had no embeddings either.
  beside = {} if guide == 'none' else {
      'embed': embed.reshape(1, -1, width), 'guide': raw['guide'][None],
      'guide_tokens': raw['guide_seq'][None]}
  got = compressed(module, feat.reshape(1, -1, width), tensors, grid, **beside)
  want = raw[f'out_local_{out}'].reshape(1, -1, 20)
  assert module.grid_after(grid) == raw[f'out_local_{out}'].shape[3 - len(grid):3]
  np.testing.assert_allclose(got, want, **CLOSE)


def test_pieces_of_hicom():
  raw = recorded.arrays('learned/hicom_local')
  for length, side in ((7, 4), (10, 3)):
    index = grids.balanced((length,), (side,))
    np.testing.assert_array_equal(index.T, raw[f'unit_balance_{length}_{side}'][..., 0])
  np.testing.assert_array_equal(grids.balanced((7, 10, 10), (4, 3, 3)),
                                raw['unit_divide_odd'][..., 0])
  np.testing.assert_allclose(grids.sincos((3, 4, 5), 12).reshape(3, 4, 5, 12), raw['unit_pos3d'],
                             atol=1e-6)


def test_llava_sp():
  raw = recorded.arrays('learned/llavasp_pool')
  x = raw['x'].reshape(2, -1, 8)
  module = LLaVASP(10, inner=4, patches='linear')
  out = compressed(module, x, weights(raw, 'w_pool/'), (24, 24))
  np.testing.assert_allclose(out, raw['pool_out'], **CLOSE)


@pytest.mark.parametrize('side', mostly_long([16, 4, 8, 12, 20]))
def test_pieces_of_llava_sp(side):
  raw = recorded.arrays('learned/llavasp_pool')
  pooled = grids.resample(jnp.asarray(raw['x'].reshape(2, -1, 8)), (24, 24), (side, side), 'area')
  np.testing.assert_allclose(pooled.reshape(2, side, side, 8), raw[f'adaptive_avg_{side}'],
                             atol=1e-6)


@pytest.mark.long
def test_vlora():
  raw = recorded.arrays('learned/vlora')
  module = VLoRA(10, layers=4, every=2, rank=3, alpha=3, inner=16, depth=2, heads=4, mlp=32)
  params = from_release(module, weights(raw), grid=(3, 3), width=12)
  change = jax.jit(module.apply)({'params': params}, TokenSet.create(jnp.asarray(raw['img'])),
                                 Beside((3, 3)))
  hidden, found = raw['hidden'], {}
  for layer in range(4):
    for kind in KINDS:
      factors = change.of(kind, layer)
      if factors is None:
        assert add_low_rank(hidden, hidden, factors) is hidden
        continue
      at = f'l{layer}_{kind}'
      found |= {f'A_{at}': factors[0], f'B_{at}': factors[1],
                f'delta_{at}': add_low_rank(jnp.zeros_like(hidden), hidden, factors)}
  assert found.keys() == {name for name in raw if name[:2] in ('A_', 'B_', 'de')}
  for name, value in found.items():
    np.testing.assert_allclose(value, raw[name], **CLOSE)
