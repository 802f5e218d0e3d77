"""Projectors that compress against the outputs of released code, through its parameters' names."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_long, recorded
from safetensors.numpy import save_file

from models.checkpoints.compressors import from_release, load_release
from models.memory import add_low_rank
from models.projectors import matryoshka
from models.projectors.base import Beside
from models.projectors.hicom import HICom
from models.projectors.llava_sp import LLaVASP
from models.projectors.mqt import MQT
from models.projectors.quecc import QueCC
from models.projectors.slime import SliME, SliMELocal
from models.projectors.tokenflex import TokenFLEX
from models.projectors.tokenpacker import TokenPacker
from models.projectors.vlora import KINDS, VLoRA
from ops.primitives import grids
from ops.tokens import TokenSet

CLOSE = {'atol': 1e-5, 'rtol': 0}


def weights(raw, prefix='w/'):
  """The tensors of a file whose names begin with a prefix, without it."""
  return {name.removeprefix(prefix): value for name, value in raw.items()
          if name.startswith(prefix)}


def compressed(module, x, tensors, grid, **beside):
  """Returns what a module with released parameters makes of float[B, N, W]."""
  return parts(module, x, tensors, grid, **beside)[0]


def parts(module, x, tensors, grid, **beside):
  """Returns what a module with released parameters makes, and what its submodules do."""
  params = from_release(module, tensors, grid=grid, width=x.shape[-1])
  return run(module, params, jnp.asarray(x), Beside(grid, **beside))


@functools.partial(jax.jit, static_argnums=0)
def run(module, params, x, beside):
  """Returns what a module makes of float[B, N, W], and what its submodules do."""
  out, state = module.apply({'params': params}, TokenSet.create(x), beside,
                            capture_intermediates=lambda made, _: len(made.path) == 1)
  return out.x, {name: found['__call__'] for name, found in state['intermediates'].items()
                 if name != '__call__'}


def prefixed(prefix, tensors):
  return {prefix + name: value for name, value in tensors.items()}


def with_mlp(tensors, first, second, inner, width):
  """Tensors of a release beside those of an MLP, which its recording has not."""
  rng = np.random.default_rng(0)
  return tensors | {
      f'{first}.weight': rng.normal(size=(width, inner)), f'{first}.bias': rng.normal(size=width),
      f'{second}.weight': rng.normal(size=(width, width)),
      f'{second}.bias': rng.normal(size=width)}


@pytest.mark.parametrize('side', [2, 3, 4])
def test_tokenpacker(side):
  raw = recorded.arrays('learned/tokenpacker')
  module = TokenPacker(24, side=side, heads=4)
  levels = tuple(jnp.split(jnp.asarray(raw['x_multi']), 4, axis=-1))
  out = compressed(module, raw['x'], weights(raw), (12, 12), levels=levels)
  np.testing.assert_allclose(out, raw[f'out_s{side}'], **CLOSE)


def test_a_release_is_read_from_its_file(tmp_path):
  raw = recorded.arrays('learned/tokenpacker')
  own = {f'model.mm_projector.{name}': value for name, value in weights(raw).items()}
  save_file(own | {'model.norm.weight': np.ones(3)}, tmp_path / 'model.safetensors')
  module, shape = TokenPacker(24, heads=4), {'grid': (12, 12), 'width': 16}
  chex.assert_trees_all_equal(load_release(module, tmp_path, **shape),
                              from_release(module, weights(raw), **shape))
  for change, said in (({'width': 20}, 'has shape .*give it the sizes of the release'),
                       ({}, 'no release of TokenFLEX is known')):
    with pytest.raises(ValueError, match=said):
      load_release(module if change else TokenFLEX(24), tmp_path, **{**shape, **change})
  del own['model.mm_projector.mlp.0.bias']
  save_file(own, tmp_path / 'model.safetensors')
  with pytest.raises(ValueError, match='bias, and these tensors do not'):
    load_release(module, tmp_path, **shape)


def test_pieces_of_tokenpacker():
  raw = recorded.arrays('learned/tokenpacker')
  np.testing.assert_allclose(grids.resample(jnp.asarray(raw['x']), (12, 12), (6, 6), 'linear'),
                             raw['point_query_s2'], atol=1e-6)


@pytest.mark.parametrize('side', mostly_long([2, 4, 8]))
def test_quecc(side):
  raw = recorded.arrays('learned/quecc')
  own = prefixed('0.', weights(raw, 'w_k2/') | weights(raw, f'w_k{side}/'))
  # Keys and values were made of 40 features, which are no multiple of the tower's 32: the rest of
  # two layers is zeros.
  for name in ('0.k_proj.0.weight', '0.v_proj.0.weight'):
    own[name] = np.pad(own[name], ((0, 0), (0, 24)))
  fine = np.pad(raw['x_multi'], ((0, 0), (0, 0), (0, 24)))
  out, made = parts(
      QueCC(20, side=side, heads=8, levels=(0, 1)), raw['x'], with_mlp(own, '1', '3', 32, 20),
      (8, 8), question=jnp.asarray(raw['text'][:, 0]),
      levels=tuple(jnp.split(jnp.asarray(fine), 2, axis=-1)))
  np.testing.assert_allclose(made['cells'][0], raw[f'out_k{side}'], **CLOSE)
  np.testing.assert_array_equal(out, made['mlp'][0])


@pytest.mark.parametrize('count', mostly_long([9, 1, 2, 4, 16]))
def test_mqt(count):
  raw = recorded.arrays('learned/mqt_resampler')
  module = MQT(20, queries=16, count=count, heads=2)
  out = compressed(module, raw['x'], weights(raw), (6, 6))
  np.testing.assert_allclose(out, raw[f'out_{count}'], **CLOSE)


def test_positions_of_mqt_and_slime():
  raw, other = (recorded.arrays(f'learned/{name}') for name in ('mqt_resampler', 'slime'))
  table = grids.sincos((4, 4), 16).astype(np.float16).astype(np.float32)
  np.testing.assert_array_equal(table, raw['w/pos_embed'])
  along = grids.matrix(4, 6, 'bicubic')
  np.testing.assert_allclose(np.kron(along, along) @ table, raw['kv_pos_6x6_bicubic'], atol=1e-6)
  np.testing.assert_allclose(grids.sincos((3, 3), 16), other['w_res/pos_embed'], atol=1e-6)
  np.testing.assert_allclose(grids.sincos((6, 6), 16), other['w_gated/attn.pos_embed'], atol=1e-6)


@pytest.mark.parametrize('count', mostly_long([36, 1, 9, 16, 64, 144, 576]))
def test_matryoshka(count):
  raw = recorded.arrays('learned/m3_pool')
  side = 24 // int(count ** 0.5)
  np.testing.assert_allclose(matryoshka.means(jnp.asarray(raw['x']), (24, 24), side),
                             raw[f'out_{count}'], **CLOSE)


def test_matryoshka_averages_behind_the_mlp_of_its_release():
  raw = recorded.arrays('learned/m3_pool')
  x, tensors = raw['x'][:, :36], prefixed('model.mm_projector.', with_mlp({}, '0', '2', 6, 5))
  out, made = parts(matryoshka.Matryoshka(5, side=3), x, tensors, (6, 6))
  np.testing.assert_allclose(out, matryoshka.means(made['mlp'][0], (6, 6), 3), **CLOSE)


def test_slime():
  raw = recorded.arrays('learned/slime')
  tensors, x = weights(raw, 'w_gated/'), raw['gated_x']
  out, made = parts(SliME(20, heads=2), x, tensors, (6, 6))
  np.testing.assert_allclose(out, raw['gated_out'], **CLOSE)
  np.testing.assert_allclose(made['gates'][0].reshape(-1, 2), raw['gated_gates'], **CLOSE)
  for index in (0, 1):
    np.testing.assert_allclose(made['mlp'][index], raw[f'gated_expert{index}'], **CLOSE)


def test_slime_of_a_crop():
  raw = recorded.arrays('learned/slime')
  own = weights(raw, 'w_res/')
  tensors = prefixed('model.sampler.post_qformer.', own) | prefixed(
      'model.mm_projector.', weights(raw, 'w_gated/'))
  _, made = parts(SliMELocal(20, side=3, heads=2, inner=16), raw['x'], tensors, (6, 6))
  # The recording has a product of its own behind the queries, in place of the shared MLP.
  found = np.asarray(made['resampler'][0])
  np.testing.assert_allclose(found @ own['proj.weight'].T + own['proj.bias'],
                             raw['resampler_out'], **CLOSE)
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
  np.testing.assert_allclose(grids.summed_sincos((3, 4, 5), 12).reshape(3, 4, 5, 12),
                             raw['unit_pos3d'], atol=1e-6)


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
