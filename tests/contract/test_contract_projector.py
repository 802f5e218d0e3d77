"""Methods behind the projector against the same cut in the tower: new ones are tested by existing.

The models have no projector (`projection=''`), so that features are those of the tower, and every
method that can act in both places must keep the same tokens in both.

Axes: B batch, C crops of a row, I images of a row, N slots, V visual tokens of an image, H heads.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contract
from helpers.invariants import close

from lib.data.pictures import Picture, batch_pictures
from lib.data.token_layout import anyres_layout, cell_layout, raster_layout, video_layout
from models.backbones.qwen_vision import RotaryBlock
from models.checkpoints.vlm_config import from_config
from models.plan import make_plan, methods
from models.projector import FROM_TOWER, PER_TOKEN
from models.reduce_config import with_projector_reduction
from ops.primitives.select import keep_top
from ops.reducers import REDUCERS
from ops.reducers.base import Reducer
from ops.signals import AXES, CROP_SIGNALS, TEXT_SIGNALS
from ops.tokens import SPECIAL, TokenSet

SIDE, PATCHES, KEEP, LAST = 4, 16, 6, 1
TEXT = {'model_type': 'llama', 'vocab_size': 40, 'hidden_size': 16, 'intermediate_size': 24,
        'num_hidden_layers': 1, 'num_attention_heads': 2}
CLIP = {'model_type': 'clip_vision_model', 'hidden_size': 16, 'intermediate_size': 24,
        'num_hidden_layers': 3, 'num_attention_heads': 2, 'image_size': 16, 'patch_size': 4}
LLAVA = {'model_type': 'llava', 'text_config': TEXT, 'vision_config': CLIP, 'image_token_id': 30}
QWEN = {'model_type': 'qwen2_5_vl', 'image_token_id': 30,
        'text_config': TEXT | {'num_key_value_heads': 2, 'rope_scaling': {
            'type': 'mrope', 'mrope_section': [1, 1, 2]}},
        'vision_config': {'hidden_size': 16, 'intermediate_size': 24, 'out_hidden_size': 16,
                          'depth': 2, 'num_heads': 2, 'patch_size': 2, 'window_size': 8,
                          'fullatt_block_indexes': [0, 1]}}
TOWERS = {'cls': {}, 'registers': {'registers': 2},
          'no_cls': {'class_token': False, 'pool': 'mean'}}
# Settings of those that go by crops.
CROPWISE = {'hired': {}, 'globalcom2': {}, 'dc2': {}, 'vflowopt': {'over': 'crops', 'cell': 2.5}}
# Those that go by frames.
FRAMEWISE = ('evs', 'vidcom2', 'dycoke', 'fastvid', 'holitom', 'prunevid', 'framefusion')
# Those that read the attention of a whole sequence.
RELATIONAL = ('prumerge', 'flowcut', 'vid_tldr', 'crossget')


def squares(crops=2):
  """Rows of two images and one, each a crop of 16 x 16 pixels."""
  random = np.random.default_rng(0)
  rows = [[Picture(random.normal(size=(1, 16, 16, 3)).astype(np.float32), *raster_layout(PATCHES))
           for _ in range(count)] for count in (crops, 1)]
  return batch_pictures(rows, patches=PATCHES)


def crops():
  """An image of three crops in the first row, with padding around it, and one in the second."""
  random = np.random.default_rng(1)

  def picture(size):
    pixels = random.normal(size=(3, 16, 16, 3)).astype(np.float32)
    return Picture(pixels, *anyres_layout(size, (16, 32), tile=16, side=SIDE), tiling=(1, 2))

  return batch_pictures([[picture((10, 40))], [picture((16, 32))]], patches=PATCHES)


def clips():
  """A video of three frames in the first row, and one of a single frame in the second."""
  random = np.random.default_rng(4)
  rows = [[Picture(random.normal(size=(frames, 16, 16, 3)).astype(np.float32),
                   *video_layout(frames, SIDE))] for frames in (3, 1)]
  return batch_pictures(rows, patches=PATCHES)


def made(tower, kind='llava'):
  """A model whose features are those of its tower."""
  vlm = from_config(LLAVA | {'model_type': kind})
  return vlm.clone(projection='', tower=vlm.tower.clone(**TOWERS[tower]))


@functools.cache
def random_params(vlm, images_of, *prompt):
  """Parameters of tower, projector and newline, none of them zero; with a prompt of embeddings."""
  init = functools.partial(vlm.init, method='sequence' if prompt else 'encode_images')
  shapes = jax.eval_shape(init, jax.random.key(0), *map(np.array, prompt), images_of())
  random = np.random.default_rng(3)
  return jax.tree.map(lambda leaf: random.normal(0, 1, leaf.shape).astype(np.float32), shapes)


def pixels(images):
  return images.pixels.reshape(-1, *images.pixels.shape[2:])


def in_tower(tower, images, params, config):
  """Applies the same cut in the last layer of the tower that runs: its dict."""
  plan = make_plan(config | {'site': 'after', 'layers': (LAST,)}, tower.host)
  return tower.clone(plan=plan).apply({'params': params['params']['tower']}, pixels(images))[1]


def behind(vlm, images, params, config, slots):
  """Applies a reduction behind the projector: the TokenSet that it leaves."""
  reduced = with_projector_reduction(vlm, config, slots=slots)
  return reduced.apply(params, images, method='encode_images')[2]['projector']


# Every method.


def names(tower):
  """Methods that can act behind the projector of a model with this tower, and in it."""
  vlm = made(tower)
  return [name for name, method in methods(vlm.projector_host(PATCHES)).items()
          if contract.method(name).needs <= vlm.tower.host.offers
          and name != 'none' and not issubclass(method, nn.Module)]


def left(tokens, row):
  """Positions, sizes and features of a row's visual tokens, in the order of their positions."""
  here = np.asarray(tokens.real[row] & (tokens.kind[row] != SPECIAL))
  pos = np.asarray(tokens.pos[row])[here]
  order = np.argsort(pos, kind='stable')
  return (pos[order], *(np.asarray(part[row])[here][order] for part in (tokens.sizes, tokens.x)))


