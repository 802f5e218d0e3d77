"""Language models from a checkpoint's config.json, or by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from models.backbones.lm import LM
from models.checkpoints import config_keys
from models.families import LLAVA_TEXTS, LM_FAMILIES, LMS, MROPE, QWEN_VL_TEXT, QWENS
from ops import choices
from ops.rope import Rope

# Which fields of `Rope` the keys of a RoPE scaling are, and which of them must be there.
_SCALINGS: dict[str, dict[str, str]] = {
    'linear': {'factor': 'factor'},
    'dynamic': {},
    'llama3': {'factor': 'factor', 'low': 'low_freq_factor', 'high': 'high_freq_factor',
               'original': 'original_max_position_embeddings'},
    'yarn': {'factor': 'factor', 'original': 'original_max_position_embeddings',
             'fast': 'beta_fast', 'slow': 'beta_slow', 'temperature': 'attention_factor',
             'rounded': 'truncate'},
}
_REQUIRED = {'linear': ('factor',), 'dynamic': ('factor',), 'yarn': ('factor',),
             'llama3': tuple(_SCALINGS['llama3'].values())}


def make_lm(variant: str, **overrides: Any) -> LM:
  """A language model by name, one of models/families.py.

  Args:
    variant: as 'llama2_7b'.
    **overrides: fields of LM that differ.

  Raises:
    ValueError: for an unknown name, or a field that LM does not have.
  """
  if variant not in LMS:
    raise ValueError(f'variant {variant!r} is unknown{choices.near(variant, LMS)}: choose one of '
                     f'{", ".join(LMS)}, or '
                     "read a checkpoint's config.json with from_config")
  return from_config(LMS[variant], **overrides)


def from_config(config: Mapping[str, Any], **overrides: Any) -> LM:
  """The model that a checkpoint's config.json describes (as the transformers library writes it).

  Args:
    config: the file's content, or a vision-language model's (`text_config`); what it leaves out has
      the family's published default (`LM_FAMILIES`).
    **overrides: fields of LM that differ.

  Raises:
    ValueError: an architecture that is not known, or settings of a known one that are not; or a
      field that LM does not have.
  """
  nested = 'text_config' in config
  config = text_config(config)
  kind: Any = config.get('model_type')
  if kind not in tuple(LM_FAMILIES):  # Which may be no text.
    raise ValueError(f'model_type {kind!r} is unknown: known are {", ".join(LM_FAMILIES)}')
  config_keys.check(config, kind, 'text_config.' if nested else '')
  stated = {**LM_FAMILIES[kind], **config}
  get: Callable[..., Any] = stated.get
  heads = get('num_attention_heads')
  if not get('head_dim'):
    config_keys.divides(stated, 'num_attention_heads', 'hidden_size')
  if get('num_key_value_heads'):
    config_keys.divides(stated, 'num_key_value_heads', 'num_attention_heads')
  head_width = get('head_dim') or get('hidden_size') // heads
  rope, context = _rope(config, get, head_width)
  settings = {
      'vocabulary': get('vocab_size'), 'width': get('hidden_size'),
      'depth': get('num_hidden_layers'), 'mlp': get('intermediate_size'), 'heads': heads,
      'kv_heads': get('num_key_value_heads') or heads, 'head_width': head_width,
      'context': context, 'tied': bool(get('tie_word_embeddings')), 'rope': rope,
      'window': _window(get), 'qkv_bias': get('qkv_bias', False), 'qk_norm': get('qk_norm', False),
      'norm_eps': get('rms_norm_eps')}
  fields = [f.name for f in dataclasses.fields(LM) if f.name not in ('parent', 'name')]
  for key in overrides:
    choices.check_key('an LM has no setting ', key, fields)
  return LM(**(settings | overrides))


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config.json of the language model in that of a vision-language model.

  Its keys lie under 'text_config' or, in older files of the Qwen families, beside the others. What
  it leaves out and the family sets in another way than the language model's own is filled in. A
  head is tied where either of the two says so: versions of the transformers library differ in
  where they write it.

  Args:
    config: the file's content; a language model's own is returned as it is.
  """
  kind: Any = config.get('model_type')
  if kind in tuple(LM_FAMILIES) or not (kind in (*LLAVA_TEXTS, *QWENS) or 'text_config' in config):
    return dict(config)
  text = config_keys.section(config, 'text_config')
  if kind in LLAVA_TEXTS:
    text = {'model_type': LLAVA_TEXTS[kind]} | text
  elif kind in QWENS:
    # Some versions repeat the whole model's keys among the text's.
    known = config_keys.KEYS['qwen2']
    own = {key: value for key, value in (text or config).items()
           if key in known or key not in config_keys.KEYS[kind]}
    rope = 'rope_parameters' if own.get('rope_parameters') else 'rope_scaling'
    text = QWEN_VL_TEXT | own | {
        'model_type': 'qwen2', rope: {'mrope_section': MROPE} | config_keys.section(own, rope)}
  else:
    return text
  tied = config.get('tie_word_embeddings') or text.get('tie_word_embeddings', False)
  return text | {'tie_word_embeddings': tied}


