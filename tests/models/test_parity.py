"""Backbones against the reference libraries: every hidden state within 3e-5, outputs within 1e-5.

tools/make_parity.py wrote tests/fixtures/parity/ with timm and the transformers library;
every parameter of those tiny models is random. Errors are printed as a table when the tests end.
"""


import jax
import numpy as np
import pytest
from helpers.parity import CASES, FOLDER, build, case, expected, outputs

from models import checkpoints

# What enters and leaves each layer is of size 10, outputs are of size 1.
LAYERS, OUTPUTS = 3e-5, 1e-5


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