def check(name, tower, **args):
  """Asserts that a method leaves the same tokens in both places."""
  vlm, images = made(tower), squares()
  config = {'method': name, 'args': contract.SETTINGS.get(name, {}) | args,
            'keep': contract.budget(name, PATCHES, KEEP, 0)}

  @jax.jit
  def run(params):
    cut = in_tower(vlm.tower, images, params, config)['cuts'][LAST]
    return cut, behind(vlm, images, params, config, PATCHES)

  inside, outside = run(random_params(vlm, squares))
  # The second image of the second row is not there.
  for row in range(3):
    (pos, *values), (wanted, *others) = left(outside, row), left(inside, row)
    np.testing.assert_array_equal(pos, wanted)
    assert 0 < len(pos) < PATCHES
    for value, other in zip(values, others, strict=True):
      # Two programs: entropies of attention, which vid_tldr weighs by, magnify their rounding.
      np.testing.assert_allclose(value, other, atol=5e-4, rtol=5e-4)


@pytest.mark.long
@pytest.mark.parametrize(('tower', 'name'), [
    *(('cls', name) for name in names('cls')),
    *(('no_cls', name) for name in ('crossget', 'tome', 'divprune', 'hiprune', 'vflowopt'))])
def test_every_method_keeps_what_the_same_cut_in_the_tower_keeps(tower, name):
  if (tower, name) == ('no_cls', 'crossget'):
    with pytest.raises(ValueError, match='a special token, of which this host has none'):
      check(name, tower)
    return
  check(name, tower)


@pytest.mark.long
@pytest.mark.parametrize('name', ['prumerge', 'flowcut'])
def test_cls_rows_are_those_of_the_tower(name):
  check(name, 'cls')


