"""Vision-language models from a checkpoint's config.json, or by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.backbones.qwen_vision import QwenVision
from models.backbones.vit import ViT
from models.backbones.vlm import VLM
from models.checkpoints import lm_config
from models.families import IMAGE_TOKENS, LLAVA_TEXTS, QWENS, TOWER_FAMILIES, VLM_TOWERS, VLMS
from ops import choices

# Fields of ViT by a tower's model_type.
_TOWERS: dict[str, dict[str, Any]] = {
    'clip_vision_model': {'norm_eps': 1e-5, 'pre_norm': True, 'patch_bias': False},
    'siglip_vision_model': {'class_token': False},
}
_ACTS = {'quick_gelu': 'quick_gelu', 'gelu': 'gelu', 'gelu_pytorch_tanh': 'gelu_tanh',
         'silu': 'swiglu'}
LLAVAS = tuple(LLAVA_TEXTS)


def from_config(config: Mapping[str, Any], *, grid: tuple[int, int] = (32, 32),
                tower: Mapping[str, Any] | None = None,
                lm: Mapping[str, Any] | None = None) -> VLM:
  """The model that a checkpoint's config.json describes (as the transformers library writes it).

  Args:
    config: the file's content.
    grid: for the Qwen families, rows and columns of patches that every image must fit into.
    tower, lm: fields of the tower and of LM that differ.

  Raises:
    ValueError: an architecture that is not known, or settings of a known one that are not.
  """
  kind = config.get('model_type')
  if kind in LLAVAS:
    return _llava(config, kind, dict(tower or {}), dict(lm or {}))
  if kind in QWENS:
    return _qwen(config, kind, grid, dict(tower or {}), dict(lm or {}))
  raise ValueError(f'model_type {kind!r} is unknown: known are {", ".join((*LLAVAS, *QWENS))}')


def make_vlm(variant: str, **settings: Any) -> VLM:
  """A vision-language model by name, one of `VLMS` in models/families.py.

  Args:
    variant: as 'llava1.5_7b'.
    **settings: what else `from_config` takes.

  Raises:
    ValueError: for an unknown name.
  """
  if variant not in VLMS:
    raise ValueError(f'variant {variant!r} is unknown{choices.near(variant, VLMS)}: choose one of '
                     f'{", ".join(VLMS)}, or '
                     "read a checkpoint's config.json with from_config")
  return from_config(VLMS[variant], **settings)


def tower_config(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the vision_config of a vision-language model, with what a config may leave out.

  Args:
    config: the content of config.json, of a family in `LLAVAS`.

  Raises:
    ValueError: a tower that is not known.
  """
  whole = VLM_TOWERS[config['model_type']]
  stated = config.get('vision_config')
  tower: Mapping[str, Any] = whole if stated is None else stated
  family = tower.get('model_type', whole['model_type'])
  if family not in TOWER_FAMILIES:
    raise ValueError(f'vision tower {family!r} is unknown: known are {", ".join(TOWER_FAMILIES)}')
  return TOWER_FAMILIES[family] | {'model_type': family} | dict(tower)


def _llava(config: Mapping[str, Any], kind: str, tower: dict[str, Any],
           lm: dict[str, Any]) -> VLM:
  seen = tower_config(config)
  family = seen['model_type']
  depth = seen['num_hidden_layers']
  feature = config.get('vision_feature_layer', -1 if kind == 'llava_onevision' else -2)
  strategy = config.get('vision_feature_select_strategy',
                        'full' if kind == 'llava_onevision' else 'default')
  special = _TOWERS[family].get('class_token', True)
  if not isinstance(feature, int) or (strategy == 'default') != special:
    raise ValueError(f'vision_feature_layer={feature} with vision_feature_select_strategy='
                     f'{strategy!r} is unknown here: one layer, without its [CLS] token if any')
  last = depth + 1 + feature if feature < 0 else feature
  settings = {
      'width': seen['hidden_size'], 'depth': depth, 'mlp': seen['intermediate_size'],
      'heads': seen['num_attention_heads'], 'patch': seen['patch_size'],
      'image_size': seen['image_size'] // seen['patch_size'] * seen['patch_size'],
      'num_classes': 0, 'layers': (0, last), 'activation': _ACTS[seen['hidden_act']],
      **_TOWERS[family]}
  if last == depth:
    # The features are those before the last norm: it stands aside, over a mean that nobody reads.
    settings |= {'layers': None, 'pool': 'mean', 'last_norm': 'pooled'}
  token = config.get('image_token_id', config.get('image_token_index', IMAGE_TOKENS[kind]))
  return VLM(ViT(**(settings | tower)), lm_config.from_config(config, **lm), token,
             _ACTS[config.get('projector_hidden_act', 'gelu')], newline=kind != 'llava')


def _qwen(config: Mapping[str, Any], kind: str, grid: tuple[int, int], tower: dict[str, Any],
          lm: dict[str, Any]) -> VLM:
  seen = config.get('vision_config') or {}
  settings = {'depth': seen.get('depth', 32), 'heads': seen.get('num_heads', 16), 'grid': grid,
              'patch': seen.get('patch_size', 14), 'temporal': seen.get('temporal_patch_size', 2),
              'merge': seen.get('spatial_merge_size', 2)}
  if kind == 'qwen2_vl':
    width = seen.get('embed_dim', 1280)
    settings |= {'width': width, 'mlp': int(width * seen.get('mlp_ratio', 4)),
                 'projection': seen.get('hidden_size', 3584),
                 'activation': _ACTS[seen.get('hidden_act', 'quick_gelu')]}
  else:
    settings |= {'width': seen.get('hidden_size', 3584), 'norm': 'rms', 'activation': 'swiglu',
                 'mlp': seen.get('intermediate_size', 3420),
                 'projection': seen.get('out_hidden_size', 3584),
                 'window': seen.get('window_size', 112) // settings['patch'],
                 'whole_layers': tuple(seen.get('fullatt_block_indexes', (7, 15, 23, 31)))}
  model = lm_config.from_config(config, **lm)
  token = config.get('image_token_id', IMAGE_TOKENS[kind])
  return VLM(QwenVision(**(settings | tower)), model, token, projection='')
