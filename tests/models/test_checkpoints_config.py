"""Configs as they are published: what they leave out has the family's default, whoever saved them.

The values are those of the transformers library's config classes (4.57 and 5.24), and the files
such as their `save_pretrained` writes.
"""

import copy
import re

import numpy as np
import pytest
from helpers.parity import described, published

from lib.data import anyres
from models.checkpoints import lm_config, vit_config, vlm_config

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


# -- every key is read, harmless or refused --------------------------------------------------------


@pytest.mark.parametrize(('config', 'message'), [
    # Of another architecture, and no default.
    ({'model_type': 'llama', 'attention_bias': True}, 'says attention_bias=True: known here is F'),
    ({'model_type': 'llama', 'mlp_bias': True}, 'says mlp_bias=True'),
    ({'model_type': 'llama', 'sliding_window': 64}, 'says sliding_window=64, which is unknown of'),
    ({'model_type': 'llama', 'qk_norm': True}, 'says qk_norm=True, which is unknown of llama'),
    ({'model_type': 'mistral', 'num_experts': 8},
     'says num_experts=8, which is unknown of mistral'),
    ({'model_type': 'qwen2', 'final_logit_softcapping': 30.0}, 'final_logit_softcapping=30.0, wh'),
    ({'model_type': 'qwen2', 'use_mrope': True}, 'says use_mrope=True'),
    ({'model_type': 'qwen3', 'hidden_act': 'gelu'}, "says hidden_act='gelu': known here is 'silu'"),
    ({'model_type': 'qwen3', 'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
    ({'model_type': 'qwen3', 'layer_types': ['chunked_attention']}, 'says layer_types='),
    ({'model_type': 'llama', 'rope_parameters': {'full_attention': {'rope_theta': 1e4}}},
     'says rope_parameters.full_attention='),
    ({'model_type': 'llama', 'rope_scaling': {'type': 'longrope'}}, "rope_scaling.type='longrope'"),
    ({'model_type': 'llama', 'rope_scaling': 4.0},
     'says rope_scaling=4.0: known here is an object'),
    ({'model_type': 'vit', 'qkv_bias': False}, 'says qkv_bias=False'),
    ({'model_type': 'vit', 'hidden_act': 'relu'}, "says hidden_act='relu'"),
    ({'model_type': 'vit', 'layer_norm_epsilon': 1e-6}, "(did you mean 'layer_norm_eps'?)"),
    ({'model_type': 'vit', 'pruned_heads': {'0': [1]}}, 'says pruned_heads='),
    ({'model_type': 'clip', 'text_config': {'eos_token_id': 7}}, 'text_config.eos_token_id=7'),
    ({'model_type': 'clip', 'vision_config': {'num_heads': 2}}, 'says vision_config.num_heads=2, '),
    ({'model_type': 'siglip', 'vision_config': {'vision_use_head': False}},
     'vision_use_head=False'),
    ({'model_type': 'siglip2_vision_model', 'num_patches': 200}, 'num_patches=200'),
    ({'model_type': 'llava', 'vision_feature_layer': [-2, -5]}, 'says vision_feature_layer=['),
    ({'model_type': 'llava', 'vision_feature_layer': 25}, 'is none of a tower of 24 layers'),
    ({'model_type': 'llava', 'vision_feature_layer': -26}, 'is none of a tower of 24 layers'),
    ({'model_type': 'llava', 'vision_feature_select_strategy': 'full'},
     "known here are all patches"),
    ({'model_type': 'llava', 'vision_config': {'model_type': 'siglip_vision_model'}},
     "vision_feature_select_strategy='default' of a siglip_vision_model"),
    ({'model_type': 'llava', 'vision_config': {'model_type': 'vit'}},
     "model_type='vit' is unknown"),
    ({'model_type': 'llava', 'multimodal_projector_bias': False},
     'multimodal_projector_bias=False'),
    ({'model_type': 'llava', 'projector_hidden_act': 'silu'}, "says projector_hidden_act='silu'"),
    ({'model_type': 'llava', 'mm_projector_type': 'mlp2x_gelu'}, 'mm_projector_type='),
    ({'model_type': 'llava_next', 'use_image_newline_parameter': False}, 'newline_parameter=False'),
    ({'model_type': 'llava_onevision', 'vision_aspect_ratio': 'pad'}, "vision_aspect_ratio='pad'"),
    ({'model_type': 'qwen2_vl', 'vision_config': {'hidden_act': 'silu'}}, "hidden_act='silu'"),
    ({'model_type': 'qwen2_vl', 'vision_config': {'in_channels': 1}},
     'vision_config.in_channels=1'),
    ({'model_type': 'qwen2_5_vl', 'vision_config': {'rope_parameters': {'rope_theta': 9.0}}},
     'vision_config.rope_parameters.rope_theta=9.0'),
    # Quantized, wherever it stands.
    ({'model_type': 'llama', 'quantization_config': {'quant_method': 'awq', 'bits': 4}},
     'quantized weights are not read'),
    ({'model_type': 'qwen2_5_vl', 'quantization_config': {'quant_method': 'fp8'}}, 'quantized'),
    ({'model_type': 'llava', 'text_config': {'quantization_config': {'quant_method': 'gptq'}}},
     'says text_config.quantization_config='),
    # No numbers, or impossible ones.
    ({'model_type': 'llama', 'num_hidden_layers': 10 ** 7}, 'a whole number from 1 to 1024'),
    ({'model_type': 'llama', 'num_hidden_layers': 0}, 'says num_hidden_layers=0'),
    ({'model_type': 'llama', 'hidden_size': -4096}, 'says hidden_size=-4096'),
    ({'model_type': 'llama', 'hidden_size': '4096'}, "says hidden_size='4096'"),
    ({'model_type': 'llama', 'hidden_size': 4096.5}, 'says hidden_size=4096.5'),
    ({'model_type': 'llama', 'hidden_size': None}, 'says hidden_size=None'),
    ({'model_type': 'llama', 'hidden_size': True}, 'says hidden_size=True'),
    ({'model_type': 'llama', 'vocab_size': 10 ** 12}, 'says vocab_size=1000000000000'),
    ({'model_type': 'llama', 'rms_norm_eps': float('nan')}, 'says rms_norm_eps=nan'),
    ({'model_type': 'llama', 'rms_norm_eps': -1e-6}, 'says rms_norm_eps=-1e-06'),
    ({'model_type': 'llama', 'rope_theta': float('inf')}, 'says rope_theta=inf'),
    ({'model_type': 'llama', 'rope_theta': 0}, 'says rope_theta=0'),
    ({'model_type': 'llama', 'hidden_size': 32, 'num_attention_heads': 5},
     'hidden_size=32 and num_attention_heads=5, which does not divide it'),
    ({'model_type': 'llama', 'num_attention_heads': 32, 'num_key_value_heads': 5},
     'does not divide'),
    ({'model_type': 'llama', 'head_dim': 7}, 'width=7 must be even'),
    ({'model_type': 'llama', 'tie_word_embeddings': 'no'}, "says tie_word_embeddings='no'"),
    ({'model_type': 'llama', 'rope_scaling': {'type': 'linear', 'factor': 0}}, 'factor=0'),
    ({'model_type': 'llama', 'rope_scaling': {**LLAMA31, 'rope_type': 'llama3',
                                              'high_freq_factor': 1.0}}, 'must be greater'),
    ({'model_type': 'vit', 'patch_size': 0}, 'says patch_size=0'),
    ({'model_type': 'vit', 'patch_size': 32, 'image_size': 16}, 'no square of whole patches'),
    ({'model_type': 'vit', 'num_attention_heads': 5}, 'does not divide'),
    ({'model_type': 'dinov2', 'mlp_ratio': 'four'}, "says mlp_ratio='four'"),
    ({'model_type': 'llava', 'vision_config': []},
     'says vision_config=[]: known here is an object'),
    ({'model_type': 'llava', 'text_config': 'llama'}, "says text_config='llama'"),
    ({'model_type': 'llava', 'image_token_index': -1}, 'says image_token_index=-1'),
    ({'model_type': 'llava', 'text_config': {'num_hidden_layers': 10 ** 7}}, 'text_config.num_hid'),
    ({'model_type': 'qwen2_vl', 'vision_config': {'num_heads': 7}}, 'does not divide'),
    ({'model_type': 'qwen2_vl', 'num_hidden_layers': 0}, 'says num_hidden_layers=0'),
    ({'model_type': 'qwen2_5_vl', 'vision_config': {'fullatt_block_indexes': [-1]}},
     'indexes=[-1]'),
    ({'model_type': 'vit', 'architectures': [3]}, 'says architectures=[3]'),
    ({'model_type': 'vit', 'id2label': 3}, 'says id2label=3'),
    ({'model_type': 'llama', 'rope_theta': None}, 'says rope_theta=None'),
    ({'model_type': 'qwen2_vl', 'rope_scaling': {'mrope_section': []}}, 'mrope_section=[]: known'),
    ({'model_type': 'qwen2_vl', 'rope_scaling': {'mrope_section': None}}, 'mrope_section=None'),
    ({'model_type': 'qwen2_5_vl', 'vision_config': {'fullatt_block_indexes': None}},
     'fullatt_block_indexes=None'),
    ({'model_type': 'llava', 'text_config': {'tie_word_embeddings': 'x'}}, "embeddings='x'"),
    # No model that is known.
    ({'model_type': 'gpt2'}, "model_type 'gpt2' is unknown"),
    ({'model_type': ['llama']}, "model_type ['llama'] is unknown"),
    ({}, 'model_type None is unknown'),
])
def test_what_a_config_cannot_say_here_is_refused_in_one_line(config, message):
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    described(config)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('config', [
    {'model_type': 'llama', 'pretraining_tp': 4, 'attention_dropout': 0.1, 'use_cache': False,
     '_name_or_path': 'x', 'torch_dtype': 'float16', 'attention_bias': False, 'mlp_bias': None,
     'logit_softcap': None, 'quantization_config': None, 'eos_token_id': [1, 2]},
    {'model_type': 'vit', 'hidden_dropout_prob': 0.5, 'encoder_stride': 32, 'pooler_act': 'tanh',
     'num_labels': 7, 'problem_type': 'regression', 'is_decoder': False, 'qkv_bias': True},
    {'model_type': 'qwen2_vl', 'video_token_id': 1, 'vision_token_id': 2,
     'vision_start_token_id': 3,
     'max_window_layers': 80, 'use_sliding_window': False, 'sliding_window': 32768,
     'vision_config': {'in_chans': 3, 'spatial_patch_size': 14, 'model_type': 'qwen2_vl'}},
])
def test_what_means_nothing_here_changes_nothing(config):
  assert described(config) == described({'model_type': config['model_type']})


@pytest.mark.parametrize(('kind', 'wanted'), [
    ('vit', (768, 12, 3072, 12, 16, 224, 'gelu', 1e-12)),
    ('deit', (768, 12, 3072, 12, 16, 224, 'gelu', 1e-12)),
    ('vit_mae', (768, 12, 3072, 12, 16, 224, 'gelu', 1e-12)),
    ('dinov2', (768, 12, 3072, 12, 14, 224, 'gelu', 1e-6)),
    ('dinov2_with_registers', (768, 12, 3072, 12, 16, 224, 'gelu', 1e-6)),
    ('clip_vision_model', (768, 12, 3072, 12, 32, 224, 'quick_gelu', 1e-5)),
    ('siglip_vision_model', (768, 12, 3072, 12, 16, 224, 'gelu_tanh', 1e-6)),
    ('siglip2_vision_model', (768, 12, 3072, 12, 16, 256, 'gelu_tanh', 1e-6)),
])
def test_an_image_tower_that_says_nothing(kind, wanted):
  vit = vit_config.from_config({'model_type': kind})
  assert (vit.width, vit.depth, vit.mlp, vit.heads, vit.patch, vit.image_size, vit.activation,
          vit.norm_eps) == wanted
  assert vit.registers == (4 if kind.endswith('registers') else 0)


@pytest.mark.parametrize(('kind', 'wanted'), [
    ('clip', (512, 12, 2048, 8, 49408, 77, 512, 'quick_gelu', 1e-5)),
    ('siglip', (768, 12, 3072, 12, 32000, 64, 768, 'gelu_tanh', 1e-6)),
    ('siglip2', (768, 12, 3072, 12, 32000, 64, 768, 'gelu_tanh', 1e-6)),
])
def test_a_pair_that_says_nothing(kind, wanted):
  pair = vit_config.from_config({'model_type': kind})
  text = pair.text
  assert (text.width, text.depth, text.mlp, text.heads, text.vocabulary, text.context,
          text.projection, text.activation, text.norm_eps) == wanted
  assert pair.bias == (kind != 'clip')
  assert vit_config.from_config({'model_type': f'{kind}_text_model'}) == text


ODD = (None, -1, 0, 10 ** 9, 2.5, 'x', True, [], {}, [None], {'a': 1}, float('nan'), float('inf'),
       [[1]], '10', 1e-300, [{}], {'rope_type': [1]})


def paths(config, start=()):
  """Yields the path of every key, in nested configs too."""
  for key, value in config.items():
    yield (*start, key)
    if isinstance(value, dict):
      yield from paths(value, (*start, key))


@pytest.mark.long
def test_odd_values_of_every_key_are_read_or_refused_in_one_line():
  for name, case in published('5.24.0').items():
    if not name.endswith(('/says_little', '/yarn', '/beside_the_others', '/swiglu')):
      continue
    for form in ('given', 'saved'):
      for path in paths(case[form]):
        for odd in ODD:
          config = copy.deepcopy(case[form])
          inner = config
          for key in path[:-1]:
            inner = inner[key]
          inner[path[-1]] = odd
          said = ''
          try:
            described(config)
          except ValueError as error:
            said = str(error)
          assert len(said) < 700, (name, path, odd)
          assert '\n' not in said, (name, path, odd)
