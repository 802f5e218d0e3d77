"""Vision-language models from a checkpoint's config.json, or by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.backbones.qwen_vision import QwenVision
from models.backbones.vlm import VLM
from models.checkpoints import config_keys, lm_config
from models.checkpoints.vit_config import image_tower
from models.families import (
    IMAGE_TOKENS,
    LLAVA_TEXTS,
    QWENS,
    TOWER_FAMILIES,
    TOWER_FIELDS,
    VLM_TOWERS,
    VLMS,
)
from ops import choices

LLAVAS = tuple(LLAVA_TEXTS)
_TOWERS = ('clip_vision_model', 'siglip_vision_model')


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
  kind: Any = config.get('model_type')
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
  stated = config_keys.section(config, 'vision_config')
  tower = whole if config.get('vision_config') is None else stated
  family: Any = tower.get('model_type', whole['model_type'])
  choices.check('vision_config.model_type=', family, _TOWERS)
  return TOWER_FAMILIES[family] | {'model_type': family} | tower


def _llava(config: Mapping[str, Any], kind: str, tower: dict[str, Any],
           lm: dict[str, Any]) -> VLM:
  config_keys.check(config, kind)
  seen = tower_config(config)
  feature = config.get('vision_feature_layer', -1 if kind == 'llava_onevision' else -2)
  strategy = config.get('vision_feature_select_strategy',
                        'full' if kind == 'llava_onevision' else 'default')
  special = TOWER_FIELDS[seen['model_type']].get('class_token', True)
  if (strategy == 'default') != special:
    raise ValueError(f'config.json says vision_feature_select_strategy={strategy!r} of a '
                     f'{seen["model_type"]}: known here are all patches of one layer and no [CLS] '
                     f'token, {"default" if special else "full"!r}; use another checkpoint')
  whole = image_tower(seen, 'vision_config.')
  last = whole.depth + 1 + feature if feature < 0 else feature
  if not 0 <= last <= whole.depth:
    raise ValueError(f'vision_feature_layer={feature} is none of a tower of {whole.depth} layers: '
                     'fetch config.json again')
  # Nobody reads what is pooled; without a [CLS] token it can be a mean alone.
  layers: dict[str, Any] = {'layers': (0, last), 'pool': 'cls' if special else 'mean'}
  if last == whole.depth:
    # The features are those before the last norm: it stands aside, over that mean.
    layers = {'layers': None, 'pool': 'mean', 'last_norm': 'pooled'}
  token = config.get('image_token_id', config.get('image_token_index', IMAGE_TOKENS[kind]))
  act = config_keys.ACTIVATIONS[config.get('projector_hidden_act', 'gelu')]
  return VLM(whole.clone(**(layers | tower)), lm_config.from_config(config, **lm), token, act,
             newline=kind != 'llava')


def _qwen(config: Mapping[str, Any], kind: str, grid: tuple[int, int], tower: dict[str, Any],
          lm: dict[str, Any]) -> VLM:
  seen = config_keys.section(config, 'vision_config')
  config_keys.check(_own(config, kind), kind)
  config_keys.check(seen, f'{kind}_vision', 'vision_config.')
  config_keys.check(config_keys.section(seen, 'rope_parameters'), 'tower_rope',
                    'vision_config.rope_parameters.')
  patch, merge = seen.get('patch_size', 14), seen.get('spatial_merge_size', 2)
  settings = {'depth': seen.get('depth', 32), 'heads': seen.get('num_heads', 16), 'grid': grid,
              'patch': patch, 'temporal': 2, 'merge': merge}
  if kind == 'qwen2_vl':
    width = seen.get('embed_dim', 1280)
    settings |= {'width': width, 'mlp': int(width * seen.get('mlp_ratio', 4)),
                 'projection': seen.get('hidden_size', 3584),
                 'activation': config_keys.ACTIVATIONS[seen.get('hidden_act', 'quick_gelu')]}
  else:
    settings |= {'width': seen.get('hidden_size', 3584), 'norm': 'rms', 'activation': 'swiglu',
                 'mlp': seen.get('intermediate_size', 3420),
                 'projection': seen.get('out_hidden_size', 3584),
                 # Whole cells.
                 'window': seen.get('window_size', 112) // merge // patch * merge,
                 'whole_layers': tuple(seen.get('fullatt_block_indexes', (7, 15, 23, 31)))}
  config_keys.divides(settings, 'heads', 'width')
  model = lm_config.from_config(config, **lm)
  token = config.get('image_token_id', IMAGE_TOKENS[kind])
  return VLM(QwenVision(**(settings | tower)), model, token, projection='')


def _own(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
  """Returns what a config of the Qwen families says, but for what is of its language model."""
  text = config_keys.KEYS['qwen2']
  return {key: value for key, value in config.items()
          if key in config_keys.KEYS[kind] or key not in text}
