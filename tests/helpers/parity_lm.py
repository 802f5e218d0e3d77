"""Tiny language models with the weights and outputs of the transformers library."""

import functools
import json
import pathlib

from safetensors.numpy import load_file, save_file

from helpers import recorded
from models import checkpoints
from models.checkpoints import files
from models.checkpoints.lm_config import from_config

FOLDER = pathlib.Path(__file__).parents[1] / 'fixtures' / 'parity' / 'lm'
CASES = sorted(file.stem for file in FOLDER.glob('*.json'))


@functools.cache
def config(name):
  return json.loads((FOLDER / f'{name}.json').read_text())


def expected(name):
  return recorded.arrays(f'parity/lm/{name}')


@functools.cache
def params(name, storage='unstacked'):
  return checkpoints.load(from_config(config(name)), FOLDER / f'{name}.safetensors',
                          storage=storage)


NAME = 'qwen2'


def path(name):
  return FOLDER / f'{name}.safetensors'


def sharded(folder, name=NAME, parts=3):
  """A checkpoint in several files with their index, as large ones are released."""
  tensors = load_file(path(name))
  names = sorted(tensors)
  places = {}
  for part in range(parts):
    file = f'model-{part + 1:05d}-of-{parts:05d}.safetensors'
    chosen = {key: tensors[key] for key in names[part::parts]}
    save_file(chosen, folder / file)
    places |= dict.fromkeys(chosen, file)
  (folder / files.INDEX).write_text(json.dumps({'weight_map': places}))
  (folder / 'config.json').write_text(json.dumps(config(name)))
  return folder
