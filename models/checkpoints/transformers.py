"""Names of the transformers library's checkpoints, as they lie on its hub (versions 4 and 5)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from models.backbones.bert import Bert
from models.backbones.clip import Clip
from models.backbones.lm import LM
from models.backbones.qwen_vision import QwenVision
from models.backbones.text_tower import Text
from models.backbones.vit import ViT
from models.backbones.vlm import VLM
from models.checkpoints.bert_config import from_config as bert_from_config
from models.checkpoints.config_keys import compare
from models.checkpoints.layout import Layout, Names
from models.checkpoints.lm_config import from_config
from models.checkpoints.vit_config import from_config as vit_from_config
from models.checkpoints.vlm_config import LLAVAS
from models.checkpoints.vlm_config import from_config as vlm_from_config
from models.families import QWENS
from ops.rope import Rope

_EMBED: Names = {
    'cls': 'embeddings.cls_token',
    'dist': 'embeddings.distillation_token',
    'registers': 'embeddings.register_tokens',
    'pos': 'embeddings.position_embeddings',
    'patch': 'embeddings.patch_embeddings.projection.*',
    'norm': 'layernorm.*',
}
_ATTENTION: Names = {
    'stack/blocks/qkv': tuple(f'encoder.layer.{{}}.attention.attention.{part}.*'
                              for part in ('query', 'key', 'value')),
    'stack/blocks/out': 'encoder.layer.{}.attention.output.dense.*',
}
# ViT, DeiT and the encoder of MAE.
VIT: Names = {
    **_EMBED, **_ATTENTION,
    'stack/blocks/norm1': 'encoder.layer.{}.layernorm_before.*',
    'stack/blocks/norm2': 'encoder.layer.{}.layernorm_after.*',
    'stack/blocks/fc1': 'encoder.layer.{}.intermediate.dense.*',
    'stack/blocks/fc2': 'encoder.layer.{}.output.dense.*',
}
# With and without registers.
DINOV2: Names = {
    **_EMBED, **_ATTENTION,
    'stack/blocks/norm1': 'encoder.layer.{}.norm1.*',
    'stack/blocks/norm2': 'encoder.layer.{}.norm2.*',
    'stack/blocks/fc1': 'encoder.layer.{}.mlp.fc1.*',
    'stack/blocks/fc2': 'encoder.layer.{}.mlp.fc2.*',
    'stack/blocks/ls1': 'encoder.layer.{}.layer_scale1.lambda1',
    'stack/blocks/ls2': 'encoder.layer.{}.layer_scale2.lambda1',
    'head': '^classifier.*',
}
SWIGLU: Names = {
    'stack/blocks/fc1': 'encoder.layer.{}.mlp.weights_in.*',
    'stack/blocks/fc2': 'encoder.layer.{}.mlp.weights_out.*',
}
# The blocks of CLIP and SigLIP, in either tower.
_TOWER: Names = {
    'stack/blocks/norm1': 'encoder.layers.{}.layer_norm1.*',
    'stack/blocks/qkv': tuple(f'encoder.layers.{{}}.self_attn.{part}_proj.*' for part in 'qkv'),
    'stack/blocks/out': 'encoder.layers.{}.self_attn.out_proj.*',
    'stack/blocks/norm2': 'encoder.layers.{}.layer_norm2.*',
    'stack/blocks/fc1': 'encoder.layers.{}.mlp.fc1.*',
    'stack/blocks/fc2': 'encoder.layers.{}.mlp.fc2.*',
    'pos': 'embeddings.position_embedding.weight',
}
_IMAGE: Names = {
    **_TOWER,
    'patch': 'embeddings.patch_embedding.*',
    'norm': 'post_layernorm.*',
}
_TEXT: Names = {
    **_TOWER,
    'table': 'embeddings.token_embedding.weight',
    'norm': 'final_layer_norm.*',
}
CLIP_IMAGE: Names = {
    **_IMAGE,
    'cls': 'embeddings.class_embedding',
    'norm_pre': 'pre_layrnorm.*',
    'projection': '^visual_projection.*',
}
CLIP_TEXT: Names = {**_TEXT, 'projection': '^text_projection.*'}
SIGLIP_IMAGE: Names = {
    **_IMAGE,
    'pool/probe': 'head.probe',
    'pool/qkv': 'head.attention.in_proj_*',
    'pool/out': 'head.attention.out_proj.*',
    'pool/norm': 'head.layernorm.*',
    'pool/fc1': 'head.mlp.fc1.*',
    'pool/fc2': 'head.mlp.fc2.*',
}
SIGLIP_TEXT: Names = {**_TEXT, 'projection': 'head.*'}
BERT: Names = {
    'table': 'embeddings.word_embeddings.weight',
    'pos': 'embeddings.position_embeddings.weight',
    'types': 'embeddings.token_type_embeddings.weight',
    'norm': 'embeddings.LayerNorm.*',
    'stack/blocks/qkv': tuple(f'encoder.layer.{{}}.attention.self.{part}.*'
                              for part in ('query', 'key', 'value')),
    'stack/blocks/out': 'encoder.layer.{}.attention.output.dense.*',
    'stack/blocks/norm1': 'encoder.layer.{}.attention.output.LayerNorm.*',
    'stack/blocks/fc1': 'encoder.layer.{}.intermediate.dense.*',
    'stack/blocks/fc2': 'encoder.layer.{}.output.dense.*',
    'stack/blocks/norm2': 'encoder.layer.{}.output.LayerNorm.*',
}
# Llama, Mistral, Qwen 2 and 3.
LANGUAGE: dict[str, str] = {
    'table': 'embed_tokens.weight',
    'stack/blocks/norm1': 'layers.{}.input_layernorm.*',
    **{f'stack/blocks/{part}': f'layers.{{}}.self_attn.{part}_proj.*' for part in 'qkv'},
    **{f'stack/blocks/{part}_norm': f'layers.{{}}.self_attn.{part}_norm.*' for part in 'qk'},
    'stack/blocks/out': 'layers.{}.self_attn.o_proj.*',
    'stack/blocks/norm2': 'layers.{}.post_attention_layernorm.*',
    **{f'stack/blocks/{part}': f'layers.{{}}.mlp.{part}_proj.*' for part in ('gate', 'up', 'down')},
    'norm': 'norm.*',
    'head': '^lm_head.*',
}
# The towers that a vision-language model holds beside its language model, and buffers.
_NOT_LANGUAGE = ('*rotary_emb.inv_freq', '*vision_tower.*', '*vision_model.*', '*visual.*',
                 '*projector.*', '*image_newline')

_RANKS = {'cls': 1, 'pos': 2}
_BUFFERS = ('*embeddings.position_ids',)
# What a pair's file holds for a caller who wants one tower of it.
_NOT_IMAGE = ('text_model.*', 'text_projection.*', 'logit_scale', 'logit_bias', *_BUFFERS)
_NOT_TEXT = ('vision_model.*', 'visual_projection.*', 'logit_scale', 'logit_bias', *_BUFFERS)
# name: (image tower, text tower, patch embedding, axes of the two scalars).
PAIRS = {
    'clip': (CLIP_IMAGE, CLIP_TEXT, 'conv', 0),
    'siglip': (SIGLIP_IMAGE, SIGLIP_TEXT, 'conv', 1),
    'siglip2': (SIGLIP_IMAGE, SIGLIP_TEXT, 'linear', 1),
}


def layouts(model: object) -> list[Layout]:
  """The layouts that could hold a model."""
  candidates = []
  if isinstance(model, Bert):
    return [Layout('transformers/bert', BERT, ('bert.', ''), {'pos': 2},
                   ignorable=('*pooler.*', 'cls.*', 'classifier.*', *_BUFFERS))]
  if isinstance(model, LM):
    ignorable = _NOT_LANGUAGE + (('*lm_head.weight',) if model.tied else ())
    inner = {path: name if name[0] == '^' else f'model.{name}' for path, name in LANGUAGE.items()}
    whole = {path: name.removeprefix('^') for path, name in inner.items()}
    return [Layout('transformers/lm', inner, ignorable=ignorable),
            # Inside vision-language models, as they were saved before version 5 and since.
            Layout('transformers/vlm4', whole, ('language_model.',), ignorable=ignorable),
            Layout('transformers/vlm', LANGUAGE, ('model.language_model.', 'language_model.'),
                   ignorable=ignorable)]
  if isinstance(model, ViT):
    head = {'head': '^cls_classifier.*', 'head_dist': '^distillation_classifier.*'}
    candidates.append(Layout(
        'transformers/vit', VIT | (head if model.distilled else {'head': '^classifier.*'}),
        ('deit.' if model.distilled else 'vit.', 'vit.', 'deit.', ''),
        ignorable=('*embeddings.mask_token', '*pooler.*', 'decoder.*')))
    names = DINOV2 | (SWIGLU if model.activation == 'swiglu' else {})
    own = 'dinov2_with_registers.' if model.registers else 'dinov2.'
    candidates.append(Layout('transformers/dinov2', names, (own, ''),
                             ignorable=('*embeddings.mask_token',)))
  for name, (image, text, patch, axes) in PAIRS.items():
    if isinstance(model, ViT):
      candidates.append(Layout(f'transformers/{name}', image, ('vision_model.',), _RANKS, patch,
                               _NOT_IMAGE))
    elif isinstance(model, Text):
      candidates.append(Layout(f'transformers/{name}', text, ('text_model.',), _RANKS, patch,
                               _NOT_TEXT))
    elif isinstance(model, Clip):
      names = {'logit_scale': 'logit_scale', 'logit_bias': 'logit_bias',
               **_tower('image', 'vision_model.', image), **_tower('text', 'text_model.', text)}
      ranks = {f'{tower}/{leaf}': rank for leaf, rank in _RANKS.items()
               for tower in ('image', 'text')}
      scalars = {'logit_scale': axes, 'logit_bias': axes}
      candidates.append(Layout(f'transformers/{name}', names, ranks=ranks | scalars, patch=patch,
                               ignorable=_BUFFERS))
  return candidates


def _tower(tower: str, prefix: str, names: Mapping[str, Any]) -> dict[str, Any]:
  """A tower's names inside a pair."""
  def whole(name: str) -> str:
    return name if name.startswith('^') else prefix + name

  return {f'{tower}/{path}': whole(name) if isinstance(name, str) else tuple(map(whole, name))
          for path, name in names.items()}


