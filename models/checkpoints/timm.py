"""Names of timm's VisionTransformer (timm/models/vision_transformer.py, deit.py), timm 1.0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.backbones.vit import ViT
from models.checkpoints import config_keys
from models.checkpoints.layout import Layout, Names

NAMES: Names = {
    'cls': 'cls_token',
    'dist': 'dist_token',
    'registers': 'reg_token',
    'pos': 'pos_embed',
    'patch': 'patch_embed.proj.*',
    'norm_pre': 'norm_pre.*',
    'stack/blocks/norm1': 'blocks.{}.norm1.*',
    'stack/blocks/qkv': 'blocks.{}.attn.qkv.*',
    'stack/blocks/out': 'blocks.{}.attn.proj.*',
    'stack/blocks/ls1': 'blocks.{}.ls1.gamma',
    'stack/blocks/norm2': 'blocks.{}.norm2.*',
    'stack/blocks/fc1': 'blocks.{}.mlp.fc1.*',
    'stack/blocks/fc2': 'blocks.{}.mlp.fc2.*',
    'stack/blocks/ls2': 'blocks.{}.ls2.gamma',
    'norm': 'norm.*',
    'pool/probe': 'attn_pool.latent',
    'pool/qkv': ('attn_pool.q.*', 'attn_pool.kv.*'),
    'pool/out': 'attn_pool.proj.*',
    'pool/norm': 'attn_pool.norm.*',
    'pool/fc1': 'attn_pool.mlp.fc1.*',
    'pool/fc2': 'attn_pool.mlp.fc2.*',
    'head': 'head.*',
    'head_dist': 'head_dist.*',
}


def layouts(model: object) -> list[Layout]:
  """The layouts that could hold a model: one for a ViT, none for texts."""
  if not isinstance(model, ViT):
    return []
  last = {'norm': 'fc_norm.*'} if model.last_norm == 'pooled' else {}
  return [Layout('timm', NAMES | last)]


def check_config(model: Any, config: Mapping[str, Any]) -> None:
  """Raises if timm's config.json contradicts a model in settings that shapes do not show.

  Args:
    model: a ViT.
    config: the file's content; without an 'architecture' it is not timm's, and says nothing.

  Raises:
    ValueError: what is not known here, or another number of heads, positions of special tokens, or
      the activation and norms of another release of CLIP.
  """
  if 'architecture' not in config:
    return
  config_keys.check(config, 'timm')
  args = config_keys.section(config, 'model_args')
  config_keys.check(args, 'timm_args', 'model_args.')
  stated = {'heads': args.get('num_heads')}
  if args.get('no_embed_class') is not None:
    stated['special_positions'] = not args['no_embed_class']
  if '_clip_' in config['architecture']:
    quick = 'quickgelu' in config['architecture']
    stated |= {'activation': 'quick_gelu' if quick else 'gelu', 'norm_eps': 1e-5}
  config_keys.compare({key: value for key, value in stated.items() if value is not None}, model)
