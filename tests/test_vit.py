"""Backbone: published parameter counts, both storage forms, settings, and errors."""

import dataclasses

import golden_vit
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.plan import make_plan
from models.stack import best_form, restack, unstack
from models.vit import SIZES, make_vit, sincos

# Published counts: torchvision and timm model cards, DeiT (arXiv:2012.12877, Table 1 exact forms).
PUBLISHED = {
    ('Ti/16', ()): 5_717_416,
    ('S/16', ()): 22_050_664,
    ('B/16', ()): 86_567_656,
    ('B/32', ()): 88_224_232,
    ('L/16', ()): 304_326_632,
    ('L/32', ()): 306_535_400,
    ('H/14', ()): 632_045_800,
    ('B/16', (('image_size', 384),)): 86_859_496,
    ('L/16', (('image_size', 384),)): 304_715_752,
    ('Ti/16', (('distilled', True),)): 5_910_800,
    ('S/16', (('distilled', True),)): 22_436_432,
    ('B/16', (('distilled', True),)): 87_338_192,
}


def parameters(vit):
  images = jax.ShapeDtypeStruct((1, vit.image_size, vit.image_size, vit.channels), jnp.float32)
  return jax.eval_shape(vit.init, jax.random.key(0), images)['params']


@pytest.mark.parametrize(('variant', 'settings'), PUBLISHED, ids=str)
def test_parameter_counts_are_the_published_ones(variant, settings):
  leaves = jax.tree.leaves(parameters(make_vit(variant, **dict(settings))))
  assert sum(leaf.size for leaf in leaves) == PUBLISHED[variant, settings]


def test_every_size_has_a_published_count():
  assert {variant.split('/')[0] for variant, _ in PUBLISHED} == set(SIZES)


def test_logits_and_every_layer_equal_the_reference():
  logits, out = jax.jit(golden_vit.model().apply)({'params': golden_vit.params()},
                                                   golden_vit.images())
  np.testing.assert_allclose(logits, golden_vit.load('tome_vit')['base_logits'], atol=1e-5)
  assert len(out['hidden']) == golden_vit.DEPTH


@pytest.mark.parametrize('method', [None, 'tome'])
def test_both_forms_of_storage_and_remat_give_the_same(method):
  vit = golden_vit.model()
  if method:
    vit = vit.clone(plan=make_plan({'method': method, 'layers': (2,), 'remove': 8}, vit.host))
  params = golden_vit.params()
  loose = {**params, 'stack': {'blocks': unstack(params['stack']['blocks'], vit.depth)}}
  images = golden_vit.images()
  apply = jax.jit(vit.apply)
  expected = apply({'params': params}, images)[0]
  np.testing.assert_allclose(apply({'params': loose}, images)[0], expected, atol=1e-5)

  def gradient(vit):
    return jax.jit(jax.grad(
        lambda params: jnp.sum(jnp.square(vit.apply({'params': params}, images)[0]))))(params)

  plain = gradient(vit)
  for remat in ('full', 'dots'):
    again = gradient(vit.clone(remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), plain, again)


def test_unstack_and_restack_are_inverse():
  blocks = golden_vit.params()['stack']['blocks']
  jax.tree.map(np.testing.assert_array_equal, restack(unstack(blocks, 4)), blocks)


def test_cuts_on_cpu_are_read_layer_by_layer():
  host = golden_vit.model().host
  cut = make_plan({'method': 'tome', 'remove': 8}, host)
  assert best_form(cut, platform='cpu') == 'unstacked'
  assert best_form(None, platform='cpu') == 'stacked'
  assert best_form(cut, platform='tpu') == 'stacked'


def test_tracing_follows_stages_not_depth():
  def equations(depth):
    vit = make_vit('Ti/8', width=32, heads=2, mlp=32, depth=depth, image_size=16, num_classes=2)
    vit = vit.clone(plan=make_plan({'method': 'tome', 'layers': (2,), 'remove': 1}, vit.host))
    images = jnp.zeros((1, 16, 16, 3))
    jaxpr = jax.make_jaxpr(vit.apply)({'params': parameters(vit)}, images)
    return len(jaxpr.eqns)

  assert equations(6) == equations(24)


