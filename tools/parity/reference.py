"""Writes checkpoints and outputs of other libraries, for tests/models/test_parity.py.

  python -m tools.parity.reference --folder=tests/fixtures/parity [--part=language]
  python -m tools.parity.reference --folder=tests/fixtures/published --part=published

Needs torch, timm and transformers, which nothing else here does: run it in an environment of its
own. Every case is a tiny model whose parameters are all random, norms, biases and layer scales too,
so that two of them exchanged would show. <case>.safetensors holds the checkpoint as the library
saves it, <case>.npz inputs and outputs, <case>.json how our model is to be built.

`published` is run once with each of several versions of the transformers library. variants.json of
the folder holds families' configs, written by hand as releases write them: a base and what each
variant says otherwise ('<left out>': nothing). For each the library builds the model that it reads
in the config, and saves it; <version>.json.gz gets the config as it was given and as it was saved,
and its tensors' names. weights.safetensors holds the tensors of all, each name and shape once, and
outputs.npz what comes out of them, which all versions must agree in.
"""

from __future__ import annotations

import argparse
import gzip
import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer

SIDE, PATCH, WIDTH, DEPTH, HEADS, MLP = 24, 8, 32, 2, 2, 64
CONTEXT, VOCABULARY, CLASSES, FEATURES = 12, 40, 5, 24
OURS = {'width': WIDTH, 'depth': DEPTH, 'mlp': MLP, 'heads': HEADS, 'patch': PATCH,
        'image_size': SIDE, 'num_classes': CLASSES}
OURS_TEXT = {'width': WIDTH, 'depth': DEPTH, 'mlp': MLP, 'heads': HEADS, 'context': CONTEXT,
             'vocabulary': VOCABULARY}
THEIRS = {'hidden_size': WIDTH, 'num_hidden_layers': DEPTH, 'num_attention_heads': HEADS,
          'intermediate_size': MLP}
THEIRS_IMAGE = {**THEIRS, 'image_size': SIDE, 'patch_size': PATCH, 'num_labels': CLASSES}
THEIRS_TEXT = {**THEIRS, 'vocab_size': VOCABULARY, 'max_position_embeddings': CONTEXT,
               'bos_token_id': VOCABULARY - 2, 'eos_token_id': VOCABULARY - 1, 'pad_token_id': 1}


