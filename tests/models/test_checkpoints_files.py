"""Files of a checkpoint that are damaged, quantized, no files, or lead elsewhere: one line each."""

import json
import os
import re

import ml_dtypes
import numpy as np
import pytest
from helpers.parity import FOLDER, build, case
from safetensors.numpy import load_file, save_file

from models import checkpoints
from models.checkpoints import files, timm

NAME = 'timm_vit'
TENSORS = load_file(FOLDER / f'{NAME}.safetensors')


def write(folder, changes=None, file='model.safetensors'):
  """The checkpoint, with tensors that differ."""
  save_file(TENSORS | (changes or {}), folder / file)
  return folder / file


def index(folder, content):
  (folder / files.INDEX).write_text(content if isinstance(content, str) else json.dumps(content))


def read(source):
  """Opens and reads all, as `checkpoints.load` does of what a model needs."""
  path = files.locate(source)
  with files.reading(files.tensor_files(path)) as tensors:
    return files.config(path), [tensors.read(name) for name in tensors.shapes]


def refused(source, message, read=read):
  with pytest.raises(ValueError, match=message) as caught:
    read(source)
  assert '\n' not in str(caught.value)
  assert len(str(caught.value)) < 1000


def load(source, **more):
  return checkpoints.load(build(NAME), source, **more)


# -- what tensors are stored as ------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize('dtype', [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_floats_of_any_width_become_the_dtype_that_is_asked_for(dtype, tmp_path):
  file = write(tmp_path, {name: value.astype(dtype) for name, value in TENSORS.items()})
  for wanted in (np.float32, ml_dtypes.bfloat16, None):
    norm = load(file, dtype=wanted)['norm']['scale']
    assert norm.dtype == (dtype if wanted is None else wanted)
    np.testing.assert_array_equal(norm, TENSORS['norm.weight'].astype(dtype).astype(norm.dtype))


@pytest.mark.parametrize(('dtype', 'word'), [
    (ml_dtypes.float8_e4m3fn, 'F8_E4M3'), *(
        pytest.param(*each, marks=pytest.mark.long) for each in (
            (ml_dtypes.float8_e5m2, 'F8_E5M2'), (np.int8, 'I8'), (np.uint8, 'U8'),
            (np.int32, 'I32'), (np.bool_, 'BOOL')))])
def test_quantized_tensors_are_refused(dtype, word, tmp_path):
  name = 'blocks.0.mlp.fc1.weight'
  message = f'is stored as {word}, as quantized weights are, which are not read: use the checkpoint'
  refused(write(tmp_path, {name: TENSORS[name].astype(dtype)}), f'{name} of .* {message}', load)
  # Beside others, as GPTQ stores them.
  refused(write(tmp_path, {'blocks.0.mlp.fc1.qweight': TENSORS[name].astype(dtype)}), message,
          load)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf, -np.nan])
