"""Names of the transformers library's vision-language models, as they lie on its hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.backbones.qwen_vision import QwenVision
from models.backbones.vlm import VLM
from models.checkpoints.layout import Layout
from models.checkpoints.transformers import CLIP_IMAGE, LANGUAGE, SIGLIP_IMAGE

QWEN_TOWER = {
    'patch': 'patch_embed.proj.*',
    'stack/blocks/norm1': 'blocks.{}.norm1.*',
    'stack/blocks/qkv': 'blocks.{}.attn.qkv.*',
    'stack/blocks/out': 'blocks.{}.attn.proj.*',
    'stack/blocks/norm2': 'blocks.{}.norm2.*',
    'merger_norm': 'merger.ln_q.*',
    'merger_fc1': 'merger.mlp.0.*',
    'merger_fc2': 'merger.mlp.2.*',
}
_PLAIN = {'stack/blocks/fc1': 'blocks.{}.mlp.fc1.*', 'stack/blocks/fc2': 'blocks.{}.mlp.fc2.*'}
_GATED = {'stack/blocks/fc1': ('blocks.{}.mlp.gate_proj.*', 'blocks.{}.mlp.up_proj.*'),
          'stack/blocks/fc2': 'blocks.{}.mlp.down_proj.*'}
_PROJECTOR = {'projector/fc1': 'multi_modal_projector.linear_1.*',
              'projector/fc2': 'multi_modal_projector.linear_2.*', 'newline': 'image_newline'}
_IGNORABLE = ('*rotary_emb.inv_freq', '*embeddings.position_ids')
# Layers of the tower behind the features that are used.
_UNREAD = ('*vision_tower*post_layernorm.*', '*vision_tower*.head.*')
_RANKS = {'tower/cls': 1, 'tower/pos': 2}


def layouts(model: object) -> list[Layout]:
  """The layouts that could hold a model."""
  if isinstance(model, QwenVision):
    return [Layout('transformers/qwen_vision', _qwen(model), ('visual.', 'model.visual.', ''),
                   patch='conv3d', ignorable=_IGNORABLE)]
  if not isinstance(model, VLM):
    return []
  ignorable = _IGNORABLE + (('*lm_head.weight',) if model.lm.tied else ())
  inside = {path: name for path, name in LANGUAGE.items() if name[0] != '^'}
  candidates = []
  if isinstance(model.tower, QwenVision):
    tower = _qwen(model.tower)
    for name, text, seen in (('vlm', 'model.language_model.', 'model.visual.'),
                             ('vlm4', 'model.', 'visual.')):
      names = {**_under('tower', seen, tower), **_under('lm', text, inside),
               'lm/head': 'lm_head.*'}
      candidates.append(Layout(f'transformers/{name}', names, patch='conv3d', ignorable=ignorable))
    return candidates
  image = CLIP_IMAGE if model.tower.class_token else SIGLIP_IMAGE
  # As saved before version 5 of the library and since, with a tower that has a level more or not.
  for name, text, head, rest in (
      ('vlm4', 'language_model.model.', 'language_model.lm_head.*', ''),
      ('vlm', 'model.language_model.', 'lm_head.*', 'model.')):
    for ending in ('vision_model.', ''):
      names = {**_under('tower', f'{rest}vision_tower.{ending}', image),
               **_under('lm', text, inside), **_under('', rest, _PROJECTOR), 'lm/head': head}
      candidates.append(Layout(f'transformers/{name}{"" if ending else "_flat"}', names,
                               ranks=_RANKS, ignorable=ignorable + _unread(model)))
  return candidates


def _qwen(tower: QwenVision) -> dict[str, Any]:
  return QWEN_TOWER | (_GATED if tower.activation == 'swiglu' else _PLAIN)


def _unread(model: VLM) -> tuple[str, ...]:
  return _UNREAD if model.tower.layers else _UNREAD[1:]


def _under(module: str, prefix: str, names: Mapping[str, Any]) -> dict[str, Any]:
  """Names of a part of the model, in ours and in theirs."""
  def whole(name: str) -> str:
    return prefix + name.removeprefix('^')

  start = f'{module}/' if module else ''
  return {start + path: whole(name) if isinstance(name, str) else tuple(map(whole, name))
          for path, name in names.items()}
