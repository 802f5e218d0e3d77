"""Turns the ViT-S/14 of an ONNX file into a folder of the published Dinov2 layout.

  python -m tools.real.vit --onnx=real/vit/vit_s_focus.onnx --folder=real/vit

model.safetensors and config.json are read as any Dinov2 checkpoint
(`winnow.load('real/vit', variant='dinov2_s14')`); decoder.safetensors holds the small decoder that
makes a map of saliency of the patches' features (lib/studies/saliency.py). Whether the weights are
those that were published for DINOv2 is not known.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np
from absl import flags
from safetensors.numpy import save_file

from lib.runtime import cli

CONFIG = {'model_type': 'dinov2', 'hidden_size': 384, 'num_hidden_layers': 12,
          'num_attention_heads': 6, 'mlp_ratio': 4, 'hidden_act': 'gelu', 'image_size': 518,
          'patch_size': 14, 'num_channels': 3, 'layer_norm_eps': 1e-6, 'qkv_bias': True,
          'use_swiglu_ffn': False}
_PREFIX = 'backbone.'


def convert(source: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes model.safetensors, config.json and decoder.safetensors.

  Raises:
    ValueError: the package that reads ONNX is missing, or the file holds another model.
  """
  tensors = _tensors(source)
  folder.mkdir(parents=True, exist_ok=True)
  for name, own in (('model', {key: value for key, value in tensors.items()
                               if not key.startswith('decoder.')}),
                    ('decoder', {key.removeprefix('decoder.'): value
                                 for key, value in tensors.items()
                                 if key.startswith('decoder.')})):
    part = folder / f'.{name}.part'
    save_file(own, part)
    os.replace(part, folder / f'{name}.safetensors')
  (folder / 'config.json').write_text(json.dumps(CONFIG, indent=1))


def _tensors(source: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of the file under Dinov2's names, the decoder's under 'decoder.'."""
  try:
    import onnx
  except ImportError as error:
    raise ValueError(f'{source} needs a package that is not installed: `pip install '
                     'onnx`') from error
  graph = onnx.load(str(source)).graph
  stored = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
  found = {name.removeprefix(_PREFIX): np.array(value) for name, value in stored.items()
           if name.startswith((_PREFIX, 'decoder.'))}
  for node in graph.node:
    # Kernels have no names of their own: the product that reads one tells which it is.
    at = re.fullmatch(r'/backbone/(encoder/layer\.\d+/.+)/MatMul', node.name)
    if at and node.input[1] in stored:
      found[f'{at[1].replace("/", ".")}.weight'] = np.ascontiguousarray(stored[node.input[1]].T)
  tables = [value for value in stored.values() if value.shape == (1, 37 * 37, 384)]
  special = [value for name, value in stored.items()
             if value.shape == (1, 1, 384) and not name.startswith(_PREFIX)]
  if len(tables) != 1 or len(special) != 1:
    raise ValueError(f'{source} is not the ViT-S/14 that is read here: it holds {len(tables)} '
                     'tables of 37 x 37 positions; fetch it again')
  found['embeddings.position_embeddings'] = np.concatenate([special[0], tables[0]], axis=1)
  return found


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string('onnx', None, 'The file.')
  flags.DEFINE_string('folder', None, 'Where to write; the folder of the file by default.')
  flags.mark_flags_as_required(['onnx'])


def main(argv: Sequence[str]) -> None:
  """Converts what the flags say."""
  del argv
  source, folder = pathlib.Path(flags.FLAGS.onnx), flags.FLAGS.folder
  convert(source, pathlib.Path(folder) if folder else source.parent)


if __name__ == '__main__':
  define_flags()
  cli.run(main)
