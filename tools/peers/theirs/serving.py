"""Answers requests, a line of JSON each, and tells how much memory this process takes."""

from __future__ import annotations

import ctypes
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def serve(versions: Mapping[str, str], actions: Mapping[str, Callable[..., Any]]) -> None:
  """Answers requests until there are no more: {'do': name of an action, its arguments}.

  Args:
    versions: of libraries, told first.
    actions: name -> what takes the arguments, and returns what JSON can hold.
  """
  # What libraries print must not stand between answers.
  out = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  print(json.dumps(versions), file=out, flush=True)
  for line in sys.stdin:
    request = json.loads(line)
    try:
      answer = {'answer': actions[request.pop('do')](**request)}
    except Exception as error:  # Whatever it is, the other side tells it.
      answer = {'error': f'{type(error).__name__}: {error}'}
    print(json.dumps(answer), file=out, flush=True)


def peak_megabytes(run: Callable[[], Any]) -> tuple[float, float]:
  """Measures this process's resident memory before a call, and its peak during it (Linux)."""
  ctypes.CDLL(None).malloc_trim(0)
  pathlib.Path('/proc/self/clear_refs').write_text('5')
  before = _status('VmRSS')
  run()
  return before, _status('VmHWM')


def _status(key: str) -> float:
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024
