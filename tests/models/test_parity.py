"""Backbones against the reference libraries: every hidden state within 3e-5, outputs within 1e-5.

tools/parity/reference.py wrote tests/fixtures/parity/ with timm and the transformers library;
every parameter of those tiny models is random. Errors are printed as a table when the tests end.
tests/fixtures/published/ holds configs as releases write them: as they were given, as each of three
versions of the transformers library saved them, and what it then computes.
"""

import functools
import json

import jax
import numpy as np
import pytest
from helpers import parity_vlm, recorded
from helpers.parity import CASES, FOLDER, build, case, described, expected, outputs, published
from safetensors.numpy import load_file, save_file

from models import checkpoints
from models.backbones.clip import Clip
from models.backbones.lm import LM
from models.backbones.vlm import VLM

# What enters and leaves each layer is of size 10, outputs are of size 1.
LAYERS, OUTPUTS = 3e-5, 1e-5
# Of logits of size 10, as in the other tests of language models.
LOGITS = 1e-4
QUICK = ('mistral/window', 'vit/other_eps')


def distance(found, wanted):
  """The largest error of all layers, and of all outputs."""
  errors = {key: float(np.abs(value - wanted[key]).max()) for key, value in found.items()}
  inner = {key for key in errors if key.endswith(('hidden', 'embedded'))}
  return tuple(max(errors[key] for key in keys) for keys in (inner, errors.keys() - inner))


def test_the_cases_cover_the_families():
  assert len(CASES) == 16
  for family in ('vit', 'deit', 'mae', 'dinov2', 'swiglu', 'clip', 'siglip', 'siglip2'):
    assert any(family in name for name in CASES), family
  assert sum(file.stat().st_size > 300_000 for file in FOLDER.iterdir()) == 0


@pytest.mark.parametrize('name', CASES)
def test_every_hidden_state_and_output_equals_the_reference(name, record_property):
  wanted = {key: value for key, value in expected(name).items() if key not in ('images', 'ids')}
  found = outputs(name, build(name))
  assert found.keys() == wanted.keys()
  assert all(found[key].shape == value.shape for key, value in wanted.items())
  hidden, ends = distance(found, wanted)
  record_property('parity', (name, case(name)['layout'], hidden, ends))
  assert hidden <= LAYERS
  assert ends <= OUTPUTS


@pytest.mark.parametrize(('name', 'tower', 'settings'), [
    ('hub_siglip', 'image', {'activation': 'gelu'}), ('hub_siglip', 'text', {'activation': 'gelu'}),
    ('hub_clip', 'image', {'activation': 'gelu'}), ('hub_clip', 'text', {'causal': False}),
])
def test_another_setting_would_show(name, tower, settings):
  model = build(name)
  other = model.clone(**{tower: getattr(model, tower).clone(**settings)})
  hidden, ends = distance(outputs(name, other), expected(name))
  assert hidden > 3 * LAYERS
  assert ends > 3 * OUTPUTS


@pytest.mark.parametrize('name', ['hub_clip', 'hub_siglip'])
def test_a_tower_alone_reads_its_part_of_a_pairs_file(name):
  pair = build(name)
  for tower, key, wanted in ((pair.image, 'images', 'image_features'),
                             (pair.text, 'ids', 'text_features')):
    params = checkpoints.load(tower, FOLDER / f'{name}.safetensors')
    features, _ = jax.jit(tower.apply)({'params': params}, expected(name)[key])
    features = features / np.linalg.norm(features, axis=-1, keepdims=True)
    np.testing.assert_allclose(features, expected(name)[wanted], atol=OUTPUTS)


# -- configs as they are published ---------------------------------------------------------------


VERSIONS = ('4.40.2', '4.57.6', '5.24.0')


def libraries_outputs(name):
  """Reads what the versions of the library agree in."""
  return recorded.arrays('published/outputs')[name]


def tolerance(wanted):
  return LOGITS if np.abs(wanted).max() > 3 else OUTPUTS


def variants():
  """Names of all variants, as 'llama/tied_other_eps'."""
  return sorted({name for version in VERSIONS for name in published(version)})


@functools.cache
def program(model):
  return jax.jit(model.apply)


@functools.cache
def weights():
  return load_file(recorded.FIXTURES / 'published' / 'weights.safetensors')


def load_published(model, name, version, folder):
  """Our parameters of the library's tensors, beside the config that it saved."""
  settings = published(version)[name]
  save_file({key: weights()[stored].astype(np.float32)
             for key, stored in settings['tensors'].items()}, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(settings['saved']))
  return checkpoints.load(model, folder)


def published_outputs(model, params, name, size):
  """Returns what the library's outputs are compared with."""
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


def test_what_each_version_saves_is_what_was_published():
  for version in VERSIONS:
    for name, each in published(version).items():
      assert described(each['given']) == described(each['saved']), (version, name)


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.long)
    for name in variants()])
def test_a_published_config_gives_the_librarys_outputs(name, tmp_path, record_property):
  wanted = libraries_outputs(name).reshape(-1)
  versions = [version for version in VERSIONS if name in published(version)]
  errors = []
  for version in versions:
    settings = published(version)[name]
    model = described(settings['given'])
    params = load_published(model, name, version, tmp_path)
    found = np.asarray(published_outputs(model, params, name, settings['size'])).reshape(-1)
    errors.append(float(np.abs(found - wanted).max()))
  record_property('parity', (name, ' '.join(versions), max(errors), max(errors)))
  assert max(errors) <= tolerance(wanted), errors


def test_every_family_has_five_variants_and_two_versions():
  families = {}
  for name in variants():
    families.setdefault(name.partition('/')[0], []).append(name)
  assert len(families) == 17
  for family, names in families.items():
    assert len(names) >= 5, family
    for name in names:
      assert sum(name in published(version) for version in VERSIONS) >= 2, name


def test_what_variants_say_shows_in_the_outputs():
  for name in variants():
    family, _, variant = name.partition('/')
    plain = f'{family}/says_little'
    if variant in ('other_eps', 'window', 'linear', 'counted_from_the_start', 'gelu', 'quick',
                   'windows_of_cells', 'newer_rope', 'older_end'):
      found, other = libraries_outputs(name), libraries_outputs(plain)
      gap = np.abs(found - other).max() if found.shape == other.shape else np.inf
      assert (gap > 3 * tolerance(found)) != (variant == 'older_end'), name