# Settings that no tensor's name or shape shows, and that nobody has reason to change.
_UNSEEN: dict[type, tuple[str, ...]] = {
    ViT: ('heads', 'activation', 'norm_eps', 'special_positions'),
    Text: ('heads', 'activation', 'norm_eps', 'causal', 'pool'),
    Bert: ('heads', 'activation', 'norm_eps'),
    QwenVision: ('heads', 'activation', 'window', 'whole_layers', 'merge', 'norm_eps'),
    LM: ('heads', 'kv_heads', 'window', 'norm_eps', 'tied'), VLM: ('projection',)}


def check_config(model: Any, config: Mapping[str, Any], *, own_head: bool = False) -> None:
  """Raises if a config.json contradicts a model in settings that shapes do not show.

  Args:
    model: a ViT, Text, Clip, LM, QwenVision or VLM; also one that is a part of what the file
      describes.
    config: the file's content; {} for none, which contradicts nothing.
    own_head: whether the checkpoint of a language model holds a head: what config.json says of
      tying is then of no account.

  Raises:
    ValueError: the file describes no such model, says what is not known here, or differs: in
      heads, activation, norm, what a text sees and where it ends; for an LM in rotations (base,
      scaling, sections), window or tying; for the tower of a vision-language model in windows, or
      the layer that is read.
  """
  if config:
    _compare(_described(model, config), model, own_head)


