"""Loads a trained model once, and sweeps methods and budgets over it.

  python -m eval --config=configs/digits_sweep.py --workdir=runs/digits
  python -m eval --config=configs/digit_segments_sweep.py --workdir=runs/segments
  python -m eval --config=configs/digit_scenes_sweep.py --workdir=runs/scenes
  python -m eval --config=configs/stdlib_needle_sweep.py --workdir=runs/needle

Writes sweep.jsonl (a row a method and budget, as soon as it is measured; those of the same weights,
data, model and settings that are there are not made again, those that failed are), a table, plots
of the score against cost and latency, differences from a baseline where config.sweep names one, and
pictures of what was kept, merged and dropped. What is measured of a task is
lib/tasks/image_sweep.py's or lib/tasks/qa_sweep.py's; what a sweep is, lib/tasks/sweep.py's.
"""

import pathlib

from absl import flags

from lib.report.measuring import measure_rows
from lib.runtime import cli, launch, screen, sharding, timing
from lib.tasks import registry


def main(argv):
  """Loads, sweeps, shows."""
  del argv
  screen.outlive()
  config, workdir = launch.CONFIG.value, pathlib.Path(launch.WORKDIR.value)
  with launch.start() as first:
    evaluate(config, workdir, first=first)


def evaluate(config, workdir, *, first):
  """Makes the rows of a sweep that are missing; the first process writes and shows them."""
  sweep = registry.make_sweep(config, workdir, sharding.make_mesh(config.mesh))

  # A budget that a method cannot meet ends only its own row.
  rows = measure_rows(sweep.rows(), sweep.measure, path=workdir / 'sweep.jsonl',
                      about=timing.machine(), write=first,
                      essential=lambda row: row['method'] == 'none')
  if first:
    sweep.show(rows, workdir)


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
