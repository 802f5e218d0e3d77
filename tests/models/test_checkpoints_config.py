"""Configs as they are published: what they leave out has the family's default, whoever saved them.

The values are those of the transformers library's config classes (4.57 and 5.24), and the files
such as their `save_pretrained` writes.
"""

import numpy as np
import pytest

from lib.data import anyres
from models.checkpoints import lm_config, vlm_config

# width, depth, mlp, heads, kv_heads, head_width, vocabulary, context, window, norm_eps, theta.
DEFAULTS = {
    'llama': (4096, 32, 11008, 32, 32, 128, 32000, 2048, 0, 1e-6, 1e4),
    'mistral': (4096, 32, 14336, 32, 8, 128, 32000, 131072, 4096, 1e-6, 1e4),
    'qwen2': (4096, 32, 22016, 32, 32, 128, 151936, 32768, 0, 1e-6, 1e4),
    'qwen3': (4096, 32, 22016, 32, 32, 128, 151936, 32768, 0, 1e-6, 1e4),
    'qwen2_vl': (8192, 80, 29568, 64, 8, 128, 152064, 32768, 0, 1e-5, 1e6),
}
CLIP_L = {'hidden_size': 1024, 'image_size': 336, 'intermediate_size': 4096,
          'model_type': 'clip_vision_model', 'num_attention_heads': 16, 'num_hidden_layers': 24,
          'patch_size': 14, 'projection_dim': 768, 'vocab_size': 32000}
MISTRAL = {'_name_or_path': 'mistralai/Mistral-7B-Instruct-v0.2',
           'architectures': ['MistralForCausalLM'], 'intermediate_size': 14336,
           'max_position_embeddings': 32768, 'model_type': 'mistral', 'num_key_value_heads': 8,
           'rms_norm_eps': 1e-05, 'rope_theta': 1e6, 'sliding_window': None, 'vocab_size': 32064}
LLAVA_NEXT = {'model_type': 'llava_next', 'image_token_index': 32000, 'text_config': MISTRAL,
              'vision_config': CLIP_L, 'vision_feature_layer': -2, 'vocab_size': 32064,
              'vision_feature_select_strategy': 'default', 'tie_word_embeddings': False}
# As 4.57 saves the same: whole, with nulls.
WHOLE = LLAVA_NEXT | {'text_config': MISTRAL | {
    'head_dim': None, 'hidden_act': 'silu', 'hidden_size': 4096, 'num_attention_heads': 32,
    'num_hidden_layers': 32}}
# As 5 does: the base of the rotations in a dict.
SAVED_BY_5 = WHOLE | {'text_config': {
    key: value for key, value in WHOLE['text_config'].items() if key != 'rope_theta'} | {
        'rope_parameters': {'rope_theta': 1e6, 'rope_type': 'default'}}}


def sizes(lm):
  return (lm.width, lm.depth, lm.mlp, lm.heads, lm.kv_heads, lm.head_width, lm.vocabulary,
          lm.context, lm.window, lm.norm_eps, lm.rope.theta)


@pytest.mark.parametrize('kind', DEFAULTS)
def test_a_config_that_says_nothing_has_the_familys_defaults(kind):
  lm = lm_config.from_config({'model_type': kind})
  assert sizes(lm) == DEFAULTS[kind]
  assert not lm.tied
  assert (lm.qkv_bias, lm.qk_norm) == (kind.startswith('qwen2'), kind == 'qwen3')


@pytest.mark.parametrize(('changes', 'wanted'), [
    ({'model_type': 'mistral', 'sliding_window': None}, {'window': 0}),
    ({'model_type': 'mistral', 'num_key_value_heads': None}, {'kv_heads': 32}),
    ({'model_type': 'qwen2', 'use_sliding_window': None, 'sliding_window': 64}, {'window': 0}),
    ({'model_type': 'qwen2', 'use_sliding_window': True, 'max_window_layers': 0},
     {'window': 4096}),
    ({'model_type': 'llama', 'hidden_size': 2048, 'head_dim': None}, {'head_width': 64}),
    ({'model_type': 'qwen3', 'hidden_size': 1024}, {'head_width': 128}),
])
def test_null_is_not_left_out(changes, wanted):
  lm = lm_config.from_config(changes)
  assert {name: getattr(lm, name) for name in wanted} == wanted


