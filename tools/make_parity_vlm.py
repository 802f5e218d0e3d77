"""Writes what tests/test_vlm_parity.py compares with: vision-language models of another library.

  python -m tools.make_parity_vlm --folder=tests/fixtures/parity_vlm

Needs torch and transformers, in an environment of its own (tools/make_parity.py says why). Every
case is a tiny model with random parameters: <case>.safetensors holds the checkpoint, <case>.npz
inputs and outputs of a batch of one ('one_...') and of three rows padded on the left ('three_...'):
an image, text alone, two images. <case>.json is its config.
"""

import argparse
import json
import pathlib
import tempfile

import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from tools.make_parity import randomise

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
SIZES = [[(20, 37)], [], [(40, 22), (9, 9)]]


def main():
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


def llava():
  """CLIP's last layer but one without [CLS], two products, Llama."""
  config = transformers.LlavaConfig(
      vision_config=transformers.CLIPVisionConfig(**TOWER, hidden_act='quick_gelu'),
      text_config=transformers.LlamaConfig(**TEXT), image_token_id=IMAGE, vision_feature_layer=-2,
      image_seq_length=16)
  return transformers.LlavaForConditionalGeneration(config), squares


def llava_next():
  """The same tower on crops."""
  config = transformers.LlavaNextConfig(
      vision_config=transformers.CLIPVisionConfig(**TOWER, hidden_act='quick_gelu'),
      text_config=transformers.LlamaConfig(**TEXT), image_token_id=IMAGE,
      image_grid_pinpoints=PINPOINTS)
  return transformers.LlavaNextForConditionalGeneration(config), crops


def llava_onevision():
  """SigLIP, Qwen 2; grids of over 2 crops' tokens are made smaller."""
  config = transformers.LlavaOnevisionConfig(
      vision_config=transformers.SiglipVisionConfig(**TOWER, vision_use_head=False),
      text_config=transformers.Qwen2Config(**TEXT, use_sliding_window=False),
      image_token_id=IMAGE, video_token_id=VIDEO, image_grid_pinpoints=PINPOINTS,
      vision_aspect_ratio='anyres_max_2')
  return transformers.LlavaOnevisionForConditionalGeneration(config), crops


ROPE = {'rope_type': 'default', 'rope_theta': 1e4, 'mrope_section': [1, 1, 2]}


def qwen2_vl():
  """Images of any size, positions of three axes."""
  config = transformers.Qwen2VLConfig(
      text_config={**TEXT, 'rope_parameters': ROPE},
      vision_config={'embed_dim': 24, 'hidden_size': 32, 'depth': 3, 'num_heads': 2, 'mlp_ratio': 2,
                     'patch_size': 4, 'temporal_patch_size': 2, 'spatial_merge_size': 2},
      image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=28, vision_end_token_id=29)
  return transformers.Qwen2VLForConditionalGeneration(config), patches


def qwen2_5_vl():
  """The same with attention in windows of 4 x 4 patches, but for layer 1."""
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


def squares(model, sizes):
  """One crop an image."""
  count = len(sizes)
  return {'pixel_values': torch.randn(count, 3, 16, 16)}, [16] * count, {}


def crops(model, sizes):
  """A small whole and crops of each image, padded to one number."""
  name = type(model).__module__.rpartition('.')[2]
  library = __import__(f'transformers.models.{name.removeprefix("modeling_")}.{name}',
                       fromlist=[name])
  counts = [library.image_size_to_num_patches(size, PINPOINTS, 16) for size in sizes]
  pixels = torch.zeros(len(sizes), max(counts), 3, 16, 16)
  for row, count in enumerate(counts):
    pixels[row, :count] = torch.randn(count, 3, 16, 16)
  given = {'pixel_values': pixels, 'image_sizes': torch.tensor(sizes)}
  if 'onevision' in name:
    # Else two images of a row are not cut.
    given['batch_num_images'] = torch.ones(len(sizes), dtype=torch.long)
  found = model.get_image_features(**given)
  lengths = [len(each) for each in found.pooler_output]
  return given, lengths, {}


