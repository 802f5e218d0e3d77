"""Verdicts on methods against chance, and the tables and plots of them."""

import numpy as np

from lib.studies import vision_report

RNG = np.random.default_rng(0)


def row(name, draw=0, *, right, budget='half', reduce=True):
  """A row whose pictures are right with some probability."""
  each = {kind: (RNG.uniform(size=200) < right).astype(int) for kind in ('probe', 'neighbours')}
  each['ranks'] = np.where(RNG.uniform(size=200) < right, 1, 4)
  made = {'name': name, 'budget': budget if reduce else '', 'draw': draw,
          'reduce': {'method': name} if reduce else {}, 'kept': 65.0, 'speedup': 1.5,
          'cosine': 0.9, 'cka': 0.8, 'saliency': 0.7, 'each': each}
  own = vision_report.values(made)
  return made | {measure: float(value.mean()) for measure, value in own.items()}


def rows():
  return [row('full', right=0.9, reduce=False),
          *(row('chance', draw, right=0.5) for draw in range(3)),
          row('good', right=0.85), row('same', right=0.5), row('bad', right=0.1)]


def test_what_differs_from_chance_is_marked():
  marks = vision_report.verdicts(rows()[1:])
  for measure in vision_report.MEASURES:
    assert [marks[name, measure] for name in ('good', 'same', 'bad')] == ['▲', '', '▼']
  assert not any(name == 'chance' for name, _ in marks)


def test_a_table_is_in_the_order_of_what_is_left():
  failed = {'name': 'broken', 'budget': 'half', 'draw': 0, 'reduce': {'method': 'broken'},
            'failed': True, 'note': 'no grid'}
  lines = vision_report.report([*rows(), failed]).splitlines()
  names = [line.split(' | ')[0].strip('| ') for line in lines if line.startswith('|')][2:]
  assert (names[0], names[1], names[-1]) == ('full', 'good', 'bad')
  assert lines[-1] == '* `broken`, half: no grid'


def test_a_plot_is_written(tmp_path):
  vision_report.draw(rows(), tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').stat().st_size > 10_000