def main() -> None:
  """Writes every case."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--folder', type=pathlib.Path, required=True)
  parser.add_argument('--part', choices=('all', 'language', 'published'), default='all')
  args = parser.parse_args()
  folder = args.folder
  if args.part == 'published':
    write_published(folder)
    return
  (folder / 'lm').mkdir(parents=True, exist_ok=True)
  for number, (name, case) in enumerate(LANGUAGE.items()):
    torch.manual_seed(100 + number)
    write_language(folder / 'lm', name, case)
  if args.part == 'language':
    return
  torch.manual_seed(200)
  (folder / 'bert').mkdir(exist_ok=True)
  write_bert(folder / 'bert')
  for number, (name, make) in enumerate({**TIMM, **HUB}.items()):
    torch.manual_seed(number)
    write(folder, name, *make())
  write_preprocess(folder)
  write_tokenizer(folder)
  write_positions(folder)


# A model, and our settings as JSON holds them.
Case = tuple[Any, dict[str, Any]]

# -- timm ----------------------------------------------------------------------------------------


def timm_vit(layout_settings: Mapping[str, Any] | None = None, *, cls: Any = VisionTransformer,
             **theirs: Any) -> Case:
  """Builds a timm ViT; `layout_settings` are ours beside the common ones."""
  settings = {'img_size': SIDE, 'patch_size': PATCH, 'embed_dim': WIDTH, 'depth': DEPTH,
              'num_heads': HEADS, 'mlp_ratio': MLP / WIDTH, 'num_classes': CLASSES}
  model = cls(**(settings | theirs))
  return model, {'layout': 'timm', 'image': {**OURS, **(layout_settings or {})}}


def eps(value: float) -> Callable[..., torch.nn.LayerNorm]:
  """Returns a maker of LayerNorms that add `value` to the variance."""
  return lambda width, **rest: torch.nn.LayerNorm(width, eps=value, **rest)


TIMM: dict[str, Callable[[], Case]] = {
    'timm_vit': timm_vit,
    'timm_deit_distilled': lambda: timm_vit(
        {'distilled': True}, cls=timm.models.deit.VisionTransformerDistilled),
    'timm_mae_tuned': lambda: timm_vit(
        {'pool': 'mean', 'last_norm': 'pooled'}, global_pool='avg'),
    'timm_dinov2_reg4': lambda: timm_vit(
        {'registers': 4, 'special_positions': False, 'layer_scale': 1.0},
        reg_tokens=4, no_embed_class=True, init_values=0.1),
    'timm_dinov2_swiglu': lambda: timm_vit(
        {'layer_scale': 1.0, 'activation': 'swiglu'}, init_values=0.1, mlp_ratio=2 * MLP / WIDTH,
        mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU),
    'timm_clip': lambda: timm_vit(
        {'pre_norm': True, 'patch_bias': False, 'activation': 'quick_gelu', 'norm_eps': 1e-5},
        pre_norm=True, act_layer='quick_gelu', norm_layer=eps(1e-5)),
    'timm_siglip': lambda: timm_vit(
        {'class_token': False, 'pool': 'map', 'activation': 'gelu_tanh', 'num_classes': 0},
        class_token=False, global_pool='map', act_layer='gelu_tanh', num_classes=0),
}


# -- transformers --------------------------------------------------------------------------------


def hub(cls: Any, config: Any, layout: str, **settings: Any) -> Case:
  """Builds a model of the transformers library with its own image tower; `settings` are ours."""
  return cls(config), {'layout': layout, 'image': OURS | settings}


def dinov2(*, registers: int, swiglu: bool) -> Case:
  """Builds DINOv2 with a linear head on [CLS] and the patches' mean."""
  family = transformers.Dinov2WithRegistersConfig if registers else transformers.Dinov2Config
  kind = (transformers.Dinov2WithRegistersForImageClassification if registers
          else transformers.Dinov2ForImageClassification)
  # The library derives the width of SwiGLU from the ratio: two thirds, a multiple of eight.
  more = {'num_register_tokens': registers} if registers else {}
  config = family(**{key: value for key, value in THEIRS_IMAGE.items()
                     if key != 'intermediate_size'}, mlp_ratio=3 if swiglu else MLP // WIDTH,
                  use_swiglu_ffn=swiglu, **more)
  return hub(kind, config, 'transformers/dinov2', pool='cls_mean', registers=registers,
             layer_scale=1.0, activation='swiglu' if swiglu else 'gelu')


def pair(cls: Any, config: Any, layout: str, image: Mapping[str, Any], text: Mapping[str, Any], *,
         bias: bool) -> Case:
  """Builds two towers; `image`, `text` and `bias` are our settings."""
  return cls(config), {'layout': layout, 'bias': bias,
                       'image': {**OURS, 'num_classes': 0, **image},
                       'text': {**OURS_TEXT, **text}}


def clip() -> Case:
  """Builds CLIP with the activation of the first release."""
  shared = {'hidden_act': 'quick_gelu', 'projection_dim': FEATURES}
  config = transformers.CLIPConfig(
      text_config=THEIRS_TEXT | shared, vision_config=THEIRS_IMAGE | shared,
      projection_dim=FEATURES)
  both = {'activation': 'quick_gelu', 'norm_eps': 1e-5, 'projection': FEATURES}
  return pair(transformers.CLIPModel, config, 'transformers/clip',
              both | {'pre_norm': True, 'patch_bias': False},
              both | {'causal': True, 'pool': 'eot'}, bias=False)


def siglip(cls: Any, family: Any, layout: str, **more: Any) -> Case:
  """Builds SigLIP, or SigLIP 2 with its own patch embedding."""
  config = family(text_config=THEIRS_TEXT | {'projection_size': WIDTH},
                  vision_config=THEIRS_IMAGE | more)
  return pair(cls, config, layout,
              {'class_token': False, 'pool': 'map', 'activation': 'gelu_tanh'},
              {'causal': False, 'pool': 'last', 'activation': 'gelu_tanh', 'projection': WIDTH,
               'projection_bias': True}, bias=True)


