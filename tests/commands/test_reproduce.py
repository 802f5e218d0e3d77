"""Published rows: costs as printed, or why not; what a row lacks; accuracies of a real file."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from configs import reproduce as published_rows
from lib.cost import jaxpr as jaxpr_cost
from lib.cost import vit as vit_cost
from lib.data import images as image_data
from lib.data.prepare import prepare
from lib.report.rows import read_jsonl
from models import checkpoints
from models.backbones.vit import ViT
from models.compressors import COMPRESSORS
from tools import reproduce

ROWS = dict(reproduce.rows())
ROOT = pathlib.Path(__file__).parents[2]
TINY = {'variant': 'Ti/8', 'width': 16, 'depth': 2, 'heads': 2, 'mlp': 24, 'image_size': 32,
        'channels': 1, 'num_classes': 10}
DIGITS = {'name': 'digits', 'image_size': 32, 'channels': 1, 'mean': (0.5,), 'std': (0.5,),
          'test_split': 'test[:50]', 'batch_size': 32, 'test_crop': 1.0}
ROW = 'tome_vit_s16_r13'


@pytest.mark.parametrize('name', ROWS)
def test_costs_are_as_published_or_say_why_not(name):
  config, found = ROWS[name], reproduce.figures(ROWS[name])
  assert found
  for figure in found:
    # A mismatch that has gone away is as wrong as one that is not told.
    assert figure.agrees == (not figure.mismatch), figure
    assert not figure.mismatch or f'ours {figure.ours:.3f} ' in figure.mismatch, figure
  assert 50 < config.expected.top1 < config.expected.get('unreduced_top1', 90)
  assert config.expected.source


@pytest.mark.parametrize(('row', 'message'), [
    ('tome_deit_s16_r14', r"'tome_deit_s16_r14' is unknown \(did you mean 'tome_deit_s16_r1.'\?\)"
                          ': choose one of deit_s16, deit_ti16, '),
    ('', r'^name a row of configs/reproduce\.py, as --config=.*: there are deit_s16, deit_ti16, ')])
def test_rows_that_are_not_there(row, message):
  with pytest.raises(ValueError, match=message):
    published_rows.get_config(row)


def test_no_two_rows_are_one():
  assert len({config.model.to_json() + config.reduce.to_json_best_effort() + str(config.needs)
              for config in ROWS.values()}) == len(ROWS)


def test_agreement_is_one_per_cent_or_the_printed_digits():
  assert reproduce.Figure('GMACs', 2.7, 2.726, '').agrees
  assert reproduce.Figure('GMACs', 0.9, 0.9499, '').agrees
  assert not reproduce.Figure('GMACs', 0.9, 0.951, '').agrees
  assert not reproduce.Figure('GMACs', 11.4, 11.52, '').agrees
  assert reproduce.Figure('speedup', 2.0, 1.885, '').agrees
  assert not reproduce.Figure('speedup', 2.0, 1.875, '').agrees


@pytest.mark.long
def test_dynamicvits_predictors_are_what_is_said_to_be_missing():
  config = ROWS['dynamicvit_deit_b16_k70']
  products = jaxpr_cost.of_vit(reproduce.model(config)).macs['reduction'] / 1e9
  assert f'take {products:.3f}' in config.expected.mismatch
  ours = vit_cost.of(reproduce.model(config)).macs / 1e9
  assert ours + products == pytest.approx(config.expected.gmacs, rel=0.01)


def small(folder, **more):
  """A row for digits and a tiny model, and that model."""
  config = ROWS[ROW].copy_and_resolve_references()
  config.unlock()
  config.model.update(TINY | {'weights': str(folder / 'tiny.safetensors')})
  config.data.update(DIGITS | {'data_dir': str(folder)})
  config.reduce.vision.remove = 7
  config.expected.update(more)
  return config, ViT(width=16, depth=2, heads=2, mlp=24, patch=8, image_size=32, channels=1,
                     num_classes=10)


def test_what_a_row_lacks_is_said(tmp_path):
  config = ROWS[ROW].copy_and_resolve_references()
  config.data.data_dir, config.model.weights = str(tmp_path), str(tmp_path / 'w.safetensors')
  file, prepared = reproduce.missing(ROW, config, tmp_path)
  assert file.startswith(f'weights {config.needs.weights} (timm/vit_small_patch16_224.')
  assert f'put the file at {tmp_path}/w.safetensors, or name it with --config.model.we' in file
  assert f'python -m tools.prepare --name=imagenet2012 --data_dir={tmp_path}' in prepared
  text = reproduce.describe(ROW, config, tmp_path)
  assert text.splitlines()[1:3] == ['  speedup: published 1.641, ours 1.702, agrees',
                                    '  top-1: published 79.3 %, not measured']
  assert [line[:13] for line in text.splitlines()[3:]] == ['    missing: '] * 2
  assert not (tmp_path / 'rows.jsonl').exists()
  (tmp_path / 'w.safetensors').touch()
  assert len(reproduce.missing(ROW, config, tmp_path)) == 1


def test_methods_with_parameters_of_their_own_have_only_costs(tmp_path):
  learned = [name for name, config in ROWS.items() if config.reduce.vision.method in COMPRESSORS]
  assert learned
  for name in learned:
    assert 'trained parameters of' in reproduce.missing(name, ROWS[name], tmp_path)[0]


@pytest.mark.long
def test_accuracies_are_those_of_the_file(tmp_path):
  """From the command line, on a checkpoint in timm's layout; again without measuring."""
  config, vit = small(tmp_path)
  params = jax.jit(vit.init)(jax.random.key(1), jnp.zeros((1, 32, 32, 1)))['params']
  # Weights that make what the reduction does show.
  params['stack'] = jax.tree.map(lambda leaf: 5 * leaf, params['stack'])
  params['head']['kernel'] = jax.random.normal(jax.random.key(1), (16, 10))
  checkpoints.save(vit, params, tmp_path / 'tiny.safetensors', layout='timm')
  # A config file may start from a row and change what it likes.
  (tmp_path / 'mine.py').write_text(
      f'from configs import reproduce\n\n\ndef get_config():\n'
      f'  config = reproduce.get_config({ROW!r})\n  config.model.update({dict(config.model)!r})\n'
      f'  config.data.update({dict(config.data)!r})\n  return config\n')
  prepare('digits', data_dir=str(tmp_path))
  done = subprocess.run(
      [sys.executable, '-m', 'tools.reproduce', f'--config={tmp_path}/mine.py',
       f'--workdir={tmp_path}', '--config.reduce.vision.remove=7'],
      cwd=ROOT, text=True, capture_output=True, check=False, timeout=120)
  assert done.returncode == 0, done.stderr
  row, = read_jsonl(tmp_path / 'rows.jsonl')
  batches = list(image_data.eval_batches(config.data))
  for key, made in (('top1', reproduce.model(config)), ('unreduced_top1', vit)):
    right = sum(float(((made.apply({'params': params}, jnp.asarray(batch['image']))[0].argmax(-1)
                        == batch['label']) * batch['mask']).sum()) for batch in batches)
    assert row[key] == pytest.approx(100 * right / 50)
    printed = config.expected[key]
    said = f'  {key}: published {printed} %, measured {row[key]:.2f} % ({row[key] - printed:+.2f})'
    assert said in done.stdout.splitlines()
  assert row['top1'] != row['unreduced_top1']


def test_rows_are_measured_once(tmp_path, monkeypatch):
  config, _ = small(tmp_path)
  calls = []
  monkeypatch.setattr(reproduce, 'missing', lambda *unused: [])
  monkeypatch.setattr(reproduce, 'accuracies', lambda *unused: calls.append(0) or {'top1': 50.0})
  params = {'head': jnp.zeros(2)}
  monkeypatch.setattr(reproduce.image_sweep, 'load', lambda *unused: (0, params))
  first, second = (reproduce.describe(ROW, config, tmp_path) for _ in range(2))
  assert first == second
  assert len(calls) == 1
  config.reduce.vision.remove = 6
  reproduce.describe(ROW, config, tmp_path)
  assert len(calls) == 2
  # Other weights under the same name.
  params['head'] = jnp.ones(2)
  reproduce.describe(ROW, config, tmp_path)
  assert len(calls) == 3


def test_configs_that_are_no_rows_are_worded_errors(tmp_path):
  config, _ = small(tmp_path)
  del config['expected']
  with pytest.raises(ValueError, match=r'give a row of configs/reproduce\.py, as --config='):
    reproduce.describe('mine', config, tmp_path)
