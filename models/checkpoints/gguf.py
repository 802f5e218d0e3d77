"""GGUF files, as llama.cpp writes them: weights, quantized or not, and the settings beside them.

  lm = from_config(gguf.config(path))      # models/checkpoints/lm_config.py
  params = load(lm, path)                  # models/checkpoints, as any other source

Tensors get the transformers library's names, so that its layouts read them. Quantized ones are
dequantized as they are read. The package `gguf` is optional (requirements-hub.txt).

Gemma 3 is not read. Its norms behind each branch, its scaled embeddings and its GELU would be a few
fields of `LM`; but its local layers rotate by another base than its global ones, and here the
stack, the caches that turn keys anew, and the methods that read `rope` have one rotation for all
layers.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from models.checkpoints import config_keys
from ops import values

SUFFIX = '.gguf'
# model_type by the architecture's name, for those whose tensors are known here.
_ARCHITECTURES = {'llama': 'llama', 'qwen2': 'qwen2', 'qwen3': 'qwen3'}
# Those whose queries and keys are stored with the two halves of a rotation interleaved.
_INTERLEAVED = ('llama',)
_NAMES = {
    r'token_embd\.weight': 'model.embed_tokens.weight',
    r'output_norm\.weight': 'model.norm.weight',
    r'output\.weight': 'lm_head.weight',
    r'blk\.(\d+)\.attn_norm\.weight': r'model.layers.\1.input_layernorm.weight',
    r'blk\.(\d+)\.ffn_norm\.weight': r'model.layers.\1.post_attention_layernorm.weight',
    r'blk\.(\d+)\.attn_output\.weight': r'model.layers.\1.self_attn.o_proj.weight',
    r'blk\.(\d+)\.attn_([qkv])\.(weight|bias)': r'model.layers.\1.self_attn.\2_proj.\3',
    r'blk\.(\d+)\.attn_([qk])_norm\.weight': r'model.layers.\1.self_attn.\2_norm.weight',
    r'blk\.(\d+)\.ffn_(gate|up|down)\.weight': r'model.layers.\1.mlp.\2_proj.weight',
}
_REMEDY = 'fetch it again, or convert the model anew'
# Of the tokenizer's settings; what its lists hold shows when it is built.
_TOKENIZER = {'model': str, 'pre': str, 'add_bos_token': bool, 'add_space_prefix': bool,
              **{f'{name}_token_id': config_keys.Token for name in (
                  'bos', 'eos', 'eot', 'unknown')}}


def config(path: pathlib.Path) -> dict[str, Any]:
  """Returns the settings of a file under the keys of a config.json.

  Args:
    path: a .gguf file.

  Raises:
    ValueError: an architecture that is not known here, a scaling of RoPE, a setting that is
      missing or of another type, or as `reading`.
  """
  reader = _open(path)
  architecture = _setting(reader, path, 'general.architecture', str)
  if architecture not in _ARCHITECTURES:
    raise ValueError(f'{path} holds the architecture {architecture!r}, which is unknown here: '
                     f'known are {", ".join(_ARCHITECTURES)}')

  def get(key: str, kind: Any, default: Any = None) -> Any:
    return _setting(reader, path, f'{architecture}.{key}', kind, default)

  # Numbers of outputs, by name.
  tensors = {tensor.name: int(tensor.shape[-1]) for tensor in reader.tensors}
  if get('rope.scaling.type', str, 'none') != 'none' or 'rope_freqs.weight' in tensors:
    raise ValueError(f'{path} scales RoPE, which is not read from GGUF files: use the model\'s '
                     'safetensors files')
  width = get('embedding_length', config_keys.Size)
  heads = get('attention.head_count', config_keys.Count)
  if 'token_embd.weight' not in tensors:
    raise ValueError(f'{path} does not say the shape of token_embd.weight: it holds no model; '
                     'fetch it again')
  return {
      'model_type': _ARCHITECTURES[architecture], 'hidden_size': width,
      'num_hidden_layers': get('block_count', config_keys.Count),
      'intermediate_size': get('feed_forward_length', config_keys.Size),
      'num_attention_heads': heads,
      'num_key_value_heads': get('attention.head_count_kv', config_keys.Count, heads),
      'head_dim': get('attention.key_length', config_keys.Size, width // heads),
      'vocab_size': tensors['token_embd.weight'],
      'max_position_embeddings': get('context_length', config_keys.Length),
      # Both are stored as float32, whose nearest short decimal is meant.
      'rms_norm_eps': float(f'{get("attention.layer_norm_rms_epsilon", config_keys.Epsilon):.6g}'),
      'rope_theta': float(f'{get("rope.freq_base", config_keys.Theta, 10000.0):.7g}'),
      'tie_word_embeddings': 'output.weight' not in tensors}


class Tensors:
  """Reads the tensors of a file under the transformers library's names.

  Attributes:
    shapes: by name.
    dtypes: by name, as the format calls them: 'F32', 'Q4_1', ...
  """

  def __init__(self, reader: Any, path: pathlib.Path):
    self._path = path
    read = config(path)
    self._interleaved = read['model_type'] in _INTERLEAVED
    self._heads = [read['num_attention_heads'], read['num_key_value_heads']]
    self._tensors = {_renamed(tensor.name): tensor for tensor in reader.tensors}
    self.shapes = {name: tuple(int(n) for n in reversed(tensor.shape))
                   for name, tensor in self._tensors.items()}
    self.dtypes = {name: tensor.tensor_type.name for name, tensor in self._tensors.items()}

  def check_dtype(self, name: str) -> None:
    """Raises nothing: which types can be read shows when they are."""

  def read(self, name: str) -> np.ndarray:
    """Reads one tensor, float32.

    Raises:
      ValueError: a type that the package cannot dequantize, or NaN or infinity in it.
    """
    import gguf
    tensor = self._tensors[name]
    try:
      with np.errstate(all='ignore'):  # What comes of an infinite scale is told below.
        array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    except NotImplementedError as error:
      raise ValueError(f'{tensor.name} of {self._path} is stored as {self.dtypes[name]}, which the '
                       'gguf package does not dequantize: use a file of another type') from error
    array = array.reshape(self.shapes[name])
    if not np.isfinite(array).all():
      raise ValueError(f'{tensor.name} of {self._path} holds NaN or infinity: fetch the file again')
    part = re.search(r'self_attn\.([qk])_proj', name)
    if self._interleaved and part:
      array = _halves(array, self._heads['qk'.index(part[1])])
    return array


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[Tensors]:
  """Opens a file; tensors are read one by one.

  Raises:
    ValueError: the package is missing, or the file is not what its name says.
  """
  yield Tensors(_open(path), path)


def _open(path: pathlib.Path) -> Any:
  if not path.is_file():
    raise ValueError(f'{path} is no regular file: give the file itself')
  stat = path.stat()
  try:
    return _reader(path, stat.st_mtime_ns, stat.st_size)
  except ImportError as error:
    raise ValueError(f'{path} needs a package that is not installed: `pip install gguf`, or use a '
                     '.safetensors file') from error
  except (OSError, ValueError, LookupError) as error:
    raise ValueError(f'{path} cannot be read as GGUF ({error}): it was cut short, or is another '
                     'kind of file; fetch it again') from error


@functools.lru_cache(maxsize=1)
def _reader(path: pathlib.Path, changed: int, size: int) -> Any:
  """Parses a file once for all who read of it: a vocabulary of 50,000 tokens takes seconds."""
  del changed, size
  import gguf
  return gguf.GGUFReader(path)


def _setting(reader: Any, path: pathlib.Path, key: str, kind: Any, default: Any = None) -> Any:
  field = reader.fields.get(key)
  value = default if field is None else field.contents()
  if value is None:
    raise ValueError(f'{path} does not say {key}: {_REMEDY}')
  try:
    values.check(f'{path}: {key}', value, kind)
  except ValueError as error:
    raise ValueError(f'{error}; {_REMEDY}') from error
  return value


def _renamed(name: str) -> str:
  """The transformers library's name of a tensor, the same where it has none."""
  for pattern, theirs in _NAMES.items():
    match = re.fullmatch(pattern, name)
    if match:
      return match.expand(theirs)
  return name


def _halves(array: np.ndarray, heads: int) -> np.ndarray:
  """Puts the two features of each rotation half a head apart, as they are rotated here."""
  paired = array.reshape(heads, -1, 2, *array.shape[1:])
  return paired.swapaxes(1, 2).reshape(array.shape)


def field(path: pathlib.Path, key: str) -> Any:
  """Returns what a file says under a key, None for nothing.

  Raises:
    ValueError: as `reading`.
  """
  found = _open(path).fields.get(key)
  return None if found is None else found.contents()


def vocabulary(path: pathlib.Path) -> Mapping[str, Any]:
  """Returns a file's tokenizer: 'tokens', 'merges', 'token_type', and what else it says of it.

  Raises:
    ValueError: a setting of another type, or as `reading`.
  """
  prefix, reader = 'tokenizer.ggml.', _open(path)
  content = {key.removeprefix(prefix): field.contents() for key, field in reader.fields.items()
             if key.startswith(prefix)}
  for key, kind in _TOKENIZER.items():
    if key in content:
      _setting(reader, path, prefix + key, kind)
  return content
