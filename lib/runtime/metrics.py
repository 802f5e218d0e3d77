"""Writes a run's metrics: JSON lines, TensorBoard, and a bar or plain lines on screen."""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
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
    # Not a SummaryWriter, whose thread loses with a kill what it has not written yet.
    self._board = EventsWriter(str(folder / 'events'), f'.{os.getpid()}')
    self._board.write_event(Event(wall_time=time.time(), step=start + 1,
                                  session_log=SessionLog(status=SessionLog.START)))
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
    scalars = {name: value for name, value in row.items() if isinstance(value, (int, float))}
    self._board.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=[
        Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()])))
    self._board.flush()
    text = '  '.join(f'{name} {value:.4g}' for name, value in scalars.items())
    self._bar.write(f'step {step:>6} of {self._bar.total}  {text}', file=sys.stderr)

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
