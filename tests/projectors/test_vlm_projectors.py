"""Vision-language models whose projector leaves fewer tokens than the tower has patches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_lm import CLIP, IMAGE, LLAVA

from configs.parts import VLM_SHARDING
from lib.cost import jaxpr
from lib.cost import vlm as vlm_cost
from lib.report import provenance
from lib.runtime import sharding
from models.backbones.images import Images
from models.checkpoints.vlm_config import from_config
from models.plan import make_cache_plan
from models.projectors import PROJECTORS, make_projector
from models.reduce_config import with_plans, with_projector_reduction

# An image in front, two images, text alone, padded on the right.
IDS = np.array([[IMAGE, 1, 2, 3, 0], [4, IMAGE, IMAGE, 5, 6], [7, 8, 0, 0, 0]])
VALID = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
LEVELS = (0, 0, 1, 1)  # LLaVA's tower leaves its last layer out.


def squares(rows=slice(None)):
  """Two images a row of 16 x 16 pixels."""
  pixels = np.random.default_rng(0).normal(size=(3, 2, 16, 16, 3)).astype(np.float32)
  return Images(pixels[rows])


def run(vlm, params, images, rows=slice(None), ids=IDS, **settings):
  """Results in numpy."""
  program = jax.jit(functools.partial(vlm.apply, **settings))
  return jax.tree.map(np.asarray, program({'params': params}, ids[rows], VALID[rows], images))


def look(vlm, params, rows=slice(None)):
  """As `run`, up to where the language model begins."""
  return run(vlm, params, squares(rows), rows, method='sequence')[1]


def visual_of(out, row, image):
  """Features of an image in the sequence."""
  tokens = out['sequence']
  return tokens.x[row][tokens.valid[row] & (tokens.stats['group'][row] == image)]


def model(name, size=16, **args):
  """LLaVA with another projector."""
  vlm = from_config(LLAVA | {'vision_config': CLIP | {'image_size': size}})
  made = make_projector({'name': name, 'args': args}, width=vlm.lm.width, dtype=jnp.float32)
  return vlm.clone(projection='', compressor=made)


@functools.cache
def packed(side=2):
  vlm = model('tokenpacker', side=side, heads=2, levels=LEVELS)
  params = jax.jit(vlm.init)(jax.random.key(0), IDS, VALID, squares())['params']
  return vlm, params


# What each needs on a tower of two layers and 4 x 4 patches.
ARGS = {
    'tokenpacker': {'heads': 2, 'levels': LEVELS}, 'quecc': {'heads': 2, 'levels': LEVELS},
    'mqt': {'queries': 4, 'count': 3, 'heads': 2}, 'tokenflex': {'side': 3},
    'slime': {'heads': 2}, 'slime_local': {'side': 3, 'heads': 2},
    'slime_crops': {'side': 3, 'heads': 2},
    'hicom': {'guide': 'none', 'side': 2, 'queries': 2, 'heads': 2},
    'crosslmm': {'side': 3, 'every': 1},
    'vision_remember': {'every': 1, 'heads': 2, 'levels': (0, 1)},
    'vlora': {'layers': 2, 'every': 2, 'rank': 2, 'inner': 8, 'depth': 1, 'heads': 2, 'mlp': 8}}


@pytest.mark.parametrize('name', PROJECTORS)
def test_every_projector_has_its_place(name):
  # Sixths of an image are whole patches.
  size, crops = 24 if name == 'llava_sp' else 16, 1 if name == 'vlora' else 2
  vlm = model(name, size, **ARGS.get(name, {}))
  inputs = IDS, VALID, Images(jnp.zeros((3, crops, size, size, 3)))
  params = jax.eval_shape(vlm.init, jax.random.key(0), *inputs)
  _, out = jax.eval_shape(vlm.apply, params, *inputs)
  assert out['sequence'].slots == IDS.shape[1] + vlm.visual_slots((crops, crops, 0))
  assert out['visual'].x.shape[2] == vlm.passed_on[0]
  sharding.make_shardings(params['params'], VLM_SHARDING,
                          sharding.make_mesh({'data': 1}, jax.devices()[:1]))


@pytest.mark.long
def test_a_projector_may_ask_what_the_question_is():
  vlm = model('quecc', **ARGS['quecc'])
  params = jax.jit(vlm.init)(jax.random.key(0), IDS, VALID, squares())['params']
  out, other = look(vlm, params), run(vlm, params, squares(), ids=IDS[::-1], method='sequence')[1]
  alone = look(vlm, params, slice(1, 2))
  np.testing.assert_allclose(visual_of(out, 1, 0), visual_of(alone, 0, 0), atol=1e-5)
  assert np.abs(out['visual'].x - other['visual'].x)[0].max() > 1e-4


@pytest.mark.long
def test_what_is_made_of_the_question_passes_no_gradient():
  vlm = model('quecc', **ARGS['quecc'])
  params = jax.jit(vlm.init)(jax.random.key(0), IDS, VALID, squares())['params']

  def visual(params):
    return vlm.apply({'params': params}, IDS, VALID, squares(), method='sequence')[1][
        'visual'].x.sum()

  found = jax.jit(jax.grad(visual))(params)
  assert not any(leaf.any() for leaf in jax.tree.leaves(found['lm']))
  assert found['compressor']['cells']['question']['kernel'].any()


@pytest.mark.long
@pytest.mark.parametrize(('side', 'left'), [(2, 4), (4, 1)])
def test_the_language_model_reads_as_many_tokens_as_are_promised(side, left):
  vlm, params = packed(side)
  assert vlm.passed_on == (left, left)
  assert vlm.visual_slots((2, 2, 0)) == 2 * left
  out = look(vlm, params)
  assert out['sequence'].valid.sum(axis=1).tolist() == [3 + left, 3 + 2 * left, 2]


def test_a_row_of_a_batch_is_the_row_alone():
  vlm, params = packed()
  out = look(vlm, params)
  alone = look(vlm, params, slice(1, 2))
  for image in (0, 1):
    np.testing.assert_allclose(visual_of(out, 1, image), visual_of(alone, 0, image), atol=1e-6)


@pytest.mark.long
def test_fewer_still_may_be_left_behind_it():
  vlm, params = packed()
  reduced = with_projector_reduction(vlm, {'method': 'divprune', 'keep': 3}, slots=4)
  assert look(reduced, params)['sequence'].valid.sum(axis=1).tolist() == [6, 9, 2]
  with pytest.raises(ValueError, match='cls_attention'):
    with_projector_reduction(vlm, {'method': 'topk', 'keep': 3}, slots=4)


def test_its_cost_is_that_of_the_traced_model():
  vlm, params = packed()
  cost = vlm_cost.of(vlm, 5, (2, 2, 0))
  encode = jaxpr.count(functools.partial(vlm.apply, method='encode_images'), {'params': params},
                       squares(slice(1)))
  assert encode.total == cost.tower_macs + cost.projector_macs
  assert cost.projector_parameters == sum(x.size for x in jax.tree.leaves(params['compressor']))


@pytest.mark.parametrize(('change', 'said'), [
    ({'projection': 'gelu'}, 'projection'), ({'side': 2}, 'side=1')])
def test_what_contradicts_it_is_refused(change, said):
  with pytest.raises(ValueError, match=said):
    packed()[0].clone(**change)


def test_levels_and_grids_that_a_tower_lacks_are_refused():
  vlm, made = from_config(LLAVA), functools.partial(make_projector, width=16, dtype=jnp.float32)
  with pytest.raises(ValueError, match='layers 0 to 1: set'):
    vlm.clone(projection='', compressor=made({'name': 'tokenpacker'}))
  with pytest.raises(ValueError, match='do not divide a grid'):
    vlm.clone(projection='', compressor=made({'name': 'tokenpacker', 'args': {'side': 3}}))
  with pytest.raises(ValueError, match='newline'):
    from_config(LLAVA | {'model_type': 'llava_next'}).clone(
        projection='', compressor=made({'name': 'tokenpacker'}))
  with pytest.raises(ValueError, match="guide='none'"):
    vlm.clone(projection='', compressor=made({'name': 'hicom', 'args': {'side': 2}}))
  with pytest.raises(ValueError, match='turns is set and'):
    made({'name': 'none', 'args': {}, 'turns': ({'side': 2},)})
  with pytest.raises(ValueError, match='sides'):
    made({'name': 'tokenpacker', 'args': {'sides': 3}})
  with pytest.raises(ValueError, match='tokenpacker'):
    made({'name': 'tokenpackers'})


@pytest.mark.long
def test_of_an_image_the_tokens_that_sum_it_up_are_left():
  """VoCo-LLaMA: decoding over these alone is that over the whole cache."""
  vlm = from_config(LLAVA)
  vlm = vlm.clone(lm=vlm.lm.clone(mask='summary', summary_token=9))
  params = jax.jit(vlm.init)(jax.random.key(0), IDS, VALID, squares())['params']
  # The second row's images stand before its two tokens, the third has neither.
  ids = np.array([[1, IMAGE, 9, 2, 0], [IMAGE, IMAGE, 9, 9, 6], [7, 8, 0, 0, 0]])
  told = {}
  for name, lm in (('whole', vlm.lm), ('left', vlm.lm.clone(cache_plan=make_cache_plan(
      {'method': 'voco', 'keep': 5}, vlm.lm.host(5 + 32, visual=32))))):
    logits, cache = run(vlm.clone(lm=lm), params, squares(), ids=ids, method='prefill', room=1)
    after, _ = jax.jit(functools.partial(vlm.apply, method='decode'))(
        {'params': params}, np.array([3, 4, 5]), cache)
    told[name] = np.stack([logits, after]), cache.layers[0].k.shape[2]
  assert (told['whole'][1], told['left'][1]) == (5 + 32 + 1, 5 + 1)
  np.testing.assert_allclose(told['left'][0], told['whole'][0], atol=1e-5)


@pytest.mark.long
def test_patches_are_followed_to_their_cells():
  vlm, params = packed()
  out = run(vlm, params, squares())[1]
  first, = provenance.stages(vlm, out, row=1)
  cells = np.arange(4).reshape(2, 2).repeat(2, axis=0).repeat(2, axis=1)
  assert (first.labels[0] == cells).all()
  assert first.merged.all()
  assert first.tokens.tolist() == [4, 4]


@pytest.mark.long
def test_patches_that_became_one_token_are_followed_together():
  vlm, images = from_config(LLAVA).clone(side=2), squares()
  vlm = with_plans(vlm, language={'method': 'stride', 'token_kinds': 'visual', 'layers': 1,
                                  'keep': 2})(IDS.shape[1], images.layout)
  params = jax.jit(vlm.init)(jax.random.key(0), IDS, VALID, images)['params']
  stage, = provenance.stages(vlm, run(vlm, params, images)[1], row=1)
  for labels, tokens in zip(stage.labels, stage.tokens, strict=True):
    cells = labels[::2, ::2]
    assert (labels == cells.repeat(2, axis=0).repeat(2, axis=1)).all()
    assert (cells >= 0).sum() == tokens
  assert stage.tokens.sum() == 2


@pytest.mark.long
def test_it_answers():
  vlm, params = packed()
  logits, cache = run(vlm, params, squares(), method='prefill', room=2)
  assert np.isfinite(logits).all()
  assert cache.layers[0].k.shape[2] == 5 + 2 * 4 + 2
