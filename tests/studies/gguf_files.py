"""A tiny model as a GGUF file."""

import numpy as np
import pytest

gguf = pytest.importorskip('gguf')

SIZES = {'embedding_length': 64, 'block_count': 2, 'feed_forward_length': 96,
         'attention.head_count': 4, 'attention.head_count_kv': 2, 'context_length': 1024}


def written(path, *, architecture='llama', changed=None, tensors=True, tokens=(), shaped=None):
  """Writes a small model, its MLPs quantized; returns its tensors by the name in the file.

  With `tokens`, a byte-level tokenizer of them without merges, the first two of them special. Of
  `shaped`, {name: shape}, there are more tensors, or others; of None there is none.
  """
  writer, changed = gguf.GGUFWriter(path, architecture), changed or {}
  settings = {f'{architecture}.{key}': value for key, value in SIZES.items()} | {
      f'{architecture}.attention.layer_norm_rms_epsilon': 1e-5,
      f'{architecture}.rope.freq_base': 1e5} | changed
  for key, value in settings.items():
    kind = gguf.GGUFValueType.get_type(value)
    writer.add_key_value(key, value, {gguf.GGUFValueType.INT32: gguf.GGUFValueType.UINT32}.get(
        kind, kind))
  if tokens:
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre('smollm')
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}"
                             '{{ eos_token }}{% endfor %}')
    writer.add_token_list(list(tokens))
    writer.add_token_types([3 if i < 2 else 1 for i in range(len(tokens))])
    writer.add_token_merges(['a b'])
  rng, wanted = np.random.default_rng(0), {}
  shapes = {'token_embd': (max(len(tokens), 50), 64), 'output_norm': (64,), **{
      f'blk.{layer}.{part}': shape for layer in range(2) for part, shape in {
          'attn_norm': (64,), 'ffn_norm': (64,), 'attn_q': (64, 64), 'attn_k': (32, 64),
          'attn_v': (32, 64), 'attn_output': (64, 64), 'ffn_gate': (96, 64), 'ffn_up': (96, 64),
          'ffn_down': (64, 96)}.items()}} | (shaped or {})
  for name, shape in shapes.items() if tensors else ():
    if shape is None:
      continue
    array = rng.normal(size=shape).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0 if 'ffn' in name and len(shape) > 1 else None
    if kind is None:
      writer.add_tensor(f'{name}.weight', array)
    else:
      packed = gguf.quantize(array, kind)
      writer.add_tensor(f'{name}.weight', packed, raw_dtype=kind)
      array = gguf.dequantize(packed, kind)
    wanted[name] = array
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return wanted
