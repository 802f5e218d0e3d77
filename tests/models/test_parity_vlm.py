"""Vision-language models against the transformers library, from pixels to generated tokens.

tools/parity/vlm.py wrote tests/fixtures/parity_vlm/: five families, a batch of one row,
and one of three (an image; text alone; two images of different sizes) padded on the left.
"""

import functools

import chex
import jax
import numpy as np
import pytest
from helpers import mostly_long
from helpers.parity_vlm import (
  BATCHES,
  FAMILIES,
  GRID,
  config_of,
  expected,
  inputs,
  model,
  pictures,
  read_order,
)

from models import checkpoints
from models.checkpoints import transformers
from models.checkpoints.vlm_config import from_config

# What enters and leaves each layer is of size 10.
LAYERS, LOGITS = 1e-4, 1e-4


@functools.cache
def outputs(family, batch):
  vlm, params = model(family)
  logits, out = jax.jit(vlm.apply)({'params': params}, *inputs(family, batch))
  return jax.tree.map(np.asarray, (logits, out))


def rows_of(values, valid):
  """Real tokens of all rows, in order."""
  return np.concatenate([own[real] for own, real in zip(values, valid, strict=True)])


@pytest.mark.parametrize(('family', 'batch'), [
    *((family, 'three') for family in FAMILIES), ('llava', 'one'), ('qwen2_5_vl', 'one')])
def test_every_layer_and_the_logits_equal_the_reference(family, batch, record_property):
  found = expected(family, batch)
  logits, out = outputs(family, batch)
  real, sequence = found['mask'] > 0, out['sequence']
  errors = {}
  errors['embeddings'] = np.abs(rows_of(sequence.x, sequence.valid)
                                - rows_of(found['text_embedded'], real)).max()
  hidden = zip(out['hidden'], found['text_hidden'], strict=True)
  errors['layers'] = max(np.abs(rows_of(ours, sequence.valid) - rows_of(theirs, real)).max()
                         for ours, theirs in hidden)
  ends = np.abs(rows_of(logits, sequence.valid) - rows_of(found['logits'], real)).max()
  record_property('parity', (f'{family} {batch}', 'transformers/vlm', float(max(errors.values())),
                             float(ends)))
  assert max(errors.values()) <= LAYERS, errors
  assert ends <= LOGITS


@pytest.mark.parametrize('family', FAMILIES)
def test_every_layer_of_the_tower_equals_the_reference(family):
  found, (_, out) = expected(family, 'three'), outputs(family, 'three')
  tower, images = out['tower'], inputs(family, 'three')[2]
  crops, first = images.pixels.shape[1], 0
  for row, number in enumerate(BATCHES['three']):
    own = pictures(family, found)[sum(BATCHES['three'][:row]):][:number]
    place = row * crops
    for picture in own:
      for _ in range(len(picture.pixels)):
        for layer, hidden in enumerate(tower['hidden']):
          if picture.sizes is None:
            wanted, given = found['tower_hidden'][layer][first], hidden[place]
          else:
            rows, columns = picture.sizes[0]
            window = 4 if family == 'qwen2_5_vl' else 2
            order = [y * GRID[1] + x for y, x in read_order(rows, columns, window)]
            wanted = found['tower_hidden'][layer][first:first + len(order)]
            given = hidden[place][tower['tokens'].owner[place][order]]
          np.testing.assert_allclose(given, wanted, atol=LAYERS)
        first += 1 if picture.sizes is None else rows * columns
        place += 1
  assert first == found['tower_hidden'].shape[1]


@pytest.mark.parametrize('family', ['qwen2_vl', 'qwen2_5_vl'])
def test_positions_of_three_axes_equal_the_reference(family):
  found, (_, out) = expected(family, 'three'), outputs(family, 'three')
  tokens = out['sequence']
  wanted = np.moveaxis(found['axes'], 0, -1)
  np.testing.assert_array_equal(rows_of(tokens.pos[..., 1:], tokens.valid),
                                rows_of(wanted, found['mask'] > 0))


def generated(model, params, prompt, steps):
  """Greedy tokens int[B, steps], and the logits before the first."""
  prefill = jax.jit(functools.partial(model.apply, room=steps, method='prefill'))
  decode = jax.jit(functools.partial(model.apply, method='decode'))
  logits, cache = prefill({'params': params}, *prompt)
  first, found = logits, []
  for step in range(steps):
    found.append(logits.argmax(axis=-1).astype(np.int32))
    if step < steps - 1:
      logits, cache = decode({'params': params}, found[-1], cache)
  return np.stack(found, axis=1), first


@pytest.mark.parametrize('family', mostly_long(FAMILIES))
def test_tokens_are_generated_as_by_the_reference(family):
  """From the sequence on, padded on the right; the reference's is padded on the left."""
  vlm, params = model(family)
  wanted = expected(family, 'three')
  sequence = outputs(family, 'three')[1]['sequence']
  found, logits = generated(vlm.lm, params['lm'], (sequence,), wanted['generated'].shape[1])
  np.testing.assert_allclose(logits, wanted['logits'][:, -1], atol=LOGITS)
  np.testing.assert_array_equal(found, wanted['generated'])


@pytest.mark.long
def test_a_whole_model_reads_and_decodes_padded_on_the_left():
  vlm, params = model('llava')
  wanted = expected('llava', 'three')['generated']
  found, _ = generated(vlm.clone(pad_side='left'), params, inputs('llava', 'three'),
                       wanted.shape[1])
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize('family', FAMILIES)
def test_weights_go_back_bit_for_bit(family, tmp_path):
  vlm, params = model(family)
  layout = 'transformers/vlm4' if 'qwen' in family else 'transformers/vlm4_flat'
  again = tmp_path / 'again.safetensors'
  checkpoints.save(vlm, params, again, layout=layout)
  found = checkpoints.load(vlm, again)
  chex.assert_trees_all_equal(found, params)


@pytest.mark.parametrize('family', FAMILIES)
def test_what_no_shape_shows_is_read_in_the_config(family):
  config = config_of(family)
  vlm = from_config(config, grid=GRID)
  transformers.check_config(vlm, config)
  with pytest.raises(ValueError, match='set heads=2'):
    transformers.check_config(vlm.clone(tower=vlm.tower.clone(heads=1)), config)
  with pytest.raises(ValueError, match='set kv_heads=2'):
    transformers.check_config(vlm.clone(lm=vlm.lm.clone(kv_heads=4)), config)


def test_another_setting_would_show():
  vlm, params = model('qwen2_5_vl')
  _, out = outputs('qwen2_5_vl', 'three')
  other = vlm.clone(tower=vlm.tower.clone(whole_layers=()))
  see = jax.jit(functools.partial(other.apply, method='sequence'))
  tokens, _ = see({'params': params}, *inputs('qwen2_5_vl', 'three'))
  assert np.abs(tokens.x - out['sequence'].x).max() > 30 * LAYERS