@pytest.mark.parametrize('config', [LLAVA_NEXT, WHOLE, SAVED_BY_5], ids=['4.36', '4.57', '5'])
def test_nested_mistral_whoever_saved_it(config):
  vlm = vlm_config.from_config(config)
  assert sizes(vlm.lm) == (4096, 32, 14336, 32, 8, 128, 32064, 32768, 0, 1e-5, 1e6)
  assert (vlm.tower.width, vlm.tower.grid, vlm.image_token) == (1024, (24, 24), 32000)


def test_nested_llamas_leave_out_what_is_not_theirs():
  vicuna = {'model_type': 'llama', 'hidden_size': 5120, 'intermediate_size': 13824,
            'num_hidden_layers': 40, 'num_attention_heads': 40, 'num_key_value_heads': 40,
            'max_position_embeddings': 4096, 'rms_norm_eps': 1e-5, 'vocab_size': 32064}
  lm = vlm_config.from_config(LLAVA_NEXT | {'text_config': vicuna}).lm
  assert sizes(lm) == (5120, 40, 13824, 40, 40, 128, 32064, 4096, 0, 1e-5, 1e4)
  llama3 = {'model_type': 'llama', 'intermediate_size': 14336, 'max_position_embeddings': 8192,
            'num_key_value_heads': 8, 'rms_norm_eps': 1e-5, 'rope_theta': 5e5,
            'vocab_size': 128320}
  lm = vlm_config.from_config(LLAVA_NEXT | {'text_config': llama3}).lm
  assert sizes(lm) == (4096, 32, 14336, 32, 8, 128, 128320, 8192, 0, 1e-5, 5e5)


@pytest.mark.parametrize(('kind', 'text', 'tower', 'token'), [
    ('llava', 'llama', (1024, 24, 4096, 16, 14, 336, 'quick_gelu'), 32000),
    ('llava_next', 'llama', (1024, 24, 4096, 16, 14, 336, 'quick_gelu'), 32000),
    ('llava_onevision', 'qwen2', (1152, 26, 4304, 16, 14, 378, 'gelu_tanh'), 151646),
])
def test_a_llava_that_says_nothing(kind, text, tower, token):
  for nothing in ({}, {'text_config': None, 'vision_config': None}, {'text_config': {}}):
    vlm = vlm_config.from_config({'model_type': kind} | nothing)
    seen = vlm.tower
    assert sizes(vlm.lm) == DEFAULTS[text]
    assert (seen.width, seen.depth, seen.mlp, seen.heads, seen.patch, seen.image_size,
            seen.activation) == tower
    assert vlm.image_token == token


@pytest.mark.parametrize(('family', 'strategy', 'tower'), [
    ('clip_vision_model', 'default', (768, 12, 3072, 12, 32, 224, 'quick_gelu', 1e-5)),
    ('siglip_vision_model', 'full', (768, 12, 3072, 12, 16, 224, 'gelu_tanh', 1e-6)),
])
def test_a_tower_named_alone_has_its_own_defaults(family, strategy, tower):
  seen = vlm_config.from_config({
      'model_type': 'llava', 'vision_config': {'model_type': family},
      'vision_feature_select_strategy': strategy}).tower
  assert (seen.width, seen.depth, seen.mlp, seen.heads, seen.patch, seen.image_size,
          seen.activation, seen.norm_eps) == tower


@pytest.mark.parametrize(('kind', 'tower'), [
    ('qwen2_vl', (1280, 32, 5120, 16, 3584, 'quick_gelu')),
    ('qwen2_5_vl', (3584, 32, 3420, 16, 3584, 'swiglu')),
])
def test_a_qwen_that_says_little(kind, tower):
  rope = {'rope_scaling': {'type': 'mrope', 'mrope_section': [16, 24, 24]}}
  for config in (rope, {'text_config': rope | {'model_type': f'{kind}_text'}}):
    vlm = vlm_config.from_config({'model_type': kind} | config)
    seen = vlm.tower
    assert sizes(vlm.lm) == DEFAULTS['qwen2_vl']
    assert vlm.lm.qkv_bias
    assert vlm.lm.rope.sections == (16, 24, 24)
    assert (seen.width, seen.depth, seen.mlp, seen.heads, seen.projection,
            seen.activation) == tower
    assert lm_config.from_config({'model_type': kind} | config) == vlm.lm


