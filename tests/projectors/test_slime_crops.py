"""SliME over all crops of an image, in a vision-language model and part by part."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import errors
from helpers.tiny_lm import IMAGE, LLAVA

from lib.data.pictures import Picture, batch_pictures
from lib.data.token_layout import raster_layout
from models.checkpoints.compressors import from_release
from models.checkpoints.vlm_config import from_config
from models.projectors import make_projector
from models.projectors.base import Beside
from models.projectors.slime import SliME, SliMELocal
from models.projectors.slime_router import SliMERouter
from ops.tokens import TokenSet

SIDE, KEEP, PATCHES = 2, 5, 16
ARGS = {'side': SIDE, 'heads': 2, 'capacity': KEEP, 'top_p': 0.7, 'temperature': 0.5}
IDS = np.array([[4, IMAGE, 1, 2, 3], [IMAGE, 5, 6, 0, 0], [IMAGE, 7, 0, 0, 0], [7, 8, 0, 0, 0]])
VALID = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]], bool)
# Of each row, that of the image in small among them.
CROPS = (4, 3, 1, 0)


def model(**args):
  vlm = from_config(LLAVA)
  made = make_projector({'name': 'slime_crops', 'args': ARGS | args}, width=16, dtype=jnp.float32)
  return vlm.clone(projection='', compressor=made)


@functools.cache
def pictures(rows=(0, 1, 2, 3)):
  """Images of `CROPS` crops; what is not there is noise."""
  rng = np.random.default_rng(0)
  every = [rng.normal(size=(max(CROPS), 16, 16, 3)).astype(np.float32) for _ in CROPS]
  made = [[Picture(every[row][:CROPS[row]], *raster_layout(CROPS[row] * PATCHES))]
          if CROPS[row] else [] for row in rows]
  images = batch_pictures(made, patches=PATCHES)
  there = np.arange(images.pixels.shape[1]) < np.array([CROPS[row] for row in rows])[:, None]
  return dataclasses.replace(images, pixels=np.where(
      there[..., None, None, None], images.pixels, 9.0).astype(np.float32))


@functools.cache
def trained():
  """A model with parameters of which none is zero, and what it makes of all rows."""
  vlm = model()
  shapes = jax.eval_shape(vlm.init, jax.random.key(0), IDS, VALID, pictures())['params']
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 3, shapes)
  return vlm, params, run(vlm, params, IDS, VALID, pictures())


def run(vlm, params, *inputs):
  return jax.tree.map(np.asarray, jax.jit(vlm.apply)({'params': params}, *inputs))


@pytest.mark.long
def test_an_image_is_its_parts_one_after_another():
  """The image in small, a separator and what the router keeps, each by its own module."""
  vlm, params, (_, out) = trained()
  own, visual = params['compressor'], out['visual']
  slime, local = SliME(16, heads=2), SliMELocal(16, side=SIDE, heads=2)
  router = SliMERouter(KEEP, top_p=0.7, temperature=0.5)
  grid = Beside((4, 4))
  assert vlm.visual_slots(pictures().layout) == visual.x.shape[2] == PATCHES + 1 + KEEP
  kept = []
  for row, count in enumerate(CROPS):
    if not count:
      assert not visual.valid[row].any()
      continue
    patches = vlm.tower.apply({'params': params['tower']}, pictures().pixels[row, :count])[0].x
    patches = TokenSet.create(patches[:, 1:])
    whole = slime.apply({'params': {name: own[name] for name in ('mlp', 'resampler', 'gates')}},
                        patches, grid).x[0]
    found = visual.x[row, 0][visual.valid[row, 0]]
    np.testing.assert_allclose(found[:PATCHES], whole, atol=1e-4)
    if count == 1:
      assert len(found) == PATCHES
      continue
    np.testing.assert_array_equal(found[PATCHES], own['separator'])
    crops = local.apply({'params': {'mlp': own['mlp'], 'resampler': own['local']}},
                        jax.tree.map(lambda leaf: leaf[1:], patches), grid).x.reshape(1, -1, 16)
    text = (IDS[row] != IMAGE) & VALID[row]
    words = params['lm']['table'][IDS[row]][None]
    left = router.apply({}, TokenSet.create(crops), words, text[None])
    np.testing.assert_allclose(found[PATCHES + 1:], left.x[0][left.real[0]], atol=1e-4)
    kept.append(len(found) - PATCHES - 1)
  assert 0 < min(kept) <= max(kept) <= KEEP


@pytest.mark.long
@pytest.mark.parametrize('row', [1, 2])
def test_a_row_of_a_batch_is_the_row_alone(row):
  vlm, params, (together, out) = trained()
  logits, own = run(vlm, params, IDS[row:row + 1], VALID[row:row + 1], pictures((row,)))
  np.testing.assert_allclose(together[row][out['sequence'].valid[row]],
                             logits[0][own['sequence'].valid[0]], atol=2e-5)


@pytest.mark.long
def test_all_of_it_trains_and_fresh_parameters_are_the_same_with_and_without_crops():
  vlm, params, _ = trained()

  def loss(params):
    return jnp.sum(jnp.square(vlm.apply({'params': params}, IDS, VALID, pictures())[0]))

  slopes = jax.jit(jax.grad(loss))(params)['compressor']
  for path, leaf in jax.tree.leaves_with_path(slopes):
    assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
    assert np.any(leaf) or 'noise' in jax.tree_util.keystr(path), jax.tree_util.keystr(path)
  module, x = vlm.compressor, TokenSet.create(jnp.zeros((1, PATCHES, 16)))
  beside = Beside((4, 4), text=jnp.zeros((1, 2, 16)), text_valid=jnp.ones((1, 2), bool))
  alone = jax.eval_shape(module.init, jax.random.key(0), x, beside)['params']
  assert jax.tree.map(jnp.shape, alone) == jax.tree.map(jnp.shape, params['compressor'])


def test_what_it_needs_is_said():
  module = model().compressor
  assert module.grid_after((4, 4)) == (4, 4)
  assert module.slots((4, 4)) == module.slots((1, 4, 4)) == PATCHES
  assert module.slots((2, 4, 4)) == PATCHES + 1 + SIDE ** 2
  x = TokenSet.create(jnp.zeros((1, 2 * PATCHES, 16)))
  said = errors.said(jax.eval_shape, module.init, jax.random.key(0), x, Beside((2, 4, 4)))
  assert 'there is no text' in said
  assert 'no release of SliMECrops' in errors.said(from_release, module, {}, grid=(4, 4), width=16)
  assert 'choose a compressor that reads crops one by one' in errors.said(
      model().visual_slots, (5, 2, 9))
