"""Backbone: published parameter counts, both storage forms, settings, and errors."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_vit

from models.backbones.clip import make_clip
from models.backbones.vit import make_vit
from models.blocks import Heads
from models.families import NAMED, PAIRS, SIZES
from models.plan import make_plan
from models.storage import all_to_storage, fastest_storage, restack, unstack
from ops.primitives.grids import sincos

# Published counts: torchvision and timm model cards, DeiT (arXiv:2012.12877, Table 1 exact forms);
# of later families what timm 1.0.31 counts.
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
    ('deit_s16_distilled', ()): 22_436_432,
    ('mae_b16', ()): 85_798_656,
    ('mae_b16_tuned', ()): 86_567_656,
    ('dinov2_s14', ()): 22_056_192,
    ('dinov2_b14', ()): 86_579_712,
    ('dinov2_l14', ()): 304_367_616,
    ('dinov2_g14', ()): 1_136_479_232,
    # 4 registers and a position for [CLS], which timm folds into the token (384 fewer).
    ('dinov2_s14_reg4', ()): 22_057_344 + 384,
    ('siglip_b16_224', ()): 92_884_224,
    ('siglip_so400m14_378', ()): 428_225_600,
    ('siglip2_gopt16_256', ()): 1_163_168_256,
}
# Both towers; as the transformers library counts its CLIP and SigLIP models of these sizes.
PUBLISHED_PAIRS = {
    'clip_b32': 151_277_313,
    'clip_b16': 149_620_737,
    'clip_l14': 427_616_513,
    'clip_l14_336': 427_944_193,
    'siglip_b16_224': 203_155_970,
    'siglip_so400m14_378': 877_960_498,
    'siglip2_b16_224': 375_187_970,
    'siglip2_gopt16_256': 1_871_393_906,
}


def parameters(vit):
  images = jax.ShapeDtypeStruct((1, vit.image_size, vit.image_size, vit.channels), jnp.float32)
  return jax.eval_shape(vit.init, jax.random.key(0), images)['params']


@pytest.mark.parametrize(('variant', 'settings'), PUBLISHED, ids=str)
def test_parameter_counts_are_the_published_ones(variant, settings):
  leaves = jax.tree.leaves(parameters(make_vit(variant, **dict(settings))))
  assert sum(leaf.size for leaf in leaves) == PUBLISHED[variant, settings]


def test_every_size_has_a_published_count():
  assert {NAMED.get(variant, {'size': variant.split('/')[0]})['size']
          for variant, _ in PUBLISHED} == set(SIZES)


@pytest.mark.parametrize('name', PUBLISHED_PAIRS)
def test_parameter_counts_of_pairs_are_the_published_ones(name):
  pair = make_clip(name)
  side = pair.image.image_size
  params = jax.eval_shape(pair.init, jax.random.key(0), jnp.zeros((1, side, side, 3)),
                          jnp.zeros((1, pair.text.context), jnp.int32))['params']
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PUBLISHED_PAIRS[name]


def test_every_named_family_is_built():
  for name in NAMED:
    assert make_vit(name).special <= 5
  for name in PAIRS:
    pair = make_clip(name)
    image = pair.image.projection or pair.image.width
    assert image == pair.text.projection


def test_logits_and_every_layer_equal_the_reference():
  logits, out = jax.jit(golden_vit.model().apply)({'params': golden_vit.params()},
                                                   golden_vit.images())
  np.testing.assert_allclose(logits, golden_vit.load('tome_vit')['base_logits'], atol=1e-5)
  assert len(out['hidden']) == golden_vit.DEPTH


@pytest.mark.long
@pytest.mark.parametrize('method', [None, pytest.param('tome', marks=pytest.mark.long)])
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
    chex.assert_trees_all_close(plain, again, rtol=1e-7, atol=2e-4)


def test_unstack_and_restack_are_inverse():
  blocks = golden_vit.params()['stack']['blocks']
  chex.assert_trees_all_equal(restack(unstack(blocks, 4)), blocks)


def test_cuts_on_cpu_are_read_layer_by_layer():
  host = golden_vit.model().host
  cut = make_plan({'method': 'tome', 'remove': 8}, host)
  assert fastest_storage(cut, platform='cpu') == 'unstacked'
  assert fastest_storage(None, platform='cpu') == 'stacked'
  assert fastest_storage(cut, platform='tpu') == 'stacked'


@pytest.mark.long
def test_tracing_follows_stages_not_depth():
  def equations(depth):
    vit = make_vit('Ti/8', width=32, heads=2, mlp=32, depth=depth, image_size=16, num_classes=2)
    vit = vit.clone(plan=make_plan({'method': 'tome', 'layers': (2,), 'remove': 1}, vit.host))
    images = jnp.zeros((1, 16, 16, 3))
    jaxpr = jax.make_jaxpr(vit.apply)({'params': parameters(vit)}, images)
    return len(jaxpr.eqns)

  assert equations(6) == equations(24)


SETTINGS = (
    {'distilled': True, 'registers': 2, 'dtype': jnp.bfloat16},
    {'activation': 'swiglu', 'layer_scale': 1e-5, 'registers': 2, 'special_positions': False},
    {'class_token': False, 'pool': 'map', 'activation': 'gelu_tanh', 'dtype': jnp.bfloat16},
    {'pre_norm': True, 'patch_bias': False, 'activation': 'quick_gelu', 'projection': 8},
    {'registers': 4}, {'distilled': True}, {'positions': 'sincos'}, {'pool': 'mean'},
    {'class_token': False, 'pool': 'mean'}, {'num_classes': 0}, {'dtype': jnp.bfloat16},
    {'pool': 'mean', 'last_norm': 'pooled'}, {'pool': 'cls_mean', 'last_norm': 'pooled'})


# The first four have of each kind some.
@pytest.mark.long
@pytest.mark.parametrize('settings', SETTINGS, ids=str)
def test_settings_run_with_a_reduction_and_keep_their_shapes(settings):
  vit = make_vit('Ti/8', **{'width': 32, 'heads': 2, 'mlp': 32, 'depth': 3, 'image_size': 32,
                            'num_classes': 5} | settings)
  assert vit.host.slots == 16 + vit.special
  vit = vit.clone(plan=make_plan({'method': 'tome', 'layers': (1,), 'remove': 3}, vit.host))
  images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
  logits, out = jax.jit(lambda key: vit.apply(vit.init(key, images), images))(jax.random.key(1))
  assert logits.shape == (2, settings.get('num_classes', 5) or 32)
  assert logits.dtype == jnp.float32
  assert np.isfinite(logits).all()
  assert out['tokens'].slots == 13 + vit.special
  np.testing.assert_array_equal(np.asarray(out['tokens'].kind)[:, :vit.special], 0)
  np.testing.assert_array_equal(np.asarray(out['tokens'].pos)[:, :vit.special], -1)


@pytest.mark.long
def test_mean_pool_counts_original_tokens():
  vit = make_vit('Ti/8', width=32, heads=2, mlp=32, depth=2, image_size=32, num_classes=0,
                 pool='mean')
  vit = vit.clone(plan=make_plan({'method': 'tome', 'layers': (1,), 'remove': 6}, vit.host))
  images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
  pooled, out = jax.jit(vit.apply)(jax.jit(vit.init)(jax.random.key(1), images), images)
  tokens = out['tokens']
  expected = np.einsum('bn,bnd->bd', tokens.sizes[:, 1:], tokens.x[:, 1:]) / 16
  np.testing.assert_allclose(pooled, expected, atol=1e-5)


@pytest.mark.long
def test_attention_pooling_counts_tokens_as_the_blocks_do():
  vit = make_vit('Ti/8', width=32, heads=2, mlp=32, depth=2, image_size=16, num_classes=0,
                 class_token=False, pool='map')
  images = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (2, 1, 1, 3)), (2, 16, 16, 3))
  params = jax.jit(vit.init)(jax.random.key(1), images)['params']
  params['pos'] = jnp.zeros_like(params['pos']).at[:, 0].set(1.0)  # One patch differs, three agree.
  whole = jax.jit(vit.apply)({'params': params}, images)[0]
  merged = vit.clone(plan=make_plan({'method': 'tome', 'layers': (0, 1), 'remove': 1}, vit.host))
  found, out = jax.jit(merged.apply)({'params': params}, images)
  assert out['tokens'].slots == 2
  np.testing.assert_allclose(found, whole, atol=1e-4)


@pytest.mark.long
def test_padding_does_not_reach_the_attention_pool():
  vit = make_vit('Ti/8', width=32, heads=2, mlp=32, depth=2, image_size=32, num_classes=0,
                 class_token=False, pool='map')
  images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
  params = jax.jit(vit.init)(jax.random.key(1), images)
  plan = {'method': 'stride', 'layers': (1,), 'remove': 6}
  cut, masked = (jax.jit(vit.clone(plan=make_plan(plan | {'mode': mode}, vit.host)).apply)(
      params, images)[0] for mode in ('gather', 'mask'))
  np.testing.assert_allclose(masked, cut, atol=1e-5)


def test_sincos_positions_are_two_dimensional():
  table = sincos((2, 3), 8)
  assert table.shape == (6, 8)
  np.testing.assert_allclose(table[1, :2], np.sin([1.0, 0.01]), atol=1e-6)
  np.testing.assert_allclose(table[3, 4:6], np.sin([1.0, 0.01]), atol=1e-6)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_projections_of_a_tpu_are_those_of_others(trace_for, dtype):
  """There each is a product of its own."""
  heads, x = Heads(2, dtype), jax.random.normal(jax.random.key(0), (2, 5, 8))
  params = heads.init(jax.random.key(1), x)
  params['params']['bias'] = jax.random.normal(jax.random.key(2), (3, 2, 4))
  for part in ({}, {'last': 2}, {'first': 2}):
    trace_for('cpu')
    wanted = heads.apply(params, x, **part)
    trace_for('tpu')
    found = heads.apply(params, x, **part)
    for one, other in zip(found, wanted, strict=True):
      assert one.dtype == other.dtype == dtype
      np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=1e-2,
                                 atol=1e-5 if dtype == 'float32' else 2e-2)


@pytest.mark.parametrize(('settings', 'message'), [
    ({'variant': 'X/16'}, 'Ti, S, B, L, H'),
    ({'variant': 'S/16', 'widht': 3}, "did you mean 'width'"),
    ({'variant': 'S/15'}, 'not a multiple of patch=15'),
    ({'variant': 'S/16', 'pool': 'max'}, 'cls, mean'),
    ({'variant': 'S/16', 'positions': 'rope'}, 'learned, sincos'),
    ({'variant': 'S/16', 'class_token': False}, "set pool='mean'"),
    ({'variant': 'S/16', 'pool': 'cls_mean', 'class_token': False}, "set pool='mean' or 'map'"),
    ({'variant': 'S/16', 'activation': 'relu'}, 'gelu, gelu_tanh, quick_gelu, swiglu'),
    ({'variant': 'S/16', 'last_norm': 'none'}, 'tokens, pooled'),
    ({'variant': 'S/16', 'position_resampling': 'cubic'}, 'bicubic, bicubic_antialiased'),
    ({'variant': 'dinov2_s16'}, "did you mean 'dinov2_s14'"),
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


@pytest.mark.long
def test_learned_methods_need_their_parameters():
  vit = golden_vit.model()
  plan = make_plan({'method': 'patchmerger', 'layers': (1,), 'keep': 9}, vit.host)
  with pytest.raises(ValueError, match='needs learned parameters'):
    vit.clone(plan=plan).apply({'params': golden_vit.params()}, golden_vit.images())


def test_plan_and_host_are_hashable_settings():
  plan = make_plan({'method': 'tome', 'remove': 8}, golden_vit.model().host)
  assert hash(plan) == hash(dataclasses.replace(plan))


def test_any_tree_goes_into_a_storage_and_back():
  """An optimizer's state, and stacks of which only what a method learned is there."""
  blocks = {'norm': {'scale': np.arange(6.0).reshape(3, 2)}}
  tree = (np.zeros(()), {'tower': {'stack': {'blocks': blocks, 'reducer_01': {'w': np.ones(2)}}},
                         'lm': {'stack': {'reducer_00': {'w': np.zeros(2)}}}})
  apart = all_to_storage(tree, 'unstacked')
  layers = apart[1]['tower']['stack']['blocks']
  assert [layer['norm']['scale'].tolist() for layer in layers] == [[0, 1], [2, 3], [4, 5]]
  assert apart[1]['lm'] == tree[1]['lm']
  chex.assert_trees_all_equal(all_to_storage(apart, 'stacked'), tree)
  chex.assert_trees_all_equal(all_to_storage(apart, 'unstacked'), apart)
