"""Renders chat templates in a child process, which they can neither keep for ever nor fill.

A template is a program from somewhere else. Jinja's sandbox keeps it from reaching out, but not
from computing without end or from filling the memory, even while it is compiled; and inside one
call, as of 'a' * 10**10, nothing in Python can stop it. The system can: the child has limits of
memory and processor time, set before it sees a template. It starts with the first template, in
0.06 s, and stays: a prompt then takes 0.1 ms where it took 0.04 in this process.

Run as a script this file is the child. Requests and answers are lines of JSON.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

# Of one rendering, in seconds of processor time; one takes milliseconds.
SECONDS = 5.0
# Of the child, in bytes; it needs 50 MB.
MEMORY = 512 << 20
# Of a rendered text, in characters: more than any context holds.
MOST_CHARACTERS = 16 << 20


class _Child:
  """Holds the process that renders; it is started when it is first needed, and again if it died."""

  def __init__(self) -> None:
    self._process: subprocess.Popen[bytes] | None = None
    self._lock = threading.Lock()

  def ask(self, request: bytes) -> tuple[bytes, int]:
    """Returns the answer to a line, empty if the child died of it, and then its exit status."""
    with self._lock:
      if self._process is None:
        # A fork of this process, which runs threads, would not be safe; this is none.
        self._process = subprocess.Popen(
            [sys.executable, '-P', __file__, str(MEMORY)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
      process, answer = self._process, b''
      assert process.stdin is not None
      assert process.stdout is not None
      try:
        with contextlib.suppress(BrokenPipeError):
          process.stdin.write(request)
          process.stdin.flush()
          answer = process.stdout.readline()
      finally:
        # Also where somebody interrupts: the answer would be taken for the next one's.
        if not answer:
          self._end(process)
      return answer, process.returncode or 0

  def close(self) -> None:
    """Ends the child, if there is one."""
    if self._process is not None:
      self._end(self._process)

  def _end(self, process: subprocess.Popen[bytes]) -> None:
    # One that died of its template keeps its own status.
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
      if pipe is not None:
        with contextlib.suppress(BrokenPipeError):
          pipe.close()
    self._process = None


_child = _Child()
atexit.register(_child.close)


def render(source: str, variables: Mapping[str, Any] | None) -> str:
  """Returns the text that a template makes of variables; '' where they are None: it is compiled.

  Raises:
    ValueError: a template that is not valid, that fails, refuses, reaches out, or takes more than
      it may; or variables that JSON does not hold. The line begins with a verb.
  """
  try:
    request = json.dumps({'source': source, 'variables': variables, 'seconds': SECONDS})
  except (TypeError, ValueError, RecursionError) as error:
    raise ValueError(f'takes texts, numbers, lists and dicts alone ({error})') from error
  line, status = _child.ask(request.encode() + b'\n')
  if not line:
    what = (f'does not end within {SECONDS:g} s' if status == -signal.SIGPROF else
            f'ended the process that renders it (status {status})')
    raise ValueError(what)
  answer = json.loads(line)
  if 'fault' in answer:
    raise ValueError(answer['fault'])
  return answer['text']


# The child.


class _RefusalError(Exception):
  """Carries what a template says with raise_exception."""


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Callable[..., str]:
  from jinja2.ext import Extension
  from jinja2.sandbox import ImmutableSandboxedEnvironment

  class Generation(Extension):
    """Reads {% generation %}, which marks what a model learns to say: its content alone."""

    tags = {'generation'}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
      next(parser.stream)
      return parser.parse_statements(('name:endgeneration',), drop_needle=True)

  def refuse(message: str) -> None:
    raise _RefusalError(message)

  # It gets nothing but what templates rely on.
  environment = ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols', Generation])
  environment.globals['raise_exception'] = refuse
  environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
  # Jinja's own escapes for HTML.
  environment.filters['tojson'] = _to_json
  return environment.from_string(source).render


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                    sort_keys=sort_keys)


def _answer(source: str, variables: Mapping[str, Any] | None) -> dict[str, str]:
  """Returns {'text': ...}, or {'fault': ...}."""
  import jinja2
  try:
    template = _compiled(source)
    text = '' if variables is None else template(**variables)
  except _RefusalError as error:
    return {'fault': f'refuses these messages: {_line(error)}'}
  except jinja2.TemplateSyntaxError as error:
    return {'fault': f'is no valid template: {_line(error)}'}
  except jinja2.exceptions.SecurityError as error:
    return {'fault': f'is stopped by the sandbox: {_line(error)}'}
  except MemoryError:
    return {'fault': f'takes more than {MEMORY >> 20} MB of memory'}
  except Exception as error:  # A template can raise anything.
    return {'fault': f'fails: {type(error).__name__}: {_line(error)}'}
  if len(text) > MOST_CHARACTERS:
    return {'fault': f'makes a text of {len(text):,} characters, more than any model reads'}
  return {'text': text}


def _line(error: Exception) -> str:
  return ' '.join(str(error).split())[:200]


def _serve(memory: int) -> None:
  """Answers requests until there are no more."""
  # Where the system has no such limit (macOS), that of time holds.
  with contextlib.suppress(ValueError):
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
  # Who interrupts means the parent, which asks for the next text all the same.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  _compiled('')  # What is imported here takes no template's time.
  for line in sys.stdin.buffer:
    request = json.loads(line)
    # The signal ends the process, whatever it is doing.
    signal.setitimer(signal.ITIMER_PROF, request['seconds'])
    answer = _answer(request['source'], request['variables'])
    signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.buffer.write(json.dumps(answer).encode() + b'\n')
    sys.stdout.buffer.flush()


if __name__ == '__main__':
  _serve(int(sys.argv[1]))