HUB: dict[str, Callable[[], Case]] = {
    'hub_vit': lambda: hub(transformers.ViTForImageClassification,
                           transformers.ViTConfig(**THEIRS_IMAGE), 'transformers/vit',
                           norm_eps=1e-12),
    'hub_deit_distilled': lambda: hub(
        transformers.DeiTForImageClassificationWithTeacher,
        transformers.DeiTConfig(**THEIRS_IMAGE), 'transformers/vit', distilled=True,
        norm_eps=1e-12),
    'hub_mae': lambda: hub(
        transformers.ViTMAEForPreTraining,
        transformers.ViTMAEConfig(
            **THEIRS_IMAGE, decoder_hidden_size=16, decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2, decoder_intermediate_size=16, mask_ratio=0.0),
        'transformers/vit', num_classes=0, norm_eps=1e-12),
    'hub_dinov2': lambda: dinov2(registers=0, swiglu=False),
    'hub_dinov2_reg4': lambda: dinov2(registers=4, swiglu=False),
    'hub_dinov2_reg4_swiglu': lambda: dinov2(registers=4, swiglu=True),
    'hub_clip': clip,
    'hub_siglip': lambda: siglip(transformers.SiglipModel, transformers.SiglipConfig,
                                 'transformers/siglip'),
    'hub_siglip2': lambda: siglip(transformers.Siglip2Model, transformers.Siglip2Config,
                                  'transformers/siglip2', num_patches=(SIDE // PATCH) ** 2),
}


# Language models: mlp and heads as small as tells them apart.
THEIRS_LANGUAGE = {'hidden_size': WIDTH, 'num_hidden_layers': 3, 'intermediate_size': 24,
                   'num_attention_heads': 4, 'num_key_value_heads': 2, 'vocab_size': 64,
                   'max_position_embeddings': 128, 'bos_token_id': None, 'eos_token_id': None,
                   'pad_token_id': 0, 'rms_norm_eps': 1e-5, 'attn_implementation': 'eager'}


def rope(kind: str, theta: float = 10000.0, **more: Any) -> dict[str, Any]:
  """Returns a config's rotations."""
  return {'rope_parameters': {'rope_type': kind, 'rope_theta': theta, **more}}


# By the names of their classes, which older versions of the library lack.
LANGUAGE: dict[str, tuple[str, dict[str, Any]]] = {
    'llama2': ('LlamaConfig', {'num_key_value_heads': 4}),
    'llama3': ('LlamaConfig', {
        'tie_word_embeddings': True,
        **rope('llama3', 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=64)}),
    'vicuna': ('LlamaConfig', {'num_key_value_heads': 4, **rope('linear', factor=4.0)}),
    'mistral': ('MistralConfig', {'sliding_window': 6}),
    'qwen2': ('Qwen2Config', {}),
    'qwen2_yarn': ('Qwen2Config', rope('yarn', factor=4.0,
                                                  original_max_position_embeddings=32)),
    'qwen3': ('Qwen3Config', {'num_attention_heads': 3, 'num_key_value_heads': 1,
                                         'head_dim': 16}),
}
PROMPT, LENGTHS, DECODED = 14, (14, 9, 5), 16


# -- running and writing -------------------------------------------------------------------------


def randomise(model: torch.nn.Module) -> None:
  """Draws every parameter from a normal distribution that keeps activations near one."""
  for name, value in model.named_parameters():
    noise = torch.randn(value.shape)
    if name == 'logit_scale':
      value.data = torch.full(value.shape, 0.7)
    elif value.ndim >= 2 and 'embed' not in name and 'token' not in name:
      value.data = noise * 1.5 / value[0].numel() ** 0.5
    elif value.ndim == 1 and (('norm' in name and name.endswith('weight'))
                              or 'lambda' in name or 'gamma' in name):
      value.data = 1 + 0.3 * noise
    else:
      value.data = 0.3 * noise


def watch(layers: Sequence[torch.nn.Module], outputs: dict[str, Any],
          prefix: str) -> list[Any]:
  """Stores the input of the first layer and the output of each in `outputs`.

  Returns:
    The hooks, to remove.
  """
  def before(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
    outputs[f'{prefix}embedded'] = args[0] if args else kwargs['hidden_states']

  def after(module: torch.nn.Module, args: Any, output: Any) -> None:
    outputs.setdefault(f'{prefix}hidden', []).append(
        output[0] if isinstance(output, tuple) else output)

  return [layers[0].register_forward_pre_hook(before, with_kwargs=True),
          *(layer.register_forward_hook(after) for layer in layers)]


def read_saved(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
  """Returns tensors and config of a transformers model, as the library saves them."""
  with tempfile.TemporaryDirectory() as scratch:
    model.save_pretrained(scratch)
    return (load_file(f'{scratch}/model.safetensors'),
            json.loads(pathlib.Path(scratch, 'config.json').read_text()))


def write_case(folder: pathlib.Path, name: str, tensors: Mapping[str, torch.Tensor],
               outputs: Mapping[str, Any], about: Mapping[str, Any]) -> None:
  """Writes the three files of a case: checkpoint, inputs and outputs, and description.

  Args:
    folder: where.
    name: of the case.
    tensors: the checkpoint.
    outputs: {name: tensor, array, or list of tensors to stack}.
    about: what JSON holds.
  """
  save_file(dict(tensors), folder / f'{name}.safetensors')
  arrays = {key: as_array(value) for key, value in outputs.items()}
  savez(folder / f'{name}.npz', arrays)
  write_json(folder / f'{name}.json', about)
  print(name, {key: value.shape for key, value in arrays.items()})


def as_array(value: Any) -> np.ndarray:
  """Converts a tensor, or a list of equal ones, to an array; leaves arrays alone."""
  if isinstance(value, list):
    value = torch.stack(value)
  return value.contiguous().numpy() if isinstance(value, torch.Tensor) else value


def savez(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes named arrays to one compressed file."""
  named: dict[str, Any] = dict(arrays)
  np.savez_compressed(path, **named)


def write_json(path: pathlib.Path, about: Any) -> None:
  """Writes indented JSON with sorted keys."""
  path.write_text(json.dumps(about, indent=1, sort_keys=True) + '\n')


def write_processed(folder: pathlib.Path, seed: int, sides: Mapping[str, tuple[int, int]],
                    processors: Mapping[str, Any],
                    read: Callable[[str, Any], Mapping[str, np.ndarray]]) -> None:
  """Writes images and what image processors make of them; preprocess.json holds their configs.

  Args:
    folder: where.
    seed: of the images.
    sides: {name of an image: (height, width)}.
    processors: by name.
    read: takes '<processor>_<image>' and a processor's output, and returns the arrays to keep.
  """
  random = np.random.default_rng(seed)
  images = {name: random.integers(0, 256, (*size, 3), dtype=np.uint8)
            for name, size in sides.items()}
  arrays = dict(images)
  for name, processor in processors.items():
    for image, pixels in images.items():
      output = processor(Image.fromarray(pixels), return_tensors='np')
      arrays |= read(f'{name}_{image}', output)
  savez(folder / 'preprocess.npz', arrays)
  write_json(folder / 'preprocess.json', {name: json.loads(processor.to_json_string())
                                          for name, processor in processors.items()})


def stacks(model: torch.nn.Module) -> dict[str, Any]:
  """Returns the lists of layers of a model, {prefix: layers}; decoders are left out."""
  lists = {name: module for name, module in model.named_modules()
           if isinstance(module, torch.nn.ModuleList) and len(module) == DEPTH}
  if isinstance(model, VisionTransformer):
    return {'image_': model.blocks}
  return {'text_' if 'text' in name else 'image_': layers for name, layers in lists.items()
          if 'decoder' not in name}


def token_ids() -> torch.Tensor:
  """Draws int64[3, CONTEXT]: texts of three lengths, with a first and an end token, padded by 1."""
  ids = torch.randint(2, VOCABULARY - 2, (3, CONTEXT))
  ids[:, 0] = VOCABULARY - 2
  for row, end in enumerate((CONTEXT - 1, 6, 3)):
    ids[row, end] = VOCABULARY - 1
    ids[row, end + 1:] = 1
  return ids


def run(model: Any, images: torch.Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
  """Returns outputs of a model by name; `settings` are ours."""
  outputs: dict[str, Any] = {}
  for prefix, layers in stacks(model).items():
    watch(layers, outputs, prefix)
  if isinstance(model, VisionTransformer):
    outputs['image_out'] = model(images)
  elif isinstance(model, transformers.ViTMAEForPreTraining):
    # Patches are masked and shuffled by noise; in order and unmasked they stay as they are.
    noise = torch.arange((SIDE // PATCH) ** 2)[None].expand(len(images), -1).float()
    outputs['image_out'] = model.vit(images, noise=noise).last_hidden_state[:, 0]
  elif 'text' not in settings:
    outputs['image_out'] = model(pixel_values=images).logits
  else:
    outputs |= pairs(model, images, settings)
  return outputs


def pairs(model: Any, images: torch.Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
  """Returns ids, and outputs of the towers one by one and together."""
  ids = token_ids()
  inputs = {'pixel_values': images}
  if settings['layout'] == 'transformers/siglip2':
    side = SIDE // PATCH
    patches = images.reshape(-1, 3, side, PATCH, side, PATCH).permute(0, 2, 4, 3, 5, 1)
    inputs = {'pixel_values': patches.reshape(len(images), side * side, -1),
              'pixel_attention_mask': torch.ones(len(images), side * side, dtype=torch.long),
              'spatial_shapes': torch.full((len(images), 2), side)}
  mask = {}
  if settings['text']['pool'] == 'eot':
    end = (ids == VOCABULARY - 1).int().argmax(dim=1)
    mask = {'attention_mask': (torch.arange(CONTEXT)[None] <= end[:, None]).long()}
  out = model(input_ids=ids, **inputs, **mask)
  # Features as the library normalises them.
  return {'ids': ids, 'logits': out.logits_per_image, 'image_features': out.image_embeds,
          'text_features': out.text_embeds}


@torch.no_grad()
def write(folder: pathlib.Path, name: str, model: Any, settings: dict[str, Any]) -> None:
  """Writes one case: checkpoint, inputs, outputs and settings."""
  model = model.eval()
  randomise(model)
  images = torch.randn(2, 3, SIDE, SIDE)
  outputs = run(model, images, settings)
  if isinstance(model, VisionTransformer):
    tensors = model.state_dict()
  else:
    tensors, settings['config'] = read_saved(model)
  versions = {library.__name__: library.__version__ for library in (torch, timm, transformers)}
  write_case(folder, name, tensors, {**outputs, 'images': images.permute(0, 2, 3, 1)},
             {**settings, 'made_with': versions})


@torch.no_grad()
def write_language(folder: pathlib.Path, name: str, case: tuple[str, dict[str, Any]]) -> None:
  """Writes a language model: three prompts padded on the left, and what is decoded after them."""
  family, settings = case
  model = transformers.AutoModelForCausalLM.from_config(
      getattr(transformers, family)(**(THEIRS_LANGUAGE | settings))).eval()
  randomise(model)
  model.tie_weights()
  ids = torch.randint(1, 64, (len(LENGTHS), PROMPT))
  valid = torch.arange(PROMPT)[None] >= PROMPT - torch.tensor(LENGTHS)[:, None]
  ids = torch.where(valid, ids, 0)
  inputs = {'input_ids': ids, 'attention_mask': valid.long(),
            'position_ids': (valid.long().cumsum(1) - 1).clamp(min=0)}
  outputs: dict[str, Any] = {}
  hooks = watch(model.model.layers, outputs, '')
  outputs['logits'] = model(**inputs).logits
  for hook in hooks:
    hook.remove()
  out = model.generate(input_ids=ids, attention_mask=valid.long(), do_sample=False,
                       max_new_tokens=DECODED)
  outputs |= {'ids': ids, 'valid': valid, 'decoded': out[:, PROMPT:]}
  tensors, config = read_saved(model)
  write_case(folder, name, tensors, outputs, config)


def write_bert(folder: pathlib.Path) -> None:
  """Writes BERT: texts of several lengths, padded behind."""
  model = transformers.BertModel(transformers.BertConfig(
      **THEIRS, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)).eval()
  randomise(model)
  ids = torch.randint(3, VOCABULARY, (3, CONTEXT))
  lengths = torch.tensor([[CONTEXT], [7], [4]])
  place = torch.arange(CONTEXT)[None]
  ids = torch.where(place == 0, 1, torch.where(place == lengths - 1, 2, ids))
  valid = place < lengths
  ids = torch.where(valid, ids, 0)
  outputs: dict[str, Any] = {}
  hooks = watch(model.encoder.layer, outputs, '')
  model(input_ids=ids, attention_mask=valid.long())
  for hook in hooks:
    hook.remove()
  tensors, config = read_saved(model)
  write_case(folder, 'bert', tensors, {**outputs, 'ids': ids, 'valid': valid}, config)


# -- configs as they are published ---------------------------------------------------------------


LEFT_OUT = '<left out>'


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a config with what a variant says otherwise, in nested ones too."""
  config = dict(base)
  for key, value in changes.items():
    if isinstance(value, dict) and isinstance(base.get(key), dict):
      value = merged(base[key], value)
    config[key] = value
  return {key: value for key, value in config.items() if value != LEFT_OUT}


@torch.no_grad()
def write_published(folder: pathlib.Path) -> None:
  """Writes what this version of the transformers library makes of every variant."""
  version = transformers.__version__
  pool_file, outputs_file = folder / 'weights.safetensors', folder / 'outputs.npz'
  pool = load_file(pool_file) if pool_file.exists() else {}
  outputs = dict(np.load(outputs_file)) if outputs_file.exists() else {}
  cases: dict[str, Any] = {}
  for family, entry in json.loads((folder / 'variants.json').read_text()).items():
    recorded = folder.parent / 'parity_vlm' / f'{family}.npz'
    for variant, changes in entry['variants'].items():
      config = merged(entry['base'], changes)
      since, size = config.pop('_since', 0), config.pop('_size', None)
      if since > float('.'.join(version.split('.')[:2])):
        continue
      with tempfile.TemporaryDirectory() as scratch:
        model, saved, names = published_model(pathlib.Path(scratch), config, pool)
      found = as_array(published_rows(recorded, model) if recorded.exists() else
                       published_outputs(model, family, size, outputs))
      name = f'{family}/{variant}'
      gap = float(np.abs(outputs.setdefault(name, found) - found).max())
      print(version, name, found.shape, float(np.abs(found).max()), gap)
      if gap > 2e-5:
        raise SystemExit(f'{name} differs from another version: look why')
      cases[name] = {'given': config, 'saved': saved, 'tensors': names, 'size': size}
  save_file(pool, pool_file)
  savez(outputs_file, outputs)
  text = json.dumps(cases, sort_keys=True).encode()
  (folder / f'{version}.json.gz').write_bytes(gzip.compress(text, mtime=0))


def published_model(scratch: pathlib.Path, config: Mapping[str, Any],
                    pool: dict[str, torch.Tensor]) -> tuple[Any, dict[str, Any], dict[str, str]]:
  """Returns the model that a config describes, its saved config, and {tensor's name: in `pool`}.

  The tensors are those of the pool, which gets what it lacks: random, of half precision. Parts of a
  name that versions of the library differ in are left out there.
  """
  cls = getattr(transformers, config['architectures'][0])
  (scratch / 'config.json').write_text(json.dumps(config))
  model = cls(transformers.AutoConfig.from_pretrained(scratch))
  randomise(model)
  model.tie_weights()
  tensors, saved = read_saved(model)
  names = {
      key: '.'.join([part for part in key.split('.')
                     if part not in ('model', 'language_model', 'vision_model')]
                    + ['x'.join(map(str, value.shape))])
      for key, value in tensors.items() if not key.endswith('position_ids')}
  for key, name in names.items():
    pool.setdefault(name, tensors[key].half().contiguous())
  save_file({key: pool[name].float() for key, name in names.items()},
            scratch / 'model.safetensors', metadata={'format': 'pt'})
  return cls.from_pretrained(scratch, attn_implementation='eager').eval(), saved, names


def published_rows(recorded: pathlib.Path, model: Any) -> torch.Tensor:
  """Returns a vision-language model's logits of the row that tools/parity/vlm.py wrote."""
  with np.load(recorded) as arrays:
    row = {key.removeprefix('one_'): torch.from_numpy(value) for key, value in arrays.items()
           if key.startswith('one_')}
  inputs = {key: row[key] for key in ('pixel_values', 'image_sizes', 'image_grid_thw')
            if key in row}
  if 'image_grid_thw' in row and int(transformers.__version__[0]) >= 5:
    inputs['mm_token_type_ids'] = (row['ids'] == model.config.image_token_id).int()
  return model(input_ids=row['ids'], attention_mask=row['mask'], **inputs).logits


def published_outputs(model: Any, family: str, size: Sequence[int] | None,
                      arrays: dict[str, np.ndarray]) -> torch.Tensor:
  """Returns the logits, or the features, of inputs that are the same in every version.

  Args:
    model: of the library.
    family: its model_type.
    size: (height, width) of images where it is not the model's own.
    arrays: get the inputs, as 'ids' and 'images/3x24x24'.
  """
  settings = {'interpolate_pos_encoding': True} if size and family != 'siglip2' else {}
  vision = getattr(model.config, 'vision_config', model.config)
  generator = torch.Generator().manual_seed(0)
  if hasattr(vision, 'patch_size'):
    side = getattr(vision, 'image_size', SIDE)
    images = torch.randn(2, vision.num_channels, *(size or (side, side)), generator=generator)
    arrays[f'images/{"x".join(map(str, images.shape[1:]))}'] = images.numpy()
  ids = torch.arange(2 * CONTEXT).reshape(2, CONTEXT) * 7 % 37 + 1
  ids[:, -1] = VOCABULARY - 1
  arrays['ids'] = ids.numpy()
  if hasattr(model, 'lm_head'):
    return model(input_ids=ids).logits
  if family == 'vit_mae':
    model.embeddings.config.mask_ratio = 0.0
    count = images[0, 0].numel() // PATCH ** 2
    noise = torch.arange(count)[None].expand(2, -1).float()
    return model(images, noise=noise, **settings).last_hidden_state[:, 0]
  if not hasattr(model.config, 'text_config'):
    return model(pixel_values=images, **settings).logits
  inputs = {'pixel_values': images}
  if family == 'siglip2':
    rows, columns = (each // PATCH for each in images.shape[2:])
    patches = images.reshape(2, 3, rows, PATCH, columns, PATCH).permute(0, 2, 4, 3, 5, 1)
    inputs = {'pixel_values': patches.reshape(2, rows * columns, -1),
              'pixel_attention_mask': torch.ones(2, rows * columns, dtype=torch.long),
              'spatial_shapes': torch.tensor([[rows, columns]] * 2)}
  out = model(input_ids=ids, **inputs, **settings)
  return torch.cat([out.logits_per_image.flatten(), out.image_embeds.flatten(),
                    out.text_embeds.flatten()])


# -- beside the models ---------------------------------------------------------------------------


def write_preprocess(folder: pathlib.Path) -> None:
  """Writes images, and what the image processors make of them."""
  small = {'height': 24, 'width': 24}
  processors = {
      'clip': transformers.CLIPImageProcessorPil(size={'shortest_edge': 28}, crop_size=small),
      'dinov2': transformers.BitImageProcessorPil(
          size={'shortest_edge': 31}, crop_size=small, resample=3),
      'deit': transformers.DeiTImageProcessorPil(
          size={'height': 29, 'width': 29}, crop_size=small),
      'vit': transformers.ViTImageProcessorPil(size=small),
      'siglip': transformers.SiglipImageProcessorPil(size=small),
      # Smaller than what is cut out of it.
      'padded': transformers.CLIPImageProcessorPil(size={'shortest_edge': 19}, crop_size=small),
  }
  write_processed(folder, 0, {'wide': (37, 53), 'tall': (61, 40), 'small': (18, 20)}, processors,
                  lambda key, output: {key: output['pixel_values'][0].transpose(1, 2, 0)})


def write_tokenizer(folder: pathlib.Path) -> None:
  """Writes a CLIP tokenizer of a few tokens as the library saves it, and its ids of texts."""
  letters = 'acdefghimnoprst'
  vocab = {token: place for place, token in enumerate(
      [*letters, *(f'{letter}</w>' for letter in letters), 'ph', 'ca', 'cat</w>', '!</w>',
       '<|startoftext|>', '<|endoftext|>'])}
  merges = [('p', 'h'), ('c', 'a'), ('ca', 't</w>')]
  tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=merges)
  texts = ['a photo of a cat', 'CAT!', 'dog']
  tokenizer.save_pretrained(folder / 'tokenizer')
  ids = tokenizer(texts, padding='max_length', max_length=16)['input_ids']
  (folder / 'tokenizer' / 'expected.json').write_text(json.dumps({'texts': texts, 'ids': ids}))


def write_positions(folder: pathlib.Path) -> None:
  """Writes position embeddings of 3 x 3 patches behind one special token, on other grids."""
  torch.manual_seed(0)
  old = torch.randn(1, 10, 8)
  arrays = {str(side): timm.layers.resample_abs_pos_embed(old, new_size=(side, side)).numpy()
            for side in (2, 5, 7)}
  savez(folder / 'positions.npz', {'old': old.numpy(), **arrays})


if __name__ == '__main__':
  main()