@pytest.mark.parametrize('dtype', [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_nan_and_infinity_are_refused_with_the_tensors_name(dtype, value, tmp_path):
  name = 'blocks.1.attn.qkv.weight'
  changed = TENSORS[name].astype(dtype)
  changed[3, 5] = value
  refused(write(tmp_path, {name: changed}), f'{name} of .* holds NaN or infinity')


@pytest.mark.parametrize('dtype', [ml_dtypes.bfloat16, np.float16, np.float32])
def test_the_largest_numbers_and_zeros_of_both_signs_are_read(dtype, tmp_path):
  top = ml_dtypes.finfo(dtype).max
  values = np.resize(np.array([top, -top, 0.0, -0.0, -1.0], dtype), TENSORS['norm.weight'].shape)
  file = write(tmp_path, {'norm.weight': values})
  with files.reading([file]) as tensors:
    np.testing.assert_array_equal(tensors.read('norm.weight'), values)


# -- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('cut', [3, 60, -1])
def test_a_truncated_file_is_refused(cut, tmp_path):
  file = write(tmp_path)
  file.write_bytes(file.read_bytes()[:cut])
  refused(file, 'cannot be read as safetensors')


@pytest.mark.parametrize('length', [0, 2 ** 40, 2 ** 60, 2 ** 64 - 1])
def test_a_wrong_length_of_the_header_is_refused(length, tmp_path):
  file = write(tmp_path)
  file.write_bytes(length.to_bytes(8, 'little') + file.read_bytes()[8:])
  refused(file, 'cannot be read as safetensors')


@pytest.mark.parametrize('name', ['model.safetensors', 'config.json', files.INDEX, 'x.safetensors'])
@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(make, name, tmp_path):
  if name == 'config.json':
    write(tmp_path)
  make(tmp_path / name)
  refused(tmp_path, 'is no regular file')
  if make is os.mkfifo and name.endswith('.safetensors'):
    refused(tmp_path / name, 'is no regular file')


@pytest.mark.parametrize(('content', 'message'), [
    ('', 'is no valid JSON'), ('{', 'is no valid JSON'),
    ('{"weight_map": {"norm.bias": NaN}}', 'NaN is no'),
    ('[1]', r'holds \[1\], and an object'), ('3', 'holds 3, and an object'),
    ('{}', 'has no weight_map'), ({'weight_map': []}, 'has no weight_map'),
    ({'weight_map': {}}, 'has no weight_map'), ({'weight_map': {'norm.bias': 3}}, 'lies in 3'),
    ('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', "key 'a' is given twice"),
    ('[' * 100_000, 'is no valid JSON .maximum recursion'),
    *(({'weight_map': {'norm.bias': name}}, f'lies in {re.escape(repr(name))}, which is no')
      for name in ('../../model.safetensors', '/etc/x.safetensors', 'a/model.safetensors',
                   'model.bin', 'model.safetensors\n', '')),
    ({'weight_map': {'norm.bias': 'other.safetensors'}}, r'lacks other\.safetensors, which its'),
    ({'weight_map': {'no.such': 'model.safetensors'}}, r'lacks no\.such, which'),
])
def test_an_index_of_the_wrong_form_is_refused(content, message, tmp_path):
  write(tmp_path)
  index(tmp_path, content)
  refused(tmp_path, message)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
  names = sorted(TENSORS)
  parts = {'a.safetensors': names[:9], 'b.safetensors': names[8:]}
  for file, part in parts.items():
    save_file({name: TENSORS[name] for name in part}, tmp_path / file)
  index(tmp_path, {'weight_map': {name: file for file, part in parts.items() for name in part}})
  refused(tmp_path, rf'{names[8]} is in two files, .*a\.safetensors and b\.safetensors')


@pytest.mark.parametrize(('content', 'message'), [
    ('[]', r'holds \[\], and an object'), ('"vit"', "holds 'vit'"), ('null', 'holds None'),
    ('{"model_type": "vit"', 'is no valid JSON'),
    ('{"model_type": "vit", "model_type": "llama"}', "the key 'model_type' is given twice"),
    ('{"model_type": "vit", "layer_norm_eps": NaN}', 'NaN is no'),
    ('{"model_type": "vit", "layer_norm_eps": -Infinity}', '-Infinity is no'),
    ('{"model_type": "vit", "hidden_size": 1' + '0' * 5000 + '}', 'is no valid JSON'),
    ('{"a":' * 50_000, 'is no valid JSON .maximum recursion'),
    (b'\xff\xfe{}', 'is no text in UTF-8'),
])
def test_a_config_that_is_none_is_refused(content, message, tmp_path):
  write(tmp_path)
  file = tmp_path / 'config.json'
  file.write_bytes(content if isinstance(content, bytes) else content.encode())
  refused(tmp_path, message)


@pytest.mark.long
@pytest.mark.parametrize(('changes', 'message'), [
    ({'layer_norm_eps': 1e-5}, 'has norm_eps=1e-05 and the model 1e-12, .* set norm_eps=1e-05'),
    ({'hidden_act': 'gelu_new'}, "has activation='gelu_tanh' and the model 'gelu'"),
    ({'num_attention_heads': 4}, 'has heads=4 and the model 2'),
    ({'model_type': 'llama'}, "model_type 'llama' is unknown"),
    ({'model_type': None}, 'None is unknown'),
    ({'layer_norm_eps': None}, 'says layer_norm_eps=None'),
    ({'quantization_config': {'quant_method': 'bitsandbytes'}}, 'quantized weights are not read'),
    ({'use_gated_mlp': True}, 'says use_gated_mlp=True, which is unknown of vit'),
])
def test_a_config_that_contradicts_the_model_is_refused(changes, message, tmp_path):
  save_file(load_file(FOLDER / 'hub_vit.safetensors'), tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').write_text(json.dumps(case('hub_vit')['config'] | changes))
  refused(tmp_path, message, lambda source: checkpoints.load(build('hub_vit'), source))


def test_a_folder_with_the_name_of_a_file_and_a_missing_one_are_told_apart(tmp_path):
  (tmp_path / 'model.safetensors').symlink_to(tmp_path / 'gone')
  refused(tmp_path, 'cannot be read as safetensors')
  refused(tmp_path / 'model.safetensors', 'there is no checkpoint at')


TIMM = {'architecture': 'vit_tiny_patch16_224', 'num_classes': 5, 'num_features': 32,
        'global_pool': 'token', 'pretrained_cfg': {'tag': 'x', 'mean': [0.5]}}


@pytest.mark.parametrize(('changes', 'message'), [
    ({'architecture': 'vit_base_patch16_clip_quickgelu_224'}, "set activation='quick_gelu'"),
    ({'architecture': 'vit_base_patch16_clip_224'}, 'set norm_eps=1e-05'),
    ({'model_args': {'num_heads': 4}}, 'set heads=4'),
    ({'model_args': {'no_embed_class': True}}, 'set special_positions=False'),
    ({'model_args': {'qk_norm': True}}, r'model_args\.qk_norm=True, which is unknown of timm_args'),
    ({'model_args': {'act_layer': 'relu'}}, "act_layer='relu', which is unknown"),
    ({'num_classes': -1}, 'says num_classes=-1'), ({'architecture': 7}, 'says architecture=7'),
])
def test_what_timms_config_says_is_compared(changes, message):
  model = build(NAME)
  timm.check_config(model, TIMM | {'model_args': {'img_size': 24, 'num_heads': 2}})
  with pytest.raises(ValueError, match=message) as caught:
    timm.check_config(model, TIMM | changes)
  assert '\n' not in str(caught.value)


@pytest.mark.long
def test_timms_config_is_read_with_its_tensors(tmp_path):
  write(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(TIMM))
  load(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(TIMM | {'model_args': {'num_heads': 4}}))
  refused(tmp_path, 'set heads=4', load)
