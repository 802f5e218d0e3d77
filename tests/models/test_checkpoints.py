"""Foreign checkpoints: round trips to the last bit, what does not fit, where they come from, pixels
and token ids."""

import json
import pathlib
import sys
import types

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import parity
from helpers.parity import CASES, FOLDER, build
from safetensors.numpy import load_file, save_file

from configs import deit_s16_sweep
from configs.parts import PRETRAINED, VIT_SHARDING
from lib.data import preprocess
from lib.data.tokenizers import TextTowerTokenizer
from lib.runtime import sharding
from lib.tasks import image_sweep
from models import checkpoints
from models.backbones.clip import Clip
from models.backbones.vit import RESAMPLINGS, ViT, make_vit
from models.build import build as build_config
from models.build import pretrained
from models.checkpoints import files, positions
from models.checkpoints.layout import flatten, nest
from models.families import NAMED
from models.storage import restack, unstack

# What released files hold beside the model, and what is left out of a round trip.
BESIDE = {'hub_mae': 'decoder.', 'hub_dinov2': '.mask_token', 'hub_dinov2_reg4': '.mask_token',
          'hub_dinov2_reg4_swiglu': '.mask_token'}
VIT = 'timm_vit'


def path(name):
  return FOLDER / f'{name}.safetensors'


def layout(name):
  return parity.case(name)['layout']


def load(name, **more):
  return checkpoints.load(build(name), path(name), **more)


def altered(folder, change, name=VIT):
  """A copy of a checkpoint after change(tensors)."""
  tensors = load_file(path(name))
  change(tensors)
  save_file(tensors, folder / 'model.safetensors')
  return folder / 'model.safetensors'


# -- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize('name', CASES)
def test_a_checkpoint_comes_back_bit_for_bit(name, tmp_path):
  model = build(name)
  checkpoints.save(model, load(name, dtype=None), tmp_path / 'again.safetensors',
                   layout=layout(name))
  before, after = load_file(path(name)), load_file(tmp_path / 'again.safetensors')
  lost = before.keys() - after.keys()
  assert after.keys() <= before.keys()
  assert bool(lost) == (name in BESIDE)
  assert all(BESIDE[name] in key for key in lost)
  for key, value in after.items():
    assert value.dtype == before[key].dtype
    np.testing.assert_array_equal(value, before[key], err_msg=key)


@pytest.mark.parametrize('name', CASES)
def test_a_tree_comes_back_bit_for_bit(name, tmp_path):
  model, random = build(name), np.random.default_rng(0)
  tree = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), load(name))
  checkpoints.save(model, tree, tmp_path / 'x.safetensors', layout=layout(name))
  again = checkpoints.load(model, tmp_path / 'x.safetensors')
  chex.assert_trees_all_equal(again, tree)


@pytest.mark.parametrize('other', ['transformers/vit', 'timm'])
def test_from_one_library_to_the_other(other, tmp_path):
  model, tree = build(VIT), load(VIT)
  checkpoints.save(model, tree, tmp_path / 'x.safetensors', layout=other)
  chex.assert_trees_all_equal(checkpoints.load(model, tmp_path / 'x.safetensors'), tree)


def test_the_tree_is_the_models_own_with_its_blocks_stacked():
  model, tree = build('hub_clip'), load('hub_clip')
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 24, 24, 3)),
                          jnp.zeros((1, 12), jnp.int32))['params']
  chex.assert_trees_all_equal_shapes(shapes, tree)
  blocks = tree['text']['stack']['blocks']
  assert blocks['qkv']['kernel'].shape == (2, 32, 3, 2, 16)
  chex.assert_trees_all_equal(restack(unstack(blocks, 2)), blocks)


def test_half_precision_is_kept_or_widened(tmp_path):
  def halve(tensors):
    tensors.update({key: value.astype(ml_dtypes.bfloat16) for key, value in tensors.items()})

  file = altered(tmp_path, halve)
  kept, wide = (checkpoints.load(build(VIT), file, dtype=dtype) for dtype in (None, np.float32))
  assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {np.dtype(ml_dtypes.bfloat16)}
  assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype(np.float32)}
  chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf.astype(np.float32), kept), wide)
  checkpoints.save(build(VIT), kept, tmp_path / 'again.safetensors', layout='timm')
  again = load_file(tmp_path / 'again.safetensors')
  for key, value in load_file(file).items():
    np.testing.assert_array_equal(again[key], value)


