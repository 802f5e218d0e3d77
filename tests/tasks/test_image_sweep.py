"""The sweep over models of images, compared with a baseline: statistics by hand, rows made once."""

import contextlib
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import eval as evaluation
from configs import digits_sweep
from lib.report import intervals, measuring, plots, tables
from lib.report.rows import read_jsonl
from lib.runtime import launch, sharding
from lib.tasks import image_metrics, image_sweep
from lib.tasks.sweep import fingerprint
from models.build import build

# -- statistics ----------------------------------------------------------------------------------


def test_wilson_is_the_root_of_its_equation():
  """At both ends the observed share is z standard errors away, the error being that of the end."""
  low, high = intervals.wilson(350, 359)
  for end in (low, high):
    assert (350 / 359 - end) ** 2 == pytest.approx(1.959964 ** 2 * end * (1 - end) / 359, rel=1e-5)
  assert low < 350 / 359 < high
  assert intervals.wilson(10, 10)[1] == 1
  assert intervals.wilson(10, 10)[0] == pytest.approx(10 / (10 + 1.959964 ** 2), rel=1e-6)


def test_one_draw_is_the_paired_t_test():
  random = np.random.default_rng(0)
  own, other = random.normal(0.1, 1, (2, 40))
  low, high = intervals.paired(own, other[None]).interval(0.95)
  theirs = scipy.stats.ttest_rel(own, other).confidence_interval(0.95)
  np.testing.assert_allclose((low, high), theirs, rtol=1e-12)


def test_draws_add_their_own_variance():
  own = np.array([1.0, 2.0, 4.0])
  draws = np.array([[0.0, 1.0, 2.0], [2.0, 2.0, 5.0]])
  found = intervals.paired(own, draws)
  # Means of the draws: 1, 1.5, 3.5 by image, 1 and 3 by draw.
  differences = [0.0, 0.5, 0.5]
  images, of_draws = np.var(differences, ddof=1) / 3, np.var([1.0, 3.0], ddof=1) / 2
  assert found.mean == pytest.approx(1 / 3)
  assert found.error == pytest.approx(np.sqrt(images + of_draws))
  assert found.freedom == pytest.approx(
      (images + of_draws) ** 2 / (images ** 2 / 2 + of_draws ** 2 / 1))
  assert found.error > intervals.paired(own, draws.mean(0, keepdims=True)).error
  with pytest.raises(ValueError, match='do not pair'):
    intervals.paired(own, draws[:, :2])


def test_no_difference_has_no_width():
  same = intervals.paired(np.arange(4.0), np.arange(4.0)[None])
  assert same.interval(0.99) == (0, 0)


def compared(method, difference, *, error=0.01, budget='0.5'):
  return {'method': method, 'budget': budget, 'nll_difference': difference, 'nll_error': error,
          'nll_freedom': 1e9}


def test_a_verdict_stands_only_beyond_the_interval_of_all_comparisons():
  # Two comparisons at 95 % together: 2.2414 standard errors instead of 1.96.
  rows = [{'method': 'none'}, compared('a', 0.0223), compared('b', -0.0225)]
  none, a, b = intervals.judge(rows)
  assert none == {'method': 'none'}
  assert (a['verdict'], b['verdict']) == ('', intervals.BETTER)
  assert (b['nll_low'], b['nll_high']) == pytest.approx((-0.044914, -0.000086), abs=1e-6)
  alone, = intervals.judge([compared('a', 0.0223)])
  assert alone['verdict'] == intervals.WORSE


def test_cross_entropies_are_of_images():
  random = np.random.default_rng(0)
  logits, labels = random.normal(size=(3, 2, 2, 4)), random.integers(0, 4, (3, 2, 2))
  logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  wanted = -np.take_along_axis(logs, labels[..., None], -1).mean(axis=(1, 2, 3))
  found = image_metrics.cross_entropies(jnp.asarray(logits), jnp.asarray(labels))
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  one = image_metrics.cross_entropies(jnp.asarray(logits[:, 0, 0]), jnp.asarray(labels[:, 0, 0]))
  np.testing.assert_allclose(one, -np.take_along_axis(
      logs[:, 0, 0], labels[:, 0, 0, None], -1)[:, 0], rtol=1e-5)