def patches(model, sizes):
  """Patches of images whose sides are multiples of two patches."""
  grids = torch.tensor([[1, height // 8 * 2, width // 8 * 2] for height, width in sizes])
  count = int(grids.prod(dim=1).sum())
  given = {'pixel_values': torch.randn(count, 3 * 2 * 4 * 4), 'image_grid_thw': grids}
  return given, (grids.prod(dim=1) // 4).tolist(), {'mm': True}


# Running and writing.


def prompt(lengths):
  """Token ids of a row: text, with a run of placeholders an image."""
  ids = torch.randint(2, 28, (4,)).tolist()
  for length in lengths:
    ids += [28, *[IMAGE] * length, 29, *torch.randint(2, 28, (3,)).tolist()]
  return ids + torch.randint(2, 28, (int(torch.randint(1, 5, ())),)).tolist()


def layers_of(model):
  """{prefix: list of layers} of the tower and of the language model."""
  core = model.model
  tower = core.visual if hasattr(core, 'visual') else core.vision_tower
  found = [module for name, module in tower.named_modules()
           if isinstance(module, torch.nn.ModuleList) and name.endswith(('layers', 'blocks'))]
  return {'tower_': found[0], 'text_': core.language_model.layers}


def run(model, given, ids, mask, more):
  """Every hidden state, positions, logits, and a few tokens more."""
  found, handles = {}, []

  def before(module, args, kwargs, key):
    found[f'{key}embedded'] = args[0] if args else kwargs['hidden_states']
    if key == 'text_':
      found['position_ids'] = kwargs.get('position_ids')

  def after(module, args, output, key):
    found.setdefault(f'{key}hidden', []).append(output[0] if isinstance(output, tuple) else output)

  for key, layers in layers_of(model).items():
    handles.append(layers[0].register_forward_pre_hook(
        lambda m, a, k, key=key: before(m, a, k, key), with_kwargs=True))
    handles += [layer.register_forward_hook(lambda m, a, o, key=key: after(m, a, o, key))
                for layer in layers]
  inputs = {**given, 'input_ids': ids, 'attention_mask': mask}
  if more.get('mm'):
    inputs['mm_token_type_ids'] = (ids == IMAGE).int()
    found['axes'], _ = model.model.get_rope_index(
        ids, inputs['mm_token_type_ids'], image_grid_thw=given['image_grid_thw'],
        attention_mask=mask)
  else:
    inputs['position_ids'] = (mask.cumsum(dim=1) - 1).clamp(min=0)
  found['logits'] = model(**inputs).logits
  for handle in handles:
    handle.remove()
  inputs.pop('position_ids', None)
  out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
  found['generated'] = out[:, ids.shape[1]:]
  found.pop('position_ids')
  return found | given | {'ids': ids, 'mask': mask}


@torch.no_grad()
def write(folder, name, model, visual):
  """One case."""
  model = model.eval()
  randomise(model)
  for key, value in model.named_parameters():
    if key.endswith('image_newline'):
      value.data = torch.randn(value.shape)
  arrays = {}
  for prefix, rows in {'one_': SIZES[:1], 'three_': SIZES}.items():
    flat = [size for row in rows for size in row]
    given, lengths, more = visual(model, flat)
    left, texts = list(lengths), []
    for row in rows:
      texts.append(prompt([left.pop(0) for _ in row]))
    length = max(map(len, texts))
    ids = torch.tensor([[PAD] * (length - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (length - len(text)) + [1] * len(text) for text in texts])
    for key, value in run(model, given, ids, mask, more).items():
      value = torch.stack(value) if isinstance(value, list) else value
      arrays[prefix + key] = value.contiguous().numpy()
    arrays[f'{prefix}lengths'] = np.array(lengths)
  with tempfile.TemporaryDirectory() as scratch:
    model.save_pretrained(scratch)
    tensors = load_file(f'{scratch}/model.safetensors')
    config = json.loads(pathlib.Path(scratch, 'config.json').read_text())
  save_file(tensors, folder / f'{name}.safetensors')
  np.savez_compressed(folder / f'{name}.npz', **arrays)
  (folder / f'{name}.json').write_text(json.dumps(config, indent=1, sort_keys=True) + '\n')
  print(name, {key: value.shape for key, value in arrays.items()})
  print([key for key in tensors if '.1.' not in key and '.2.' not in key])


def write_preprocess(folder):
  """Images, and what the image processors make of them; .json holds their configs."""
  random = np.random.default_rng(1)
  images = {name: random.integers(0, 256, (*sides, 3), dtype=np.uint8)
            for name, sides in {'wide': (37, 53), 'tall': (61, 30), 'small': (18, 20),
                                'long': (20, 130)}.items()}
  square = {'height': 16, 'width': 16}
  made = {
      'llava_pad': transformers.LlavaImageProcessorPil(
          do_pad=True, size={'shortest_edge': 16}, crop_size=square),
      'llava_next': transformers.LlavaNextImageProcessorPil(
          image_grid_pinpoints=PINPOINTS, size={'shortest_edge': 16}, crop_size=square),
      'llava_onevision': transformers.LlavaOnevisionImageProcessorPil(
          image_grid_pinpoints=PINPOINTS, size=square),
      'qwen2_vl': transformers.Qwen2VLImageProcessorPil(
          patch_size=4, min_pixels=16 * 16, max_pixels=40 * 40),
  }
  arrays, configs = dict(images), {}
  for name, processor in made.items():
    configs[name] = json.loads(processor.to_json_string())
    for image, pixels in images.items():
      out = processor(Image.fromarray(pixels), return_tensors='np')
      for key in ('pixel_values', 'image_grid_thw'):
        if key in out:
          arrays[f'{name}_{image}_{key}'] = np.asarray(out[key])
  np.savez_compressed(folder / 'preprocess.npz', **arrays)
  (folder / 'preprocess.json').write_text(json.dumps(configs, indent=1, sort_keys=True) + '\n')


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


def write_chat(folder):
  """A tokenizer with a chat template, and what the library makes of conversations."""
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
  tools = [{'name': 'é <b>', 'n': 1}]
  made = {}
  for name, messages in CHATS.items():
    for answer in (True, False):
      for more in ({}, {'tools': tools}):
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer, **more)
        made[f'{name}/{answer}/{bool(more)}'] = {
            'messages': messages, 'answer': answer, 'more': more, 'text': text,
            'ids': tokenizer(text, add_special_tokens=False)['input_ids'],
            'ids_special': tokenizer(text)['input_ids']}
  (folder / 'chat' / 'expected.json').write_text(json.dumps(made, indent=1) + '\n')


if __name__ == '__main__':
  main()
