"""The measuring loop: what it reads, measures, writes, tries again and names; tools that use it."""

import json

import numpy as np
import pytest
from absl import flags

from lib.report import measuring, tables
from lib.report.rows import append_jsonl, read_jsonl
from tools import targets, targets_lm

HEADS = [{'method': 'a', 'batch': 1}, {'method': 'b', 'batch': 8}]


class Measure:
  """Measures, and remembers what; methods in `broken` fail with the reason there."""

  def __init__(self, **broken):
    self.broken, self.heads = broken, []

  def __call__(self, head):
    self.heads.append(head)
    if head['method'] in self.broken:
      raise self.broken[head['method']]
    return {'ms': np.float32(len(self.heads)), 'counts': (1, 2)}


def test_only_missing_rows_are_measured_and_all_come_in_order(tmp_path):
  path, measure = tmp_path / 'deep' / 'rows.jsonl', Measure()
  append_jsonl(path, {'method': 'b', 'batch': 8, 'ms': 5.0})
  append_jsonl(path, {'method': 'b', 'batch': 8, 'ms': 7.0})
  append_jsonl(path, {'method': 'b', 'batch': 1, 'ms': 9.0})
  rows = measuring.measure_rows(HEADS, measure, path=path, about={'cpu': 'chip'})
  assert measure.heads == HEADS[:1]
  assert rows == [{'method': 'a', 'batch': 1, 'cpu': 'chip', 'ms': 1.0, 'counts': [1, 2]},
                  {'method': 'b', 'batch': 8, 'ms': 7.0}]
  assert read_jsonl(path)[3:] == rows[:1]
  assert measuring.measure_rows(HEADS, measure, path=path) == rows
  assert len(measure.heads) == 1


def test_again_measures_all_and_the_newest_row_counts(tmp_path):
  path, measure = tmp_path / 'rows.jsonl', Measure()
  measuring.measure_rows(HEADS, measure, path=path)
  rows = measuring.measure_rows(HEADS, measure, path=path, again=True)
  assert [row['ms'] for row in rows] == [3.0, 4.0]
  assert len(read_jsonl(path)) == 4
  assert list(measuring.newest(path, ('method', 'batch')).values()) == rows


def test_a_failure_costs_its_own_row_and_is_tried_again(tmp_path):
  path = tmp_path / 'rows.jsonl'
  measure = Measure(a=ValueError('keep=9\n  is too much'))
  rows = measuring.measure_rows(HEADS, measure, path=path)
  assert rows[0] == {'method': 'a', 'batch': 1, 'failed': True, 'note': 'keep=9 is too much'}
  assert 'failed' not in rows[1]
  assert measuring.measured(rows) == rows[1:]
  # The same reason is not written twice, another one is, and so is success.
  measuring.measure_rows(HEADS, measure, path=path)
  assert (len(measure.heads), len(read_jsonl(path))) == (3, 2)
  measuring.measure_rows(HEADS, Measure(a=FloatingPointError('nan')), path=path)
  assert read_jsonl(path)[-1]['note'] == 'nan'
  rows = measuring.measure_rows(HEADS, Measure(), path=path)
  assert rows[0]['ms'] == 1.0
  assert len(read_jsonl(path)) == 4
  last = Measure()
  assert measuring.measure_rows(HEADS, last, path=path) == rows
  assert not last.heads


def test_without_an_essential_row_nothing_else_is_measured(tmp_path):
  path, measure = tmp_path / 'rows.jsonl', Measure(a=ValueError('no such size'))
  with pytest.raises(ValueError, match='no such size'):
    measuring.measure_rows(HEADS, measure, path=path, essential=lambda row: row['method'] == 'a')
  assert [row['method'] for row in read_jsonl(path)] == ['a']
  assert len(measuring.measure_rows(HEADS, Measure(), path=path,
                                    essential=lambda row: row['method'] == 'a')) == 2


def test_nested_keys_of_a_head_tell_rows_apart_in_any_order(tmp_path):
  path, measure = tmp_path / 'rows.jsonl', Measure()
  for made_of in ({'size': 32, 'split': ('test',)}, {'split': ['test'], 'size': 32},
                  {'size': 48, 'split': ('test',)}):
    measuring.measure_rows([{'method': 'a', 'made_of': made_of}], measure, path=path)
  assert [row['made_of']['size'] for row in read_jsonl(path)] == [32, 48]


def test_other_errors_end_the_loop_with_the_rows_before_them_written(tmp_path):
  path = tmp_path / 'rows.jsonl'
  with pytest.raises(TypeError, match='a bug'):
    measuring.measure_rows(HEADS, Measure(b=TypeError('a bug')), path=path)
  with pytest.raises(ValueError, match='no weights'):
    measuring.measure_rows(HEADS, Measure(b=ValueError('no weights')), path=path, failures=())
  assert [row['method'] for row in read_jsonl(path)] == ['a']