# -- what is shown -------------------------------------------------------------------------------


def test_a_table_shows_intervals_where_there_are_some():
  rows = [{'accuracy': 0.5, 'accuracy_low': 0.4, 'accuracy_high': 0.61, 'nll_difference': 0.02,
           'nll_low': -0.01, 'nll_high': 0.05}, {'accuracy': 0.25}]
  lines = tables.table(rows, ('accuracy', 'nll_difference')).splitlines()
  assert lines[2].split('  ') == ['50.00 [40.0, 61.0]', '+0.020 [-0.010, +0.050]']
  assert lines[3].split() == ['25.00', '-']


def test_differences_are_drawn_and_nothing_is_refused(tmp_path):
  rows = intervals.judge([compared('a', -0.1), compared('b', 0.5, budget='0.2'),
                          compared('a', 0.001, budget='0.2')])
  path = plots.plot_differences(list(rows), tmp_path / 'x.png', title='a title', baseline='random')
  assert path.stat().st_size > 10_000
  with pytest.raises(ValueError, match='nothing to draw'):
    plots.plot_differences([], tmp_path / 'x.png')


# -- the sweep -----------------------------------------------------------------------------------


@functools.cache
def params_of(vit):
  params = jax.jit(vit.init)(jax.random.key(0), np.zeros((1, 16, 16, 1)))['params']
  # A head of zeros would give every image the same loss.
  kernel = jax.random.normal(jax.random.key(1), params['head']['kernel'].shape)
  return params | {'head': params['head'] | {'kernel': kernel}}


@pytest.fixture
def config(tmp_path, monkeypatch):
  config = digits_sweep.get_config()
  config.model.update(width=16, depth=2, heads=2, mlp=16, image_size=16)
  config.data.update(image_size=16, batch_size=16, data_dir=str(tmp_path / 'data'),
                     test_split='test[:40]')
  config.sweep.update(methods=('random', 'topk'), budgets=(0.8, 0.6), layers=(0,), rounds=1,
                      pictured=(), baseline_draws=2)
  params = params_of(build(config.model))
  monkeypatch.setattr(image_sweep, 'load', lambda *_: (7, params))
  monkeypatch.setattr(image_sweep.ImageSweep, '_draw', lambda *_: None)
  return config


DRAW = image_sweep.ImageSweep._draw


def sweep_of(config, tmp_path):
  return image_sweep.ImageSweep(config, tmp_path, sharding.make_mesh({'data': 1}))


@pytest.fixture
def identities(config, tmp_path, monkeypatch):
  """The identities of a sweep's rows with other settings; images are not needed for them."""
  monkeypatch.setattr(image_sweep.image_data, 'eval_batches', lambda *_, **__: [])

  def call(**settings):
    other = config.copy_and_resolve_references()
    with other.unlocked():
      other.update_from_flattened_dict(settings)
    rows = list(sweep_of(other, tmp_path).rows())
    return [measuring.identity(row, tuple(rows[0])) for row in rows]

  return call


@pytest.mark.long
def test_rows_are_known_by_all_that_makes_them(identities):
  before = identities()
  assert len(set(before)) == 5
  for settings in (
      {'model.image_size': 32, 'data.image_size': 32}, {'data.test_split': 'test[:20]'},
      {'data.name': 'digit_segments'}, {'data.test_crop': 0.9}, {'data.filter': 'bicubic'},
      {'data.mean': (0.4,)}, {'data.batch_size': 8}, {'model.dtype': 'bfloat16'},
      {'model.heads': 1}, {'model.pool': 'mean'}, {'seed': 1}, {'sweep.layers': (1,)},
      {'sweep.budget': 'keep_ratio'}, {'sweep.baseline_draws': 3},
      {'sweep.overrides': {'random': {'args': {'seed': 3}}}}):
    assert not set(before) & set(identities(**settings)), settings
  # An override of another method than the baseline makes other rows of that method alone.
  after = identities(**{'sweep.overrides': {'topk': {'args': {'by': 'cls'}}}})
  assert [one == other for one, other in zip(before, after, strict=True)] == [
      True, True, True, False, False]


