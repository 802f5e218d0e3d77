"""The keys of a published config.json: what is read, in what range, and what means nothing here.

A key that is read has a check. One that changes nothing in a model's outputs passes at any value
(`HARMLESS`). Every other key is refused, unless it is null: it may change the model, and to ignore
it would be wrong in silence.

Keys and defaults are those of the transformers library's config classes, versions 4.40 to 5.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from ops import choices

# Activations by the library's names, as models/blocks.py calls them.
ACTIVATIONS = {'gelu': 'gelu', 'gelu_python': 'gelu', 'gelu_new': 'gelu_tanh',
               'gelu_fast': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh',
               'quick_gelu': 'quick_gelu'}


@dataclasses.dataclass(frozen=True)
class Number:
  """A range of numbers, ends included.

  Attributes:
    low, high: the ends.
    whole: whether fractions are excluded.
    null: whether null is a value.
    otherwise: says what other values mean, '' for nothing.
  """

  low: float
  high: float
  whole: bool = True
  null: bool = False
  otherwise: str = ''

  def allows(self, value: Any) -> bool:
    """Returns whether a value is in the range; NaN and booleans are not."""
    if value is None or isinstance(value, bool):
      return self.null and value is None
    return isinstance(value, int if self.whole else (int, float)) and (
        self.low <= value <= self.high)

  def __str__(self) -> str:
    return (f'a {"whole " if self.whole else ""}number from {self.low:g} to {self.high:g}'
            f'{" or null" if self.null else ""}{self.otherwise and "; "}{self.otherwise}')


@dataclasses.dataclass(frozen=True)
class OneOf:
  """A few values; `otherwise` says what the others need."""

  values: tuple[Any, ...]
  otherwise: str = 'use another checkpoint'

  def allows(self, value: Any) -> bool:
    """Returns whether a value is among them."""
    return value in self.values

  def __str__(self) -> str:
    return f'{" or ".join(map(repr, self.values))}; {self.otherwise}'


@dataclasses.dataclass(frozen=True)
class Each:
  """A list of values that one check allows.

  Attributes:
    check: of a value.
    length: how many there are, 0 for any number.
    null: whether null is a value.
  """

  check: Any
  length: int = 0
  null: bool = False

  def allows(self, value: Any) -> bool:
    """Returns whether a value is such a list."""
    if value is None:
      return self.null
    return (isinstance(value, list | tuple) and all(map(self.check.allows, value))
            and self.length in (0, len(value)))

  def __str__(self) -> str:
    return f'a list{f" of {self.length}" if self.length else ""}, each {self.check}'


@dataclasses.dataclass(frozen=True)
class Pattern:
  """Texts that a regular expression matches as a whole; `example` is one."""

  pattern: str
  example: str

  def allows(self, value: Any) -> bool:
    """Returns whether a value is such a text."""
    return isinstance(value, str) and re.fullmatch(self.pattern, value) is not None

  def __str__(self) -> str:
    return f'a text as {self.example!r}'


class Section:
  """An object with keys of its own, or null."""

  def allows(self, value: Any) -> bool:
    """Returns whether a value is an object, and its model_type a name where it has one."""
    return value is None or (
        isinstance(value, Mapping) and isinstance(value.get('model_type'), str | None))

  def __str__(self) -> str:
    return 'an object, whose model_type is a name'


Check = Number | OneOf | Each | Pattern | Section
Checks = Mapping[str, Check]

SIZE, COUNT, LENGTH = Number(1, 2 ** 18), Number(1, 1024), Number(1, 2 ** 30)
TOKEN, VOCABULARY = Number(0, 2 ** 24), Number(1, 2 ** 24)
EPSILON, FACTOR = Number(0, 1, whole=False), Number(1e-3, 1e6, whole=False)
THETA = Number(2, 1e12, whole=False)
YES_OR_NO = OneOf((True, False, None), 'write true or false')
NO = OneOf((False, None), 'this model has no place for anything else: use another checkpoint')
YES = OneOf((True, None), NO.otherwise)
ACTIVATION = OneOf(tuple(ACTIVATIONS), 'no other activation is known here')

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
_QUANTIZED = OneOf((None,), 'quantized weights are not read: use the checkpoint in bfloat16, '
                            'float16 or float32')
_EVERYWHERE: Checks = {
    'architectures': Each(Pattern('.*', 'LlamaForCausalLM'), null=True), 'id2label': Section(),
    'quantization_config': _QUANTIZED, 'compression_config': _QUANTIZED,
    'pruned_heads': OneOf(({}, None)), 'is_encoder_decoder': NO, 'add_cross_attention': NO}

_BLOCKS: Checks = {'hidden_size': SIZE, 'intermediate_size': Number(1, 2 ** 20),
                   'num_hidden_layers': COUNT, 'num_attention_heads': COUNT}
_LM: Checks = {
    **_BLOCKS, 'num_key_value_heads': dataclasses.replace(COUNT, null=True),
    'head_dim': dataclasses.replace(SIZE, null=True), 'vocab_size': VOCABULARY,
    'max_position_embeddings': LENGTH, 'rms_norm_eps': EPSILON,
    'rope_theta': THETA, 'rope_scaling': Section(),
    'rope_parameters': Section(), 'partial_rotary_factor': OneOf((1.0, None)),
    'hidden_act': OneOf(('silu', 'swish'), 'these models gate with it'),
    'tie_word_embeddings': YES_OR_NO, 'attention_bias': NO, 'mlp_bias': NO, 'rope_interleaved': NO}
_WINDOW = Number(0, LENGTH.high, null=True)
_WINDOWS: Checks = {
    'sliding_window': _WINDOW, 'use_sliding_window': YES_OR_NO, 'max_window_layers': _WINDOW,
    'layer_types': Each(OneOf(('full_attention', 'sliding_attention')), null=True),
    'use_mrope': NO}
_TOWER: Checks = {
    **_BLOCKS, 'patch_size': Number(1, 1024), 'num_channels': Number(1, 16),
    'hidden_act': ACTIVATION, 'layer_norm_eps': EPSILON, 'tie_word_embeddings': YES_OR_NO}
_IMAGE: Checks = {**_TOWER, 'image_size': Number(1, 2 ** 14)}
_VIT: Checks = {**_IMAGE, 'qkv_bias': YES}
_DINOV2: Checks = {
    **{key: check for key, check in _VIT.items() if key != 'intermediate_size'},
    'mlp_ratio': Number(0.1, 64, whole=False), 'use_swiglu_ffn': YES_OR_NO}
# Beside its own tower CLIP's has these of the text's, which nothing reads.
_CLIP_IMAGE: Checks = {**_IMAGE, 'projection_dim': SIZE, 'vocab_size': VOCABULARY}
_TEXT: Checks = {**_TOWER, 'vocab_size': VOCABULARY, 'max_position_embeddings': LENGTH,
                 'eos_token_id': Number(0, 2 ** 24, null=True)}
_SIGLIP_TEXT: Checks = {**_TEXT, 'projection_size': dataclasses.replace(SIZE, null=True)}
_PAIR: Checks = {'vision_config': Section(), 'text_config': Section(),
                 'tie_word_embeddings': YES_OR_NO}
_VLM: Checks = {
    **_PAIR, 'image_token_id': TOKEN, 'image_token_index': TOKEN,
    # Of videos, and around images: a tokenizer writes them.
    **{f'{kind}_token_{ending}': dataclasses.replace(TOKEN, null=True)
       for kind in ('video', 'vision', 'vision_start', 'vision_end') for ending in ('id', 'index')}}
_LLAVA: Checks = {
    **_VLM, 'vision_feature_layer': Number(
        -1024, 1024, otherwise='one layer, without its [CLS] token if any'),
    'vision_feature_select_strategy': OneOf(('default', 'full')),
    'projector_hidden_act': ACTIVATION, 'multimodal_projector_bias': YES,
    # As long as a processor writes it, and as older files repeat it of the text's.
    'image_seq_length': dataclasses.replace(LENGTH, null=True), 'vocab_size': VOCABULARY}
_PINPOINTS: Checks = {'image_grid_pinpoints': Each(Each(SIZE, 2), null=True),
                      'use_image_newline_parameter': YES}
_QWEN_TOWER: Checks = {
    'depth': COUNT, 'num_heads': COUNT, 'hidden_size': SIZE, 'patch_size': Number(1, 1024),
    'temporal_patch_size': OneOf((2,)), 'spatial_merge_size': Number(1, 16),
    'in_channels': OneOf((3,)), 'in_chans': OneOf((3,)), 'spatial_patch_size': Number(1, 1024),
    'rope_parameters': Section(), 'tie_word_embeddings': YES_OR_NO}

# What a config.json may say, by its model_type; a nested one of a text has the plain model's.
KEYS: dict[str, Checks] = {
    'llama': _LM, 'mistral': {**_LM, 'sliding_window': _WINDOW},
    'qwen2': {**_LM, **_WINDOWS}, 'qwen3': {**_LM, **_WINDOWS},
    'vit': _VIT, 'deit': _VIT, 'vit_mae': _VIT, 'dinov2': _DINOV2,
    'dinov2_with_registers': {**_DINOV2, 'num_register_tokens': Number(0, 1024)},
    'clip_vision_model': _CLIP_IMAGE,
    'siglip_vision_model': {**_IMAGE, 'vision_use_head': YES_OR_NO},
    'siglip2_vision_model': {**_TOWER, 'num_patches': LENGTH, 'vision_use_head': YES_OR_NO},
    'clip_text_model': {**_TEXT, 'projection_dim': SIZE},
    'siglip_text_model': _SIGLIP_TEXT, 'siglip2_text_model': _SIGLIP_TEXT,
    'clip': {**_PAIR, 'projection_dim': SIZE, 'text_config_dict': Section(),
             'vision_config_dict': Section()},
    'siglip': _PAIR, 'siglip2': _PAIR,
    'llava': _LLAVA, 'llava_next': {**_LLAVA, **_PINPOINTS},
    'llava_onevision': {**_LLAVA, **_PINPOINTS, 'vision_aspect_ratio': Pattern(
        r'anyres_max_[1-9]\d{0,3}', 'anyres_max_9')},
    'qwen2_vl': _VLM, 'qwen2_5_vl': _VLM,
    'qwen2_vl_vision': {**_QWEN_TOWER, 'embed_dim': SIZE, 'hidden_act': ACTIVATION,
                        'mlp_ratio': Number(0.1, 64, whole=False)},
    'qwen2_5_vl_vision': {
        **_QWEN_TOWER, 'hidden_act': OneOf(('silu', 'swish')), 'intermediate_size': SIZE,
        'out_hidden_size': SIZE, 'window_size': Number(1, 2 ** 14),
        'fullatt_block_indexes': Each(Number(0, COUNT.high)),
        # Of videos.
        'tokens_per_second': Number(0, 1e6, whole=False)},
    'rope': {
        **dict.fromkeys(('rope_type', 'type'), OneOf(
            (None, 'default', 'linear', 'dynamic', 'llama3', 'yarn', 'mrope'))),
        **dict.fromkeys(('factor', 'low_freq_factor', 'high_freq_factor', 'beta_fast', 'beta_slow',
                         'attention_factor'), dataclasses.replace(FACTOR, null=True)),
        'rope_theta': dataclasses.replace(THETA, null=True), 'truncate': YES_OR_NO,
        'original_max_position_embeddings': dataclasses.replace(LENGTH, null=True),
        'mrope_section': Each(Number(0, SIZE.high), 3), 'mrope_interleaved': YES_OR_NO,
        'partial_rotary_factor': OneOf((1.0, None)), 'finetuned': YES_OR_NO,
        **dict.fromkeys(('mscale', 'mscale_all_dim'),
                        OneOf((0, None), "no family's scaling has it"))},
    # timm's own file, and what it adds to the architecture; most of that, shapes show.
    'timm': {'architecture': Pattern('.+', 'vit_base_patch16_224'), 'model_args': Section(),
             'pretrained_cfg': Section(), 'num_classes': Number(0, 2 ** 20), 'num_features': SIZE,
             'global_pool': OneOf(('token', 'avg', 'map', ''))},
    'timm_args': {
        **dict.fromkeys(('embed_dim', 'depth', 'patch_size', 'img_size', 'num_heads', 'in_chans'),
                        Number(1, SIZE.high)),
        **dict.fromkeys(('num_classes', 'reg_tokens'), Number(0, 2 ** 20)),
        **dict.fromkeys(('class_token', 'no_embed_class', 'pre_norm', 'dynamic_img_size',
                         'dynamic_img_pad', 'strict_img_size'), YES_OR_NO),
        'mlp_ratio': Number(0.1, 64, whole=False), 'init_values': Number(0, 1e3, False, True),
        'global_pool': OneOf(('token', 'avg', 'map', '')), 'qkv_bias': YES},
    'tower_rope': {'rope_theta': OneOf((10000.0,)), 'rope_type': OneOf(('axial', 'default'))},
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
  checks = {**_EVERYWHERE, **KEYS[kind]}
  for key, value in config.items():
    if key in checks:
      if not checks[key].allows(value):
        raise ValueError(f'config.json says {where}{key}={reprlib.repr(value)}: known here is '
                         f'{checks[key]}')
    elif value is not None and key not in HARMLESS and not key.startswith('_'):
      raise ValueError(f'config.json says {where}{key}={reprlib.repr(value)}, which is unknown '
                       f'of {kind}{choices.near(key, checks)}: delete it if it changes nothing, or '
                       'use another checkpoint')


def section(config: Mapping[str, Any], key: str) -> dict[str, Any]:
  """Returns an object inside a config, {} where there is none.

  Raises:
    ValueError: something else is there.
  """
  value = config.get(key)
  if not Section().allows(value):
    raise ValueError(f'config.json says {key}={reprlib.repr(value)}: known here is {Section()}')
  return dict(value or {})


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
