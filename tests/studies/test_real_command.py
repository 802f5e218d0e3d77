"""The command that fetches and runs all studies, with studies and packages of the test's own."""

import types

import pytest
from ml_collections import ConfigDict

from lib.report.rows import read_jsonl
from tools.real import __main__ as command
from tools.real import fetch, study


class Subject:
  """Counts what it measures."""

  measured = 0

  def __init__(self, config):
    if config.study == 'broken':
      raise ValueError('there is no tower')

  def measure(self, row):
    Subject.measured += 1
    return {'score': 1}


def config_of(name):
  """A module of configs, whose sizes are seeds."""
  def get_config(size):
    rows = ({'name': 'full', 'reduce': {}}, {'name': 'a', 'reduce': {'b': 1}})
    return ConfigDict({'study': name, 'folder': '', 'out': '', 'seed': int(size), 'rows': rows},
                      convert_dict=False)
  return types.SimpleNamespace(get_config=get_config, SIZES=('0', '1'))


@pytest.fixture
def run(tmp_path, monkeypatch):
  """Runs studies by name with a size; returns the folder that they write into."""
  monkeypatch.setattr(fetch, 'PACKAGES', {})
  made = study.Study(Subject, lambda rows: f'{len(rows)} rows\n',
                     lambda rows, path: path.write_bytes(b'picture'))
  monkeypatch.setattr(study, 'STUDIES', {'good': made, 'broken': made})
  monkeypatch.setattr(Subject, 'measured', 0)

  def run(*names, size='0'):
    monkeypatch.setattr(command, 'CONFIGS', {name: config_of(name) for name in names})
    command.run(tmp_path / 'real', tmp_path / 'out', size)
  return run


def test_a_second_run_measures_nothing(run, tmp_path, capsys):
  for _ in range(2):
    run('good')
  assert Subject.measured == 2
  table = tmp_path / 'out' / 'good.md'
  assert table.read_text() == '2 rows\n'
  assert str(table) in capsys.readouterr().out
  assert len(read_jsonl(table.with_suffix('.jsonl'))) == 2


def test_what_is_there_is_reported_at_any_time(run, tmp_path):
  run('good')
  config = command.CONFIGS['good'].get_config('0')
  config.out = str(tmp_path / 'out' / 'good.jsonl')
  config.rows = (*config.rows, {'name': 'later', 'reduce': {'c': 2}})
  assert study.report(config).read_text() == '2 rows\n'
  assert Subject.measured == 2


def test_one_study_that_cannot_run_stops_no_other(run, tmp_path):
  with pytest.raises(ValueError, match='broken: there is no tower'):
    run('broken', 'good')
  assert (tmp_path / 'out' / 'good.png').exists()
  assert not (tmp_path / 'out' / 'broken.md').exists()


def test_rows_of_other_settings_are_measured_anew(run):
  for size in ('0', '1', '0'):
    run('good', size=size)
  assert Subject.measured == 4


def test_a_study_without_a_size_is_passed_over(run, tmp_path):
  run('good', size='2')
  assert not (tmp_path / 'out').exists()
