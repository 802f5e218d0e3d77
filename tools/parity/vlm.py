"""Writes vision-language models of another library, for tests/models/test_parity_vlm.py.

  python -m tools.parity.vlm --folder=tests/fixtures/parity_vlm

Needs torch and transformers, in an environment of its own (tools/parity/reference.py says why).
Every case is a tiny model with random parameters: <case>.safetensors holds the checkpoint,
<case>.npz inputs and outputs of a batch of one ('one_...') and of three rows padded on the left
('three_...'): an image, text alone, two images. <case>.json is its config.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image

from tools.parity.reference import (
    as_array,
    randomise,
    read_saved,
    savez,
    watch,
    write_case,
    write_processed,
)

IMAGE, VIDEO, PAD, VOCABULARY = 30, 31, 0, 40
STEPS = 4
TEXT = {'vocab_size': VOCABULARY, 'hidden_size': 32, 'intermediate_size': 48,
        'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 2,
        'max_position_embeddings': 512, 'tie_word_embeddings': False, 'pad_token_id': PAD,
        'bos_token_id': 1, 'eos_token_id': None}
TOWER = {'hidden_size': 24, 'intermediate_size': 40, 'num_hidden_layers': 3,
         'num_attention_heads': 2, 'image_size': 16, 'patch_size': 4}
PINPOINTS = [[16, 32], [32, 16], [32, 32], [16, 48]]
# (height, width) of the images of the three rows.
SIZES: list[list[tuple[int, int]]] = [[(20, 37)], [], [(40, 22), (9, 9)]]

Sizes = Sequence[tuple[int, int]]
# A model and sizes -> its visual inputs, placeholders an image, and settings of the run.
Visual = Callable[[Any, Sizes], tuple[dict[str, Any], list[int], dict[str, Any]]]
Case = tuple[Any, Visual]


def main() -> None:
  """Writes every case."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--folder', type=pathlib.Path, required=True)
  folder = parser.parse_args().folder
  folder.mkdir(parents=True, exist_ok=True)
  for number, (name, case) in enumerate(CASES.items()):
    torch.manual_seed(100 + number)
    write(folder, name, *case())
  write_preprocess(folder)
  write_chat(folder)


# Models, and what makes their visual inputs.


def llava() -> Case:
  """Builds CLIP's last layer but one without [CLS], two products, Llama."""
  config = transformers.LlavaConfig(
      vision_config=transformers.CLIPVisionConfig(**TOWER, hidden_act='quick_gelu'),
      text_config=transformers.LlamaConfig(**TEXT), image_token_id=IMAGE, vision_feature_layer=-2,
      image_seq_length=16)
  return transformers.LlavaForConditionalGeneration(config), squares


def llava_next() -> Case:
  """Builds the same tower on crops."""
  config = transformers.LlavaNextConfig(
      vision_config=transformers.CLIPVisionConfig(**TOWER, hidden_act='quick_gelu'),
      text_config=transformers.LlamaConfig(**TEXT), image_token_id=IMAGE,
      image_grid_pinpoints=PINPOINTS)
  return transformers.LlavaNextForConditionalGeneration(config), crops


def llava_onevision() -> Case:
  """Builds SigLIP with Qwen 2; grids of over 2 crops' tokens are made smaller."""
  config = transformers.LlavaOnevisionConfig(
      vision_config=transformers.SiglipVisionConfig(**TOWER, vision_use_head=False),
      text_config=transformers.Qwen2Config(**TEXT, use_sliding_window=False),
      image_token_id=IMAGE, video_token_id=VIDEO, image_grid_pinpoints=PINPOINTS,
      vision_aspect_ratio='anyres_max_2')
  return transformers.LlavaOnevisionForConditionalGeneration(config), crops


ROPE = {'rope_type': 'default', 'rope_theta': 1e4, 'mrope_section': [1, 1, 2]}


def qwen2_vl() -> Case:
  """Builds a model of images of any size, with positions of three axes."""
  config = transformers.Qwen2VLConfig(
      text_config={**TEXT, 'rope_parameters': ROPE},
      vision_config={'embed_dim': 24, 'hidden_size': 32, 'depth': 3, 'num_heads': 2, 'mlp_ratio': 2,
                     'patch_size': 4, 'temporal_patch_size': 2, 'spatial_merge_size': 2},
      image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=28, vision_end_token_id=29)
  return transformers.Qwen2VLForConditionalGeneration(config), patches


def qwen2_5_vl() -> Case:
  """Builds the same with attention in windows of 4 x 4 patches, but for layer 1."""
  config = transformers.Qwen2_5_VLConfig(
      text_config={**TEXT, 'rope_parameters': ROPE},
      vision_config={'hidden_size': 24, 'intermediate_size': 40, 'out_hidden_size': 32, 'depth': 3,
                     'num_heads': 2, 'patch_size': 4, 'temporal_patch_size': 2,
                     'spatial_merge_size': 2, 'window_size': 16, 'fullatt_block_indexes': [1],
                     'tokens_per_second': 2},
      image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=28, vision_end_token_id=29)
  return transformers.Qwen2_5_VLForConditionalGeneration(config), patches


