"""Searches how many tokens a method should keep in each layer of a language model.

  python -m tools.search_schedule --config=configs/digit_scenes_search.py \\
      --workdir=results/digit_scenes

By G-Search: the fewest tokens of each layer with which accuracy falls by no more than
`config.search.loss`. Then by P-Sigmoid: the best schedule with as many tokens on average, or with
the share `config.search.mean`; and the numbers that a method takes (`config.search.args`, the
bounds of each), as VFlowOpt's, by the same optimisation. Every schedule is a program of its own,
and compiled anew. Rows go to search.jsonl in the workdir and are not measured
again; the schedules found are printed as configs take them.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import flags

from lib.report import tables
from lib.report.measuring import measure_rows
from lib.report.rows import Row
from lib.runtime import cli, launch, screen, sharding, timing
from lib.search.bayes import Point, maximise
from lib.search.schedules import Counts, g_search, p_sigmoid
from lib.tasks import registry
from lib.tasks.qa_sweep import QASweep


class Search:
  """Holds a trained model, and scores schedules by the share of questions that it answers.

  Args:
    config: with `config.sweep`, of which the first set is asked, and `config.search`.
    workdir: of the run whose best checkpoint is searched for.
    first: whether this process writes.
  """

  def __init__(self, config: Any, workdir: pathlib.Path, *, first: bool):
    sweep = registry.make_sweep(config, workdir, sharding.make_mesh(config.mesh))
    if not isinstance(sweep, QASweep):
      raise ValueError('schedules are searched for models that answer questions: name a config of '
                       'such a task')
    self.sweep, self.config, self.first = sweep, config.search, first
    self.path = workdir / 'search.jsonl'
    self.unreduced = next(iter(sweep.rows()))
    self.rows: list[Row] = []

  def measured(self, settings: Mapping[str, Any]) -> Row:
    """Returns the row of one reduction, measured unless the file has it."""
    head = self.unreduced
    if settings:
      head = {**head, 'method': self.config.method, 'place': self.config.place, 'budget': '',
              'settings': json.dumps(settings, sort_keys=True)}
    row, = measure_rows([head], self.sweep.measure, path=self.path, about=timing.machine(),
                        write=self.first, essential=lambda head: not settings)
    if row not in self.rows:
      self.rows.append(row)
    return row

  def settings(self, counts: Counts, args: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Returns the reduction of a schedule, as a config writes it."""
    return {**self.config.reduction, 'method': self.config.method,
            'layers': tuple(self.config.layers), 'keep': counts,
            'args': {**self.config.reduction.get('args', {}), **(args or {})}}

  def score(self, counts: Counts, args: Mapping[str, float] | None = None) -> float:
    """Returns the accuracy of a schedule, -1 for one that the method cannot meet."""
    return self.measured(self.settings(counts, args)).get('accuracy', -1.0)


def run(config: Any, workdir: pathlib.Path, *, first: bool = True) -> dict[str, dict[str, Any]]:
  """Searches, prints what was found, and returns it: the reduction by the name of the search."""
  search, asked = Search(config, workdir, first=first), config.search
  whole = search.measured({})['accuracy']
  shape = {'layers': len(asked.layers), 'tokens': asked.tokens}
  counts = g_search(search.score, **shape, least=whole - asked.loss, step=asked.step)
  found = {'greedy': search.settings(counts)}
  mean = asked.mean or sum(counts) / len(counts) / asked.tokens
  counts, _ = p_sigmoid(search.score, **shape, mean=mean, calls=asked.calls, seed=config.seed)
  found['sigmoid'] = search.settings(counts)
  if asked.args:
    names, bounds = zip(*sorted(asked.args.items()), strict=True)

    def named(point: Point) -> dict[str, float]:
      return dict(zip(names, (round(value, 4) for value in point), strict=True))

    points = maximise(lambda point: search.score(counts, named(point)), bounds,
                      calls=asked.calls, seed=config.seed)
    best = max(points, key=lambda pair: pair[1])[0]
    found['arguments'] = search.settings(counts, named(best))
  if first:
    print(tables.table(search.rows, ('settings', 'accuracy', 'kept_mean', 'gmacs_ratio', 'note')))
    for name, reduction in found.items():
      print(f'{name}: config.reduce.{asked.place} = {reduction}')
  return found


def main(argv: list[str]) -> None:
  """Searches what the flags ask for."""
  del argv
  screen.outlive()
  with launch.start() as first:
    run(launch.CONFIG.value, pathlib.Path(launch.WORKDIR.value), first=first)


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