def test_shards_are_read_by_their_index(tmp_path):
  tensors = load_file(path(VIT))
  names = sorted(tensors)
  parts = {'a.safetensors': names[::2], 'b.safetensors': names[1::2]}
  for file, part in parts.items():
    save_file({name: tensors[name] for name in part}, tmp_path / file)
  with pytest.raises(ValueError, match=r'several safetensors files and no .*index'):
    checkpoints.load(build(VIT), tmp_path)
  (tmp_path / files.INDEX).write_text(json.dumps(
      {'weight_map': {name: file for file, part in parts.items() for name in part}}))
  chex.assert_trees_all_equal(checkpoints.load(build(VIT), tmp_path), load(VIT))


def test_tensors_are_read_one_by_one_and_only_once_all_fits(tmp_path, monkeypatch):
  seen = []
  real = files.Tensors.read

  def read(self, name):
    seen.append(name)
    return real(self, name)

  monkeypatch.setattr(files.Tensors, 'read', read)
  with pytest.raises(ValueError, match='lacks'):
    checkpoints.load(build(VIT), altered(tmp_path, lambda tensors: tensors.pop('norm.bias')))
  assert seen == []
  load(VIT)
  assert sorted(seen) == sorted(load_file(path(VIT)))


# -- what does not fit ---------------------------------------------------------------------------


def test_missing_and_left_over_tensors_are_both_listed(tmp_path):
  def change(tensors):
    for block in (0, 1):
      tensors[f'blocks.{block}.attn.q_norm.weight'] = np.zeros(4, np.float32)
      del tensors[f'blocks.{block}.mlp.fc1.bias']
    del tensors['norm.weight']

  with pytest.raises(ValueError, match='as timm') as caught:
    checkpoints.load(build(VIT), altered(tmp_path, change))
  said = str(caught.value)
  assert r'lacks blocks.*.mlp.fc1.bias (2 times), norm.weight, and has' in said
  assert 'has blocks.*.attn.q_norm.weight (2 times) that the model does not' in said
  assert '\n' not in said


@pytest.mark.parametrize(('name', 'settings', 'message'), [
    (VIT, {'layer_scale': 1.0}, 'lacks blocks.*.ls1.gamma (2 times), blocks.*.ls2.gamma (2 times)'),
    (VIT, {'class_token': False, 'pool': 'mean'}, 'has cls_token that the model does not'),
    ('timm_dinov2_reg4', {'registers': 0}, 'has reg_token that'),
    ('hub_vit', {'depth': 1}, 'has vit.encoder.layer.*.attention.attention.key.bias,'),
    ('hub_dinov2', {'num_classes': 0}, 'has classifier.bias, classifier.weight that'),
    ('hub_siglip', {'pre_norm': True}, 'is one of this ViT'),
])
def test_the_wrong_architecture_is_an_error(name, settings, message):
  model = build(name)
  model = (model.image if isinstance(model, Clip) else model).clone(**settings)
  with pytest.raises(ValueError, match=r'does not fit|another model') as caught:
    checkpoints.load(model, path(name))
  assert message in str(caught.value)


def test_another_models_tensors_are_told_as_such(tmp_path):
  save_file({f'layer{i}.0.conv1.weight': np.zeros((4, 4, 3, 3), np.float32) for i in range(4)},
            tmp_path / 'resnet.safetensors')
  with pytest.raises(ValueError, match='holds another model') as caught:
    checkpoints.load(build(VIT), tmp_path / 'resnet.safetensors')
  assert 'layer0.*.conv1.weight' in str(caught.value)
  assert 'cls_token' in str(caught.value)
  with pytest.raises(ValueError, match='one of this Text'):
    checkpoints.load(build('hub_clip').text, path(VIT))


