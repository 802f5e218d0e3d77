"""Configs as releases write them, against three versions of the transformers library.

tools/make_parity.py wrote tests/fixtures/published/: per variant of a family's config the config as
it was given and as each version saved it, and what the library then computes. The library's tensors
are loaded with both, so every key that they hold is read, known to mean nothing, or would fail.
"""

import functools
import gzip
import json

import jax
import numpy as np
import pytest
from helpers import parity_vlm, recorded
from safetensors.numpy import load_file, save_file

from models import checkpoints
from models.backbones.clip import Clip
from models.backbones.lm import LM
from models.backbones.vlm import VLM
from models.checkpoints import lm_config, vit_config, vlm_config
from models.families import LLAVA_TEXTS, LM_FAMILIES, QWENS

FOLDER = recorded.FIXTURES / 'published'
VERSIONS = ('4.40.2', '4.57.6', '5.24.0')
# Of vectors of unit length 1e-6, of logits of size 10 as in the other tests of parity.
TOLERANCE = 3e-5
# The cheapest of each kind of model, which share their programs with nothing.
QUICK = ('mistral/window', 'vit/other_eps', 'clip/repeated')


@functools.cache
def cases(version):
  return json.loads(gzip.decompress((FOLDER / f'{version}.json.gz').read_bytes()))


def names():
  return sorted({name for version in VERSIONS for name in cases(version)})


def build(config):
  """The model that a config describes."""
  kind = config['model_type']
  if kind in (*LLAVA_TEXTS, *QWENS):
    more = {'grid': parity_vlm.GRID} if kind in QWENS else {}
    return vlm_config.from_config(config, **more)
  return (lm_config if kind in LM_FAMILIES else vit_config).from_config(config)


@functools.cache
def program(model):
  return jax.jit(model.apply)


@functools.cache
def weights():
  return load_file(FOLDER / 'weights.safetensors')


def load(model, name, version, folder):
  """Our parameters of the library's tensors, beside the config that it saved."""
  case = cases(version)[name]
  save_file({key: weights()[stored].astype(np.float32)
             for key, stored in case['tensors'].items()}, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(case['saved']))
  return checkpoints.load(model, folder)


def outputs(model, params, name, size):
  """What the library's outputs are compared with."""
  family = name.partition('/')[0]
  arrays = recorded.arrays('published/outputs')
  if isinstance(model, VLM):
    ids, valid, images = parity_vlm.inputs(family, 'one')
    logits, out = program(model)({'params': params}, ids, valid, images)
    return logits[out['sequence'].valid]
  if isinstance(model, LM):
    return program(model)({'params': params}, arrays['ids'])[0]
  tower = model.image if isinstance(model, Clip) else model
  own = params['image'] if isinstance(model, Clip) else params
  if size:
    own = checkpoints.resize_positions(own, tower, image_size=tuple(size))
    tower = tower.clone(image_size=tuple(size))
  shape = 'x'.join(map(str, (tower.channels, *tower.input_shape[:2])))
  images = np.moveaxis(arrays[f'images/{shape}'], 1, -1)
  if not isinstance(model, Clip):
    return program(tower)({'params': own}, images)[0]
  logits, out = program(model.clone(image=tower))(
      {'params': params | {'image': own}}, images, arrays['ids'])
  return np.concatenate([np.ravel(logits), np.ravel(out['image_features']),
                         np.ravel(out['text_features'])])


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in names()])
def test_a_published_config_gives_the_librarys_outputs(name, tmp_path, record_property):
  wanted = recorded.arrays('published/outputs')[name]
  errors = {}
  for version in (version for version in VERSIONS if name in cases(version)):
    case = cases(version)[name]
    model = build(case['given'])
    assert model == build(case['saved']), version
    params = load(model, name, version, tmp_path)
    found = np.asarray(outputs(model, params, name, case['size']))
    errors[version] = float(np.abs(found.reshape(-1) - wanted.reshape(-1)).max())
  record_property('parity', (name, ' '.join(errors), max(errors.values()), max(errors.values())))
  assert max(errors.values()) <= TOLERANCE, errors


def test_every_family_has_five_variants_or_more_and_two_versions():
  families = {}
  for name in names():
    families.setdefault(name.partition('/')[0], []).append(name)
  assert len(families) == 17
  for family, variants in families.items():
    assert len(variants) >= 5, family
    for name in variants:
      assert sum(name in cases(version) for version in VERSIONS) >= 2, name