CASES = {'llava': llava, 'llava_next': llava_next, 'llava_onevision': llava_onevision,
         'qwen2_vl': qwen2_vl, 'qwen2_5_vl': qwen2_5_vl}


def squares(model: Any, sizes: Sizes) -> tuple[dict[str, Any], list[int], dict[str, Any]]:
  """Makes one crop an image."""
  count = len(sizes)
  return {'pixel_values': torch.randn(count, 3, 16, 16)}, [16] * count, {}


def crops(model: Any, sizes: Sizes) -> tuple[dict[str, Any], list[int], dict[str, Any]]:
  """Makes a small whole and crops of each image, padded to one number."""
  name = type(model).__module__.rpartition('.')[2]
  library = __import__(f'transformers.models.{name.removeprefix("modeling_")}.{name}',
                       fromlist=[name])
  counts = [library.image_size_to_num_patches(size, PINPOINTS, 16) for size in sizes]
  pixels = torch.zeros(len(sizes), max(counts), 3, 16, 16)
  for row, count in enumerate(counts):
    pixels[row, :count] = torch.randn(count, 3, 16, 16)
  inputs = {'pixel_values': pixels, 'image_sizes': torch.tensor(sizes)}
  if 'onevision' in name:
    # Else two images of a row are not cut.
    inputs['batch_num_images'] = torch.ones(len(sizes), dtype=torch.long)
  features = model.get_image_features(**inputs)
  lengths = [len(each) for each in features.pooler_output]
  return inputs, lengths, {}