@pytest.mark.parametrize(('settings', 'message'), [
    ({'num_classes': 7}, r"head.* has shape \(5,\) and the model wants \(7,\).*fresh=\('head',\)"),
    ({'mlp': 60}, r'blocks.0.mlp.fc1.bias .* has shape \(64,\) and the model wants \(60,\)'),
    ({'channels': 1}, r'patch_embed.proj.weight .* has shape \(32, 3, 8, 8\)'),
    ({'image_size': 40}, 'is for 10 positions and the model has 26: .*resize_positions'),
    ({'patch': 12}, r'is for 10 positions and the model has 5|has shape \(32, 3, 8, 8\)'),
])
def test_other_shapes_are_errors_that_say_what_to_do(settings, message):
  with pytest.raises(ValueError, match=message):
    checkpoints.load(build(VIT).clone(**settings), path(VIT))


def test_heads_and_activations_are_compared_with_the_config(tmp_path):
  model = build('hub_clip')
  config = parity.case('hub_clip')['config']
  altered(tmp_path, lambda tensors: None, 'hub_clip')
  (tmp_path / 'config.json').write_text(json.dumps(config))
  checkpoints.load(model, tmp_path)
  checkpoints.load(model.image, tmp_path)
  with pytest.raises(ValueError, match=r'has heads=2 and the model 4, .* set heads=2'):
    checkpoints.load(model.clone(image=model.image.clone(heads=4)), tmp_path)
  with pytest.raises(ValueError, match="set activation='quick_gelu'"):
    checkpoints.load(model.text.clone(activation='gelu'), tmp_path)


def test_parts_are_left_out_only_by_name(tmp_path):
  model = build(VIT).clone(num_classes=7)
  tree = checkpoints.load(model, path(VIT), fresh=('head',))
  assert 'head' not in tree
  with pytest.raises(ValueError, match=r'has head.bias, head.weight that the model does not'):
    checkpoints.load(model.clone(num_classes=0), path(VIT))
  checkpoints.load(model.clone(num_classes=0), path(VIT), unused=('head.*',))


def test_a_tree_that_no_layout_holds_is_not_written(tmp_path):
  model, tree = build('timm_siglip'), load('timm_siglip')
  with pytest.raises(ValueError, match='has no place for pool/'):
    checkpoints.save(model, tree, tmp_path / 'x.safetensors', layout='transformers/vit')
  with pytest.raises(ValueError, match='choose one of timm, transformers/vit'):
    checkpoints.save(model, tree, tmp_path / 'x.safetensors', layout='flax')
  with pytest.raises(ValueError, match='they lack stack/blocks/ls1'):
    checkpoints.save(model.clone(layer_scale=1.0), tree, tmp_path / 'x.safetensors', layout='timm')
  assert not (tmp_path / 'x.safetensors').exists()


# -- where they lie ------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pt', 'model.pth'])
def test_pickles_are_refused_unopened(name, tmp_path):
  file = tmp_path / name
  file.write_bytes(b'cos\nsystem\n(S"exit 1"\ntR.')
  with pytest.raises(ValueError, match='is a pickle, which can run anything'):
    checkpoints.load(build(VIT), file)
  with pytest.raises(ValueError, match='has pickles only'):
    checkpoints.load(build(VIT), tmp_path)


def test_nothing_there_is_an_error(tmp_path):
  with pytest.raises(ValueError, match='there is no checkpoint at'):
    checkpoints.load(build(VIT), tmp_path / 'nowhere')
  with pytest.raises(ValueError, match=r'has no \.safetensors file, only nothing'):
    checkpoints.load(build(VIT), tmp_path)
  (tmp_path / 'model.safetensors').write_bytes(b'not this')
  with pytest.raises(ValueError, match='cannot be read as safetensors'):
    checkpoints.load(build(VIT), tmp_path)


def test_names_are_fetched_from_the_hub_without_pickles(tmp_path, monkeypatch):
  altered(tmp_path, lambda tensors: None)
  asked = []

  def snapshot_download(name, *, revision, allow_patterns):
    asked.append((name, revision, allow_patterns))
    return str(tmp_path)

  hub = types.SimpleNamespace(snapshot_download=snapshot_download)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
  for source in ('timm/tiny', 'timm/tiny@v1'):
    chex.assert_trees_all_equal(checkpoints.load(build(VIT), source), load(VIT))
  wanted = ['*.safetensors', '*.json']
  assert asked == [('timm/tiny', None, wanted), ('timm/tiny', 'v1', wanted)]

  def refuse(name, **unused):
    raise FileNotFoundError(f'no such repository: {name}\nsecond line')

  hub.snapshot_download = refuse
  with pytest.raises(ValueError, match='the hub did not give it') as caught:
    checkpoints.load(build(VIT), 'timm/tiny')
  assert '\n' not in str(caught.value)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(ValueError, match=r'pip install -r requirements-hub\.txt'):
    checkpoints.load(build(VIT), 'timm/tiny')


