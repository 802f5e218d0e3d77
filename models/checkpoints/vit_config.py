"""Vision transformers, and pairs with a text tower, from a checkpoint's config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from models.backbones.clip import Clip
from models.backbones.text_tower import Text
from models.backbones.vit import ViT
from models.checkpoints import config_keys
from models.families import TEXT_FAMILIES, TOWER_FAMILIES, TOWER_FIELDS
from ops import choices

PAIRS = ('clip', 'siglip', 'siglip2')


def from_config(config: Mapping[str, Any]) -> ViT | Text | Clip:
  """The model that a checkpoint's config.json describes (as the transformers library writes it).

  Args:
    config: the file's content, of a ViT, DeiT, MAE, DINOv2, CLIP, SigLIP or SigLIP 2; of the last
      three also that of one tower. What it leaves out has the family's published default.

  Raises:
    ValueError: an architecture that is not known, or settings of a known one that are not.
  """
  kind: Any = config.get('model_type')
  choices.check('model_type ', kind, (*TOWER_FAMILIES, *TEXT_FAMILIES, *PAIRS))
  config_keys.check(config, kind)
  if kind in PAIRS:
    return _pair(config, kind)
  if kind in TEXT_FAMILIES:
    return text_tower(config)
  return image_tower(config, **_head(config, kind))


def image_tower(config: Mapping[str, Any], where: str = '', **fields: Any) -> ViT:
  """Returns the ViT of a config of one, without a head.

  Args:
    config: with its model_type, one of `TOWER_FAMILIES`.
    where: of it inside the file, as 'vision_config.'.
    **fields: of ViT that differ.

  Raises:
    ValueError: settings that are not known.
  """
  kind = config['model_type']
  config_keys.check(config, kind, where)
  stated = {**TOWER_FAMILIES[kind], **config}
  config_keys.divides(stated, 'num_attention_heads', 'hidden_size')
  patch, act = stated['patch_size'], config_keys.ACTIVATIONS[stated['hidden_act']]
  if 'num_patches' in stated:
    side = math.isqrt(stated['num_patches'])
  else:
    # Pixels beyond the last whole patch are not read.
    side = stated['image_size'] // patch
  if not side or stated.get('num_patches', side ** 2) != side ** 2:
    raise ValueError(f'config.json says {where}num_patches={stated.get("num_patches")} and '
                     f'{where}image_size={stated.get("image_size")}, which are no square of whole '
                     f'patches of {patch} pixels: fetch the file again')
  width = stated['hidden_size']
  mlp = stated.get('intermediate_size') or int(width * stated['mlp_ratio'])
  if stated.get('use_swiglu_ffn'):
    # Two thirds, for the gate, rounded up to a multiple of eight.
    mlp, act = (int(mlp * 2 / 3) + 7) // 8 * 8, 'swiglu'
  return ViT(**({
      'width': width, 'depth': stated['num_hidden_layers'], 'mlp': mlp,
      'heads': stated['num_attention_heads'], 'patch': patch, 'image_size': side * patch,
      'num_classes': 0, 'channels': stated['num_channels'], 'activation': act,
      'norm_eps': stated['layer_norm_eps'], 'registers': stated.get('num_register_tokens', 0),
      'position_resampling': 'bicubic', **TOWER_FIELDS[kind]} | fields))


def text_tower(config: Mapping[str, Any], where: str = '', **fields: Any) -> Text:
  """Returns the Text of a config of one; arguments and errors as those of `image_tower`."""
  kind = config['model_type']
  config_keys.check(config, kind, where)
  stated = {**TEXT_FAMILIES[kind], **config}
  config_keys.divides(stated, 'num_attention_heads', 'hidden_size')
  # In older files 2 stands for the last id.
  if kind == 'clip_text_model' and stated['eos_token_id'] not in (2, stated['vocab_size'] - 1):
    raise ValueError(f'config.json says {where}eos_token_id={stated["eos_token_id"]}: texts end '
                     f'with the last id here, {stated["vocab_size"] - 1}; use another checkpoint')
  width = stated['hidden_size']
  return Text(**({
      'width': width, 'depth': stated['num_hidden_layers'], 'mlp': stated['intermediate_size'],
      'heads': stated['num_attention_heads'], 'vocabulary': stated['vocab_size'],
      'context': stated['max_position_embeddings'],
      'projection': stated.get('projection_dim') or stated.get('projection_size') or width,
      'activation': config_keys.ACTIVATIONS[stated['hidden_act']],
      'norm_eps': stated['layer_norm_eps'], **TOWER_FIELDS[kind]} | fields))


def _pair(config: Mapping[str, Any], kind: str) -> Clip:
  image, text = (
      # Files of the first releases repeat a tower's settings under another name, which wins.
      config_keys.section(config, f'{part}_config')
      | config_keys.section(config, f'{part}_config_dict') | {'model_type': f'{kind}_{part}_model'}
      for part in ('vision', 'text'))
  if kind == 'clip':
    projection = config.get('projection_dim', 512)
    both = {'projection': projection}
    return Clip(image_tower(image, 'vision_config.', **both),
                text_tower(text, 'text_config.', **both))
  if image.get('vision_use_head') is False:
    raise ValueError('config.json says vision_config.vision_use_head=False: a pair compares what '
                     'that head pools; use another checkpoint')
  return Clip(image_tower(image, 'vision_config.', pool='map'), text_tower(text, 'text_config.'),
              bias=True)


def _head(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
  """Returns the fields of ViT that say what stands on top."""
  classes = config.get('architectures') or ()
  if any('ForImageClassification' in name for name in classes):
    return {'num_classes': len(config.get('id2label') or (0, 1))}
  if kind == 'clip_vision_model' and 'CLIPVisionModelWithProjection' in classes:
    return {'projection': config.get('projection_dim', 512)}
  if config.get('vision_use_head', True) and kind.startswith('siglip'):
    return {'pool': 'map'}
  return {}