@pytest.mark.long
def test_queries_of_visiontrim_are_those_of_the_tower():
  check('visiontrim', 'cls', variant='release')


def test_all_methods_are_there():
  """The tests above would pass without any."""
  assert {'prumerge', 'flowcut', 'visionzip', 'vtc_cls', 'hiprune', 'tome', 'vid_tldr', 'crossget',
          'pool', 'divprune', 'evit', 'ats'} <= set(names('cls')) == set(names('registers'))
  assert {'tome', 'vid_tldr', 'divprune'} <= set(names('no_cls'))
  assert not {'prumerge', 'flowcut', 'topk'} & set(names('no_cls'))


# What methods are given.


CALLS = []


@dataclasses.dataclass(frozen=True)
class Spy(Reducer):
  """Remembers the tokens and signals of its calls.

  Attributes:
    names: signals that it asks for.
  """

  names: tuple[str, ...] = ()
  drops = 'pruning drops tokens'

  @property
  def needs(self):
    return frozenset(self.names)

  def __call__(self, tokens, signals, *, num_slots):
    made = signals.project and signals.project(signals.vision_features)
    CALLS.append((tokens, signals.replace(project=None), made))
    return keep_top(tokens, jnp.zeros(tokens.x.shape[:2]), num_slots=num_slots)


@pytest.fixture
def spy(monkeypatch):
  """(function(config, params), names, params) -> tokens and signals that a spy in it gets."""
  monkeypatch.setitem(REDUCERS, 'spy', Spy)

  def run(function, names, params):
    @jax.jit
    def seen(params):
      CALLS.clear()
      function({'method': 'spy', 'args': {'names': tuple(sorted(names))}, 'keep': 5}, params)
      call, = CALLS
      return call if 'project' in names else call[:2]

    return seen(params)

  return run


def attention_last(name, value):
  """A signal with its slots in axis 1."""
  return np.asarray(jnp.swapaxes(value, 1, 2) if AXES.get(name) == ('B', 'H', 'N') else value)


@pytest.mark.long
@pytest.mark.parametrize('tower', TOWERS)
def test_signals_of_a_crop_are_all_that_the_tower_has(tower, spy):
  vlm, images = made(tower), squares()
  params, host = random_params(vlm, squares), vlm.projector_host(PATCHES)
  wanted = set(FROM_TOWER) - ({'cls_attention', 'cls_logits'} if tower == 'no_cls' else set())
  assert host.offers == wanted | TEXT_SIGNALS | CROP_SIGNALS | {
      'grid', 'layer', 'depth', 'slots', 'one_sequence'}
  tokens, signals = spy(lambda config, params: behind(vlm, images, params, config, PATCHES), wanted,
                        params)
  inside, measured = spy(lambda config, params: in_tower(vlm.tower, images, params, config), wanted,
                         params)
  rows = np.array([0, 1, 2])  # The fourth image is not there.
  for name in wanted:
    np.testing.assert_allclose(getattr(signals, name)[rows], getattr(measured, name)[rows],
                               atol=1e-6)
  for name in ('x', 'pos', 'kind', 'real'):
    np.testing.assert_allclose(getattr(tokens, name)[rows], getattr(inside, name)[rows], atol=1e-5)
  assert tokens.protected == inside.protected == vlm.tower.special
  for name in ('grid', 'layer', 'depth', 'slots', 'one_sequence'):
    assert getattr(signals, name) == getattr(measured, name)
  assert not tokens.real[3, tokens.protected:].any()


