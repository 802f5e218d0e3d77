"""Projectors for videos, and with spatial tokens: shapes, rows, gradients, and what they refuse.

Axes: B batch, N patches, M tokens left, W width of the tower, D width of the language model.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import errors, mostly_long

from models.checkpoints.compressors import from_release
from models.projectors import PROJECTORS
from models.projectors.base import EMBED, GUIDE, Beside
from models.projectors.hicom import HICom
from models.projectors.llava_sp import LLaVASP
from models.projectors.vlora import VLoRA
from ops.primitives import grids
from ops.tokens import TokenSet

W, D, ASKED = 8, 6, 3
VIDEO, IMAGE = (7, 5, 4), (12, 6)
CASES = {
    'hicom': (HICom(D, side=2, queries=2, heads=2, adapted=('key', 'value', 'guide')), VIDEO),
    'hicom_fine': (HICom(D, guide='fine', queries=1, heads=4, adapted=('query', 'guide')), (5, 7)),
    'llava_sp': (LLaVASP(D, inner=4), IMAGE),
    'llava_sp_cropping': (LLaVASP(D, form='cropping', inner=4, patches='linear'), IMAGE)}


def inputs(grid, *, batch=2, width=W, seed=0):
  """Random tokens and what stands beside them; of the second row's question a token is missing."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=(batch, *shape)), jnp.float32)

  x = normal(math.prod(grid), width)
  there = np.arange(ASKED) < ASKED - np.arange(batch)[:, None]
  return TokenSet.create(x), Beside(
      grid, embed=normal(math.prod(grid), width), guide=normal(width),
      guide_tokens=normal(ASKED, width), guide_valid=jnp.asarray(there))