def test_nothing_is_written_without_a_file_or_by_another_process(tmp_path):
  path = tmp_path / 'rows.jsonl'
  assert len(measuring.measure_rows(HEADS, Measure(), path=path, write=False)) == 2
  assert not path.exists()
  assert len(measuring.measure_rows(HEADS, Measure())) == 2
  assert measuring.measure_rows([], Measure(), path=path) == []


def test_heads_are_known_again_as_json_holds_them(tmp_path):
  path, measure = tmp_path / 'rows.jsonl', Measure()
  head = {'method': 'a', 'layers': (1, 2), 'step': np.int64(3)}
  measuring.measure_rows([head], measure, path=path)
  measuring.measure_rows([head], measure, path=path)
  assert len(measure.heads) == 1


def test_faults_are_named():
  rows = [{'method': 'a', 'batch': 1, 'fault': ''}, {'method': 'b', 'batch': 8, 'fault': 'copies'},
          {'method': 'c', 'batch': 8, 'failed': True, 'note': 'why not'},
          {'method': 'd', 'batch': 8, 'note': 'untrained'}]
  keys = ('method', 'batch')
  assert measuring.faults(rows, keys) == ['b, 8: copies', 'c, 8: why not']
  with pytest.raises(ValueError, match='2 of 4 rows are not as they should be: b, 8: copies; c, '
                                       '8: why not'):
    measuring.check_faults(rows, keys)
  measuring.check_faults(rows[:1], keys)


def test_ready_cells_become_markdown_and_fit_their_titles():
  assert tables.markdown_lines(['a', 'a'], [['1', '2']]) == '| a | a |\n| --- | --- |\n| 1 | 2 |\n'
  with pytest.raises(ValueError, match='a row of 1 cells does not fit 2 titles'):
    tables.markdown_lines(['a', 'b'], [['1']])


# -- tools whose programs need compilers of other devices ------------------------------------------


@pytest.fixture
def parsed(tmp_path, monkeypatch):
  """Flags of both tools, which test with a file that holds another target's rows."""
  flags.FLAGS.mark_as_parsed()
  path = tmp_path / 'targets.json'
  path.write_text('{"v6e:4x4": {"rows": []}}')
  for tool in (targets, targets_lm):
    monkeypatch.setattr(tool, 'missing', lambda name: None)
    for name, value in (('OUT', str(path)), ('TARGETS', ['h100:8']), ('METHODS', ['topk', 'tome'])):
      if hasattr(tool, name):
        monkeypatch.setattr(tool, name, type('Flag', (), {'value': value}))
  return path


def test_targets_keep_other_targets_rows_and_name_what_is_worse(parsed, monkeypatch, capsys):
  def compiled(target, step, method):
    if method == 'tome' and step == 'eval':
      raise ValueError('too many tokens')
    peak = {'none': 10.0, 'topk': 1000.0}.get(method, 9.0)
    return {'peak_mb': peak, 'output_mb': 1, 'argument_mb': 1.0, 'collectives': 'none',
            'compile_s': 1.0}

  monkeypatch.setattr(targets, 'compiled', compiled)
  with pytest.raises(ValueError, match=r'2 of 6 rows .* h100:8, eval, topk: raises peak_mb; '
                                       'h100:8, eval, tome: too many tokens'):
    targets.main(['targets'])
  found = json.loads(parsed.read_text())
  assert list(found) == ['v6e:4x4', 'h100:8']
  assert [(row['step'], row['method']) for row in found['h100:8']['rows']] == [
      ('train', 'none'), ('train', 'tome'), ('eval', 'none'), ('eval with a map', 'none'),
      ('eval', 'topk'), ('eval', 'tome')]
  assert 'raises peak_mb' in capsys.readouterr().out


def test_a_step_without_an_unreduced_one_is_a_failure(parsed, monkeypatch, capsys):
  def compiled(target, step, plan):
    if step == 'decode' and plan == 'none':
      raise ValueError('no room')
    return {'mesh': 'data 8', 'rows': 1, 'peak_mb': 5.0, 'argument_mb': 1.0, 'output_mb': 1.0,
            'collectives': {'all-reduce of tokens': (2, 3.0)}, 'expected_mb': {}, 'compile_s': 1.0}

  monkeypatch.setattr(targets_lm, 'compiled', compiled)
  with pytest.raises(ValueError, match=r"2 of 7 rows .*decode, none: no room; h100:8, decode, "
                                       "pyramiddrop: there is no unreduced step 'decode'"):
    targets_lm.main(['targets_lm'])
  rows = json.loads(parsed.read_text())['h100:8']['rows']
  assert rows[0]['saved_mb'] == 0.0
  assert rows[0]['fault'] == ''
  assert 'all-reduce of tokens 2 (3 MB)' in capsys.readouterr().out