def laid_out(images, name, value, special):
  """A signal [B * C, S + n, ...] of the tower as `Images` lays patches out, zeros at newlines."""
  value = attention_last(name, value)[:, special:]
  (batch, images_of_row, visual, _), each = images.index.shape, value.shape[1]
  flat = value.reshape(batch, -1, *value.shape[2:])
  flat = np.concatenate([flat, np.zeros_like(flat[:, :1])], axis=1)
  index, weight = np.asarray(images.index), np.asarray(images.weight)
  assert index.max() <= flat.shape[1] - 1
  assert flat.shape[1] - 1 == images.pixels.shape[1] * each
  parts = flat[np.arange(batch)[:, None, None, None], index]
  parts = parts * weight.reshape(weight.shape + (1,) * (parts.ndim - 4))
  return parts.sum(axis=3).reshape(batch, images_of_row * visual, *value.shape[2:])


@pytest.mark.long
@pytest.mark.parametrize('case', ['crops', 'prompt'])
def test_signals_of_several_crops_are_each_crops_own(case, spy):
  vlm = made('cls', 'llava_next' if case == 'crops' else 'llava')
  images_of = crops if case == 'crops' else squares
  images, params = images_of(), random_params(vlm, images_of)
  slots = images.index.shape[2] * images.index.shape[1]
  host = vlm.projector_host(slots)
  assert host.offers == {*PER_TOKEN, *TEXT_SIGNALS, *CROP_SIGNALS, 'layer', 'depth', 'slots'}
  across = {'across': 'prompt', 'order': 'method'} if case == 'prompt' else {}
  tokens, signals = spy(lambda config, params: behind(vlm, images, params, config | across, slots),
                        PER_TOKEN, params)
  _, measured = spy(lambda config, params: in_tower(vlm.tower, images, params, config), PER_TOKEN,
                    params)
  assert not signals.one_sequence
  assert (tokens.kind != SPECIAL).all()
  for name in PER_TOKEN:
    np.testing.assert_allclose(
        attention_last(name, getattr(signals, name)),
        laid_out(images, name, getattr(measured, name), vlm.tower.special), atol=1e-6)


@pytest.mark.long
def test_tokens_know_the_crop_that_they_are_of(spy):
  vlm, names = made('cls', 'llava_next'), CROP_SIGNALS
  images, params = crops(), random_params(vlm, crops)
  slots = images.index.shape[2]
  _, found = spy(lambda config, params: behind(vlm, images, params, config, slots), names, params)
  assert found.crop_grid == (SIDE, SIDE)
  assert found.num_crops == 3
  np.testing.assert_array_equal(found.tiling, [[1, 2], [1, 2]])
  # Of the first image's crops four rows of padding are left out, of the second's none.
  there, newline = np.asarray(images.weight)[:, 0, :, 0] > 0, found.crop < 0
  assert newline.sum(axis=1, where=there).tolist() == [2, 4]
  for row, rows in enumerate((2, 4)):
    real = there[row] & ~newline[row]
    counts = np.bincount(found.crop[row][real]).tolist()
    assert counts == [PATCHES, rows * SIDE, rows * SIDE]
    source = found.crop[row] * PATCHES + found.patch[row]
    np.testing.assert_array_equal(source[real], images.index[row, 0, :, 0][real])


def test_frames_are_crops_and_their_order_is_the_place(spy):
  vlm, params = made('no_cls', 'llava_next'), random_params(made('no_cls', 'llava_next'), clips)
  images, names = clips(), CROP_SIGNALS - {'tiling'}
  slots = images.index.shape[2]
  tokens, found = spy(lambda config, params: behind(vlm, images, params, config, slots), names,
                      params)
  assert (found.num_crops, found.crop_grid) == (3, (SIDE, SIDE))
  real = np.asarray(tokens.real)
  frames = [np.asarray(found.crop[row])[real[row]].tolist() for row in range(2)]
  assert frames == [[0] * 4 + [1] * 4 + [2] * 4 + [-1], [0] * 4 + [-1]]