def test_rows_stay_what_they_are_with_settings_that_do_not_make_them(identities):
  before = identities()
  for settings in (
      {'sweep.rounds': 9}, {'sweep.title': 'x'}, {'data.threads': 9},
      {'data.data_dir': '/elsewhere'}, {'model.remat': 'full'}, {'optimizer.peak_lr': 1.0},
      {'data.train_split': 'train[:10]'}, {'sweep.pictured': ('topk',)},
      {'sweep.overrides': {'tome': {'args': {'by': 'key'}}}}):
    assert identities(**settings) == before, settings


def test_rows_are_of_their_weights(identities, monkeypatch):
  before, (_, params) = identities(), image_sweep.load()
  kernel = np.array(params['head']['kernel'])
  for place in ((0, 0), (3, 1)):
    other = kernel.copy()
    other[place] = np.nextafter(other[place], np.float32(9))
    changed = params | {'head': params['head'] | {'kernel': other}}
    monkeypatch.setattr(image_sweep, 'load', lambda *_, changed=changed: (7, changed))
    assert not set(before) & set(identities())


def test_a_fingerprint_is_of_names_shapes_types_and_values_in_their_order():
  rows = np.arange(32, dtype=np.float32).reshape(8, 4)
  found = {fingerprint({name: array}) for name, array in (
      ('a', rows), ('b', rows), ('a', rows[::-1]), ('a', rows.T), ('a', rows.reshape(4, 8)),
      ('a', rows.astype(jnp.bfloat16)), ('a', rows.view(np.int32)))}
  assert len(found) == 7
  assert fingerprint({'a': jnp.asarray(rows)}) == fingerprint({'a': rows.copy()})


def test_no_pictures_are_no_error(config, tmp_path, capsys, monkeypatch):
  batch = {'image': np.zeros((16, 16, 16, 1), np.float32), 'label': np.zeros(16, np.int32)}
  monkeypatch.setattr(image_sweep.image_data, 'eval_batches', lambda *_, **__: [batch])
  for settings, printed in (
      ({'pictured': ()}, ''), ({'pictured': ('topk',), 'pictured_images': 0}, ''),
      ({'pictured': ('topk',), 'pictured_images': 4, 'budgets': ()}, ''),
      ({'pictured': ('tome',), 'budgets': (0.01,)}, 'no picture of tome: ')):
    config.sweep.update(settings)
    DRAW(sweep_of(config, tmp_path), tmp_path / 'overlays')
    assert capsys.readouterr().out.startswith(printed)
    assert not (tmp_path / 'overlays').exists()


VOLATILE = ('date', 'median_ms', 'low_ms', 'high_ms', 'speedup', 'speedup_low', 'speedup_high',
            'compile_s')


