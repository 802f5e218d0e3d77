"""Checkpoints of language models: round trips to the last bit, shards, placement, what differs."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import parity_vlm
from helpers.parity_lm import CASES, NAME, config, path, sharded
from safetensors.numpy import load_file, save_file

from configs.parts import LM_SHARDING
from lib.runtime import sharding
from models import checkpoints
from models.checkpoints import files
from models.checkpoints.layout import flatten
from models.checkpoints.lm_config import from_config
from models.checkpoints.vlm_config import from_config as vlm_from_config
from models.storage import restack


@pytest.mark.parametrize('name', CASES)
def test_round_trips_give_back_every_bit_both_ways(name, tmp_path):
  lm = from_config(config(name))
  tree = checkpoints.load(lm, path(name))
  checkpoints.save(lm, tree, tmp_path / 'back.safetensors', layout='transformers/lm')
  found, wanted = load_file(tmp_path / 'back.safetensors'), load_file(path(name))
  assert found.keys() == wanted.keys()
  for key, value in wanted.items():
    np.testing.assert_array_equal(found[key], value)
  chex.assert_trees_all_equal(checkpoints.load(lm, tmp_path / 'back.safetensors'), tree)


@pytest.mark.parametrize('layout', ['transformers/vlm', 'transformers/vlm4'])
def test_language_models_are_read_out_of_vision_language_models(layout, tmp_path):
  lm = from_config(config(NAME))
  tree = checkpoints.load(lm, path(NAME))
  checkpoints.save(lm, tree, tmp_path / 'lm.safetensors', layout=layout)
  tensors = load_file(tmp_path / 'lm.safetensors')
  beside = {'model.vision_tower.x.weight': np.zeros(3, np.float32),
            'multi_modal_projector.linear_1.bias': np.zeros(3, np.float32)}
  save_file(tensors | beside, tmp_path / 'model.safetensors')
  (tmp_path / 'lm.safetensors').unlink()
  chex.assert_trees_all_equal(checkpoints.load(lm, tmp_path), tree)


def test_shards_are_read_as_one_file_and_missing_ones_are_named(tmp_path):
  lm = from_config(config(NAME))
  sharded(tmp_path)
  chex.assert_trees_all_equal(checkpoints.load(lm, tmp_path), checkpoints.load(lm, path(NAME)))
  (tmp_path / 'model-00002-of-00003.safetensors').unlink()
  with pytest.raises(ValueError, match=r'lacks model-00002-of-00003\.safetensors, which'):
    checkpoints.load(lm, tmp_path)


@pytest.mark.parametrize('storage', ['stacked', 'unstacked'])
def test_arrays_are_made_where_they_belong(storage, tmp_path):
  lm = from_config(config(NAME))
  sharded(tmp_path)
  plain = checkpoints.load(lm, tmp_path, storage=storage)
  mesh = sharding.make_mesh({'data': 1})
  places = sharding.make_shardings(plain, LM_SHARDING, mesh)
  found = checkpoints.load(lm, tmp_path, storage=storage, shardings=places, dtype=jnp.bfloat16)
  assert isinstance(found['stack']['blocks'], tuple) == (storage == 'unstacked')
  for leaf, place, wanted in zip(*map(jax.tree.leaves, (found, places, plain)), strict=True):
    assert leaf.sharding == place
    assert leaf.dtype == jnp.bfloat16
    np.testing.assert_array_equal(leaf, wanted.astype(jnp.bfloat16))
  if storage == 'unstacked':
    chex.assert_trees_all_equal(restack(plain['stack']['blocks']),
                                checkpoints.load(lm, tmp_path)['stack']['blocks'])


def test_a_device_reads_no_more_than_its_part(tmp_path, monkeypatch):
  # As a device with the second of three layers, and half of the heads, would ask.
  lm = from_config(config(NAME))
  asked = []
  read = files.Tensors.read
  monkeypatch.setattr(files.Tensors, 'read',
                      lambda self, name: (asked.append(name), read(self, name))[1])

  def part(shape, sharding, callback):
    index = (slice(1, 2), *(slice(None),) * (len(shape) - 1)) if len(shape) > 2 else (
        slice(None),) * len(shape)
    return callback(index)

  monkeypatch.setattr(jax, 'make_array_from_callback', part)
  places = jax.tree.map(lambda leaf: 'here', checkpoints.load(lm, path(NAME)))
  asked.clear()
  found = flatten(checkpoints.load(lm, path(NAME), shardings=places))
  assert found['stack/blocks/q/kernel'].shape == (1, 32, 4, 8)
  assert 'model.layers.1.self_attn.q_proj.weight' in asked
  assert 'model.layers.0.self_attn.q_proj.weight' not in asked


@pytest.mark.parametrize(('changes', 'message'), [
    ({'heads': 2}, 'the checkpoint has heads=4 and the model 2'),
    ({'norm_eps': 1e-6}, 'has norm_eps=1e-05 and the model 1e-06'),
    ({'window': 4}, 'has window=0 and the model 4'),
])
def test_what_no_shape_shows_is_compared_with_the_config(changes, message, tmp_path):
  lm = from_config(config(NAME)).clone(**changes)
  with pytest.raises(ValueError, match=message):
    checkpoints.load(lm, sharded(tmp_path))


SCALINGS = {
    'linear': {'type': 'linear', 'factor': 4.0},
    'llama3': {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0,
               'high_freq_factor': 4.0, 'original_max_position_embeddings': 64},
    'yarn': {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32},
}


def scaled_checkpoint(folder, scaling):
  """A folder with the tensors of `NAME`, and its config with another RoPE scaling."""
  settings = {key: value for key, value in config(NAME).items() if key != 'rope_parameters'}
  settings |= {'rope_theta': config(NAME)['rope_parameters']['rope_theta'],
               'rope_scaling': scaling}
  save_file(load_file(path(NAME)), folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(settings))
  return from_config(settings)


@pytest.mark.parametrize('kind', SCALINGS)
def test_another_rope_scaling_is_refused(kind, tmp_path):
  plain, scaled = from_config(config(NAME)), scaled_checkpoint(tmp_path, SCALINGS[kind])
  with pytest.raises(ValueError, match=(
      f"the checkpoint has RoPE with scaling='{kind}', factor=.* and the model with "
      "scaling='none', factor=1.0")):
    checkpoints.load(plain, tmp_path)
  chex.assert_trees_all_equal(checkpoints.load(scaled, tmp_path),
                              checkpoints.load(plain, path(NAME)))
  other = scaled.clone(rope=dataclasses.replace(scaled.rope, factor=3.0))
  with pytest.raises(ValueError, match=r'RoPE with factor=.* and the model with factor=3\.0'):
    checkpoints.load(other, tmp_path)


def test_another_rope_scaling_inside_a_vision_language_model_is_refused(tmp_path):
  settings = parity_vlm.config_of('llava')
  scaled = settings | {'text_config': settings['text_config'] | {
      'rope_parameters': {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 1e4}}}
  save_file(load_file(parity_vlm.FOLDER / 'llava.safetensors'), tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').write_text(json.dumps(scaled))
  with pytest.raises(ValueError, match=r"scaling='linear', factor=2\.0 and the model"):
    checkpoints.load(vlm_from_config(settings), tmp_path)
  checkpoints.load(vlm_from_config(scaled), tmp_path)


@pytest.mark.parametrize('scaling', [
    {'type': 'linear', 'factor': 1.0}, {'type': 'dynamic', 'factor': 4.0},
    {'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32,
     'attention_factor': 0.1 * np.log(4.0) + 1}])
def test_rotations_that_are_equal_are_not_refused_for_their_words(scaling, tmp_path):
  built = scaled_checkpoint(tmp_path, SCALINGS['yarn']) if scaling['type'] == 'yarn' else (
      from_config(config(NAME)))
  scaled_checkpoint(tmp_path, scaling)
  assert 'head' in checkpoints.load(built, tmp_path)


@pytest.mark.parametrize(('changes', 'message'), [
    ({'qkv_bias': False}, 'has model.layers.*.self_attn.k_proj.bias'),
    ({'qk_norm': True}, 'lacks model.layers.*.self_attn.k_norm.weight'),
    ({'depth': 2}, 'has model.layers.*.input_layernorm.weight'),
])
def test_other_architectures_do_not_fit(changes, message):
  lm = from_config(config(NAME)).clone(**changes)
  with pytest.raises(ValueError, match='does not fit this LM as transformers/lm') as caught:
    checkpoints.load(lm, path(NAME))
  assert message in str(caught.value)


# -- a head of its own -----------------------------------------------------------------------------


def tied_checkpoint(folder, change=lambda tensors: None):
  """A folder whose config.json ties the head, and its tensors after change(tensors)."""
  tensors = load_file(path(NAME))
  change(tensors)
  save_file(tensors, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(config(NAME) | {'tie_word_embeddings': True}))
  return folder, from_config(config(NAME) | {'tie_word_embeddings': True})


def test_a_head_that_is_the_tied_table_is_left_out(tmp_path):  # Some releases store it twice.
  def change(tensors):
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']

  folder, tied = tied_checkpoint(tmp_path, change)
  assert checkpoints.tied_as_stored(tied, folder) == tied
  assert 'head' not in checkpoints.load(tied, folder)


def test_a_head_that_differs_is_read_though_the_config_ties_it(tmp_path):
  folder, tied = tied_checkpoint(tmp_path)
  with pytest.raises(ValueError, match=r'lm_head\.weight of .* differs from the embeddings'):
    checkpoints.load(tied, folder)
  model = checkpoints.tied_as_stored(tied, folder)
  assert model == tied.clone(tied=False)
  found, wanted = checkpoints.load(model, folder), checkpoints.load(model, path(NAME))
  chex.assert_trees_all_equal(found, wanted)
  ids = jnp.arange(5, 15)[None]
  logits, _ = model.apply({'params': found}, ids)
  own, _ = from_config(config(NAME)).apply({'params': wanted}, ids)
  np.testing.assert_array_equal(logits, own)
  # Asked for, the table is the head all the same.
  assert 'head' not in checkpoints.load(tied, folder, unused=('lm_head.weight',))


def test_a_head_of_another_size_is_a_worded_error(tmp_path):
  def change(tensors):
    tensors['lm_head.weight'] = tensors['lm_head.weight'][:-1]

  folder, tied = tied_checkpoint(tmp_path, change)
  with pytest.raises(ValueError, match=r'lm_head\.weight of .* has shape'):
    checkpoints.load(checkpoints.tied_as_stored(tied, folder), folder)


def test_a_quantized_head_is_a_worded_error(tmp_path):
  def change(tensors):
    tensors['lm_head.weight'] = tensors['lm_head.weight'].astype(np.int8)

  folder, tied = tied_checkpoint(tmp_path, change)
  for read in (checkpoints.tied_as_stored, checkpoints.load):
    with pytest.raises(ValueError, match=r'lm_head\.weight of .* is stored as I8'):
      read(tied, folder)


def test_a_head_that_is_not_there_is_tied_or_missed(tmp_path):
  folder, tied = tied_checkpoint(tmp_path, lambda tensors: tensors.pop('lm_head.weight'))
  assert checkpoints.tied_as_stored(tied, folder) == tied
  assert 'head' not in checkpoints.load(tied, folder)
  untied = tied.clone(tied=False)
  with pytest.raises(ValueError, match='the checkpoint has tied=True and the model False'):
    checkpoints.load(untied, folder)
  (folder / 'config.json').write_text(json.dumps(config(NAME)))
  with pytest.raises(ValueError, match=r'lacks lm_head\.weight'):
    checkpoints.load(untied, folder)
  with pytest.raises(ValueError, match='the checkpoint has tied=False and the model True'):
    checkpoints.load(tied, folder)


@pytest.mark.parametrize('family', ['llava', 'llava_onevision', 'qwen2_5_vl'])
def test_vision_language_models_find_their_head_in_the_file(family, tmp_path):
  vlm = vlm_from_config(parity_vlm.config_of(family))
  tied = vlm.clone(lm=vlm.lm.clone(tied=True))
  tensors = load_file(parity_vlm.FOLDER / f'{family}.safetensors')
  name, = [name for name in tensors if name.endswith('embed_tokens.weight')]
  head, = [name for name in tensors if name.endswith('lm_head.weight')] or ['lm_head.weight']
  other = tensors | {head: tensors[name] + 1}
  save_file(other, tmp_path / 'other.safetensors')
  assert not checkpoints.tied_as_stored(tied, tmp_path / 'other.safetensors').lm.tied
  with pytest.raises(ValueError, match='differs from the embeddings'):
    checkpoints.load(tied, tmp_path / 'other.safetensors')
  save_file(tensors | {head: tensors[name]}, tmp_path / 'same.safetensors')
  assert checkpoints.tied_as_stored(tied, tmp_path / 'same.safetensors').lm.tied
  assert 'head' not in checkpoints.load(tied, tmp_path / 'same.safetensors')['lm']


def test_unknown_storages_are_worded_errors():
  with pytest.raises(ValueError,
                     match="storage='list' is unknown: choose one of stacked, unstacked"):
    checkpoints.load(from_config(config(NAME)), path(NAME), storage='list')


def test_every_parameter_has_a_sharding_rule():
  mesh = sharding.make_mesh({'data': 1})
  for name in CASES:
    sharding.make_shardings(checkpoints.load(from_config(config(name)), path(name)), LM_SHARDING,
                            mesh)