@pytest.mark.long
def test_frames_of_merged_patches_are_rows_of_the_tower(spy):
  vlm = from_config(QWEN, grid=(8, 8))
  rows = []
  for number, (frames, size) in enumerate([(2, (2, 3)), (1, (4, 1))]):
    index, axes, extent = cell_layout(frames, size, 4, 16)
    patches = np.random.default_rng(number).normal(size=(frames, 8, 8, 24)).astype(np.float32)
    sizes = np.int32([np.multiply(size, 2)] * frames)
    rows.append([Picture(patches, index, np.ones(index.shape, np.float32), sizes, axes, extent)])
  images = batch_pictures(rows, patches=16)
  slots = images.index.shape[2]
  tokens, found = spy(lambda config, params: behind(vlm, images, params, config, slots),
                      CROP_SIGNALS - {'tiling'}, random_params(vlm, lambda: images))
  assert (found.num_crops, found.crop_grid) == (2, (4, 4))
  there = np.asarray(tokens.real)
  assert np.asarray(found.crop)[0][there[0]].tolist() == [0] * 6 + [1] * 6
  assert np.asarray(found.crop)[1][there[1]].tolist() == [0] * 4
  assert np.asarray(found.patch)[0][there[0]].tolist() == [0, 1, 2, 4, 5, 6] * 2
  with pytest.raises(ValueError, match='hired needs'):
    with_projector_reduction(vlm, {'method': 'hired', 'keep': 4}, slots=slots)
  dropping = vlm.clone(tower=vlm.tower.clone(plan=make_plan(
      {'method': 'tome', 'keep': 32, 'layers': 0, 'site': 'after'}, vlm.tower.host)))
  with pytest.raises(ValueError, match='evs needs crop'):
    with_projector_reduction(dropping, {'method': 'evs', 'keep': 4}, slots=slots)


@pytest.mark.long
def test_crops_of_several_images_share_no_budget():
  vlm, images = made('cls'), squares()
  with pytest.raises(ValueError, match=r"hired goes by the crops .* set across='image'"):
    behind(vlm, images, random_params(vlm, squares),
           {'method': 'hired', 'keep': 8, 'across': 'prompt'}, 2 * PATCHES)


@pytest.mark.long
@pytest.mark.parametrize(('name', 'images_of'), [
    *((name, crops) for name in CROPWISE), *((name, clips) for name in FRAMEWISE)])
def test_crops_have_budgets_whatever_else_is_in_the_batch(name, images_of):
  vlm, images = made('cls', 'llava_next'), images_of()
  params, slots = random_params(vlm, images_of), images.index.shape[2]

  @jax.jit
  def run(images):
    return behind(vlm, images, params, {'method': name, 'keep_ratio': 0.5,
                                        'args': CROPWISE.get(name, {})}, slots)

  both = run(images)
  for row in range(2):
    alone = run(jax.tree.map(lambda leaf, row=row: leaf[row:row + 1], images))
    for found, wanted in zip(left(alone, 0), left(both, row), strict=True):
      close(found, wanted)
    assert (1 if row else 4) < len(left(alone, 0)[0]) <= (slots + 1) // 2


WORDS = np.array([[30, 1, 2, 3, 30, 9], [4, 5, 30, 0, 0, 0]])
REAL = np.arange(6) < np.array([[6], [3]])


def spied(spy, vlm, images_of, names, slots, marks=None):
  """Tokens and signals that a method behind the projector gets, and what `project` makes."""
  params = random_params(vlm, images_of, ((30,),), ((True,),))

  def function(config, params):
    with_projector_reduction(vlm, config, slots=slots).apply(
        params, WORDS, REAL, images_of(), marks, method='sequence')

  return params['params'], spy(function, names, params)


def test_the_prompts_text_is_that_of_its_row(spy):
  vlm, names = from_config(LLAVA), TEXT_SIGNALS
  params, (_, found) = spied(spy, vlm, squares, names, PATCHES)
  table = np.asarray(params['lm']['table'])
  wanted = REAL & (WORDS != 30)
  assert wanted.sum(axis=1).tolist() == [4, 2]
  # Two images a row, one after the other.
  np.testing.assert_array_equal(found.text_valid, np.repeat(wanted, 2, axis=0))
  np.testing.assert_allclose(
      found.text, np.repeat(np.where(wanted[..., None], table[WORDS], 0), 2, axis=0), atol=1e-6)
  asked = WORDS == 2
  _, (_, found) = spied(spy, vlm, squares, names, PATCHES, marks={'question': asked})
  np.testing.assert_array_equal(found.text_valid, np.repeat(asked, 2, axis=0))
  assert (np.asarray(found.text)[~np.repeat(asked, 2, axis=0)] == 0).all()


