"""The sweep over models that answer: decoding decides, budgets are met, rows are made once."""

import dataclasses
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
from models.backbones.vit import ViT
from ops.reducers.branch import BRANCHES
from ops.reducers.cache import CACHE_REDUCERS
from ops.reducers.language import LANGUAGE
from ops.reducers.projector import PROJECTOR
from ops.reducers.vision import VISION

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


@pytest.mark.long
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


def built(name, task, info, config, every):
  """Rows of a config's candidates with their models: of every budget, or of each one's last."""
  sweep = bare(task, info, config)
  for candidate in config.sweep.candidates:
    chosen = qa_sweep.budgets(candidate, config.sweep)
    tokens = [each for each in chosen if not each.startswith(qa_sweep.OF_MACS)]
    for budget in chosen if every else tokens[-1:]:
      row = {'method': candidate['name'], 'place': candidate['place'], 'budget': budget,
             'settings': qa_sweep.settings_of(candidate)}
      yield row, sweep, sweep._reduced('set', row)


def bare(task, info, config):
  """A sweep without a checkpoint."""
  sweep = qa_sweep.QASweep.__new__(qa_sweep.QASweep)
  sweep.config, sweep.mesh = config, sharding.make_mesh({'data': 1}, jax.devices()[:1])
  data = config.data.copy_and_resolve_references()
  data.context = min(context for _, context in config.sweep.sets)
  sweep._sets, sweep._info = {'set': data}, {'set': info}
  return sweep


@pytest.mark.parametrize('every', [False, pytest.param(True, marks=pytest.mark.long)])
def test_every_candidate_of_the_configs_is_a_model(every):
  for name, (task, info, config) in CONFIGS.items():
    for row, sweep, model in built(name, task, info, config.get_config(), every):
      lm = model.lm if info.image_shape else model
      tower = model.tower.plan if info.image_shape else None
      smaller = row['place'] == 'image' and model.tower.image_size < info.image_shape[0]
      assert any((tower, getattr(model, 'projector_reduction', None), lm.plan,
                  lm.cache_plan, smaller)), row
      if row['budget'].startswith(qa_sweep.OF_MACS):
        base, share = sweep._model('set', {}), float(row['budget'].split()[1])
        ratio = sweep._cost('set', model)['gmacs'] / sweep._cost('set', base)['gmacs']
        assert share - 0.05 < ratio <= share, row


def test_all_methods_are_candidates_or_left_out_for_a_reason():
  named = {(each['place'], each.get('method')) for each in digit_scenes_sweep.get_config(
      ).sweep.candidates}
  left = {(place, name) for place, names in digit_scenes_sweep.LEFT_OUT.items() for name in names}
  assert not named & left
  for place, registry in (('vision', VISION), ('projector', PROJECTOR), ('language', LANGUAGE),
                          ('cache', CACHE_REDUCERS)):
    assert {name for at, name in named | left if at == place} >= set(registry), place
  assert {name for _, name in named | left} >= set(BRANCHES)


def test_a_share_of_the_macs_that_cannot_be_met_is_one_line():
  config = digit_scenes_sweep.get_config()
  row = {'method': 'fastv', 'place': 'language', 'budget': 'MACs 0.5', 'settings': json.dumps(
      {'method': 'fastv', 'layers': [2], 'token_kinds': 'visual'})}
  with pytest.raises(ValueError, match=r'fastv cannot get down to 0\.5 of the MACs'):
    bare(digit_scenes, SCENES, config)._reduced('set', row)


