"""Vision-language models whose projector leaves fewer tokens than the tower has patches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib.cost import jaxpr
from lib.cost import vlm as vlm_cost
from lib.report import provenance
from models.backbones.vlm import Images
from models.checkpoints.vlm_config import from_config
from models.projectors import make_projector
from models.reduce_config import with_projector_reduction

IMAGE = 30
TEXT = {'model_type': 'llama', 'vocab_size': 40, 'hidden_size': 16, 'intermediate_size': 24,
        'num_hidden_layers': 2, 'num_attention_heads': 2, 'num_key_value_heads': 2}
CLIP = {'model_type': 'clip_vision_model', 'hidden_size': 16, 'intermediate_size': 24,
        'num_hidden_layers': 3, 'num_attention_heads': 2, 'image_size': 16, 'patch_size': 4}
LLAVA = {'model_type': 'llava', 'text_config': TEXT, 'vision_config': CLIP, 'image_token_id': IMAGE}
# An image in front, two images, text alone, padded on the right.
IDS = np.array([[IMAGE, 1, 2, 3, 0], [4, IMAGE, IMAGE, 5, 6], [7, 8, 0, 0, 0]])
VALID = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
LEVELS = (0, 0, 1, 1)  # LLaVA's tower leaves its last layer out.


def squares(rows=slice(None)):
  """Two images a row of 16 x 16 pixels."""
  pixels = np.random.default_rng(0).normal(size=(3, 2, 16, 16, 3)).astype(np.float32)
  return Images(pixels[rows])


def run(vlm, params, images, rows=slice(None), **settings):
  """Results in numpy."""
  program = jax.jit(functools.partial(vlm.apply, **settings))
  return jax.tree.map(np.asarray, program({'params': params}, IDS[rows], VALID[rows], images))


def look(vlm, params, rows=slice(None)):
  """As `run`, up to where the language model begins."""
  return run(vlm, params, squares(rows), rows, method='sequence')[1]


def visual_of(out, row, image):
  """Features of an image in the sequence."""
  tokens = out['sequence']
  return tokens.x[row][tokens.valid[row] & (tokens.stats['group'][row] == image)]


@functools.cache
def packed(side=2):
  vlm = from_config(LLAVA)
  made = make_projector({'name': 'tokenpacker', 'args': {
      'side': side, 'heads': 2, 'levels': LEVELS}}, width=vlm.lm.width, dtype=jnp.float32)
  vlm = vlm.clone(projection='', compressor=made)
  params = jax.jit(vlm.init)(jax.random.key(0), IDS, VALID, squares())['params']
  return vlm, params


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
  with pytest.raises(ValueError, match='sides'):
    made({'name': 'tokenpacker', 'args': {'sides': 3}})
  with pytest.raises(ValueError, match='tokenpacker'):
    made({'name': 'tokenpackers'})


def test_patches_are_followed_to_their_cells():
  vlm, params = packed()
  out = run(vlm, params, squares())[1]
  first, = provenance.stages(vlm, out, row=1)
  cells = np.arange(4).reshape(2, 2).repeat(2, axis=0).repeat(2, axis=1)
  assert (first.labels[0] == cells).all()
  assert first.merged.all()
  assert first.tokens.tolist() == [4, 4]


def test_it_answers():
  vlm, params = packed()
  logits, cache = run(vlm, params, squares(), method='prefill', room=2)
  assert np.isfinite(logits).all()
  assert cache.layers[0].k.shape[2] == 5 + 2 * 4 + 2