@pytest.mark.parametrize('case', ['squares', pytest.param('crops', marks=pytest.mark.long)])
def test_vision_features_are_what_the_projector_gets(case, spy):
  vlm = from_config(LLAVA | {'model_type': 'llava' if case == 'squares' else 'llava_next'})
  images_of = squares if case == 'squares' else crops
  images = images_of()
  slots = PATCHES if case == 'squares' else images.index.shape[2]
  names = {'vision_features', 'project'} | ({'queries'} if case == 'squares' else set())
  params, (tokens, found, made) = spied(spy, vlm, images_of, names, slots)
  tower, _ = jax.jit(vlm.tower.apply)({'params': params['tower']}, pixels(images))
  features = tower.x[:, 0 if case == 'squares' else vlm.special:]
  if case == 'squares':
    # The fourth image is not there.
    np.testing.assert_allclose(found.vision_features[:3], features[:3], rtol=1e-5)
    np.testing.assert_allclose(made[:3], tokens.x[:3], rtol=1e-5)
  else:
    wanted = laid_out(images, '', features, 0)
    np.testing.assert_allclose(found.vision_features.reshape(wanted.shape), wanted, atol=1e-6)


@pytest.mark.parametrize('needs', ['text', 'project', 'vision_features'])
def test_hosts_without_text_or_projector_refuse(needs, monkeypatch):
  monkeypatch.setitem(REDUCERS, 'spy', Spy)
  config = {'method': 'spy', 'args': {'names': (needs,)}, 'keep': 4}
  hosts = [from_config(LLAVA).tower.host, from_config(LLAVA).lm.host(20, visual=8)]
  if needs != 'text':
    hosts.append(from_config(QWEN, grid=(8, 8)).projector_host(PATCHES))
  for host in hosts:
    with pytest.raises(ValueError, match=f'spy needs {needs}, which this host does not') as error:
      make_plan(config | {'layers': 0, 'site': 'after'}, host)
    assert '\n' not in str(error.value)
  if needs == 'text':
    vlm = with_projector_reduction(from_config(LLAVA), config, slots=PATCHES)
    with pytest.raises(ValueError, match='spy at the projector reads the prompt'):
      jax.eval_shape(functools.partial(vlm.init, method='encode_images'), jax.random.key(0),
                     squares())


@pytest.mark.parametrize('name', RELATIONAL)
def test_attention_over_several_crops_is_not_made_up(name):
  for vlm, slots in ((made('cls'), 2 * PATCHES), (made('cls', 'llava_next'), 40)):
    with pytest.raises(ValueError, match=f'{name} needs (queries|one_sequence), which this host '
                                         'does not offer') as error:
      with_projector_reduction(vlm, {'method': name, 'keep': 9}, slots=slots)
    assert '\n' not in str(error.value)
  crossget = {'method': 'crossget', 'args': {'form': 'attention'}, 'keep': 9}
  with pytest.raises(ValueError, match='crossget needs one_sequence'):
    with_projector_reduction(made('cls', 'llava_next'), crossget, slots=40)


def image_of_cells():
  """A model of merged patches without windows, and an image of 3 x 4 cells."""
  vlm = from_config(QWEN, grid=(8, 8))
  vlm = vlm.clone(tower=vlm.tower.clone(window=0, whole_layers=()))
  index, axes, extent = cell_layout(1, (3, 4), 4, 16)
  patches = np.zeros((1, 8, 8, 24), np.float32)
  patches[0, :6, :8] = np.random.default_rng(2).normal(size=(6, 8, 24))
  picture = Picture(patches, index, np.ones(index.shape, np.float32), np.int32([[6, 8]]), axes,
                    extent)
  images = batch_pictures([[picture]], patches=16)
  return vlm, images