def test_draws_are_joined_and_compared_batch_by_batch():
  shared = {'set': 's', 'place': 'p', 'note': ''}

  def row(method, parts, budget='0.5', **more):
    return {**shared, 'method': method, 'budget': budget, 'settings': str(parts),
            'by_batch': parts, 'accuracy': float(np.mean(parts)),
            'by': {'a': parts[0]}, **more}

  rows = [row('none', [0.9, 0.9, 0.8], '1.0'), row('random', [0.2, 0.3, 0.4]),
          row('random', [0.4, 0.5, 0.3]), row('mine', [0.75, 0.8, 0.8]),
          row('mine', [0.2, 0.2, 0.3], '0.25'),
          {**shared, 'method': 'other', 'budget': '0.5', 'settings': '', 'note': 'too few'}]
  none, random, mine, alone, other = qa_sweep.compared(rows, {'mine': 'random'})
  assert random['accuracy'] == pytest.approx(0.35)
  assert random['by'] == {'a': pytest.approx(0.3)}
  assert mine['difference'] == pytest.approx(np.mean([0.75, 0.8, 0.8]) - 0.35)
  assert mine['difference_low'] < mine['difference'] < mine['difference_high']
  assert none['accuracy_low'] < none['accuracy'] < none['accuracy_high']
  assert 'difference' not in alone
  assert 'difference' not in none
  assert other == rows[-1]


def test_maps_by_kind_go_from_budget_to_budget():
  rows = [{'method': method, 'budget': budget, 'by': {'a': 0.5, 'b': value}}
          for method, budget, value in (('x', '0.25', 0.1), ('x', 'MACs 0.8', 0.2),
                                        ('y', '0.5', 0.3), ('y', '', 0.4))]
  maps = qa_sweep.accuracy_by_kind(rows)
  assert list(maps) == ['0.5', '0.25', 'MACs 0.8', 'its own']
  names, kinds, shares = maps['0.25']
  assert (names, kinds) == (['x', 'y'], ['a', 'b'])
  np.testing.assert_array_equal(shares, [[0.5, 0.1], [np.nan, np.nan]])


def test_more_lines_than_styles_are_drawn_place_by_place():
  few = [{'method': 'none', 'place': ''}, {'method': 'low', 'place': 'image'},
         {'method': 'a', 'place': 'cache'}]
  assert qa_sweep.by_place(few) == {'': few[1:]}
  many = [{'method': str(number), 'place': 'language'} for number in range(plots.STYLES)]
  assert qa_sweep.by_place(few + many) == {'cache': few[1:], 'language': [few[1], *many]}


@pytest.mark.long
def test_what_is_behind_the_prompt_is_decoded():
  """Unreduced the answers stay what they are; a cut of the cache then counts."""
  _, info, model, params = model_of('scenes')
  batch = says(model, params, batch_of(info, CONTEXT))
  match = jax.jit(functools.partial(qa_task.exact_match, model, longest=2, behind=2))
  np.testing.assert_array_equal(match(params, batch), 1)
  first = jax.jit(lambda ids: qa_task.answers(model, params, {**batch, 'ids': ids}, longest=2,
                                              behind=1)[0])
  wrong = jnp.asarray(batch['ids']).at[0, 7].add(1)  # The last token of the first question.
  np.testing.assert_array_equal(first(wrong), first(batch['ids']))


def test_positions_of_smaller_images_are_resampled():
  tower = ViT(width=4, depth=1, mlp=4, heads=1, patch=8, image_size=32, num_classes=0)
  pos = np.random.default_rng(0).normal(size=(1, 65, 4)).astype(np.float32)
  small = qa_sweep.for_smaller_images({'pos': pos, 'other': 1}, tower)
  assert small['other'] == 1
  assert small['pos'].shape == (1, 17, 4)
  np.testing.assert_array_equal(small['pos'][0, 0], pos[0, 0])
  level = qa_sweep.for_smaller_images({'pos': np.ones((1, 65, 4), np.float32)}, tower)
  np.testing.assert_allclose(level['pos'], 1, rtol=1e-6)