def parameters(module, tokens, beside):
  """Random ones, none of them zero, as after training."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(module.init, jax.random.key(0), tokens, beside)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 3, shapes)


@pytest.mark.parametrize('name', mostly_long(['llava_sp', *sorted(CASES.keys() - {'llava_sp'})]))
def test_a_row_of_a_batch_is_the_row_alone(name):
  module, grid = CASES[name]
  tokens, beside = inputs(grid)
  params, apply = parameters(module, tokens, beside), jax.jit(module.apply)
  together = apply(params, tokens, beside).x
  assert together.shape == (2, module.slots(grid), D)
  after = module.grid_after(grid)
  assert after is None or math.prod(after) == module.slots(grid)
  one = jax.tree.map(lambda leaf: leaf[1:], (tokens, beside))
  np.testing.assert_allclose(apply(params, *one).x[0], together[1], atol=1e-5)


@pytest.mark.parametrize('name', mostly_long(['llava_sp', 'llava_sp_cropping', 'hicom_fine']))
def test_bf16_and_its_gradients_are_finite(name):
  module, grid = CASES[name]
  tokens, beside = inputs(grid)
  params = parameters(module, tokens, beside)
  module = module.clone(dtype=jnp.bfloat16)

  def loss(params, x):
    out = module.apply(params, tokens.replace(x=x.astype(jnp.bfloat16)), beside).x
    assert out.dtype == jnp.bfloat16
    return jnp.mean(jnp.square(out.astype(jnp.float32)))

  for leaf in jax.tree.leaves(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, tokens.x)):
    assert jnp.isfinite(leaf).all()


def test_what_is_read_beside_the_features():
  assert PROJECTORS['hicom'](D).reads == {EMBED, GUIDE}
  assert PROJECTORS['hicom'](D, guide='none').reads == {EMBED}
  assert not PROJECTORS['llava_sp'](D).reads


def released(names, seed=2):
  """Random tensors of these shapes."""
  rng = np.random.default_rng(seed)
  return {name: (rng.normal(size=shape) / math.sqrt(shape[-1])).astype(np.float32)
          for name, shape in names.items()}


def gelu(x):
  return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def norm(x, scale, shift, eps):
  x = x - x.mean(axis=-1, keepdims=True)
  return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps) * scale + shift


def softmax(x):
  x = np.exp(x - x.max(axis=-1, keepdims=True))
  return x / x.sum(axis=-1, keepdims=True)


def test_crops_of_llava_sp_by_loops():
  inner, wide, side = 3, 2, 24
  w = released({
      **{f'conv_{n}.weight': (inner, wide, n, n) for n in range(4, 25, 4)},
      'conv_CM.weight': (inner, wide, 16, 16), 'conv_linear.1.weight': (D, 2 * inner),
      'conv_linear.1.bias': (D,), 'mm_projector.0.weight': (D, wide), 'mm_projector.0.bias': (D,),
      'mm_projector.2.weight': (D, D), 'mm_projector.2.bias': (D,),
      **{f'{name}_projector.{i}.{part}': (inner, inner) if (i, part) == (1, 'weight') else (inner,)
         for name in ('query', 'key', 'value') for i in (0, 1) for part in ('weight', 'bias')}})
  tokens, beside = inputs((side, side), batch=1, width=wide)
  module = LLaVASP(D, form='cropping', inner=inner)
  params = from_release(module, {f'model.{name}': value for name, value in w.items()},
                        grid=(side, side), width=wide)
  got = np.asarray(jax.jit(module.apply)({'params': params}, tokens, beside).x[0])

  x = np.asarray(tokens.x[0]).reshape(side, side, wide)
  crops = [np.array([np.sum(kernel * x[at:side - at, at:side - at].transpose(2, 0, 1))
                     for kernel in w[f'conv_{side - 2 * at}.weight']])
           for at in (10, 8, 6, 4, 2, 0)]
  detail = [np.array([np.sum(kernel * x[r:r + 16, c:c + 16].transpose(2, 0, 1))
                      for kernel in w['conv_CM.weight']])
            for r in range(0, 9, 2) for c in range(0, 9, 2)]
  assert len(detail) == 25

  def product(name, part):
    part = norm(np.stack(part), w[f'{name}.0.weight'], w[f'{name}.0.bias'], 1e-5)
    return part @ w[f'{name}.1.weight'].T + w[f'{name}.1.bias']

  query, key, value = (product(f'{name}_projector', part) for name, part in
                       (('query', crops), ('key', detail), ('value', detail)))
  read = softmax(query @ key.T / math.sqrt(inner)) @ value
  spatial = (gelu(np.concatenate([np.stack(crops), read], axis=1)) @ w['conv_linear.1.weight'].T
             + w['conv_linear.1.bias'])
  np.testing.assert_allclose(got[:6], spatial, atol=1e-5)
  patches = gelu(x.reshape(-1, wide) @ w['mm_projector.0.weight'].T + w['mm_projector.0.bias'])
  np.testing.assert_allclose(
      got[6:], patches @ w['mm_projector.2.weight'].T + w['mm_projector.2.bias'], atol=1e-5)


def test_learned_tokens_of_hicom_by_loops():
  grid, queries, heads, start = (2, 3, 3), 3, 2, 'global_compressor.'
  parts = [f'attn_layer.{name}_proj' for name in ('q', 'k', 'v', 'out')]
  shapes = {f'{start}query': (queries, W)}
  for name, (out, into) in {
      **dict.fromkeys(parts, (W, W)), 'guide_injector.coarse_proj.0': (2 * W, W),
      'guide_injector.coarse_proj.2': (2 * W, 2 * W), 'readout.0': (D, W),
      'readout.2': (D, D)}.items():
    shapes |= {f'{start}{name}.weight': (out, into), f'{start}{name}.bias': (out,)}
  shapes |= {f'{start}guide_injector.coarse_norm.{part}': (W,) for part in ('weight', 'bias')}
  w = released(shapes | {
      f'local_compressor.readout.{i}.{part}': (D,) if part == 'bias' else (D, D if i else W)
      for i in (0, 2) for part in ('weight', 'bias')})
  tokens, beside = inputs(grid, batch=1)
  module = HICom(D, queries=queries, heads=heads)
  params = from_release(module, {f'mm_projector.{name}': value for name, value in w.items()},
                        grid=grid, width=W)
  got = np.asarray(jax.jit(module.apply)({'params': params}, tokens, beside).x[0, -queries:])

  def product(name, x):
    return x @ w[f'{start}{name}.weight'].T + w[f'{start}{name}.bias']

  guide = np.asarray(beside.guide[0])
  both = product('guide_injector.coarse_proj.0', guide)
  both = product('guide_injector.coarse_proj.2', gelu(both))
  query = norm(w[f'{start}query'] * (1 + both[:W]) + both[W:],
               w[f'{start}guide_injector.coarse_norm.weight'],
               w[f'{start}guide_injector.coarse_norm.bias'], 1e-6)
  placed = np.asarray(tokens.x[0]) + [
      [sum((math.cos if i % 2 else math.sin)(at / 10000 ** (2 * (i // 2) / W)) for at in place)
       for i in range(W)] for place in np.ndindex(grid)]
  q, k, v = (product(name, x) for name, x in zip(parts[:3], (query, placed, placed), strict=True))
  own = W // heads
  mixed = np.concatenate([softmax(q[:, at:at + own] @ k[:, at:at + own].T / math.sqrt(own))
                          @ v[:, at:at + own] for at in range(0, W, own)], axis=1)
  out = query + product(parts[3], mixed)
  np.testing.assert_allclose(got, product('readout.2', gelu(product('readout.0', out))), atol=1e-5)


@pytest.mark.parametrize(('length', 'side', 'first'), [
    (8, 4, [0, 4]), (7, 4, [0, 3]), (10, 4, [0, 3, 6]), (3, 4, [0]), (1, 4, [0])])
def test_balanced_windows_cover_an_axis(length, side, first):
  index = grids.balanced((length,), (side,))
  np.testing.assert_array_equal(index[:, 0], first)
  assert set(index.ravel()) == set(range(length))
  x = np.arange(length)[None]
  np.testing.assert_array_equal(grids.balanced_windows(x, (length,), (side,))[0], index)


@pytest.mark.parametrize(('grid', 'says'), [
    ((5, 3, 3), 'windows of 4 cannot cover 5 frames .* give 7 to 8 frames, or choose another side'),
    ((4, 4, 3), 'windows of 3 cannot cover 4 rows and overlap by one at most: give 5 to 6 rows'),
    ((3, 4), 'windows of 3 cannot cover 4 columns')], ids=['frames', 'rows', 'columns'])
def test_hicom_refuses_a_grid_that_it_cannot_divide(grid, says):
  for asked in (HICom(D).slots, HICom(D, queries=0).slots, HICom(D, queries=0).grid_after):
    assert re.search(says, errors.said(asked, grid))


def refused(module, grid, **fields):
  """Returns what a module says where something else stands beside the features."""
  tokens, beside = inputs(grid)
  return errors.said(jax.eval_shape, module.init, jax.random.key(0), tokens,
                     beside.replace(**fields))


def test_hicom_refuses_what_it_cannot_read():
  grid = (1, 3, 3)
  assert refused(HICom(D), grid, guide=None) == (
      "HICom with guide='direct' reads what is asked, and there is no guide beside the features: "
      "give one, or set guide='none'")
  assert 'there is no guide_tokens' in refused(HICom(D, guide='fine', queries=0, heads=2), grid,
                                               guide_tokens=None)
  assert 'give embeddings as wide' in refused(HICom(D, guide='coarse', queries=0), grid,
                                              embed=jnp.zeros((2, 9, W + 1)))
  assert "leave 'query' out of adapted=" in errors.said(HICom, D, adapted=('key', 'query'))
  assert "leave 'guide' out of adapted=" in errors.said(HICom, D, guide='none',
                                                        adapted=('guide',))
  assert "choose one of none, direct" in errors.said(HICom, D, guide='direkt')
  assert 'heads=9 does not divide' in refused(HICom(D), grid)


def test_a_question_of_another_width_is_projected_to_the_tower():
  tokens, beside = inputs((1, 3, 3))
  asked = {'embed': jnp.zeros((2, 9, W + 2)), 'guide': jnp.zeros((2, W + 2))}
  params = jax.eval_shape(HICom(D, heads=2).init, jax.random.key(0), tokens,
                          beside.replace(**asked))['params']
  assert params['global']['injector']['text']['fc1']['kernel'].shape == (W + 2, W)
  assert 'injector' not in params['local']


def test_vlora_refuses_layers_that_it_cannot_divide():
  assert errors.said(VLoRA, D, layers=30) == (
      'every=4 does not divide layers=30: choose one that does')


@pytest.mark.parametrize('grid', [(8, 6), (6, 8), (2, 6, 6)])
def test_llava_sp_refuses_a_grid_without_sixths(grid):
  for asked in (LLaVASP(D).slots, LLaVASP(D).grid_after):
    assert errors.said(asked, grid) == (
        f'LLaVA-SP takes sixths of (rows, columns) of patches, and {grid} has none: choose an '
        'image size that gives a multiple of 6 each way, as 24')