def _window(get: Callable[..., Any]) -> int:
  """The sliding window, 0 for none.

  Raises:
    ValueError: for a window in some layers only.
  """
  window = get('sliding_window') or 0
  if not window or not get('use_sliding_window', True):
    return 0
  kinds = set(get('layer_types') or ())
  if 'max_window_layers' in LM_FAMILIES[get('model_type')] and not kinds:
    full = min(get('max_window_layers'), get('num_hidden_layers'))
    kinds = ({'full_attention'} if full else set()) | (
        {'sliding_attention'} if full < get('num_hidden_layers') else set())
  if kinds == {'full_attention'}:
    return 0
  if len(kinds) > 1:
    raise ValueError('a sliding window in some layers only is unknown here: set sliding_window '
                     'to None if no prompt is longer, or choose another checkpoint')
  return window


def _rope(config: Mapping[str, Any], get: Callable[..., Any], head_width: int) -> tuple[Rope, int]:
  """The rotations and the context that they are for.

  Either form of config is read: `rope_parameters`, or theta and `rope_scaling`.
  """
  name = 'rope_parameters' if config.get('rope_parameters') else 'rope_scaling'
  rope_config = config_keys.section(config, name)
  config_keys.check(rope_config, 'rope', f'{name}.')
  kind = rope_config.get('rope_type') or rope_config.get('type') or 'default'
  context = get('max_position_embeddings')
  settings: dict[str, Any] = {
      'width': head_width, 'theta': float(rope_config.get('rope_theta') or get('rope_theta'))}
  sections = tuple(rope_config.get('mrope_section') or ())
  if sections:
    settings |= {'sections': sections,
                 'spread': 'interleaved' if rope_config.get('mrope_interleaved') else 'blocks'}
  if kind in ('default', 'mrope'):
    return Rope(**settings), context
  missing = [key for key in _REQUIRED[kind] if rope_config.get(key) is None]
  if missing:
    raise ValueError(f'RoPE scaling {kind!r} lacks {", ".join(missing)}: complete rope_scaling in '
                     'config.json')
  if kind == 'llama3' and rope_config['low_freq_factor'] >= rope_config['high_freq_factor']:
    raise ValueError('config.json says low_freq_factor='
                     f'{rope_config["low_freq_factor"]} and high_freq_factor='
                     f'{rope_config["high_freq_factor"]}, which must be greater: fetch the file '
                     'again')
  if kind == 'dynamic':
    # Its base grows with prompts beyond the context, which are refused here; up to it nothing is
    # scaled.
    return Rope(**settings), context
  scaling_settings = {ours: rope_config[theirs] for ours, theirs in _SCALINGS[kind].items()
                      if rope_config.get(theirs) is not None}
  if kind == 'yarn':
    scaling_settings.setdefault('original', context)
    # Some files give the context before scaling, others that after it.
    context = max(context, int(scaling_settings['original'] * scaling_settings['factor']))
  elif kind == 'linear':
    context = int(context * scaling_settings['factor'])
  return Rope(**settings, scaling=kind, **scaling_settings), context