@pytest.mark.long
def test_signals_of_merged_patches_are_means_of_their_cells(spy):
  vlm, images = image_of_cells()
  params = random_params(vlm, lambda: images)
  wanted = {'keys', 'plain_keys', 'values', 'received_attention'}
  slots = images.index.shape[2]
  assert vlm.projector_host(slots).offers == wanted | TEXT_SIGNALS | CROP_SIGNALS - {'tiling'} | {
      'layer', 'depth', 'slots', 'grids'}
  _, signals = spy(lambda config, params: behind(vlm, images, params, config, slots), wanted,
                   params)

  def tower(config, params):
    plan = make_plan(config | {'site': 'after', 'layers': (LAST,)}, vlm.tower.host)
    vlm.tower.clone(plan=plan).apply({'params': params['params']['tower']}, pixels(images),
                                     images.sizes.reshape(-1, 2))

  _, measured = spy(tower, wanted, params)
  for name in wanted:
    patchwise = attention_last(name, getattr(measured, name))[0].reshape(4, 2, 4, 2, -1)
    cells = patchwise[:3].mean(axis=(1, 3)).reshape(12, -1)
    np.testing.assert_allclose(
        attention_last(name, getattr(signals, name))[0].reshape(slots, -1)[:12], cells, atol=1e-6)


@pytest.mark.long
def test_images_of_any_size_tell_their_own_grid(spy):
  vlm, images = image_of_cells()
  params, slots = random_params(vlm, lambda: images), images.index.shape[2]
  _, signals = spy(lambda config, params: behind(vlm, images, params, config, slots), {'grids'},
                   params)
  np.testing.assert_array_equal(signals.grids, [[3, 4]])
  config = {'method': 'hiprune', 'args': {'grid': 'own', 'middle': 0}, 'keep': 5}
  reduced = with_projector_reduction(vlm, config, slots=slots)
  assert reduced.tower.plan.only.watch == (0, 1)
  tokens = jax.jit(lambda params: behind(vlm, images, params, config, slots))(params)
  assert int(tokens.real.sum()) == 5
  with pytest.raises(ValueError, match='hiprune needs grids, which this host does not offer'):
    with_projector_reduction(vlm, config | {'across': 'prompt'}, slots=slots)


def test_keys_of_a_tower_with_rotary_positions_are_told_as_they_were():
  """Turned back, and the same as those of a tower that turns nothing."""
  vlm, _ = image_of_cells()
  block = RotaryBlock(16, 2, 24, parent=None)
  rng = np.random.default_rng(0)
  plain = rng.normal(size=(2, 5, 2, 8)).astype(np.float32)
  tokens = TokenSet.create(jnp.zeros((2, 5, 16)),
                           stats={'patch': rng.integers(0, 8, (2, 5, 2)).astype(np.int32)})
  _, turned = block.rotate_qk(tokens, plain, plain)
  assert np.abs(turned - plain).max() > 0.1
  np.testing.assert_allclose(block.plain_keys(tokens, turned), plain, atol=1e-5)
  args = {'by': 'received_attention', 'metric': 'plain_keys', 'contextual': 2}
  reduced = with_projector_reduction(vlm, {'method': 'visionzip', 'args': args, 'keep': 5},
                                     slots=12)
  assert 'plain_keys' in reduced.tower.plan.only.method.watch_needs


