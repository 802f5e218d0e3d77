"""Projectors that read all crops of an image at once, in a vision-language model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import errors
from helpers.qa import SCENES, batch_of, small
from helpers.tiny_lm import IMAGE, LLAVA

from configs import digit_scenes as scenes_config
from lib.cost import jaxpr
from lib.cost import vlm as vlm_cost
from lib.data.pictures import Picture, batch_pictures
from lib.data.token_layout import raster_layout
from lib.report import provenance
from lib.tasks import qa as qa_task
from lib.tasks.settings import check_config
from models.backbones.images import Images
from models.checkpoints.vlm_config import from_config
from models.projectors import make_projector
from models.projectors.base import Beside
from models.projectors.frames import frames_of_windows, windows_over
from models.projectors.hicom import HICom
from models.reduce_config import with_plans, with_projector_reduction
from ops.primitives import grids
from ops.tokens import TokenSet

SIDE = 4
IDS = np.array([[4, IMAGE, 1, 2, 3], [IMAGE, 5, 6, 0, 0], [IMAGE, 7, 0, 0, 0], [7, 8, 0, 0, 0]])
VALID = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]], bool)
# Of each row; three make a window, which four do not fill twice, and two not once.
FRAMES = (5, 2, 4, 0)
WINDOWS, QUERIES = 4, 2
LAYOUT = (5, 1, 5 * (WINDOWS + QUERIES))


def model(dtype=jnp.float32, **args):
  """LLaVA with HICom."""
  vlm = from_config(LLAVA)
  vlm = vlm.clone(tower=vlm.tower.clone(dtype=dtype), lm=vlm.lm.clone(dtype=dtype))
  made = make_projector({'name': 'hicom', 'args': {
      'guide': 'none', 'frames': 3, 'side': 2, 'queries': QUERIES, 'heads': 2, 'span': 'image',
      'adapted': ['query', 'key', 'value'], **args}}, width=16, dtype=dtype)
  return vlm.clone(projection='', compressor=made)


@functools.cache
def videos():
  """Videos of `FRAMES` frames; what is not there is noise."""
  rng, each = np.random.default_rng(0), model().passed_on[0]
  rows = [[Picture(rng.normal(size=(count, 16, 16, 3)).astype(np.float32),
                   *raster_layout(count * each))] if count else [] for count in FRAMES]
  images = batch_pictures(rows, patches=each)
  there = np.arange(max(FRAMES)) < np.array(FRAMES)[:, None]
  noise = rng.normal(size=images.pixels.shape).astype(np.float32)
  return dataclasses.replace(images, pixels=np.where(there[..., None, None, None], images.pixels,
                                                     noise))


@functools.cache
def program(vlm, **settings):
  return jax.jit(functools.partial(vlm.apply, **settings))


@functools.cache
def trained():
  """A model with parameters of which none is zero, and what it makes of all rows."""
  vlm = model()
  shapes = jax.eval_shape(vlm.init, jax.random.key(0), IDS, VALID, videos())['params']
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 3, shapes)
  return vlm, params, run(vlm, params, IDS, VALID, videos())


def run(vlm, params, *inputs, **settings):
  """Results in numpy."""
  return jax.tree.map(np.asarray, program(vlm, **settings)({'params': params}, *inputs))


def alone(row):
  """A row of `videos` without the others, in as few frames as it has."""
  images, each = videos(), model().passed_on[0]
  index, weight = (part[row:row + 1, :, :FRAMES[row] * each] for part in
                   (images.index, images.weight))
  return Images(images.pixels[row:row + 1, :FRAMES[row]], None, index, weight)


@pytest.mark.long
def test_a_video_is_one_grid():
  vlm, params, (_, out) = trained()
  # One that knows no number of frames but the grid's.
  module, visual = vlm.compressor.clone(span='crop'), out['visual']

  @functools.partial(jax.jit, static_argnums=1)
  def by_hand(pixels, grid):
    tokens, _ = vlm.tower.apply({'params': params['tower']}, pixels)
    return module.apply({'params': params['compressor']},
                        TokenSet.create(tokens.x[:, 1:].reshape(1, -1, 16)), Beside(grid)).x[0]

  for row in (0, 1):
    grid = (FRAMES[row], SIDE, SIDE)
    found = by_hand(videos().pixels[row, :FRAMES[row]], grid)
    assert len(found) == module.slots(grid) == visual.valid[row, 0].sum()
    np.testing.assert_allclose(visual.x[row, 0][visual.valid[row, 0]], found, atol=1e-5)


@pytest.mark.long
def test_the_language_model_reads_as_many_tokens_as_are_promised():
  vlm, _, (_, out) = trained()
  windows = [-(-count // 3) * WINDOWS for count in FRAMES]
  found = [count + QUERIES * (count > 0) for count in windows]
  assert out['visual'].valid.sum(axis=(1, 2)).tolist() == found
  placeholders = (IDS == IMAGE).sum(axis=1)
  assert (out['sequence'].valid.sum(axis=1) == VALID.sum(axis=1) - placeholders + found).all()
  assert videos().layout == LAYOUT
  assert vlm.visual_slots(LAYOUT) == found[0] == out['visual'].x.shape[2]
  assert out['sequence'].slots == IDS.shape[1] + found[0]


def test_a_row_of_a_batch_is_the_row_alone():
  vlm, params, (together, out) = trained()
  row = 2
  logits, own = run(vlm, params, IDS[row:row + 1], VALID[row:row + 1], alone(row))
  np.testing.assert_allclose(together[row][out['sequence'].valid[row]],
                             logits[0][own['sequence'].valid[0]], atol=2e-5)


def test_all_frames_count():
  vlm, params, (_, out) = trained()
  pixels = videos().pixels.copy()
  pixels[0, 4] = pixels[0, 0]
  pixels[1, 2:] += 1
  other = run(vlm, params, IDS, VALID, dataclasses.replace(videos(), pixels=pixels))[1]['visual']
  change = np.abs(other.x - out['visual'].x).max(axis=3)[:, 0]
  # Its last window, and what is learned of all; of the second row nothing that there is.
  assert (change[0, :WINDOWS] == 0).all()
  assert (change[0, WINDOWS:] > 1e-3).all()
  assert (change[1][out['visual'].valid[1, 0]] == 0).all()


@pytest.mark.parametrize('side', [2, 3, 4])
def test_windows_along_time(side):
  lengths = np.arange(1, 12)
  found = np.asarray(frames_of_windows(jnp.asarray(lengths), side, -(-11 // side)))
  for length, taken, number in zip(lengths, found, windows_over(lengths, side), strict=True):
    own, rest = taken[:number], taken[number:]
    assert (rest >= length).all()
    try:
      windows = grids.balanced((length,), (side,))
    except ValueError:
      windows = None
    if windows is not None:
      np.testing.assert_array_equal(own[:, :windows.shape[1]], windows)
    else:
      # The last one is shorter; none is empty, and none has more than one frame of another.
      assert own[-1, -1] >= length > own[-1, 0]
      assert set(own[own < length]) == set(range(length))
      assert (np.diff(own[:, 0]) >= side - 1).all()


@pytest.mark.long
def test_prefill_and_decode_are_the_whole_pass():
  vlm, params, (together, out) = trained()
  _, cache = run(vlm, params, IDS[:3, :-1], np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]],
                                                      bool), videos_of(3), method='prefill', room=1)
  last = VALID[:3].sum(axis=1) - 1
  logits, _ = run(vlm, params, IDS[np.arange(3), last], cache, method='decode')
  slot = out['slot'][np.arange(3), last]
  np.testing.assert_allclose(logits, together[np.arange(3), slot], atol=2e-5)


def videos_of(rows):
  """The first rows of `videos`."""
  return jax.tree.map(lambda leaf: leaf[:rows], videos())


@pytest.mark.long
def test_bf16_and_its_gradients_are_finite():
  _, params, _ = trained()
  low = model(jnp.bfloat16)

  def loss(params):
    visual = low.apply({'params': params}, videos(), method='encode_images')[0]
    x = jnp.where(visual.valid[..., None], visual.x.astype(jnp.float32), 0)
    return jnp.mean(jnp.square(x))

  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  assert value > 0
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  own = {jax.tree_util.keystr(path): np.abs(leaf).max()
         for path, leaf in jax.tree_util.tree_leaves_with_path(grads['compressor'])}
  assert not [path for path, most in own.items() if not most]


def test_its_cost_is_that_of_the_traced_model():
  vlm, params, _ = trained()
  cost = vlm_cost.of(vlm, 5, LAYOUT)
  encode = jaxpr.count(functools.partial(vlm.apply, method='encode_images'), {'params': params},
                       videos_of(1))
  assert encode.total == cost.tower_macs + cost.projector_macs
  assert cost.projector_parameters == sum(x.size for x in jax.tree.leaves(params['compressor']))
  assert (cost.crops, cost.visual) == (5, 2 * WINDOWS + QUERIES) == (5, cost.projected)
  apart = vlm_cost.of(vlm, 5, (5, 5, 0))
  assert (apart.visual, apart.projected) == (5 * (WINDOWS + QUERIES),) * 2


def test_images_of_one_crop_are_read_as_without_time():
  vlm, params, _ = trained()
  pixels = videos().pixels[:2, :2]
  images = Images(pixels)
  found, _, _ = run(vlm, params, images, method='encode_images')
  each = vlm.passed_on[0]
  index, weight = raster_layout(each)
  one = Images(pixels[:1, :1], None, index[None, None], weight[None, None])
  np.testing.assert_allclose(run(vlm, params, one, method='encode_images')[0].x[0, 0],
                             found.x[0, 0], atol=1e-5)
  assert vlm.visual_slots(one.layout) * 2 == vlm.visual_slots(images.layout)


@pytest.mark.long
def test_fewer_still_may_be_left_behind_it():
  vlm, params, _ = trained()
  reduced = with_plans(vlm, projector={'method': 'divprune', 'keep': 3})(5, LAYOUT)
  assert reduced.visual_slots(LAYOUT) == 3
  found = run(reduced, params, videos(), method='encode_images')[0]
  kept = found.valid.sum(axis=(1, 2))
  assert kept[0] == 3
  assert (kept <= 3).all()
  assert kept[3] == 0
  told = errors.said(with_projector_reduction, vlm, {'method': 'prunevid', 'keep': 3}, slots=10)
  assert 'crop' in told


def test_a_config_reaches_it():
  config = small(scenes_config)
  with config.unlocked():
    config.model.compressor = {'name': 'hicom', 'args': {
        'guide': 'none', 'side': 2, 'queries': QUERIES, 'heads': 2, 'span': 'image'}}
  check_config(config, 'model')
  vlm = qa_task.build(config.model, {}, SCENES, context=14)
  # Its images have one crop each.
  assert vlm.compressor.span == 'image'
  assert qa_task.visual_tokens(vlm) == WINDOWS + QUERIES
  assert qa_task.training_macs(vlm, context=14) > 0
  shapes = jax.eval_shape(functools.partial(qa_task.init, vlm, SCENES, 14), jax.random.key(0))
  loss = functools.partial(qa_task.loss, vlm, config.optimizer, teacher=None)
  grads, _ = jax.eval_shape(jax.grad(loss, has_aux=True), shapes, batch_of(SCENES, 14),
                            key=jax.random.key(0))
  assert grads['compressor'].keys() == {'local', 'global'}


def test_what_does_not_go_together_is_refused():
  vlm, params, (_, out) = trained()
  says = errors.said(vlm.visual_slots, (5, 2, 9))
  assert "rows have up to 2 images" in says
  assert "span='crop'" in says
  two = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf], axis=1), videos())
  assert errors.said(jax.eval_shape, functools.partial(vlm.apply, method='encode_images'),
                     {'params': params}, two) == says
  assert "mask='frames'" in errors.said(vlm.clone, lm=vlm.lm.clone(mask='frames'))
  assert 'no picture' in errors.said(provenance.stages, vlm, out)
  assert 'choose one of crop, image' in errors.said(HICom, 16, span='video')
  assert 'cannot cover 4 rows' in errors.said(model, side=3)