def test_rows_are_known_by_all_that_makes_them(monkeypatch, tmp_path):
  monkeypatch.setattr(qa_data, 'info', lambda data: SCENES)
  weights = ['one']
  monkeypatch.setattr(qa_sweep.QASweep, '_load', lambda *_: (7, weights[-1], None))
  config = digit_scenes_sweep.get_config()
  chosen = [each for each in config.sweep.candidates if each['name'] in ('divprune', 'fastervlm')]
  config.sweep.update(sets=(), candidates=tuple(chosen), budgets=(0.5,), macs=(), pictured=())

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
  with pytest.raises(ValueError, match='behind=12 leaves no token of a context of 12'):
    identities(**{'sweep.behind': 12, 'data.context': 12})
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
  scenes = [each for each in digit_scenes_sweep.get_config().sweep.candidates
            if each['name'] in ('low resolution', 'divprune', 'snapkv')]
  needle = [stdlib_needle_sweep.CANDIDATES[0], stdlib_needle_sweep.CANDIDATES[-2]]
  chosen = tuple({**each, 'budgets': (0.5,)} for each in (scenes if info.kinds else needle))
  with config.unlocked():
    config.sweep = {'title': 'a title', 'sets': (), 'candidates': chosen, 'budgets': (0.5,),
                    'rounds': 2 * bool(info.kinds), 'baselines': (), 'behind': 1,
                    'pictured': ('divprune',) if info.kinds else ()}
  sweep = qa_sweep.QASweep(config, tmp_path, sharding.make_mesh({'data': 1}, jax.devices()[:1]))
  wanted = list(sweep.rows())
  assert len({measuring.identity(row, tuple(wanted[0])) for row in wanted}) == 1 + len(chosen)
  rows = [row | sweep.measure(row) for row in wanted]
  for row in rows:
    assert row['questions'] == 4
    assert 0 <= row['accuracy'] <= 1
    assert set(row['by']) == set(info.kinds or qa_sweep.TENTHS)
    assert ('speedup' in row) == bool(info.kinds)
  assert rows[0]['gmacs_ratio'] == 1
  assert rows[0]['kept_mean'] == CONTEXT + (16 if info.kinds else 0)
  assert all(row['kept_mean'] < rows[0]['kept_mean'] for row in rows[1:])
  sweep.show(rows, tmp_path)
  drawn = sorted(path.name for path in tmp_path.glob('*.png'))
  assert ('recall.png' in drawn) == (name == 'needle')
  stem = config.data.name.replace('/', '_')
  assert set(drawn) == {f'accuracy_{stem}.png'} | (
      {f'kinds_{stem}.png', 'kept.png'} if info.kinds else {'recall.png'})
  assert (tmp_path / 'sweep.md').read_text().count('\n') == 2 + len(rows)
  assert 'accuracy %' in capsys.readouterr().out


def test_sets_may_ask_different_kinds_of_questions(tmp_path, monkeypatch):
  monkeypatch.setattr(qa_sweep.QASweep, '_draw', lambda *_: None)
  kinds = {'one': ('name',), 'grid': ('name', 'count')}
  sweep = bare(digit_scenes, SCENES, digit_scenes_sweep.get_config())
  sweep._sets = dict.fromkeys(kinds, sweep._sets['set'])
  sweep._info = {name: dataclasses.replace(SCENES, kinds=own) for name, own in kinds.items()}
  sweep.show([{'set': name, 'method': method, 'place': place, 'settings': '', 'budget': budget,
               'note': '', 'accuracy': 0.5, 'by_batch': [0.5, 0.5], 'kept_mean': 9.0, 'gmacs': 1.0,
               'gmacs_ratio': 1.0, 'kv_mb': 1.0, 'by': dict.fromkeys(own, 0.25)}
              for name, own in kinds.items()
              for method, place, budget in (('none', '', '1.0'), ('pool', 'projector', '0.5'))],
             tmp_path)
  lines = [line.split('|') for line in (tmp_path / 'sweep.md').read_text().splitlines()[2:]]
  assert [[cell.strip() for cell in line[-3:-1]] for line in lines] == [
      ['25', ''], ['25', ''], ['25', '25'], ['25', '25']]
  assert {path.name for path in tmp_path.glob('*.png')} == {
      f'{what}_{name}.png' for what in ('accuracy', 'kinds') for name in kinds}


def test_heat_maps_are_drawn_and_nothing_is_refused(tmp_path):
  shares = np.array([[0.0, 1.0], [0.5, np.nan]])
  path = plots.heat_maps(dict.fromkeys('abcdefg', (('0 %', '50 %'), ('256', '1k'), shares)),
                         tmp_path / 'maps.png', title='a title')
  assert path.stat().st_size > 10_000
  with pytest.raises(ValueError, match='nothing to draw'):
    plots.heat_maps({}, path)