# -- positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize('side', [2, 5, 7])
def test_positions_are_resized_as_the_reference_does(side):
  with np.load(FOLDER / 'positions.npz') as arrays:
    old, wanted = arrays['old'], arrays[str(side)]
  model = ViT(width=8, depth=1, mlp=8, heads=1, patch=4, image_size=12, num_classes=0)
  found = checkpoints.resize_positions({'pos': old}, model, image_size=4 * side)['pos']
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  np.testing.assert_array_equal(found[:, 0], old[:, 0])


def bicubic_taps(old, new):
  """[new, old]: torch's 'bicubic' (a = -0.75) along one axis, tap by tap."""
  place = (np.arange(new) + 0.5) * old / new - 0.5
  low = np.floor(place).astype(int)
  t, a = place - low, -0.75

  def near(d):
    return (a + 2) * d ** 3 - (a + 3) * d ** 2 + 1

  def far(d):
    return a * d ** 3 - 5 * a * d ** 2 + 8 * a * d - 4 * a

  weight = np.stack([far(1 + t), near(t), near(1 - t), far(2 - t)], axis=1)
  matrix = np.zeros((new, old))
  for k in range(4):
    np.add.at(matrix, (np.arange(new), np.clip(low - 1 + k, 0, old - 1)), weight[:, k])
  return matrix


