"""Towers, doors and sequences of vision-language models, with random parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_lm import IMAGE, LLAMA, LLAVA

from lib.cost.vlm import macs_of
from lib.data.pictures import Picture, batch_pictures
from lib.data.token_layout import anyres_layout, cell_layout
from models import checkpoints
from models.backbones.images import Images, reduced_layout
from models.backbones.qwen_vision import QwenVision
from models.checkpoints.vlm_config import from_config, make_vlm
from models.plan import make_plan
from models.reduce_config import with_plans, with_projector_reduction
from ops.assignments import Mix
from ops.temporal import TTF
from ops.tokens import VISUAL, TokenSet, reduce

SIDE = 4
NEXT = LLAVA | {'model_type': 'llava_next'}
QWEN = {'model_type': 'qwen2_5_vl', 'image_token_id': IMAGE,
        'text_config': {**LLAMA, 'rope_scaling': {'type': 'mrope', 'mrope_section': [1, 1, 2]}},
        'vision_config': {'hidden_size': 16, 'intermediate_size': 24, 'out_hidden_size': 16,
                          'depth': 2, 'num_heads': 2, 'patch_size': 2, 'window_size': 8,
                          'fullatt_block_indexes': [1]}}
# An image in front, two images, text alone, padded on the right.
IDS = np.array([[IMAGE, 1, 2, 3, 0], [4, IMAGE, IMAGE, 5, 6], [7, 8, 0, 0, 0]])
VALID = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)


def squares(seed=0):
  """Two images a row of 16 x 16 pixels."""
  pixels = np.random.default_rng(seed).normal(size=(3, 2, 16, 16, 3)).astype(np.float32)
  return Images(pixels)


@functools.cache
def llava(kind='llava'):
  vlm = from_config(LLAVA if kind == 'llava' else NEXT)
  images = squares() if kind == 'llava' else crops()
  params = jax.jit(vlm.init)(jax.random.key(0), IDS, VALID, images)['params']
  # So that attention tells patches apart.
  params['tower'] = jax.tree.map(lambda x: 3 * x, params['tower'])
  return vlm, params


def crops():
  """One image of 3 crops in the first row and one in the second, with padding around each."""
  random = np.random.default_rng(1)

  def picture(size):
    pixels = random.normal(size=(3, 16, 16, 3)).astype(np.float32)
    return Picture(pixels, *anyres_layout(size, (16, 32), tile=16, side=SIDE))

  return batch_pictures([[picture((10, 40))], [picture((16, 20)), picture((16, 32))], []],
                        patches=16)


@functools.cache
def program(model, **settings):
  return jax.jit(functools.partial(model.apply, **settings))


def run(vlm, params, images, ids=IDS, valid=VALID, **settings):
  """Results in numpy."""
  return jax.tree.map(np.asarray, program(vlm, **settings)({'params': params}, ids, valid, images))


def look(vlm, params, images):
  """As `run`, up to where the language model begins."""
  return run(vlm, params, images, method='sequence')[1]


def visual_of(out, row, image=0):
  """Features of an image in the sequence."""
  tokens = out['sequence']
  return tokens.x[row][tokens.valid[row] & (tokens.stats['group'][row] == image)]


# The projector.


@pytest.mark.long
@pytest.mark.parametrize('by', ['cls_attention', 'received_attention'])
def test_the_door_keeps_what_the_towers_last_layer_attends_to(by):
  vlm, params = llava()
  reduced = with_projector_reduction(vlm, {'method': 'topk', 'args': {'by': by}, 'keep': 5},
                                     slots=16)
  out = look(reduced, params, squares())
  plain = look(vlm, params, squares())
  # The same attention by the tower alone, asked for by another way.
  tower = vlm.tower.clone(plan=make_plan({'method': 'topk', 'args': {'by': by}, 'site': 'after',
                                              'layers': (1,), 'keep': 5}, vlm.tower.host))
  kept, _ = jax.tree.map(np.asarray, program(tower)({'params': params['tower']},
                                                    squares().pixels.reshape(6, 16, 16, 3)))
  for row, image in ((0, 0), (1, 0), (1, 1)):
    chosen = np.sort(kept.pos[2 * row + image, 1:])
    np.testing.assert_allclose(visual_of(out, row, image),
                               visual_of(plain, row, image)[chosen], atol=1e-6)
  # Positions are those of a shorter prompt.
  assert out['sequence'].valid.sum(axis=1).tolist() == [8, 13, 2]
  assert out['sequence'].pos[1, :13].tolist() == list(range(13))
  assert out['sequence'].slots == 5 + 2 * 5


@pytest.mark.long
def test_a_pool_of_all_images_of_a_prompt():
  vlm, params = llava()
  reduced = with_projector_reduction(vlm,
                                     {'method': 'topk', 'args': {'by': 'cls_attention'}, 'keep': 9,
                              'across': 'prompt'}, slots=32)
  out = look(reduced, params, squares())
  plain = look(vlm, params, squares())
  counts = [len(visual_of(out, 1, image)) for image in (0, 1)]
  assert sum(counts) == 9
  assert out['sequence'].slots == 5 + 9
  for image, count in enumerate(counts):
    every, left = visual_of(plain, 1, image), visual_of(out, 1, image)
    places = [int(np.abs(every - one).sum(axis=1).argmin()) for one in left]
    np.testing.assert_allclose(every[places], left, atol=1e-6)
    assert places == sorted(set(places))
    assert len(places) == count


@pytest.mark.long
def test_a_door_that_keeps_everything_changes_nothing():
  vlm, params = llava()
  wanted, _ = run(vlm, params, squares())
  reduced = with_projector_reduction(vlm, {'method': 'tome', 'keep': 16}, slots=16)
  found, _ = run(reduced, params, squares())
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  assert with_projector_reduction(reduced, {'method': 'none'}, slots=16).projector_reduction is None


@pytest.mark.long
@pytest.mark.parametrize('method', ['tome', 'pitome', 'stride'])
def test_methods_that_join_or_read_keys_act_at_the_door(method):
  vlm, params = llava()
  reduced = with_projector_reduction(vlm, {'method': method, 'keep': 10}, slots=16)
  logits, out = run(reduced, params, squares())
  assert len(visual_of(out, 0)) == 10
  assert np.isfinite(logits).all()


@pytest.mark.long
@pytest.mark.long
def test_a_prompts_words_choose_for_its_own_images():
  vlm, params = llava()
  reduced = with_projector_reduction(vlm, {'method': 'mmtok', 'keep': 5}, slots=16)
  images = squares()
  together = look(reduced, params, images)
  # Shorter, and with other words after the same image.
  alone, other = (run(reduced, params, Images(images.pixels[:1, :1]), method='sequence',
                      ids=np.array([[IMAGE, *words]]), valid=np.ones((1, 4), bool))[1]
                  for words in ((1, 2, 3), (21, 22, 23)))
  np.testing.assert_allclose(visual_of(together, 0), visual_of(alone, 0), rtol=1e-3)
  assert not np.allclose(visual_of(other, 0), visual_of(alone, 0), rtol=0.1)


@pytest.mark.long
def test_a_learned_method_at_the_door_has_parameters_that_train():
  vlm, params = llava()
  reduced = with_projector_reduction(vlm, {'method': 'patchmerger', 'keep': 4}, slots=16)
  fresh = jax.jit(reduced.init)(jax.random.key(0), IDS, VALID, squares())['params']
  assert fresh['reducers'].keys() == {'reducer_01'}

  @functools.partial(jax.grad, has_aux=True)
  def total(own):
    logits, out = reduced.apply({'params': params | {'reducers': own}}, IDS, VALID, squares())
    return jnp.sum(logits), out['sequence'].slots

  slope, slots = jax.jit(total)(fresh['reducers'])
  assert slots == 5 + 2 * 4
  assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(slope)) > 0
  with pytest.raises(ValueError, match=r'patchmerger in layer 1 needs learned parameters'):
    run(reduced, params, squares())


@pytest.mark.long
def test_a_reduction_in_the_tower_leaves_fewer_visual_tokens():
  vlm, params = llava()
  plan = make_plan({'method': 'tome', 'layers': (0, 1), 'remove': 4}, vlm.tower.host)
  out = look(vlm.clone(tower=vlm.tower.clone(plan=plan)), params, squares())
  assert [len(visual_of(out, 1, image)) for image in (0, 1)] == [8, 8]


@pytest.mark.long
def test_crops_lose_tokens_in_their_places_and_newlines_go():
  vlm, params = llava('next')
  plain = look(vlm, params, crops())
  plan = make_plan({'method': 'topk', 'args': {'by': 'cls_attention'}, 'site': 'after',
                    'layers': (1,), 'keep': 7}, vlm.tower.host)
  out = look(vlm.clone(tower=vlm.tower.clone(plan=plan)), params, crops())
  every, left = visual_of(plain, 0), visual_of(out, 0)
  # 16 in small, then two rows of 8 and a newline: the image is half as high as its crops.
  assert every.shape[0] == 16 + 2 * 9
  places = [int(np.abs(every - one).sum(axis=1).argmin()) for one in left]
  np.testing.assert_allclose(every[places], left, atol=1e-5)
  assert places == sorted(set(places))
  assert not {24, 33} & set(places)
  assert sum(place < 16 for place in places) == 7
  assert 7 < len(places) <= 3 * 7


def test_what_a_tower_adds_to_a_crop_stands_where_most_of_it_was():
  """A token made of dropped ones, which others also take in."""
  weights = np.zeros((2, 3, 4), np.float32)
  weights[:, [0, 1], [3, 1]] = 1.0
  weights[0, 0, 2] = weights[0, 2, 2] = 0.4
  weights[1, 2, 0] = 0.3
  valid = np.array([[True, True, True], [True, False, True]])
  x = np.arange(8, dtype=np.float32).reshape(2, 4, 1)
  index = np.arange(8, dtype=np.int32).reshape(1, 1, 8, 1)
  slots, weight = jax.jit(lambda x, weights, valid: reduced_layout(
      reduce(TokenSet.create(x), Mix(weights, valid=valid)), index,
      np.ones(index.shape, np.float32)))(x, weights, valid)
  real = weight[0, 0, :, 0] > 0
  # Of the first crop patches 1, 2 and 3, of the second 0 and 3.
  assert slots[0, 0, :, 0][real].tolist() == [1, 2, 0, 5, 3]


@pytest.mark.long
def test_a_door_behind_crops_pools_patches_and_newlines():
  vlm, params = llava('next')
  images = crops()
  slots = images.index.shape[2]
  reduced = with_projector_reduction(vlm, {'method': 'topk', 'args': {'by': 'cls_attention'},
                                        'keep': 12}, slots=slots)
  out = look(reduced, params, images)
  assert [len(visual_of(out, row, image)) for row, image in ((0, 0), (1, 0), (1, 1))] == [12] * 3
  every = visual_of(look(vlm, params, images), 0)
  left = visual_of(out, 0)
  places = [int(np.abs(every - one).sum(axis=1).argmin()) for one in left]
  np.testing.assert_allclose(every[places], left, atol=1e-5)
  # No patch attends to a newline.
  assert not {24, 33} & set(places)


# Sequences.


@pytest.mark.long
@pytest.mark.parametrize('config', [LLAVA, QWEN], ids=['llava', 'qwen'])
def test_text_alone_needs_no_images(config):
  vlm, params = llava() if config is LLAVA else qwen()
  example = squares() if config is LLAVA else qwen_images()[0]
  logits, out = run(vlm, params, None, IDS[2:, :2], VALID[2:, :2])
  both, beside = run(vlm, params, example)
  np.testing.assert_allclose(logits[0], both[2, :2], atol=1e-5)
  assert out['visual'] is None
  assert (np.asarray(beside['sequence'].kind) == VISUAL).sum(axis=1).tolist() == [
      example.index.shape[2] * 2 if example.index is not None else 32] * 3


@pytest.mark.long
@pytest.mark.parametrize('side', ['left', 'right'])
def test_patches_that_a_tower_merged_are_seen_apart(side):
  """Each patch belongs to the slot of its group, wherever rows are padded; caches hold them all."""
  vlm, params = llava()
  tower = vlm.tower.clone(plan=make_plan({'method': 'tome', 'remove': 5, 'layers': (0, 1)},
                                         vlm.tower.host))
  vlm = vlm.clone(tower=tower, lm=vlm.lm.clone(unmerging='virtual'), pad_side=side)
  out = look(vlm, params, squares())
  tokens, crops = out['sequence'], out['tower_tokens']
  assert (tokens.slots, tokens.places.shape[1]) == (5 + 2 * 6, 5 + 2 * 16)
  for row, images in enumerate([1, 2, 0]):
    real = np.asarray(tokens.real[row])
    owner, place = np.asarray(tokens.owner[row]), np.asarray(tokens.places[row])
    held = owner >= 0
    assert held.sum() == VALID[row].sum() - images + 16 * images
    np.testing.assert_array_equal(np.sort(place[held]), np.arange(held.sum()))
    np.testing.assert_array_equal(np.unique(owner[held]), np.flatnonzero(real))
    text = held & (np.asarray(tokens.kind[row])[owner] == 2)
    assert text.sum() == VALID[row].sum() - images
    first = np.flatnonzero(held)[0] + (row == 1)
    for image in range(images):
      own = owner[first + 16 * image:first + 16 * (image + 1)]
      np.testing.assert_array_equal(own - own.min(), crops.owner[2 * row + image])
  read = functools.partial(run, vlm, params, room=1, method='prefill')
  logits, cache = read(squares())
  assert cache.layers[0].pos.shape == (3, 5 + 2 * 16 + 1)
  pixels = squares().pixels
  for row, length, images in ((0, 4, 1), (1, 5, 2)):
    alone, own = read(Images(pixels[row:row + 1, :images]), IDS[row:row + 1, :length],
                      VALID[row:row + 1, :length])
    np.testing.assert_allclose(logits[row], alone[0], atol=1e-5)
    np.testing.assert_array_equal(own.layers[0].start[0], cache.layers[0].start[row])


@pytest.mark.long
def test_frames_of_a_stream_share_what_has_not_changed():
  """Behind the tower, row by row and frame by frame, and as `TTF` does it by itself."""
  vlm, params = llava()
  params = params | {'tower': jax.tree.map(lambda x: x / 3, params['tower'])}
  rule = TTF(threshold=0.05, attended=3, keyframe_every=4)
  streams = vlm.clone(frames=rule)
  pixels = np.asarray(squares().pixels).repeat(3, axis=1)  # Six frames, each thrice.
  pixels[:, 1, :8, 4:12] += 1.0
  pixels[1, 5, 12:] -= 0.5
  images = Images(pixels)
  ids = np.full((3, 8), IMAGE)
  ids[:, 6:] = [[1, 2], [3, 4], [5, 6]]
  valid = np.ones(ids.shape, bool)
  see = jax.jit(lambda m, ids, valid, images: m.apply(
      {'params': params}, ids, valid, images, method='sequence')[1], static_argnums=0)
  plain, out = see(vlm, ids, valid, images), see(streams, ids, valid, images)
  reused = np.asarray(out['tower']['reused']).reshape(3, 6, -1)[..., -16:]
  # Keyframes renew everything; an equal frame keeps all but what is attended to most.
  assert not reused[:, [0, 4]].any()
  assert (reused[:, 2].sum(axis=1) <= 13).all()
  changed = np.zeros((4, 4), bool)
  changed[:2, 1:3] = True
  assert not reused[:, 1][:, changed.reshape(-1)].any()
  assert reused[:, 1][:, ~changed.reshape(-1)].sum() >= 3 * (12 - 3)
  found = np.asarray(out['tower_tokens'].x).reshape(3, 6, 16, -1)
  new = np.asarray(plain['tower_tokens'].x).reshape(3, 6, 16, -1)
  kept = new[:, 0]
  for frame in range(6):
    kept = np.where(reused[:, frame][..., None], kept, new[:, frame])
    np.testing.assert_allclose(found[:, frame], kept, atol=1e-5)
  alone = see(streams, ids[1:2, [0, 1, 6, 7]], valid[:1, :4], Images(images.pixels[1:2, :2]))
  np.testing.assert_allclose(alone['tower_tokens'].x, found[1, :2], atol=1e-5)
  with pytest.raises(ValueError, match='the tower must be a ViT without windows'):
    streams.clone(tower=vlm.tower.clone(plan=make_plan(
        {'method': 'tome', 'remove': 2, 'layers': 1}, vlm.tower.host)))


@pytest.mark.long
def test_a_joint_budget_of_projector_language_model_and_cache():
  """VisionZip, FastV and SnapKV in one config: FastV takes what the others leave of a budget."""
  vlm, params = llava()
  reduce = {'projector': {'method': 'visionzip', 'keep': 12, 'args': {'contextual': 2}},
            'language': {'method': 'fastv', 'layers': 1, 'flops_ratio': 0.75},
            'cache': {'method': 'snapkv', 'keep': 9, 'args': {'window': 2, 'kernel': 3}}}
  ids, valid, images = IDS[1:2], VALID[1:2], Images(squares().pixels[1:2])
  plans = with_plans(vlm, **reduce, macs=macs_of)
  made = plans(5, images.layout)
  whole, ours = (macs_of(model, 5, images.layout) for model in (vlm, made))
  event, = made.lm.plan.events
  assert 0.6 * whole < ours <= 0.75 * whole
  assert event.slots_in == 5 + 2 * 12 > event.slots_out
  # One token more would be too many; the projector alone is not enough.
  more = with_plans(vlm, **reduce | {'language': {'method': 'fastv', 'layers': 1,
                                                  'keep': event.slots_out - 5 + 1}})
  assert macs_of(more(5, images.layout), 5, images.layout) > 0.75 * whole
  logits, cache = run(made, params, images, ids, valid, room=2, method='prefill')
  assert np.isfinite(logits).all()
  assert [layer.pos.shape[-1] for layer in cache.layers] == [11, 11]
  _, cache = program(made, method='decode')({'params': params}, np.array([3]), cache)
  assert int(cache.steps) == 1


@pytest.mark.long
def test_places_of_frames_merge_in_the_language_model():
  """Frames are the images of a prompt, or the crops of an image."""
  settings = {'method': 'framefusion_merge', 'args': {'threshold': -1.0}, 'layers': (0, 1),
              'keep': (28, 16)}
  vlm, params = llava()
  plan = make_plan(settings, vlm.lm.host(5 + 32, visual=32))
  _, out = run(vlm.clone(lm=vlm.lm.clone(plan=plan)), params, squares())
  group, tokens = out['sequence'].stats['group'][1], out['tokens']
  first, second = (np.asarray(tokens.owner[1])[group == image] for image in (0, 1))
  np.testing.assert_array_equal(first, second)
  assert len(set(first)) == 16
  assert (first >= 0).all()
  np.testing.assert_array_equal(tokens.size[1][first], 2)
  # One frame alone has nothing to merge.
  assert (np.asarray(tokens.owner[0])[out['sequence'].stats['group'][0] == 0] >= 0).all()
  vlm, params = llava('next')
  images = crops()
  slots = 5 + vlm.visual_slots(images.layout)
  plan = make_plan(settings, vlm.lm.host(slots, visual=slots - 5))
  assert 'frame' not in look(vlm, params, images)['sequence'].stats
  sequence = look(vlm.clone(lm=vlm.lm.clone(plan=plan)), params, images)['sequence']
  frame = sequence.stats['frame'][0][sequence.stats['group'][0] == 0]
  np.testing.assert_array_equal(frame[:16], 0)
  # As frames of a video would be, in the order of time.
  np.testing.assert_array_equal(frame[16:], np.repeat([1, 2], (4, 14)))


@pytest.mark.long
def test_features_of_the_tower_join_their_tokens_in_later_layers():
  """Adds features to those that are left, wherever they stand, and whatever pads their row."""
  plain, params = llava()
  vlm = plain.clone(deepstack=((0, 1),), pad_side='left')
  host = vlm.lm.host(5 + 32, visual=32)
  plan = make_plan({'method': 'random', 'site': 'before', 'layers': 1, 'keep_ratio': 0.25}, host)
  lm = vlm.lm.clone(plan=plan, capture=True)
  vlm = vlm.clone(lm=lm)
  logits, out = run(vlm, params, squares())
  tower = np.asarray(program(plain.tower.clone(capture=True))(
      {'params': params['tower']}, squares().pixels.reshape(-1, 16, 16, 3))[1]['hidden'][0])
  without, before = run(vlm.clone(deepstack=()), params, squares())
  assert np.abs(logits - without).max() > 1e-4
  np.testing.assert_array_equal(out['cuts'][1].pos, before['cuts'][1].pos)
  # By hand: what the cut left, and its patches' features of the tower's first layer.
  first, second = (jax.tree.map(np.asarray, params['projector'][name]) for name in ('fc1', 'fc2'))
  deep = tower[:, 1:] @ first['kernel'] + first['bias']
  deep = np.asarray(jax.nn.gelu(deep, approximate=False)) @ second['kernel'] + second['bias']
  deep = deep.reshape(3, 32, 16)
  left = out['cuts'][1]
  x = np.array(left.x)
  for row in range(3):
    for slot in np.flatnonzero(np.asarray(left.real[row] & (left.kind[row] == VISUAL))):
      place = np.flatnonzero(np.asarray(left.owner[row]) == slot)[0]
      group = int(out['sequence'].stats['group'][row, place])
      first = np.flatnonzero(np.asarray(out['sequence'].stats['group'][row]) == group)[0]
      x[row, slot] += deep[row, 16 * group + place - first]
  own = lm.clone(plan=None).bind({'params': params['lm']})
  block = own.stack.block.clone(parent=None)
  layer = {'params': jax.tree.map(lambda p: p[1], params['lm']['stack']['blocks'])}
  want = jax.jit(lambda x: block.apply(layer, left.replace(x=x)).x)(jnp.asarray(x))
  real = np.asarray(left.real)
  np.testing.assert_allclose(np.asarray(out['hidden'][1])[real], np.asarray(want)[real], atol=1e-4)
  with pytest.raises(ValueError, match='nothing may be reduced before'):
    vlm.clone(projector_reduction=with_projector_reduction(
        plain, {'method': 'divprune', 'keep': 4}, slots=16).projector_reduction)
  with pytest.raises(ValueError, match=r'deepstack has layers \(0, 9\)'):
    plain.clone(deepstack=((0, 9),))


@pytest.mark.long
def test_images_see_the_question_and_not_the_answer():
  vlm, params = llava()
  vlm = vlm.clone(lm=vlm.lm.clone(mask='mutual'))
  answered = np.array(IDS)
  answered[1, 4] = 9
  question = (np.arange(5) < 4)[None] & VALID

  def moved(*marks):
    (first, out), (second, _) = (jax.tree.map(np.asarray, program(vlm)(
        {'params': params}, ids, VALID, squares(), *marks)) for ids in (IDS, answered))
    apart = np.abs(first - second)[1].max(axis=1) > 1e-6
    return np.flatnonzero(apart & out['sequence'].valid[1])

  # Two images of 16 tokens behind one of text; the answer is the last of two behind them.
  np.testing.assert_array_equal(moved({'question': question}), [34])
  np.testing.assert_array_equal(moved(), np.arange(1, 35))


def test_rows_do_not_touch_each_other():
  vlm, params = llava()
  images = squares()
  wanted, out = run(vlm, params, images)
  real = out['sequence'].valid[0]
  # Other rows' images, and one that no placeholder asks for.
  for place in (np.s_[1:], np.s_[0, 1]):
    other = images.pixels.copy()
    other[place] = 1e3
    found, _ = run(vlm, params, Images(other))
    np.testing.assert_allclose(found[0][real], wanted[0][real], atol=1e-5)


def qwen_images(grid=(8, 8), fill=0.0):
  """An image of 6 x 4 patches; one of 4 x 8 and one of 2 x 2; none. And the pictures themselves."""
  random = np.random.default_rng(2)
  made = []
  for rows, columns in ((6, 4), (4, 8), (2, 2)):
    patches = np.full((1, *grid, 3 * 2 * 4), fill, np.float32)
    patches[0, :rows, :columns] = random.normal(size=(rows, columns, 24))
    index, axes, extent = cell_layout(1, (rows // 2, columns // 2), grid[1] // 2,
                                       grid[0] * grid[1] // 4)
    made.append(Picture(patches, index, np.ones(index.shape, np.float32),
                               np.int32([[rows, columns]]), axes, extent))
  rows = [made[:1], made[1:], []]
  return batch_pictures(rows, patches=grid[0] * grid[1] // 4), rows


@functools.cache
def qwen(grid=(8, 8)):
  vlm = from_config(QWEN, grid=grid)
  init = jax.jit(from_config(QWEN, grid=(8, 8)).init)
  params = init(jax.random.key(1), IDS, VALID, qwen_images()[0])['params']
  return vlm, params


@pytest.mark.long
def test_an_images_grid_and_what_pads_it_do_not_matter():
  vlm, params = qwen()
  out = look(vlm, params, qwen_images()[0])['sequence']
  for grid, fill in (((8, 8), 1e3), ((12, 16), 0.0)):
    found = look(qwen(grid)[0], params, qwen_images(grid, fill)[0])['sequence']
    np.testing.assert_array_equal(found.valid, out.valid)
    np.testing.assert_array_equal(found.pos, out.pos)
    np.testing.assert_allclose(found.x, out.x, atol=2e-5)


@pytest.mark.long
def test_positions_survive_a_door_and_text_stays_where_it_was():
  vlm, params = qwen()
  images, _ = qwen_images()
  plain = look(vlm, params, images)
  reduced = with_projector_reduction(vlm, {'method': 'topk', 'args': {'by': 'received_attention'},
                                        'keep': 3},
                                  slots=images.index.shape[2])
  out = look(reduced, params, images)
  for row, image, count in ((0, 0, 3), (1, 0, 3), (1, 1, 1)):
    every, left = (visual_of(each, row, image) for each in (plain, out))
    assert len(left) == min(count, len(every))
    places = [int(np.abs(every - one).sum(axis=1).argmin()) for one in left]

    def axes(each, row=row, image=image):
      tokens = each['sequence']
      here = np.asarray(tokens.valid[row] & (tokens.stats['group'][row] == image))
      return np.asarray(tokens.pos[row])[here][:, 1:]

    np.testing.assert_array_equal(axes(out), axes(plain)[places])
  # The text behind the images.
  for row in (0, 1):
    last = [int(each['slot'][row][VALID[row]][-1]) for each in (plain, out)]
    assert (plain['sequence'].pos[row, last[0], 1:] == out['sequence'].pos[row, last[1], 1:]).all()
    assert last[0] > last[1]


@pytest.mark.long
@pytest.mark.parametrize('window', [0, 4])
def test_patches_may_be_merged_inside_a_qwen_tower(window):
  vlm, params = qwen()
  tower = vlm.tower.clone(window=window, whole_layers=(1,) if window else ())
  plan = make_plan({'method': 'tome', 'layers': (0, 1), 'keep': (32, 16)}, tower.host)
  images, _ = qwen_images()
  pixels, sizes = (each.reshape(-1, *each.shape[2:]) for each in (images.pixels, images.sizes))
  tokens, out = program(tower.clone(plan=plan))({'params': params['tower']}, pixels, sizes)
  assert out['tokens'].slots == 16
  assert tokens.slots == 16
  # Every cell keeps some patch of its own, for merging drops none.
  assert np.asarray(tokens.valid).sum(axis=1).tolist()[:1] == [6]
  assert np.isfinite(tokens.x).all()
  whole, _ = program(tower)({'params': params['tower']}, pixels, sizes)
  assert np.abs(np.asarray(whole.x) - tokens.x).max() > 1e-3


# Errors.


@pytest.mark.parametrize(('config', 'message'), [
    ({'method': 'topk', 'keep': 4, 'site': 'before'}, 'leave site, layers and expand out'),
    ({'method': 'topk', 'keep': 4, 'expand': 0}, 'leave site, layers and expand out'),
    ({'method': 'topk', 'keep': 4, 'across': 'batch'}, 'choose one of image, prompt'),
    ({'method': 'topk', 'keep': 4, 'order': 'random'}, 'choose one of raster, method'),
    ({'method': 'fastv', 'keep': 4}, 'which this host does not offer'),
])
def test_projector_reductions_that_cannot_be(config, message):
  with pytest.raises(ValueError, match=message):
    with_projector_reduction(llava()[0], config, slots=16)


def test_one_place_reads_the_tower_at_a_time():
  vlm, params = llava()
  plan = make_plan({'method': 'tome', 'remove': 2}, vlm.tower.host)
  reduced = vlm.clone(tower=vlm.tower.clone(plan=plan))
  with pytest.raises(ValueError, match='reduce at one of the two places'):
    with_projector_reduction(reduced, {'method': 'topk', 'keep': 4}, slots=16)
  with pytest.raises(ValueError, match='made for 20 visual tokens and gets 16'):
    run(with_projector_reduction(vlm, {'method': 'tome', 'keep': 12}, slots=20), params, squares())


def test_models_that_cannot_be():
  with pytest.raises(ValueError, match='known are llava'):
    from_config({'model_type': 'blip'})
  with pytest.raises(ValueError, match=r'vision_feature_layer=\[-2, -1\] must be a whole number'):
    from_config(LLAVA | {'vision_feature_layer': [-2, -1]})
  tower = QwenVision(width=8, depth=1, mlp=8, heads=1, projection=8, grid=(6, 8), patch=2, window=4)
  with pytest.raises(ValueError, match='must be a multiple of 4'):
    tower.init(jax.random.key(0), np.zeros((1, 6, 8, 24)), np.zeros((1, 2), int))
  with pytest.raises(ValueError, match='do not fit: expected'):
    tower.init(jax.random.key(0), np.zeros((1, 8, 8, 24)), np.zeros((1, 2), int))


@pytest.mark.long
def test_images_need_positions_along_the_models_axes():
  vlm, params = qwen()
  images = qwen_images()[0].replace(axes=None, extent=None)
  with pytest.raises(ValueError, match='positions along 0 axes and the model takes 3'):
    run(vlm, params, images)


@pytest.mark.parametrize(('name', 'billions', 'tokens'), [
    ('llava1.5_7b', 7.06, 576), ('llava_onevision_7b', 8.03, 729), ('qwen2_vl_2b', 2.21, 256),
    ('qwen2.5_vl_7b', 8.29, 256)])
def test_released_models_have_their_sizes(name, billions, tokens):
  vlm = make_vlm(name)
  count = sum(int(np.prod(shape)) for shape in checkpoints._shapes(vlm).values())
  assert count / 1e9 == pytest.approx(billions, abs=0.01)
  side = vlm.tower.grid if vlm.projection else vlm.tower.cells
  assert side[0] * side[1] == tokens


def test_an_unknown_name_lists_what_there_is():
  with pytest.raises(ValueError, match=r"did you mean 'llava1\.5_7b'"):
    make_vlm('llava_1.5_7b')


@pytest.mark.long
def test_neighbouring_patches_become_one_token():
  """Brings patches of a tower that merges or drops some back to their places first."""
  vlm, _ = llava()
  vlm = vlm.clone(side=2)
  images = squares()
  params = jax.jit(vlm.init)(jax.random.key(0), IDS, VALID, images)['params']
  features = params['projector']['fc1']['kernel'].shape[0]
  assert features == 4 * vlm.tower.width
  assert params['projector']['norm']['scale'].shape == (features,)

  def run(vlm):
    return jax.jit(lambda params: vlm.apply({'params': params}, images, method='encode_images'))(
        params)

  visual, _, aux = run(vlm)
  assert visual.x.shape == (3, 2, 4, 16)
  assert vlm.visual_slots(images.layout) == 2 * 4
  # Token 1 is of the upper right corner: rows 0 and 1, columns 2 and 3 of a grid of 4 x 4.
  tokens, _ = vlm.tower.apply({'params': params['tower']}, images.pixels.reshape(-1, 16, 16, 3))
  tokens = tokens if hasattr(tokens, 'x') else _['tokens']
  patches = tokens.x[:, vlm.special:].reshape(6, 4, 4, -1)
  joined = patches[:, [0, 0, 1, 1], [2, 3, 2, 3]].reshape(6, -1)
  wanted = vlm.bind({'params': params}).projector(joined)
  np.testing.assert_allclose(visual.x.reshape(6, 4, -1)[:, 1], wanted, atol=1e-5)
  assert aux['layout'] is None
  for settings, changed in (({'method': 'tome', 'remove': 2}, True), ({}, False)):
    vision = settings and {**settings, 'layers': (0,)}
    reduced = with_plans(vlm, vision=vision or None)(5, images.layout)
    found = run(reduced)[0].x
    assert found.shape == visual.x.shape
    assert (np.abs(found - visual.x).max() > 1e-4) == changed
  # What is cut at the projector is cut of the joined tokens.
  reduced = with_plans(vlm, projector={'method': 'topk', 'keep': 3})(5, images.layout)
  assert run(reduced)[0].x.shape == (3, 2, 3, 16)
  with pytest.raises(ValueError, match='must divide both'):
    vlm.clone(side=3)