@pytest.mark.parametrize('kind', ['llava', 'llava_onevision', 'qwen2_vl', 'qwen2_5_vl'])
def test_a_head_is_tied_where_either_config_says_so(kind):
  rope = {'rope_scaling': {'type': 'mrope', 'mrope_section': [16, 24, 24]}}
  for root, nested in ((True, None), (False, True), (None, True), (True, False), (None, None),
                       (False, False)):
    ties = [{} if tie is None else {'tie_word_embeddings': tie} for tie in (root, nested)]
    vlm = vlm_config.from_config({
        'model_type': kind, 'text_config': (rope if 'qwen' in kind else {}) | ties[1]} | ties[0])
    assert vlm.lm.tied == bool(root or nested)
  if 'qwen' in kind:
    assert vlm_config.from_config({'model_type': kind, 'tie_word_embeddings': True} | rope).lm.tied


def test_processors_know_the_same_defaults():
  steps = {'do_resize': False, 'do_center_crop': False, 'do_rescale': True, 'do_normalize': True,
           'image_mean': [0.5] * 3, 'image_std': [0.5] * 3}
  found = anyres.from_config(steps, {'model_type': 'llava_next'})
  assert (found.tile, found.side) == (336, 24)
  np.testing.assert_array_equal(
      found.pinpoints, [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]])
  found = anyres.from_config(steps, {'model_type': 'llava_onevision'})
  assert (found.tile, found.side, len(found.pinpoints), found.used) == (384, 27, 36, 378)


# -- rotary scaling ------------------------------------------------------------------------------


LLAMA31 = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
           'original_max_position_embeddings': 8192}


@pytest.mark.parametrize(('scaling', 'stated', 'context'), [
    (None, 4096, 4096),
    ({'type': 'linear', 'factor': 4.0}, 4096, 16384),
    ({'rope_type': 'linear', 'factor': 2.5}, 2048, 5120),
    ({'rope_type': 'llama3', **LLAMA31}, 131072, 131072),
    # 3.2 says less than its factor would give.
    ({'rope_type': 'llama3', **LLAMA31, 'factor': 32.0}, 131072, 131072),
    ({'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32768}, 32768, 131072),
    ({'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32768}, 131072, 131072),
    ({'rope_type': 'yarn', 'factor': 4.0}, 32768, 131072),
    ({'type': 'dynamic', 'factor': 2.0}, 2048, 2048),
    ({'type': 'mrope', 'mrope_section': [16, 24, 24]}, 32768, 32768),
])
def test_a_scaled_rotary_raises_the_context_as_its_release_means(scaling, stated, context):
  base = {'model_type': 'llama', 'max_position_embeddings': stated}
  assert lm_config.from_config(base | {'rope_scaling': scaling}).context == context
  if scaling:
    new = {'rope_theta': 1e4, **scaling}
    found = lm_config.from_config(base | {'rope_parameters': new})
    assert found == lm_config.from_config(base | {'rope_scaling': scaling})
  assert lm_config.from_config(base | {'rope_scaling': scaling}, context=77).context == 77


def test_named_models_have_the_context_of_their_release():
  contexts = {'vicuna_7b': 4096, 'vicuna_7b_16k': 16384, 'llama3_8b': 8192, 'llama3.1_8b': 131072,
              'llama3.2_1b': 131072, 'qwen3_8b': 40960}
  assert {name: lm_config.make_lm(name).context for name in contexts} == contexts


def test_dynamic_scaling_scales_nothing_up_to_the_context():
  base = {'model_type': 'llama'}
  scaled = lm_config.from_config(base | {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}})
  assert scaled == lm_config.from_config(base)


@pytest.mark.parametrize(('scaling', 'missing'), [
    ({'type': 'linear'}, 'factor'),
    ({'type': 'dynamic'}, 'factor'),
    ({'rope_type': 'yarn', 'factor': None}, 'factor'),
    ({'rope_type': 'llama3', 'factor': 8.0},
     'low_freq_factor, high_freq_factor, original_max_position_embeddings'),
])
def test_a_scaling_without_its_numbers_is_a_worded_error(scaling, missing):
  kind = scaling.get('rope_type') or scaling['type']
  with pytest.raises(ValueError, match=f"RoPE scaling '{kind}' lacks {missing}: "):
    lm_config.from_config({'model_type': 'llama', 'rope_scaling': scaling})
