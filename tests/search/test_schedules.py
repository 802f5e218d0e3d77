"""Searches of schedules, on scores whose best answer is known."""

import json
import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import digit_scenes_search
from lib.search.bayes import maximise
from lib.search.schedules import g_search, p_sigmoid, sigmoid_counts
from lib.tasks import registry
from lib.tasks.qa_sweep import QASweep
from tools import search_schedule


@pytest.mark.parametrize('need', [(57, 40, 40, 9, 1), (64, 64, 64, 64, 64), (3, 2, 1, 1, 1)])
def test_the_greedy_search_finds_what_each_layer_needs(need):
  calls = []

  def score(counts):
    calls.append(counts)
    return float(all(count >= least for count, least in zip(counts, need, strict=True)))

  assert g_search(score, layers=5, tokens=64, least=1.0) == need
  assert len(calls) == len(set(calls)) <= 5 * math.ceil(math.log2(64))
  assert all(list(counts) == sorted(counts, reverse=True) for counts in calls)


def test_counts_of_the_greedy_search_are_whole_steps():
  def score(counts):
    return min(counts[0] - 21, counts[1] - 8)

  assert g_search(score, layers=2, tokens=30, least=0, step=4) == (24, 8)
  # The last step is what is left.
  assert g_search(lambda counts: -1.0, layers=2, tokens=30, least=0, step=4) == (30, 30)


@pytest.mark.parametrize('steepness', [0.0, 2.0, 15.0, 60.0])
@pytest.mark.parametrize('floor', [0.0, 0.2])
@pytest.mark.parametrize('mean', [0.25, 0.5, 1.0])
def test_a_sigmoid_has_the_mean_that_is_asked_for(steepness, floor, mean):
  counts = sigmoid_counts(steepness, floor, layers=24, tokens=576, mean=mean)
  assert list(counts) == sorted(counts, reverse=True)
  assert 576 * mean - 1.5 <= np.mean(counts) <= 576 * mean + 1.0
  assert min(counts) >= max(1, int(576 * floor))
  if steepness == 0.0:
    assert len(set(counts)) == 1


def test_a_steep_sigmoid_is_one_step_down():
  counts = sigmoid_counts(1e4, 0.0, layers=10, tokens=100, mean=0.3)
  assert counts == (100, 100, 100, *[1] * 7)


@pytest.mark.long
def test_the_search_of_sigmoids_comes_near_the_best():
  wanted = sigmoid_counts(12.0, 0.1, layers=8, tokens=64, mean=0.4)

  def score(counts):
    return -math.dist(counts, wanted)

  counts, found = p_sigmoid(score, layers=8, tokens=64, mean=0.4, calls=25)
  even = score(sigmoid_counts(0.0, 0.0, layers=8, tokens=64, mean=0.4))
  assert score(counts) == max(value for _, value in found) > 0.2 * even
  assert p_sigmoid(score, layers=8, tokens=64, mean=0.4, calls=25)[0] == counts


def test_optimisation_beats_as_many_draws():
  def score(point):
    return -(point[0] - 3.3) ** 2 - 4 * (point[1] + 0.7) ** 2

  bounds = [(0.0, 10.0), (-2.0, 2.0)]
  found = maximise(score, bounds, calls=25, seed=1)
  assert len(found) == 25
  assert all(low <= value <= high for point, _ in found
             for value, (low, high) in zip(point, bounds, strict=True))
  random = np.random.default_rng(1).random((25, 2)) * [10, 4] - [0, 2]
  assert max(value for _, value in found) > max(map(score, random))
  assert max(value for _, value in found) > -0.05


@pytest.mark.parametrize(('bounds', 'calls'), [([], 3), ([(1.0, 1.0)], 3), ([(0.0, 1.0)], 0)])
def test_optimisation_of_nothing_is_refused(bounds, calls):
  with pytest.raises(ValueError, match='must be pairs'):
    maximise(lambda point: 0.0, bounds, calls=calls)


class Fake(QASweep):
  """A model that answers by how many tokens it keeps, and by an argument."""

  def __init__(self):
    self.measured = []

  def rows(self):
    yield {'step': 1, 'set': 's', 'method': 'none', 'place': '', 'settings': '', 'budget': '1.0',
           'made_of': {}}

  def measure(self, row):
    self.measured.append(row)
    if row['method'] == 'none':
      return {'accuracy': 0.9, 'note': ''}
    settings = json.loads(row['settings'])
    assert row['budget'] == ''
    assert row['method'] == settings['method'] == 'fastv'
    lost = sum(max(0, least - count) for count, least in
               zip(settings['keep'], (32, 8, 8), strict=True))
    return {'accuracy': 0.9 - 0.01 * lost + 0.01 * settings['args'].get('x', 0), 'note': ''}


def test_the_command_measures_nothing_twice(tmp_path, monkeypatch, capsys):
  config, sweep = digit_scenes_search.get_config(), Fake()
  config.search.update(calls=6, args=ConfigDict({'x': (-1.0, 1.0)}))
  monkeypatch.setattr(registry, 'make_sweep', lambda *args: sweep)
  found = search_schedule.run(config, tmp_path)
  assert found['greedy']['keep'] == (32, 8, 8)
  assert np.mean(found['sigmoid']['keep']) <= 17
  assert -1 <= found['arguments']['args']['x'] <= 1
  assert "config.reduce.language = {'token_kinds': 'visual', 'method': 'fastv'" in (
      capsys.readouterr().out)
  count = len(sweep.measured)
  assert count == len({json.dumps(row) for row in sweep.measured}) < 40
  assert search_schedule.run(config, tmp_path) == found
  assert len(sweep.measured) == count
