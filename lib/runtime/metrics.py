"""Writes a run's metrics: JSON lines, TensorBoard, and a bar or plain lines on screen."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from lib.report.rows import Row, keep_rows


class Writer:
  """Writes metrics; every process may make one, only the first writes.

  What earlier lives of the run wrote of steps that come again is removed, so that metrics.jsonl has
  each step once and in order; TensorBoard is told not to show it.

  Args:
    folder: gets metrics.jsonl and TensorBoard's files.
    total_steps: for the progress bar.
    start: steps done.
    active: False silences it (processes other than the first).
  """

  def __init__(self, folder: pathlib.Path, *, total_steps: int, start: int, active: bool) -> None:
    self._active = active
    if not active:
      return
    folder.mkdir(parents=True, exist_ok=True)
    self._path = folder / 'metrics.jsonl'
    keep_rows(self._path, lambda row: _place(row, start))
    self._board = SummaryWriter(str(folder), purge_step=start + 1)
    self._bar = tqdm(total=total_steps, initial=start, unit='step', dynamic_ncols=True,
                     disable=not sys.stderr.isatty())

  def advance(self, step: int) -> None:
    """Moves the bar."""
    if self._active:
      self._bar.update(step - self._bar.n)

  def write(self, step: int, row: dict[str, Any]) -> None:
    """Writes one row: a line of JSON, scalars to TensorBoard, a line of text."""
    if not self._active:
      return
    with self._path.open('a') as file:
      file.write(json.dumps({'step': step, **row}) + '\n')
    for name, value in row.items():
      if isinstance(value, (int, float)):
        self._board.add_scalar(name, value, step)
    text = '  '.join(f'{name} {value:.4g}' for name, value in row.items()
                     if isinstance(value, (int, float)))
    self._bar.write(f'step {step:>6}  {text}', file=sys.stderr)

  def close(self) -> None:
    """Flushes everything."""
    if self._active:
      self._bar.close()
      self._board.close()


def _place(row: Row, start: int) -> tuple[int, bool] | None:
  """Returns what tells a row from others, None for one of a step that comes again.

  Training's rows have a loss; those of the evaluation after the same step do not.
  """
  step = row.get('step')
  return (step, 'loss' not in row) if isinstance(step, int) and step <= start else None
