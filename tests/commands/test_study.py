"""The study: rows are made once, its comparison is by hand, its config resolves."""

import json

import chex
import jax
import numpy as np
import pytest

from configs import digits_study
from lib.tasks import image_sweep
from models.build import build
from tools import study


def small(tmp_path):
  config = digits_study.get_config()
  config.model.update(width=16, depth=2, heads=2, mlp=16, image_size=16)
  config.data.update(image_size=16, batch_size=16, data_dir=str(tmp_path / 'data'))
  config.update(total_steps=2, eval_steps=2, checkpoint_steps=2)
  config.optimizer.warmup_steps = 1
  config.study.update(
      results=str(tmp_path / 'results' / 'small'), seeds=(0, 1), methods=('random',), lower=(),
      budgets=({'budget': '50 %', 'layers': (1,), 'keep': (8,)},), resolutions=(),
      recipes=({'name': 'impossible', 'method': 'tome', 'budget': '50 %',
                'anneal': {'start_step': 5, 'stop_step': 5, 'phases': 1}},))
  config.study.tune.update(total_steps=2, batch_size=16, warmup_steps=1)
  return config


@pytest.mark.long
def test_rows_are_made_once_and_a_cut_off_study_goes_on(tmp_path, monkeypatch, capsys):
  config, path = small(tmp_path), tmp_path / 'results' / 'small.jsonl'
  init = jax.jit(build(config.model).init)
  images = np.zeros((1, 16, 16, 1), np.float32)
  monkeypatch.setattr(study, 'unreduced', lambda config, workdir, seed, mesh: init(
      jax.random.key(seed), images)['params'])
  study.study(config, tmp_path / 'runs')
  lines = path.read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [(row['method'], row['seed'], row['steps']) for row in rows] == [
      (name, seed, steps) for name, steps in (
          ('none', 0), ('random', 0), ('none', 2), ('random', 2), ('impossible', 2))
      for seed in (0, 1)]
  good, bad = rows[:-2], rows[-2:]
  assert all(0 <= row['accuracy'] <= 1 and row['nll'] > 0 and row['gmacs'] > 0 for row in good)
  assert [row['tokens_left'] for row in good] == [17, 17, 9, 9] * 2
  assert all('phases=1 must be' in row['note'] for row in bad)
  # Seeds are other models, and training changes them; a head of zeros gives all classes the same.
  assert all(row['nll'] == pytest.approx(np.log(10)) for row in good[:4])
  assert len({row['nll'] for row in good[4:]}) == 4

  made = []
  compiled = image_sweep.compiled
  monkeypatch.setattr(image_sweep, 'compiled', lambda *args: made.append(1) or compiled(*args))
  path.write_text('\n'.join(lines[:2] + lines[3:]) + '\n')
  study.study(config, tmp_path / 'runs')
  again = [json.loads(line) for line in path.read_text().splitlines()]
  assert len(made) == 1
  assert again[:-1] == [json.loads(line) for line in lines[:2] + lines[3:]]
  volatile = ('seconds', 'date')
  assert ({name: value for name, value in again[-1].items() if name not in volatile}
          == {name: value for name, value in rows[2].items() if name not in volatile})
  assert path.with_suffix('.png').stat().st_size > 10_000
  assert '## What could not be measured' in path.with_suffix('.md').read_text()
  assert 'made of 10 rows' in capsys.readouterr().out


def row(method, seed, gmacs, nll, *, budget='50 %', steps=0, layers='(1, 2)', **others):
  return {'method': method, 'budget': budget, 'seed': seed, 'steps': steps, 'gmacs': gmacs,
          'nll': nll, 'accuracy': 1 - nll / 10, 'tokens_left': 33.0, 'layers': layers,
          'keep': '', 'note': '', 'seconds': 1.0, 'cpu': 'a cpu', 'cores': 1, 'jax': '1',
          'date': 'today', **others}


ROWS = [
    *(row('none', seed, 4.0, 1.0 + seed, budget='100 %', layers='all') for seed in (0, 1)),
    *(row('random', seed, 2.0, 3.0 + seed) for seed in (0, 1)),
    # At 3.0 random is halfway between 3 and 1: 2, and 3 with the other seed.
    row('good', 0, 3.0, 1.5), row('good', 1, 3.0, 2.9),
    row('bad', 0, 2.0, 3.5), row('bad', 1, 2.0, 4.5),
    row('mixed', 0, 2.0, 2.5), row('mixed', 1, 2.0, 4.5),
    row('cheap', 0, 1.0, 9.0), row('cheap', 1, 1.0, 9.0),
    # Another training: not the same curve.
    row('good', 0, 3.0, 0.5, steps=60),
    {name: value for name, value in row('lost', 0, 0.0, 0.0, note='why not').items()
     if name not in ('gmacs', 'nll', 'accuracy', 'tokens_left')},
]


def test_differences_are_taken_at_equal_cost_seed_by_seed():
  found = {(made['method'], made['steps']): made
           for made in study.summaries(ROWS, reference='random', score='accuracy')}
  good = found['good', 0]
  np.testing.assert_allclose(good['nll_apart'], [-0.5, -0.1])
  np.testing.assert_allclose(good['accuracy_apart'], [0.05, 0.01])
  assert (good['nll'], good['nll_sd']) == (2.2, pytest.approx(0.98995, abs=1e-5))
  verdicts = {key: study.verdict(made, 'random') for key, made in found.items()}
  assert verdicts == {
      ('none', 0): '', ('random', 0): '', ('good', 0): 'better in every seed',
      ('bad', 0): 'worse in every seed', ('mixed', 0): 'better in 1 of 2 seeds',
      ('cheap', 0): "outside random's costs", ('good', 60): "outside random's costs",
      ('lost', 0): ''}


def test_the_report_ranks_by_cross_entropy_and_names_failures():
  config = digits_study.get_config()
  found = study.text(ROWS, config)
  places = [found.index(f'| {name} ') for name in ('good', 'mixed', 'bad', 'cheap')]
  assert places == sorted(places)
  assert '-0.300 ± 0.283 | better in every seed' in ' '.join(found.split())
  assert '- `lost`, 50 %: why not' in found
  assert '*random*' in found


def test_cross_entropy():
  logits = np.array([[0.0, 0.0], [np.log(3), 0.0]], np.float32)
  assert study.nll(logits, np.array([1, 0])) == pytest.approx((np.log(2) + np.log(4 / 3)) / 2)


def test_the_config_resolves():
  """Every entry is another measurement, and says what it trains."""
  config = digits_study.get_config()
  found = list(study.entries(config))
  keys = [tuple(entry.head(0).values()) for entry in found]
  assert len(set(keys)) == len(keys)
  assert sum(entry.training is not None for entry in found) > 30
  by_name = {(entry.name, entry.budget): entry for entry in found if entry.training}
  dropped = by_name['patch_dropout, then random', '50 %']
  assert dropped.training.model.training_patches == 32
  assert dropped.training.reduce.vision.method == 'none'
  assert dropped.config.reduce.vision.keep == (45, 32)
  assert dropped.config.model.get('training_patches', 0) == 0
  small = by_name['resolution', '50 %']
  vit = build(small.config.model)
  params = jax.eval_shape(vit.init, jax.random.key(0), np.zeros((1, 24, 24, 1), np.float32))
  whole = build(config.model)
  chex.assert_trees_all_equal_shapes(params, jax.eval_shape(
      whole.init, jax.random.key(0), np.zeros((1, 32, 32, 1), np.float32)))
