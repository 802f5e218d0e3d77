"""The keys of a published config.json: what is read, of what type, and what means nothing here.

A key that is read has a type. One that changes nothing in a model's outputs passes at any value
(`HARMLESS`). Every other key is refused, unless it is null: it may change the model, and to ignore
it would be wrong in silence.

Keys and defaults are those of the transformers library's config classes, versions 4.40 to 5.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping
from types import NoneType
from typing import Annotated, Any

from ops import choices, values
from ops.values import Like, OneOf, Pixels, Range

# Activations by the library's names, as models/blocks.py calls them.
ACTIVATIONS = {'gelu': 'gelu', 'gelu_python': 'gelu', 'gelu_new': 'gelu_tanh',
               'gelu_fast': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh',
               'quick_gelu': 'quick_gelu'}

Kinds = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class NamedType:
  """Says that the model_type of an object is a name, where it has one."""

  def check(self, name: str, value: Mapping[Any, Any]) -> None:
    """Raises a ValueError, with its name, for another one."""
    values.check(f'{name}.model_type', value.get('model_type'), str | None)

  def __str__(self) -> str:
    return 'whose model_type is a name'


Size = Annotated[int, Range(1, 2 ** 18)]
Count = Annotated[int, Range(1, 1024)]
Few = Annotated[int, Range(1, 16)]
Layer = Annotated[int, Range(0, 1024)]
Length = Annotated[int, Range(1, 2 ** 30)]
Window = Annotated[int, Range(0, 2 ** 30)]
Vocabulary = Annotated[int, Range(1, 2 ** 24)]
Token = Annotated[int, Range(0, 2 ** 24)]
Classes = Annotated[int, Range(0, 2 ** 20)]
RopeSection = Annotated[int, Range(0, 2 ** 18)]
Epsilon = Annotated[float, Range(0, 1)]
Factor = Annotated[float, Range(1e-3, 10 ** 6)]
Theta = Annotated[float, Range(2, 10 ** 12)]
Ratio = Annotated[float, Range(0.1, 64)]
Flag = bool | None
# Where a model has no place for anything else.
No = Annotated[bool, OneOf((False,))] | None
Yes = Annotated[bool, OneOf((True,))] | None
AllOfIt = Annotated[float, OneOf((1.0,))] | None
Section = Annotated[Mapping[Any, Any], NamedType()] | None
Activation = Annotated[str, OneOf(ACTIVATIONS)]
Gate = Annotated[str, OneOf(('silu', 'swish'))]
Pool = Annotated[str, OneOf(('token', 'avg', 'map', ''))]

# Keys that mean nothing here at any value, by the reason.
_HARMLESS = {
    'where a file comes from, and how the library runs it':
        'model_type transformers_version torch_dtype dtype auto_map tokenizer_class '
        'torchscript use_bfloat16 tf_legacy_loss return_dict output_attentions prefix use_cache '
        'output_hidden_states chunk_size_feed_forward attn_implementation transformers.js_config '
        'name_or_path unsloth_version unsloth_fixed max_sequence_length '
        'is_llama_config',
    'training, and values that parameters start from, which the file holds as they became':
        'attention_dropout dropout hidden_dropout_prob attention_probs_dropout_prob mask_ratio '
        'classifier_dropout '
        'drop_path_rate initializer_range initializer_factor logit_scale_init_value '
        'layerscale_value use_mask_token norm_pix_loss ignore_index gradient_checkpointing '
        'neftune_noise_alpha',
    'names of classes':
        'label2id num_labels finetuning_task task_specific_params problem_type label_names '
        'label_descriptions',
    'how text starts and ends, and is generated: other files beside this one say it':
        'bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id max_length '
        'min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty top_k '
        'top_p typical_p temperature repetition_penalty length_penalty no_repeat_ngram_size '
        'encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores '
        'return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values '
        'exponential_decay_length_penalty suppress_tokens begin_suppress_tokens',
    'other kinds of model, heads and decoders that are not read':
        'is_decoder tie_encoder_decoder encoder_stride pooler_output_size pooler_act out_features '
        'decoder_num_attention_heads decoder_hidden_size decoder_num_hidden_layers out_indices '
        'decoder_intermediate_size stage_names apply_layernorm reshape_hidden_states',
    'the same products in slices': 'pretraining_tp'}
HARMLESS = frozenset(key for keys in _HARMLESS.values() for key in keys.split())
_QUANTIZED = ('quantization_config', 'compression_config')
_EVERYWHERE: Kinds = {
    'architectures': tuple[Annotated[str, Like('.*', 'LlamaForCausalLM')], ...] | None,
    'id2label': Section, **dict.fromkeys(_QUANTIZED, NoneType),
    'pruned_heads': Annotated[Mapping[Any, Any], OneOf(({},))] | None, 'is_encoder_decoder': No,
    'add_cross_attention': No}

_BLOCKS: Kinds = {'hidden_size': Size, 'intermediate_size': Annotated[int, Range(1, 2 ** 20)],
                  'num_hidden_layers': Count, 'num_attention_heads': Count}
_LM: Kinds = {
    **_BLOCKS, 'num_key_value_heads': Count | None, 'head_dim': Size | None,
    'vocab_size': Vocabulary, 'max_position_embeddings': Length, 'rms_norm_eps': Epsilon,
    'rope_theta': Theta, 'rope_scaling': Section, 'rope_parameters': Section,
    'partial_rotary_factor': AllOfIt, 'hidden_act': Gate, 'tie_word_embeddings': Flag,
    'attention_bias': No, 'mlp_bias': No, 'rope_interleaved': No}
_WINDOWS: Kinds = {
    'sliding_window': Window | None, 'use_sliding_window': Flag, 'max_window_layers': Window | None,
    'use_mrope': No, 'layer_types': tuple[
        Annotated[str, OneOf(('full_attention', 'sliding_attention'))], ...] | None}
_TOWER: Kinds = {
    **_BLOCKS, 'patch_size': Count, 'num_channels': Few, 'hidden_act': Activation,
    'layer_norm_eps': Epsilon, 'tie_word_embeddings': Flag}
_IMAGE: Kinds = {**_TOWER, 'image_size': Pixels}
_VIT: Kinds = {**_IMAGE, 'qkv_bias': Yes}
_DINOV2: Kinds = {**{key: kind for key, kind in _VIT.items() if key != 'intermediate_size'},
                  'mlp_ratio': Ratio, 'use_swiglu_ffn': Flag}
# Beside its own tower CLIP's has these of the text's, which nothing reads.
_CLIP_IMAGE: Kinds = {**_IMAGE, 'projection_dim': Size, 'vocab_size': Vocabulary}
_TEXT: Kinds = {**_TOWER, 'vocab_size': Vocabulary, 'max_position_embeddings': Length,
                'eos_token_id': Token | None}
_SIGLIP_TEXT: Kinds = {**_TEXT, 'projection_size': Size | None}
_PAIR: Kinds = {'vision_config': Section, 'text_config': Section, 'tie_word_embeddings': Flag}
_VLM: Kinds = {
    **_PAIR, 'image_token_id': Token, 'image_token_index': Token,
    # Of videos, and around images: a tokenizer writes them.
    **{f'{kind}_token_{ending}': Token | None
       for kind in ('video', 'vision', 'vision_start', 'vision_end') for ending in ('id', 'index')}}
_LLAVA: Kinds = {
    # One layer, without its [CLS] token if any.
    **_VLM, 'vision_feature_layer': Annotated[int, Range(-1024, 1024)],
    'vision_feature_select_strategy': Annotated[str, OneOf(('default', 'full'))],
    'projector_hidden_act': Activation, 'multimodal_projector_bias': Yes,
    # As long as a processor writes it, and as older files repeat it of the text's.
    'image_seq_length': Length | None, 'vocab_size': Vocabulary}
_PINPOINTS: Kinds = {'image_grid_pinpoints': tuple[tuple[Size, Size], ...] | None,
                     'use_image_newline_parameter': Yes}
_QWEN_TOWER: Kinds = {
    'depth': Count, 'num_heads': Count, 'hidden_size': Size, 'patch_size': Count,
    'temporal_patch_size': Annotated[int, OneOf((2,))], 'spatial_merge_size': Few,
    **dict.fromkeys(('in_channels', 'in_chans'), Annotated[int, OneOf((3,))]),
    'spatial_patch_size': Count, 'rope_parameters': Section, 'tie_word_embeddings': Flag}

# What a config.json may say, by its model_type; a nested one of a text has the plain model's.
KEYS: dict[str, Kinds] = {
    'llama': _LM, 'mistral': {**_LM, 'sliding_window': Window | None},
    'qwen2': {**_LM, **_WINDOWS}, 'qwen3': {**_LM, **_WINDOWS},
    'vit': _VIT, 'deit': _VIT, 'vit_mae': _VIT, 'dinov2': _DINOV2,
    'dinov2_with_registers': {**_DINOV2, 'num_register_tokens': Layer},
    'clip_vision_model': _CLIP_IMAGE,
    'siglip_vision_model': {**_IMAGE, 'vision_use_head': Flag},
    'siglip2_vision_model': {**_TOWER, 'num_patches': Length, 'vision_use_head': Flag},
    'clip_text_model': {**_TEXT, 'projection_dim': Size},
    'siglip_text_model': _SIGLIP_TEXT, 'siglip2_text_model': _SIGLIP_TEXT,
    'bert': {**_BLOCKS, 'vocab_size': Vocabulary, 'max_position_embeddings': Length,
             'type_vocab_size': Few, 'hidden_act': Activation, 'layer_norm_eps': Epsilon,
             'position_embedding_type': Annotated[str, OneOf(('absolute',))],
             'tie_word_embeddings': Flag},
    'clip': {**_PAIR, 'projection_dim': Size, 'text_config_dict': Section,
             'vision_config_dict': Section},
    'siglip': _PAIR, 'siglip2': _PAIR,
    'llava': _LLAVA, 'llava_next': {**_LLAVA, **_PINPOINTS},
    'llava_onevision': {**_LLAVA, **_PINPOINTS, 'vision_aspect_ratio': Annotated[
        str, Like(r'anyres_max_[1-9]\d{0,3}', 'anyres_max_9')]},
    'qwen2_vl': _VLM, 'qwen2_5_vl': _VLM,
    'qwen2_vl_vision': {**_QWEN_TOWER, 'embed_dim': Size, 'hidden_act': Activation,
                        'mlp_ratio': Ratio},
    'qwen2_5_vl_vision': {
        **_QWEN_TOWER, 'hidden_act': Gate, 'intermediate_size': Size, 'out_hidden_size': Size,
        'window_size': Pixels, 'fullatt_block_indexes': tuple[Layer, ...],
        # Of videos.
        'tokens_per_second': Annotated[float, Range(0, 10 ** 6)]},
    'rope': {
        **dict.fromkeys(('rope_type', 'type'), Annotated[str, OneOf(
            ('default', 'linear', 'dynamic', 'llama3', 'yarn', 'mrope'))] | None),
        **dict.fromkeys(('factor', 'low_freq_factor', 'high_freq_factor', 'beta_fast', 'beta_slow',
                         'attention_factor'), Factor | None),
        'rope_theta': Theta | None, 'original_max_position_embeddings': Length | None,
        'mrope_section': tuple[RopeSection, RopeSection, RopeSection],
        **dict.fromkeys(('truncate', 'mrope_interleaved', 'finetuned'), Flag),
        'partial_rotary_factor': AllOfIt,
        # No family's scaling has these.
        **dict.fromkeys(('mscale', 'mscale_all_dim'), Annotated[float, OneOf((0,))] | None)},
    # timm's own file, and what it adds to the architecture; most of that, shapes show.
    'timm': {'architecture': Annotated[str, Like('.+', 'vit_base_patch16_224')],
             'model_args': Section, 'pretrained_cfg': Section, 'num_classes': Classes,
             'num_features': Size, 'global_pool': Pool},
    'timm_args': {
        **dict.fromkeys(('embed_dim', 'depth', 'patch_size', 'img_size', 'num_heads', 'in_chans'),
                        Size),
        **dict.fromkeys(('num_classes', 'reg_tokens'), Classes),
        **dict.fromkeys(('class_token', 'no_embed_class', 'pre_norm', 'dynamic_img_size',
                         'dynamic_img_pad', 'strict_img_size'), Flag),
        'mlp_ratio': Ratio, 'init_values': Annotated[float, Range(0, 1000)] | None,
        'global_pool': Pool, 'qkv_bias': Yes},
    'tower_rope': {'rope_theta': Annotated[float, OneOf((10000.0,))],
                   'rope_type': Annotated[str, OneOf(('axial', 'default'))]},
}


def check(config: Mapping[str, Any], kind: str, where: str = '') -> None:
  """Raises unless every key of a config is read, null or harmless, and every number possible.

  Args:
    config: what a file says, without defaults.
    kind: a name in `KEYS`.
    where: of the config inside the file, as 'text_config.'.

  Raises:
    ValueError: one line, with the key, its value and what is known.
  """
  kinds = {**_EVERYWHERE, **KEYS[kind]}
  for key, value in config.items():
    if key in kinds:
      _check(where, key, value, kinds[key])
    elif value is not None and key not in HARMLESS and not key.startswith('_'):
      raise ValueError(f'config.json says {where}{key}={reprlib.repr(value)}, which is unknown '
                       f'of {kind}{choices.near(key, kinds)}: delete it if it changes nothing, or '
                       'use another checkpoint')


def section(config: Mapping[str, Any], key: str) -> dict[str, Any]:
  """Returns an object inside a config, {} where there is none.

  Raises:
    ValueError: something else is there.
  """
  _check('', key, config.get(key), Section)
  return dict(config.get(key) or {})


def _check(where: str, key: str, value: Any, kind: Any) -> None:
  try:
    values.check(f'{where}{key}', value, kind)
  except ValueError as error:
    advice = ('quantized weights are not read, use the checkpoint in bfloat16, float16 or float32'
              if key in _QUANTIZED else 'fetch the file again, or use another checkpoint')
    raise ValueError(f'config.json: {error}; {advice}') from error


def divides(config: Mapping[str, Any], part: str, whole: str) -> None:
  """Raises ValueError unless one number of a config divides another."""
  if config[whole] % config[part]:
    raise ValueError(f'config.json says {whole}={config[whole]} and {part}={config[part]}, which '
                     'does not divide it: fetch the file again')


def compare(stated: Mapping[str, Any], model: Any) -> None:
  """Raises ValueError for the first field of a model that a config states otherwise.

  Args:
    stated: fields as the config has them.
    model: with these fields.
  """
  for name, value in stated.items():
    built = getattr(model, name)
    if value != built:
      raise ValueError(f'the checkpoint has {name}={value!r} and the model {built!r}, which '
                       f'shapes do not show: set {name}={value!r}')
