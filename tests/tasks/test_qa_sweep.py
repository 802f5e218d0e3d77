"""The sweep over models that answer: decoding decides, budgets are met, rows are made once."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.qa import NEEDLE, SCENES, batch_of, made, small

from configs import digit_scenes, digit_scenes_sweep, stdlib_needle, stdlib_needle_sweep
from lib.data import qa as qa_data
from lib.report import measuring, plots
from lib.runtime import sharding
from lib.tasks import qa as qa_task
from lib.tasks import qa_sweep

CONFIGS = {'scenes': (digit_scenes, SCENES, digit_scenes_sweep),
           'needle': (stdlib_needle, NEEDLE, stdlib_needle_sweep)}
CONTEXT = 14


@functools.cache
def model_of(name, unlocked=()):
  config, info, _ = CONFIGS[name]
  config = small(config)
  config.data.context = CONTEXT
  with config.unlocked():
    return config, info, *made(config, info, **dict(unlocked))


def says(model, params, batch):
  """The batch with the answers that the model gives, token by token from the front."""
  run = jax.jit(lambda ids: qa_task.predictions(
      *qa_task.apply(model, params, {**batch, 'ids': ids})).argmax(-1))
  ids = jnp.asarray(batch['ids'])
  for _ in range(2):
    ids = jnp.where(batch['answer'], run(ids), ids)
  return {**batch, 'ids': np.array(ids)}


@pytest.mark.long
@pytest.mark.parametrize('name', CONFIGS)
def test_decoding_is_right_where_every_token_is(name):
  _, info, model, params = model_of(name)
  batch = says(model, params, batch_of(info, CONTEXT))
  wrong = np.flatnonzero(batch['answer'][1])[1]
  batch['ids'][1, wrong] = (batch['ids'][1, wrong] + 1) % info.vocabulary
  found = jax.jit(functools.partial(qa_task.exact_match, model, longest=3))(params, batch)
  np.testing.assert_array_equal(found, [1, 0, 1, 1])
  # What stands in the places of the answer is not read before it is asked for.
  logits, out = qa_task.apply(model, params, batch)
  whole = qa_task.correct_and_total(logits, out, batch, 3)
  np.testing.assert_array_equal(whole.sum(axis=0), [3, 4])


def test_groups_are_kinds_or_tenths_of_the_depth():
  _, info, model, params = model_of('needle')
  batch = says(model, params, batch_of(info, CONTEXT)) | {
      'depth': np.float32([0.05, 0.31, 0.39, 1.0]), 'mask': np.float32([1, 1, 1, 0])}
  found = np.asarray(qa_sweep.count(model, 10, 3, params, batch))
  wanted = np.zeros((10, 2))
  wanted[0], wanted[3] = 1, 2
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(('row', 'ratio', 'left'), [
    ({'place': 'projector', 'settings': {'method': 'random'}}, 0.25, 16),
    ({'place': 'language', 'settings': {'method': 'pyramiddrop', 'layers': [1, 2],
                                        'token_kinds': 'visual'}}, 0.5, 16)])
def test_a_budget_is_the_share_that_the_last_cut_leaves(row, ratio, left):
  reduce = qa_sweep.reduction(
      {**row, 'settings': json.dumps(row['settings']), 'budget': '0.25'})
  assert reduce[row['place']]['keep_ratio'] == ratio
  config = digit_scenes.get_config()
  model = qa_task.build(config.model, reduce, SCENES, context=12)
  visual = qa_task.visual_tokens(model)
  cuts = model.lm.plan.events if model.lm.plan else ()
  assert (cuts[-1].slots_out - 12 if cuts else visual) == left


def test_every_candidate_of_the_configs_is_a_model():
  for _, info, config in CONFIGS.values():
    config = config.get_config()
    shortest = min(context for _, context in config.sweep.sets)
    for candidate in config.sweep.candidates:
      settings = {key: value for key, value in candidate.items() if key not in ('name', 'place')}
      for budget in config.sweep.budgets:
        reduce = qa_sweep.reduction({'place': candidate['place'], 'budget': str(budget),
                                     'settings': json.dumps(settings)})
        model = qa_task.build(config.model, reduce, info, context=shortest)
        lm = model.lm if info.image_shape else model
        tower = model.tower.plan if info.image_shape else None
        assert any((tower, getattr(model, 'projector_reduction', None), lm.plan,
                    lm.cache_plan)), candidate


def test_rows_are_known_by_all_that_makes_them(monkeypatch, tmp_path):
  monkeypatch.setattr(qa_data, 'info', lambda data: SCENES)
  weights = ['one']
  monkeypatch.setattr(qa_sweep.QASweep, '_load', lambda *_: (7, weights[-1], None))
  config = digit_scenes_sweep.get_config()
  config.sweep.update(sets=(), candidates=config.sweep.candidates[:2], budgets=(0.5,))

  def identities(**settings):
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict(settings)
    rows = list(qa_sweep.QASweep(other, tmp_path, sharding.make_mesh({'data': 1})).rows())
    return {measuring.identity(row, tuple(rows[0])) for row in rows}

  before = identities()
  for settings, same in (
      ({'data.test_split': 'test[:5]'}, 0), ({'data.context': 61}, 0), ({'data.batch_size': 2}, 0),
      ({'data.pad_side': 'left'}, 0), ({'data.kinds': ('count',)}, 0),
      ({'model.dtype': 'bfloat16'}, 0), ({'model.lm.heads': 8}, 0), ({'sweep.budgets': (0.4,)}, 1),
      ({'sweep.rounds': 9}, 3), ({'data.turns': 1}, 3), ({'data.data_dir': '/elsewhere'}, 3)):
    assert len(before & identities(**settings)) == same, settings
  weights.append('other')
  assert not before & identities()


@pytest.mark.long
@pytest.mark.parametrize('name', CONFIGS)
def test_a_sweep_measures_each_row_once_and_draws(name, tmp_path, monkeypatch, capsys):
  config, info, _, params = model_of(name)
  batch = batch_of(info, CONTEXT) | ({} if info.kinds else {'depth': np.linspace(0, 0.9, 4)})
  monkeypatch.setattr(qa_data, 'info', lambda data: info)
  monkeypatch.setattr(qa_data, 'eval_batches', lambda *_, **__: [batch])
  monkeypatch.setattr(qa_sweep.pretrained, 'best', lambda *_, **__: (7, params))
  config = config.copy_and_resolve_references()
  config.data.batch_size = 4
  chosen = CONFIGS[name][2].CANDIDATES[0], CONFIGS[name][2].CANDIDATES[-2]
  with config.unlocked():
    config.sweep = {'title': 'a title', 'sets': (), 'candidates': chosen, 'budgets': (0.5,),
                    'rounds': 2, 'baselines': ()}
  sweep = qa_sweep.QASweep(config, tmp_path, sharding.make_mesh({'data': 1}, jax.devices()[:1]))
  wanted = list(sweep.rows())
  assert len({measuring.identity(row, tuple(wanted[0])) for row in wanted}) == 3
  rows = [row | sweep.measure(row) for row in wanted]
  for row in rows:
    assert row['questions'] == 4
    assert 0 <= row['accuracy'] <= 1
    assert set(row['by']) == set(info.kinds or qa_sweep.TENTHS)
  assert rows[0]['gmacs_ratio'] == 1
  assert rows[0]['kept_mean'] == CONTEXT + (16 if info.kinds else 0)
  assert all(row['kept_mean'] < rows[0]['kept_mean'] for row in rows[1:])
  sweep.show(rows, tmp_path)
  drawn = sorted(path.name for path in tmp_path.glob('*.png'))
  assert ('recall.png' in drawn) == (name == 'needle')
  assert len(drawn) == (1 + len(info.kinds) if info.kinds else 2)
  assert 'accuracy %' in capsys.readouterr().out


def test_heat_maps_are_drawn_and_nothing_is_refused(tmp_path):
  shares = np.array([[0.0, 1.0], [0.5, np.nan]])
  path = plots.heat_maps(dict.fromkeys('abcdefg', (('0 %', '50 %'), ('256', '1k'), shares)),
                         tmp_path / 'maps.png', title='a title')
  assert path.stat().st_size > 10_000
  with pytest.raises(ValueError, match='nothing to draw'):
    plots.heat_maps({}, path)