@pytest.mark.long
def test_visionzip_hands_cls_on():
  """As one of the tokens kept, in front; a row that loses nothing has none."""
  vlm, images = made('registers'), squares()
  params = random_params(vlm, squares)

  def left(keep, **args):
    config = {'method': 'visionzip', 'args': {'contextual': 2, **args}, 'keep': keep}
    return jax.jit(lambda params: behind(vlm, images, params, config, PATCHES))(params)

  kept, without = left(6, cls='kept'), left(5)
  tower = jax.jit(lambda params: vlm.tower.apply(
      {'params': params['params']['tower']}, pixels(images))[0])(params)
  assert kept.slots == 6
  for row in range(3):  # The fourth image is not there.
    assert kept.real[row].all()
    np.testing.assert_array_equal(kept.kind[row] == SPECIAL, np.arange(6) < 1)
    np.testing.assert_allclose(kept.x[row, 0], tower.x[row, 0], atol=1e-5)
    np.testing.assert_allclose(kept.x[row, 1:], without.x[row], atol=1e-6)
  assert not kept.real[3].any()
  assert (kept.owner[:3] != 0).all()
  with pytest.raises(ValueError, match=r'visionzip hands on a \[CLS\] that these tokens do not'):
    with_projector_reduction(made('cls', 'llava_next'), {
        'method': 'visionzip', 'args': {'contextual': 2, 'cls': 'kept'}, 'keep': 6}, slots=40)


@pytest.mark.long
def test_merged_tokens_carry_the_positions_of_their_members():
  """In the language model too, where text has one number on all parts of a section."""
  text = QWEN['text_config'] | {'num_attention_heads': 1, 'num_key_value_heads': 1,
                                'rope_scaling': {'type': 'mrope', 'mrope_section': [2, 2, 4]}}
  _, images = image_of_cells()
  vlm = from_config(QWEN | {'text_config': text}, grid=(8, 8))
  config, slots = {'method': 'ppe', 'args': {'members': 2}, 'keep': 5}, images.index.shape[2]
  reduced = with_projector_reduction(vlm, config, slots=slots)
  assert reduced.lm.rope.sections == (1, 1, 1, 1, 2, 2)
  ids = np.array([[4, 30, 7, 9]], np.int32)
  valid = np.ones(ids.shape, bool)
  shapes = jax.eval_shape(reduced.init, jax.random.key(0), ids, valid, images)
  random = np.random.default_rng(3)
  params = jax.tree.map(lambda leaf: random.normal(0, 1, leaf.shape).astype(np.float32), shapes)
  logits, out = jax.jit(lambda params: reduced.apply(params, ids, valid, images))(params)
  assert np.isfinite(logits).all()
  left, tokens = out['projector'], out['sequence']
  pos = np.asarray(tokens.pos[0])[np.asarray(tokens.real[0])]
  assert pos.shape == (3 + 5, 1 + 6)
  assert (pos[[0, 6, 7], 1:] == pos[[0, 6, 7], 1:2]).all()
  cells = np.stack(np.unravel_index(np.arange(12), (3, 4)), axis=1) + 1
  for slot in range(5):
    members = np.flatnonzero(np.asarray(left.owner[0]) == slot)[::-1]
    wanted = cells[np.resize(members, 2)]
    np.testing.assert_array_equal(pos[1 + slot, 3:5], wanted[:, 0])
    np.testing.assert_array_equal(pos[1 + slot, 5:7], wanted[:, 1])
  with pytest.raises(ValueError, match=r'sections=\(2, 2, 4\) of RoPE cannot be divided into 8'):
    with_projector_reduction(vlm, config | {'args': {}}, slots=slots)


def test_layers_watched_are_the_towers():
  vlm = made('cls')
  reduced = with_projector_reduction(vlm, {'method': 'flowcut', 'keep': 4}, slots=PATCHES)
  assert reduced.tower.plan.only.watch == (0, 1)
  alone = with_projector_reduction(vlm, {'method': 'flowcut', 'keep': 4, 'watch': ()},
                                   slots=PATCHES)
  assert alone.tower.plan.only.watch == (1,)
  plain = with_projector_reduction(vlm, {'method': 'divprune', 'keep': 4}, slots=PATCHES)
  assert plain.tower.plan is None
  assert plain.projector_reduction.special == 0
