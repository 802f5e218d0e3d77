"""BERT against the transformers library, and reductions in it."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_long, recorded

from models import checkpoints
from models.backbones.bert import Bert
from models.checkpoints.bert_config import from_config
from models.plan import make_plan, methods

FOLDER = pathlib.Path(__file__).parents[1] / 'fixtures' / 'parity' / 'bert'
CONFIG = json.loads((FOLDER / 'bert.json').read_text())
LENGTHS = (12, 7, 4)


@functools.cache
def model():
  return from_config(CONFIG, capture=True)


@functools.cache
def params():
  return checkpoints.load(model(), FOLDER / 'bert.safetensors')


@functools.cache
def reading(bert):
  return jax.jit(lambda params, ids, valid: bert.apply({'params': params}, ids, valid))


def read(bert, rows=slice(None), length=12, masked=True):
  wanted = recorded.arrays('parity/bert/bert')
  ids, valid = (wanted[name][rows, :length] for name in ('ids', 'valid'))
  return reading(bert)(params(), ids.astype(np.int32), valid if masked else None)


def test_every_hidden_state_equals_the_reference():
  wanted = recorded.arrays('parity/bert/bert')
  pooled, out = read(model())
  real = wanted['valid']
  np.testing.assert_allclose(out['embedded'][real], wanted['embedded'][real], atol=1e-5)
  for found, hidden in zip(out['hidden'], wanted['hidden'], strict=True):
    np.testing.assert_allclose(found[real], hidden[real], atol=1e-5)
  mean = [hidden[row].mean(axis=0) for hidden, row in zip(wanted['hidden'][-1], real, strict=True)]
  np.testing.assert_allclose(pooled, mean, atol=1e-5)


def test_parameters_are_written_as_they_were_read(tmp_path):
  checkpoints.save(model(), params(), tmp_path / 'again.safetensors', layout='transformers/bert')
  again = checkpoints.load(model(), tmp_path / 'again.safetensors')
  jax.tree.map(np.testing.assert_array_equal, params(), again)


@pytest.mark.parametrize(('config', 'message'), [
    ({'position_embedding_type': 'relative_key'}, "position_embedding_type='relative_key'"),
    ({'hidden_act': 'relu'}, "hidden_act='relu'"), ({'relative_heads': 1}, 'relative_heads=1'),
    ({'num_attention_heads': 5}, 'num_attention_heads')], ids=lambda value: '')
def test_what_is_not_read_is_refused_in_a_line(config, message):
  with pytest.raises(ValueError, match=message) as caught:
    from_config(CONFIG | config)
  assert '\n' not in str(caught.value)


def test_a_checkpoint_of_other_heads_is_refused(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
  (tmp_path / 'model.safetensors').write_bytes((FOLDER / 'bert.safetensors').read_bytes())
  with pytest.raises(ValueError, match='heads'):
    checkpoints.load(model().clone(heads=4), tmp_path)


def planned(config, length=12):
  return model().clone(plan=make_plan(config, model().host(length)))


@pytest.mark.long
@pytest.mark.parametrize('config', [
    {'method': 'tome', 'layers': (0, 1), 'keep_ratio': 0.7},
    {'method': 'topk', 'layers': 1, 'keep_ratio': 0.6, 'site': 'before'},
    {'method': 'random', 'layers': 0, 'keep_ratio': 0.5, 'site': 'inside'},
    {'method': 'random', 'layers': 1, 'keep_ratio': 0.5, 'site': 'branch', 'parts': 'both'},
    {'method': 'stride', 'layers': 0, 'keep_ratio': 0.5, 'site': 'before', 'expand': 0}],
    ids=['tome', 'topk', 'inside', 'branch', 'expand'])
def test_a_row_of_a_batch_equals_the_row_alone(config):
  together, out = read(planned(config))
  for row, length in enumerate(LENGTHS):
    alone, own = read(planned(config, length), slice(row, row + 1), length, masked=False)
    np.testing.assert_allclose(together[row], alone[0], atol=1e-5)
    kept = np.asarray(out['tokens'].real[row])
    np.testing.assert_array_equal(np.sort(np.asarray(out['tokens'].pos[row])[kept]),
                                  np.sort(np.asarray(own['tokens'].pos[0])))
    # [CLS] and [SEP] stay.
    assert {0, length - 1} <= set(np.asarray(out['tokens'].pos[row])[kept].tolist())


def test_a_token_that_skips_a_layer_stays_as_it_is():
  _, out = read(planned({'method': 'random', 'layers': 1, 'keep_ratio': 0.5, 'site': 'branch',
                         'parts': 'both'}))
  before, after = np.asarray(out['hidden'])
  same = (np.abs(after[0] - before[0]) < 1e-6).all(axis=1)
  assert same.sum() == 5


def test_the_mean_counts_every_token():
  """Of what was merged as often as it stands for tokens."""
  _, out = read(planned({'method': 'tome', 'layers': 1, 'keep_ratio': 0.6, 'site': 'after'}))
  x, sizes = np.asarray(out['tokens'].x), np.asarray(out['tokens'].sizes)
  pooled, plain = read(planned({'method': 'tome', 'layers': 1, 'keep_ratio': 0.6, 'site': 'after'})
                       )[0], read(model())[0]
  np.testing.assert_allclose(sizes.sum(axis=1), LENGTHS)
  np.testing.assert_allclose(pooled, (x * sizes[:, :, None]).sum(1) / sizes.sum(1)[:, None],
                             atol=1e-5)
  # After the last layer merging changes no mean.
  np.testing.assert_allclose(pooled, plain, atol=1e-5)


@pytest.mark.parametrize('name', mostly_long(
    sorted(set(methods(model().host(12))) - {'none'}), short=6))
def test_every_method_that_it_hosts_runs(name):
  args = {'visionzip': {'contextual': 2}, 'duet_zip': {'contextual': 2, 'width': 2}}.get(name, {})
  bert = planned({'method': name, 'layers': 1, 'remove': 2, 'args': args})
  ids = jax.ShapeDtypeStruct((2, 12), jnp.int32)
  shapes = jax.eval_shape(bert.init, jax.random.key(0), ids)
  pooled, out = jax.eval_shape(bert.apply, shapes, ids)
  assert (pooled.shape, out['tokens'].slots) == ((2, 32), 10)


def test_ids_that_do_not_fit_are_refused():
  bert = Bert(width=16, depth=1, mlp=16, heads=2, vocabulary=9, context=8)
  with pytest.raises(ValueError, match='shorten the text'):
    bert.init(jax.random.key(0), jnp.zeros((1, 9), jnp.int32))
