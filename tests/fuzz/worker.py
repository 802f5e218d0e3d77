"""Runs cases in a child process each kind: one that hangs or dies is replaced, and told of.

  python tests/fuzz/worker.py prompts 'seed=-1'      # a case alone, with its traceback
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import io
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

ROOT = pathlib.Path(__file__).parents[2]
if __name__ == '__main__':
  sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from fuzz.case import FAULTY, Accepted, Case  # noqa: E402

# The module that lists each kind.
KINDS = {
    'training configs': 'config_cases', 'sweeps and studies': 'config_cases',
    'published configs': 'checkpoint_cases', 'weights': 'checkpoint_cases',
    'saved runs': 'checkpoint_cases',
    'files beside weights': 'text_cases', 'templates': 'text_cases',
    'prompts': 'text_cases', 'images': 'image_cases', 'commands': 'command_cases'}
# These leave flags behind: each has a process of its own.
ALONE = 'commands'
# What all of them import; flags are not to be defined.
PRELOADED = ['lib.notebook', 'lib.tasks.registry', 'adapters.answerer', 'tokenizers', 'optax',
             'orbax.checkpoint', 'PIL.Image', 'matplotlib.pyplot', 'fuzz.case']
# A worker starts, and makes what its cases share.
STARTING = 120.0
LONGEST_LINE = 4000


@functools.cache
def cases(kind: str) -> Mapping[str, Case]:
  """Returns the cases of a kind by name."""
  module = (KINDS | {FAULTY: 'case'})[kind]
  return {case.name: case for case in importlib.import_module(f'fuzz.{module}').KINDS[kind]()}


def faults(kind: str, names: Sequence[str], shared: pathlib.Path) -> dict[str, str]:
  """Runs cases; returns what is wrong with the outcome of each that went wrong, by name."""
  found, worker = {}, None
  for name in names:
    case = cases(kind)[name]
    worker = worker or _Worker(kind, shared)
    outcome = worker.run(name, case.seconds)
    fault = judged(case, outcome)
    if fault:
      found[name] = fault
    if worker.ended or kind == ALONE:
      worker.end()
      worker = None
  if worker:
    worker.end()
  return found


def judged(case: Case, outcome: tuple[str, str]) -> str:
  """Returns what is wrong with an outcome, '' for nothing."""
  how, text = outcome
  if case.fine:
    return '' if how == 'accepted' else f'is fine, and was not accepted: {how}: {text}'
  if how != 'refused':
    return f'{how}: {text}'
  if len(text) > LONGEST_LINE or '\n' in text:
    return f'refused in more than a line: {text}'
  if case.says and not any(words in text for words in case.says):
    return f'refused without a word of {" or ".join(case.says)}: {text}'
  return ''


class _Worker:
  """Holds a process that runs cases of one kind."""

  def __init__(self, kind: str, shared: pathlib.Path) -> None:
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, {
        'PYTHONPATH': os.pathsep.join((str(ROOT), str(ROOT / 'tests'))), 'OMP_NUM_THREADS': '1'}):
      multiprocessing.forkserver.ensure_running()
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(target=_serve, args=(theirs, kind, str(shared)), daemon=True)
    self._process.start()
    theirs.close()
    self.ended = False
    self._ask(None, STARTING)

  def run(self, name: str, seconds: float) -> tuple[str, str]:
    return self._ask(name, seconds)

  def _ask(self, name: str | None, seconds: float) -> tuple[str, str]:
    try:
      if name is not None:
        self._pipe.send(name)
      if self._pipe.poll(seconds):
        return self._pipe.recv()
      how = 'never ends', f'not within {seconds:g} s'
    except (EOFError, OSError):
      self._process.join(10)
      how = 'died', f'exit code {self._process.exitcode}'
    self.ended = True
    return how

  def end(self) -> None:
    self._process.kill()
    self._process.join()
    self._pipe.close()


def _serve(pipe: Any, kind: str, shared: str) -> None:
  """Answers names of cases with outcomes, until there are no more."""
  os.chdir(ROOT)
  warnings.simplefilter('ignore')
  with tempfile.TemporaryFile('w+b') as screen:
    for number in (1, 2):
      os.dup2(screen.fileno(), number)
    cases(kind)
    _trace_once()
    # As in tests/conftest.py.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    pipe.send('ready')
    while True:
      name = pipe.recv()
      pipe.send(outcome(cases(kind)[name], pathlib.Path(shared)))


def _trace_once() -> None:
  """Finds the shapes of equal models once: hundreds of cases read the same few, damaged."""
  from models import checkpoints
  shapes, found = checkpoints._shapes, {}

  def once(model: Any) -> Any:
    return found.get(repr(model)) or found.setdefault(repr(model), shapes(model))

  checkpoints._shapes = once


def outcome(case: Case, shared: pathlib.Path) -> tuple[str, str]:
  """Runs a case: how it ended, and the line that a user would read."""
  from lib.runtime import cli
  with tempfile.TemporaryDirectory() as folder:
    try:
      case.call(pathlib.Path(folder), shared)
    except Accepted:
      return 'accepted', 'the work would begin'
    except cli.USER_ERRORS as error:
      return _said(error)
    except BaseException as error:
      return 'traceback', _short(error)
  return 'accepted', 'it returned'


def _said(error: Exception) -> tuple[str, str]:
  """Returns the line of a command that ends with an error, if the words are this project's."""
  from absl import flags

  from lib.runtime import cli
  with contextlib.redirect_stderr(io.StringIO()) as screen, contextlib.suppress(SystemExit):
    cli.stop(error)
  line = screen.getvalue().removesuffix('\n')
  last = traceback.extract_tb(error.__traceback__)[-1].filename
  ours = last.startswith(str(ROOT)) and 'site-packages' not in last
  named = isinstance(error, OSError) and error.filename
  if not (ours or named or isinstance(error, flags.Error)):
    return "in a library's words", _short(error)
  return 'refused', line


def _short(error: BaseException) -> str:
  places = [f'{pathlib.Path(frame.filename).name}:{frame.lineno}'
            for frame in traceback.extract_tb(error.__traceback__)[-3:]]
  return f'{type(error).__name__}: {str(error)[:200]!r} at {" > ".join(places)}'


if __name__ == '__main__':
  case = cases(sys.argv[1])[sys.argv[2]]
  with tempfile.TemporaryDirectory() as own, tempfile.TemporaryDirectory() as shared:
    case.call(pathlib.Path(own), pathlib.Path(shared))