def patches(model: Any, sizes: Sizes) -> tuple[dict[str, Any], list[int], dict[str, Any]]:
  """Makes patches of images whose sides are multiples of two patches."""
  grids = torch.tensor([[1, height // 8 * 2, width // 8 * 2] for height, width in sizes])
  count = int(grids.prod(dim=1).sum())
  inputs = {'pixel_values': torch.randn(count, 3 * 2 * 4 * 4), 'image_grid_thw': grids}
  return inputs, (grids.prod(dim=1) // 4).tolist(), {'mm': True}


# Running and writing.


def prompt(lengths: Sequence[int]) -> list[int]:
  """Draws token ids of a row: text, with a run of placeholders an image."""
  ids = torch.randint(2, 28, (4,)).tolist()
  for length in lengths:
    ids += [28, *[IMAGE] * length, 29, *torch.randint(2, 28, (3,)).tolist()]
  return ids + torch.randint(2, 28, (int(torch.randint(1, 5, ())),)).tolist()


def layers_of(model: Any) -> dict[str, Any]:
  """Returns {prefix: list of layers} of the tower and of the language model."""
  core = model.model
  tower = core.visual if hasattr(core, 'visual') else core.vision_tower
  lists = [module for name, module in tower.named_modules()
           if isinstance(module, torch.nn.ModuleList) and name.endswith(('layers', 'blocks'))]
  return {'tower_': lists[0], 'text_': core.language_model.layers}


def run(model: Any, visual: dict[str, Any], ids: torch.Tensor, mask: torch.Tensor,
        settings: dict[str, Any]) -> dict[str, Any]:
  """Returns every hidden state, logits, and a few tokens more, beside the inputs.

  Args:
    model: of the library.
    visual: its visual inputs.
    ids, mask: int64[B, N], padded on the left.
    settings: 'mm' for a model with positions of three axes, which become 'axes'.
  """
  outputs: dict[str, Any] = {}
  hooks = [hook for prefix, layers in layers_of(model).items()
           for hook in watch(layers, outputs, prefix)]
  inputs = {**visual, 'input_ids': ids, 'attention_mask': mask}
  if settings.get('mm'):
    inputs['mm_token_type_ids'] = (ids == IMAGE).int()
    outputs['axes'], _ = model.model.get_rope_index(
        ids, inputs['mm_token_type_ids'], image_grid_thw=visual['image_grid_thw'],
        attention_mask=mask)
  else:
    inputs['position_ids'] = (mask.cumsum(dim=1) - 1).clamp(min=0)
  outputs['logits'] = model(**inputs).logits
  for hook in hooks:
    hook.remove()
  inputs.pop('position_ids', None)
  out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
  outputs['generated'] = out[:, ids.shape[1]:]
  return outputs | visual | {'ids': ids, 'mask': mask}


@torch.no_grad()
def write(folder: pathlib.Path, name: str, model: Any, visual: Visual) -> None:
  """Writes one case."""
  model = model.eval()
  randomise(model)
  for key, value in model.named_parameters():
    if key.endswith('image_newline'):
      value.data = torch.randn(value.shape)
  arrays: dict[str, Any] = {}
  for prefix, rows in {'one_': SIZES[:1], 'three_': SIZES}.items():
    flat = [size for row in rows for size in row]
    inputs, lengths, settings = visual(model, flat)
    left, texts = list(lengths), []
    for row in rows:
      texts.append(prompt([left.pop(0) for _ in row]))
    length = max(map(len, texts))
    ids = torch.tensor([[PAD] * (length - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (length - len(text)) + [1] * len(text) for text in texts])
    arrays |= {prefix + key: as_array(value) for key, value in
               run(model, inputs, ids, mask, settings).items()}
    arrays[f'{prefix}lengths'] = np.array(lengths)
  tensors, config = read_saved(model)
  write_case(folder, name, tensors, arrays, config)
  print([key for key in tensors if '.1.' not in key and '.2.' not in key])


def write_preprocess(folder: pathlib.Path) -> None:
  """Writes images, and what the image processors make of them."""
  square = {'height': 16, 'width': 16}
  processors = {
      'llava_pad': transformers.LlavaImageProcessorPil(
          do_pad=True, size={'shortest_edge': 16}, crop_size=square),
      'llava_next': transformers.LlavaNextImageProcessorPil(
          image_grid_pinpoints=PINPOINTS, size={'shortest_edge': 16}, crop_size=square),
      'llava_onevision': transformers.LlavaOnevisionImageProcessorPil(
          image_grid_pinpoints=PINPOINTS, size=square),
      'qwen2_vl': transformers.Qwen2VLImageProcessorPil(
          patch_size=4, min_pixels=16 * 16, max_pixels=40 * 40),
  }
  sides = {'wide': (37, 53), 'tall': (61, 30), 'small': (18, 20), 'long': (20, 130)}
  write_processed(
      folder, 1, sides, processors, lambda key, output: {
          f'{key}_{name}': np.asarray(output[name])
          for name in ('pixel_values', 'image_grid_thw') if name in output})
  # All of them in one prompt, where this family reads them otherwise than each alone.
  with np.load(folder / 'preprocess.npz') as arrays:
    row = [Image.fromarray(arrays[name]) for name in sides]
  output = processors['llava_onevision']([row], return_tensors='np')
  savez(folder / 'preprocess_row.npz', {'llava_onevision': output['pixel_values']})


TEMPLATE = """{%- set ns = namespace(images=0) -%}
{{ bos_token }}
{% for message in messages %}
  {% if message['role'] not in ['system', 'user', 'assistant'] %}
    {{ raise_exception('no such role: ' + message['role']) }}
  {% endif %}
  {{- '<' + message['role'] + '>' }}
  {%- if message['content'] is string %}
    {{- message['content'] | trim }}
  {%- else %}
    {% for part in message['content'] %}
      {%- if part['type'] == 'image' %}
        {%- set ns.images = ns.images + 1 %}
        {{- '<image>' }}
      {%- elif part['type'] == 'skip' %}
        {%- continue %}
      {%- else %}
        {{- part['text'] }}
      {%- endif %}
    {%- endfor %}
  {%- endif %}
  {{- eos_token }}
{% endfor %}
{% if tools %}
{{ tools | tojson }}
{% endif %}
{% if add_generation_prompt %}
<assistant>{{ ns.images }}
{% endif %}
"""
CHATS = {
    'plain': [{'role': 'system', 'content': ' be brief '}, {'role': 'user', 'content': 'a cat'}],
    'images': [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'skip'}, {'type': 'image'},
                                            {'type': 'text', 'text': 'a <cat> & é'}]},
               {'role': 'assistant', 'content': [{'type': 'text', 'text': 'yes'}]}],
}


def write_chat(folder: pathlib.Path) -> None:
  """Writes a tokenizer with a chat template, and the library's texts of conversations."""
  words = ['<unk>', '<s>', '</s>', '<image>', 'a', 'cat', 'be', 'brief', 'yes', '<', '>', 'user']
  inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(
      {word: place for place, word in enumerate(words)}, unk_token='<unk>'))
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  inner.post_processor = tokenizers.processors.TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', 1)])
  tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=inner, bos_token='<s>', eos_token='</s>', unk_token='<unk>',
      additional_special_tokens=['<image>'])
  tokenizer.chat_template = TEMPLATE
  tokenizer.save_pretrained(folder / 'chat')
  extras: tuple[dict[str, Any], ...] = ({}, {'tools': [{'name': 'é <b>', 'n': 1}]})
  chats = {}
  for name, messages in CHATS.items():
    for answer in (True, False):
      for more in extras:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer, **more)
        chats[f'{name}/{answer}/{bool(more)}'] = {
            'messages': messages, 'answer': answer, 'more': more, 'text': text,
            'ids': tokenizer(text, add_special_tokens=False)['input_ids'],
            'ids_special': tokenizer(text)['input_ids']}
  (folder / 'chat' / 'expected.json').write_text(json.dumps(chats, indent=1) + '\n')


if __name__ == '__main__':
  main()