def _described(model: Any, config: Mapping[str, Any]) -> Any:
  """Returns what config.json describes, or of it the part that is of a model's type."""
  kind = config.get('model_type')
  if kind in (*LLAVAS, *QWENS) and not isinstance(model, LM):
    whole: Any = vlm_from_config(config)
    parts = [whole, whole.tower]
  elif isinstance(model, ViT | Text | Clip):
    whole = vit_from_config(config)
    parts = [whole, *([whole.image, whole.text] if isinstance(whole, Clip) else [])]
  else:
    whole = bert_from_config(config) if kind == 'bert' else from_config(config)
    parts = [whole]
  for part in parts:
    if isinstance(model, type(part)):
      return part
  raise ValueError(f'config.json describes a {kind}, and no {type(model).__name__} in it: build '
                   'the model that it describes')


def _compare(theirs: Any, model: Any, own_head: bool) -> None:
  if isinstance(model, Clip):
    _compare(theirs.image, model.image, own_head)
    _compare(theirs.text, model.text, own_head)
    return
  if isinstance(model, VLM):
    _compare(theirs.tower, model.tower, own_head)
    _compare(theirs.lm, model.lm, own_head)
    if isinstance(model.tower, ViT):
      compare({'layers': theirs.tower.layers}, model.tower)
  names = next(names for kind, names in _UNSEEN.items() if isinstance(model, kind))
  compare({name: getattr(theirs, name) for name in names if not (name == 'tied' and own_head)},
          model)
  if isinstance(model, LM) and not _same_rotations(theirs.rope, model.rope):
    fields = [field.name for field in dataclasses.fields(Rope)
              if getattr(theirs.rope, field.name) != getattr(model.rope, field.name)]
    stored, built = (', '.join(f'{name}={getattr(rope, name)!r}' for name in fields)
                     for rope in (theirs.rope, model.rope))
    raise ValueError(f'the checkpoint has RoPE with {stored} and the model with {built}, which '
                     'shapes do not show: set rope, or build the model that config.json describes')


def _same_rotations(one: Rope, other: Rope) -> bool:
  """True for equal angles and amplitudes, whatever fields they come from."""
  return (one.width == other.width and one.sections == other.sections
          and np.array_equal(one.axes(), other.axes())
          and np.allclose(one.frequencies(), other.frequencies(), rtol=1e-6, atol=0)
          and math.isclose(one.amplitude, other.amplitude, rel_tol=1e-6))