@pytest.mark.long
def test_a_resumed_sweep_is_the_same(config, tmp_path, monkeypatch, capsys):
  """Whether the baseline's own row is known or missing, and only what is missing is measured."""
  monkeypatch.setattr(launch, 'start', lambda: contextlib.nullcontext(True))
  monkeypatch.setattr(launch, 'CONFIG', type('Flag', (), {'value': config}))
  monkeypatch.setattr(launch, 'WORKDIR', type('Flag', (), {'value': str(tmp_path)}))
  evaluation.main([])
  path = tmp_path / 'sweep.jsonl'
  lines = path.read_text().splitlines()
  whole = [json.loads(line) for line in lines]
  assert [row['method'] for row in whole] == ['none', 'random', 'random', 'topk', 'topk']
  for lost in ([1], [3], [0, 2, 4]):
    path.write_text('\n'.join(line for i, line in enumerate(lines) if i not in lost) + '\n')
    measured = []
    measure = image_sweep.ImageSweep.measure
    with monkeypatch.context() as patch:
      patch.setattr(image_sweep.ImageSweep, 'measure',
                    lambda self, row: measured.append(row) or measure(self, row))
      evaluation.main([])
    again = read_jsonl(path)
    assert len(measured) == len(lost)
    for made, number in zip(again[-len(lost):], lost, strict=True):
      assert all(made[key] == value for key, value in whole[number].items() if key not in VOLATILE)
  printed = capsys.readouterr().out
  assert 'On 40 test images' in printed
  assert 'all 2 comparisons' in printed
  assert (tmp_path / 'nll_difference.png').exists()


@pytest.mark.long
def test_rows_compare_with_the_mean_of_the_draws(config, tmp_path):
  sweep = sweep_of(config, tmp_path)
  rows = [row | sweep.measure(row) for row in sweep.rows()]
  none, random, _, topk, _ = rows
  vit = build(config.model, {'method': 'topk', 'layers': (0,), 'flops_ratio': 0.8},
              macs=image_sweep.vit_cost.solver)
  images = np.concatenate([batch['image'][batch['mask'] > 0] for batch, _ in sweep.batches])
  labels = np.concatenate([batch['label'][batch['mask'] > 0] for batch, _ in sweep.batches])
  own = image_metrics.cross_entropies(vit.apply({'params': sweep.params}, images)[0], labels)
  draws = np.stack([image_metrics.cross_entropies(build(
      config.model, {'method': 'random', 'layers': (0,), 'flops_ratio': 0.8,
                     'args': {'seed': seed}},
      macs=image_sweep.vit_cost.solver).apply({'params': sweep.params}, images)[0], labels)
      for seed in (0, 1)])
  assert len(images) == topk['images'] == 40
  assert (draws[0] != draws[1]).any()
  assert topk['nll'] == pytest.approx(float(own.mean()), rel=1e-5)
  assert random['nll'] == pytest.approx(float(draws.mean()), rel=1e-5)
  assert topk['nll_difference'] == pytest.approx(float((own - draws.mean(0)).mean()), abs=1e-5)
  assert topk['nll_error'] == pytest.approx(intervals.paired(own, draws).error, rel=1e-3)
  assert 'nll_difference' not in none.keys() | random.keys()


def test_without_a_baseline_rows_have_the_keys_that_they_had(config, tmp_path):
  with config.unlocked():
    del config.sweep.baseline, config.sweep.baseline_draws
  sweep = sweep_of(config, tmp_path)
  row = next(iter(sweep.rows()))
  assert list(row) == ['step', 'form', 'layers', 'way', 'method', 'budget', 'made_of']
  assert list(sweep.measure(row)) == [
      'accuracy', 'tokens', 'kept_mean', 'gmacs', 'gmacs_ratio', 'batch', 'dtype', 'median_ms',
      'low_ms', 'high_ms', 'speedup', 'speedup_low', 'speedup_high', 'compile_s', 'note']


@pytest.mark.long
def test_no_rounds_time_nothing_and_draw_no_latency(config, tmp_path):
  with config.unlocked():
    del config.sweep.baseline, config.sweep.baseline_draws
  config.sweep.rounds = 0
  sweep = sweep_of(config, tmp_path)
  rows = [row | sweep.measure(row) for row in itertools.islice(sweep.rows(), 2)]
  assert not any('speedup' in row or 'median_ms' in row for row in rows)
  sweep.show(rows, tmp_path)
  assert [path.name for path in tmp_path.glob('*.png')] == ['accuracy_cost.png']