@pytest.mark.parametrize('settings', [
    {'registers': 4}, {'distilled': True}, {'positions': 'sincos'},
    {'pool': 'mean'}, {'class_token': False, 'pool': 'mean'}, {'num_classes': 0},
    {'dtype': jnp.bfloat16}, {'distilled': True, 'registers': 2, 'dtype': jnp.bfloat16},
], ids=str)
def test_settings_run_with_a_reduction_and_keep_their_shapes(settings):
  vit = make_vit('Ti/8', **{'width': 32, 'heads': 2, 'mlp': 32, 'depth': 3, 'image_size': 32,
                            'num_classes': 5} | settings)
  assert vit.host.slots == 16 + vit.special
  vit = vit.clone(plan=make_plan({'method': 'tome', 'layers': (1,), 'remove': 3}, vit.host))
  images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
  params = jax.jit(vit.init)(jax.random.key(1), images)
  logits, out = jax.jit(vit.apply)(params, images)
  assert logits.shape == (2, settings.get('num_classes', 5) or 32)
  assert logits.dtype == jnp.float32
  assert bool(jnp.isfinite(logits).all())
  assert out['tokens'].slots == 13 + vit.special
  np.testing.assert_array_equal(out['tokens'].kind[:, :vit.special], 0)
  np.testing.assert_array_equal(out['tokens'].pos[:, :vit.special], -1)


def test_mean_pool_counts_original_tokens():
  vit = make_vit('Ti/8', width=32, heads=2, mlp=32, depth=2, image_size=32, num_classes=0,
                 pool='mean')
  vit = vit.clone(plan=make_plan({'method': 'tome', 'layers': (1,), 'remove': 6}, vit.host))
  images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
  pooled, out = jax.jit(vit.apply)(jax.jit(vit.init)(jax.random.key(1), images), images)
  tokens = out['tokens']
  expected = np.einsum('bn,bnd->bd', tokens.sizes[:, 1:], tokens.x[:, 1:]) / 16
  np.testing.assert_allclose(pooled, expected, atol=1e-5)


def test_sincos_positions_are_two_dimensional():
  table = sincos((2, 3), 8)
  assert table.shape == (6, 8)
  np.testing.assert_allclose(table[1, :2], np.sin([1.0, 0.01]), atol=1e-6)
  np.testing.assert_allclose(table[3, 4:6], np.sin([1.0, 0.01]), atol=1e-6)


@pytest.mark.parametrize(('settings', 'message'), [
    ({'variant': 'X/16'}, 'Ti, S, B, L, H'),
    ({'variant': 'S/16', 'widht': 3}, "did you mean 'width'"),
    ({'variant': 'S/15'}, 'not a multiple of patch=15'),
    ({'variant': 'S/16', 'pool': 'max'}, 'cls, mean'),
    ({'variant': 'S/16', 'positions': 'rope'}, 'learned, sincos'),
    ({'variant': 'S/16', 'class_token': False}, "set pool='mean'"),
    ({'variant': 'S/16', 'remat': 'some'}, 'none, full, dots'),
])
def test_wrong_settings_are_one_line_errors(settings, message):
  with pytest.raises(ValueError, match=r'(?s).*') as caught:
    parameters(make_vit(**settings))
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


def test_images_of_another_size_are_refused():
  vit = make_vit('S/16')
  with pytest.raises(ValueError, match=r'expected \[batch, 224, 224, 3\]'):
    jax.eval_shape(vit.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_learned_methods_need_their_parameters():
  vit = golden_vit.model()
  plan = make_plan({'method': 'patchmerger', 'layers': (1,), 'keep': 9}, vit.host)
  with pytest.raises(ValueError, match='needs learned parameters'):
    vit.clone(plan=plan).apply({'params': golden_vit.params()}, golden_vit.images())


def test_plan_and_host_are_hashable_settings():
  plan = make_plan({'method': 'tome', 'remove': 8}, golden_vit.model().host)
  assert hash(plan) == hash(dataclasses.replace(plan))