@pytest.mark.long
@pytest.mark.parametrize('size', [224, 518, 700, (224, 336)])
@pytest.mark.parametrize('name', ['dinov2_s14', 'dinov2_s14_reg4'])
def test_dinov2_is_resampled_as_its_release_does(name, size):
  # Without registers bicubic as it is, with registers antialiased.
  random = np.random.default_rng(1)
  y, x = np.mgrid[0:37, 0:37] / 37
  waves = random.normal(size=(384, 6))
  grid = sum(waves[:, k] * np.cos(np.pi * ((k % 3) * x + (k // 3) * y))[..., None]
             for k in range(6))
  grid = (grid + 0.1 * random.normal(size=grid.shape)).astype(np.float32)
  table = np.concatenate([np.ones((1, 1, 384), np.float32), grid.reshape(1, -1, 384)], axis=1)
  found = checkpoints.resize_positions({'pos': table}, make_vit(name), image_size=size)['pos']
  np.testing.assert_array_equal(found[:, 0], 1)
  assert found.dtype == np.float32
  rows, columns = (side // 14 for side in (size if isinstance(size, tuple) else (size, size)))
  wanted = np.einsum('ia,jb,abd->ijd', bicubic_taps(37, rows), bicubic_taps(37, columns), grid)
  gap = np.abs(found[0, 1:] - wanted.reshape(rows * columns, 384)).max()
  assert gap < 1e-5 if name == 'dinov2_s14' or size == 518 else gap > 1e-2


def test_bicubic_weights_are_those_of_the_kernel():
  # A grid twice as fine lies a quarter off the old one: an impulse comes back as the four weights.
  impulse = np.zeros((9, 1, 1), np.float32)
  impulse[4] = 1
  found = positions.bicubic(impulse, (18, 1))[:, 0, 0]
  weights = [-0.03515625, -0.10546875, 0.26171875, 0.87890625]
  np.testing.assert_allclose(found[5:9], weights, atol=1e-7)
  np.testing.assert_allclose(found, found[::-1], atol=1e-7)
  np.testing.assert_array_equal(positions.bicubic(impulse, (9, 1)), impulse)


def test_every_resampling_of_a_model_is_there():
  assert set(positions.RESAMPLINGS) == set(RESAMPLINGS)
  assert {make_vit(name).position_resampling for name in NAMED if name.startswith('dinov2')
          and not name.endswith('_reg4')} == {'bicubic'}
  with pytest.raises(ValueError, match="position_resampling='nearest' is unknown: choose one of"):
    build(VIT).clone(position_resampling='nearest')


@pytest.mark.long
def test_resized_trees_fit_and_wrong_sizes_do_not():
  model, tree = build(VIT), load(VIT)
  resized = checkpoints.resize_positions(tree, model, image_size=40)
  logits, _ = model.clone(image_size=40).apply({'params': resized}, jnp.ones((1, 40, 40, 3)))
  assert logits.shape == (1, 5)
  same = checkpoints.resize_positions(tree, model, image_size=24)
  np.testing.assert_allclose(same['pos'], tree['pos'], atol=1e-6)
  with pytest.raises(ValueError, match='image_size=42 is not a multiple of patch=8'):
    checkpoints.resize_positions(tree, model, image_size=42)
  with pytest.raises(ValueError, match='nothing to resize'):
    checkpoints.resize_positions(tree, model.clone(positions='sincos'), image_size=40)


@pytest.mark.parametrize('shape', [(1, 24, 32, 3), (1, 40, 40, 3), (1, 24, 24, 1), (24, 24, 3)])
def test_images_that_do_not_fit_are_worded_errors(shape):
  with pytest.raises(ValueError, match=r'expected \[batch, 24, 24, 3\]'):
    build(VIT).apply({'params': load(VIT)}, jnp.zeros(shape))


def test_sizes_that_patches_do_not_divide_are_worded_errors():
  with pytest.raises(ValueError, match='image_size=30 is not a multiple of patch=8'):
    build(VIT).clone(image_size=30).apply({'params': load(VIT)}, jnp.zeros((1, 30, 30, 3)))


# -- from a config -------------------------------------------------------------------------------


SETTINGS = {'variant': 'Ti/8', 'width': 32, 'depth': 2, 'heads': 2, 'mlp': 64, 'num_classes': 5,
            **PRETRAINED, 'weights': str(path(VIT))}


def test_a_config_names_weights_and_they_land_where_the_state_lies():
  config = SETTINGS | {'image_size': 40, 'weights_image_size': 24, 'num_classes': 3,
                       'fresh': ('head',)}
  vit = build_config(config)
  loaded = pretrained(config, vit)
  mesh = sharding.make_mesh({'data': 1})
  params = jax.jit(vit.init)(jax.random.key(0), jnp.zeros((1, 40, 40, 3)))['params']
  params['head']['bias'] += 1.0
  params = jax.device_put(params, sharding.make_shardings(params, VIT_SHARDING, mesh))
  made = checkpoints.merge_params(params, loaded)
  chex.assert_trees_all_equal_shapes(made, params)
  for name, leaf in flatten(made).items():
    source = flatten(params) if name.startswith('head') else flatten(loaded)
    np.testing.assert_array_equal(leaf, source[name])
    assert leaf.sharding == flatten(params)[name].sharding
  # The overlay owns its memory: a training step may donate one of two.
  assert made['cls'].unsafe_buffer_pointer() != params['cls'].unsafe_buffer_pointer()


def test_configs_without_weights_load_nothing():
  config = SETTINGS | {'image_size': 24, 'weights': ''}
  assert pretrained(config, build_config(config)) is None


def test_evaluation_starts_from_named_weights(tmp_path):
  config = deit_s16_sweep.get_config()
  config.model, config.data.image_size = SETTINGS | {'image_size': 24}, 24
  step, params = image_sweep.load(config, tmp_path, sharding.make_mesh({'data': 1}))
  assert step == 0
  chex.assert_trees_all_equal(params, load(VIT))
  assert build_config(deit_s16_sweep.get_config().model).depth == 12


@pytest.mark.parametrize('name', ['dinov2_s14', 'siglip_b16_224', 'clip_b16', 'mae_b16_tuned'])
def test_every_parameter_of_named_models_has_a_sharding_rule(name):
  vit = make_vit(name)
  side = vit.image_size
  params = jax.eval_shape(vit.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))['params']
  sharding.make_shardings(params, VIT_SHARDING, sharding.make_mesh({'data': 1}))


def test_paths_nest_and_flatten():
  tree = {'a': {'b': 1, 'c': {'d': 2}}, 'e': 3}
  assert flatten(tree) == {'a/b': 1, 'a/c/d': 2, 'e': 3}
  assert nest(flatten(tree)) == tree


# -- pixels and texts ----------------------------------------------------------------------------


PROCESSORS = json.loads((FOLDER / 'preprocess.json').read_text())


@pytest.mark.parametrize('image', ['wide', 'tall', 'small'])
@pytest.mark.parametrize('name', PROCESSORS)
def test_pixels_equal_the_reference_processors(name, image, tmp_path):
  with np.load(FOLDER / 'preprocess.npz') as arrays:
    pixels, wanted = arrays[image], arrays[f'{name}_{image}']
  (tmp_path / 'preprocessor_config.json').write_text(json.dumps(PROCESSORS[name]))
  found = preprocess.read(tmp_path)(pixels)
  assert found.dtype == np.float32
  assert found.shape == (24, 24, 3)
  np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_older_configs_mean_the_same():
  new = preprocess.from_config(PROCESSORS['clip'])
  old = PROCESSORS['clip'] | {'size': 28, 'crop_size': 24,
                              'image_processor_type': 'CLIPImageProcessor'}
  assert preprocess.from_config(old) == new
  square = PROCESSORS['vit'] | {'size': 24}
  assert preprocess.from_config(square) == preprocess.from_config(PROCESSORS['vit'])


def test_grey_images_get_three_channels_and_unknown_steps_are_errors(tmp_path):
  made = preprocess.from_config(PROCESSORS['vit'])
  grey = np.arange(900, dtype=np.uint8).reshape(30, 30)
  np.testing.assert_array_equal(made(grey), made(np.stack([grey] * 3, axis=2)))
  with pytest.raises(ValueError, match='resample=9 is unknown'):
    preprocess.from_config(PROCESSORS['vit'] | {'resample': 9})
  with pytest.raises(ValueError, match='give height and width, or shortest_edge'):
    preprocess.from_config(PROCESSORS['vit'] | {'size': {'longest_edge': 24}})
  with pytest.raises(ValueError, match='there is no'):
    preprocess.read(tmp_path)


def test_token_ids_equal_the_reference_tokenizer():
  wanted = json.loads((FOLDER / 'tokenizer' / 'expected.json').read_text())
  texts = TextTowerTokenizer(FOLDER / 'tokenizer', context=16)
  np.testing.assert_array_equal(texts(wanted['texts']), wanted['ids'])
  with pytest.raises(ValueError, match=r"'a photo of a cat' has 11 tokens and the .* is 10:"):
    TextTowerTokenizer(FOLDER / 'tokenizer', context=10)(wanted['texts'])


def test_texts_are_made_canonical_and_ended_as_the_settings_say(tmp_path):
  folder = FOLDER / 'tokenizer'
  settings = json.loads((folder / 'tokenizer_config.json').read_text())
  (tmp_path / 'tokenizer.json').write_text((folder / 'tokenizer.json').read_text())
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(
      settings | {'add_bos_token': False, 'add_eos_token': True, 'padding_side': 'left'}))
  words = TextTowerTokenizer(tmp_path, context=4, canonical='words')
  vocabulary = json.loads((folder / 'tokenizer.json').read_text())['model']['vocab']
  cat, end = vocabulary['cat</w>'], vocabulary['<|endoftext|>']
  np.testing.assert_array_equal(words(['  CAT!', 'cat  Cat']),
                                [[end, end, cat, end], [end, cat, cat, end]])


def test_a_tokenizer_without_its_package_or_files_is_a_worded_error(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match=r'there is no tokenizer\.json'):
    TextTowerTokenizer(tmp_path, context=4)
  with pytest.raises(ValueError, match='choose one of none, lower, words'):
    TextTowerTokenizer(tmp_path, context=4, canonical='upper')
  (tmp_path / 'tokenizer.json').write_text((FOLDER / 'tokenizer' / 'tokenizer.json').read_text())
  with pytest.raises(ValueError, match='names no pad_token'):
    TextTowerTokenizer(tmp_path, context=9)(['a'])
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(ValueError, match=r'pip install -r requirements-hub\.txt'):
    TextTowerTokenizer(tmp_path, context=4)


def test_nothing_here_needs_the_reference_libraries():
  for module in ('torch', 'timm', 'transformers'):
    assert module not in sys.modules
  assert pathlib.Path('tools/parity/reference.py').exists()
