"""Tiny vision models with the weights and outputs of the reference libraries
(tools/parity/reference.py)."""

import functools
import gzip
import json
import pathlib

import jax
import numpy as np

from helpers import parity_vlm, recorded
from models import checkpoints
from models.backbones.clip import Clip
from models.backbones.text_tower import Text
from models.backbones.vit import ViT
from models.checkpoints import lm_config, vit_config, vlm_config
from models.families import LLAVA_TEXTS, LM_FAMILIES, QWENS

FOLDER = pathlib.Path(__file__).parents[1] / 'fixtures' / 'parity'
CASES = sorted(file.stem for file in FOLDER.glob('*_*.json'))


@functools.cache
def published(version):
  """{variant: its config as given and as saved, names of its tensors} of one of three versions."""
  file = recorded.FIXTURES / 'published' / f'{version}.json.gz'
  return json.loads(gzip.decompress(file.read_bytes()))


@functools.cache
def case(name):
  return json.loads((FOLDER / f'{name}.json').read_text())


def expected(name):
  return recorded.arrays(f'parity/{name}')


def build(name):
  made = case(name)
  image = ViT(**made['image'], capture=True)
  if 'text' not in made:
    return image
  return Clip(image, Text(**made['text'], capture=True), made['bias'])


def outputs(name, model):
  """Runs a model with the weights of a case; results have the names of the stored arrays."""
  params = checkpoints.load(build(name), FOLDER / f'{name}.safetensors')
  inputs = [expected(name)[key] for key in ('images', 'ids') if key in expected(name)]
  logits, out = jax.jit(model.apply)({'params': params}, *inputs)
  single = isinstance(model, ViT)
  towers = {'image': out} if single else {key: out[key] for key in ('image', 'text')}
  found = {f'{tower}_{key}': np.asarray(part[key]) for tower, part in towers.items()
           for key in ('embedded', 'hidden')}
  if single:
    return found | {'image_out': logits}
  return found | {'logits': logits, 'image_features': out['image_features'],
                  'text_features': out['text_features']}


def described(config):
  """The model that a config of any family describes."""
  kind = config.get('model_type')
  if kind in (*LLAVA_TEXTS, *QWENS):
    more = {'grid': parity_vlm.GRID} if kind in QWENS else {}
    return vlm_config.from_config(config, **more)
  return (lm_config if kind in tuple(LM_FAMILIES) else vit_config).from_config(config)
