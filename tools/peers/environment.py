"""Environments of other libraries, and a process in one that answers requests."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

HERE = pathlib.Path(__file__).parent
# Their versions count; those of what they stand on are told beside the figures.
WANTED = {'kvpress': '0.5.5', 'transformers': '5.2.0', 'pylate': '1.6.0'}


def python_of(peer: str, given: str, folder: pathlib.Path) -> pathlib.Path:
  """Returns the Python of a peer's environment.

  Args:
    peer: the name of a requirements file beside this one.
    given: its path, '' to make the environment where it is not there yet.
    folder: holds those that are made.

  Raises:
    ValueError: there is none at this path, or it cannot be made.
  """
  if given:
    if not os.access(given, os.X_OK):
      raise ValueError(f'--peer={given} is no Python: give the bin/python of an environment with '
                       f'what {HERE / peer}.txt lists, or leave it out to have one made')
    return pathlib.Path(given)
  home = folder / 'peers' / peer
  python, done = home / 'bin' / 'python', home / 'made'
  if not done.exists():
    # Every version is listed, and some packages ask for more than is used.
    for command in ([sys.executable, '-m', 'venv', home],
                    [python, '-m', 'pip', 'install', '--no-deps', '-r', HERE / f'{peer}.txt']):
      if subprocess.run(list(map(str, command)), check=False).returncode:
        raise ValueError(f'{home} cannot be made (see above): make an environment with what '
                         f'{HERE / peer}.txt lists, and give its --peer=.../bin/python')
    done.touch()
  return python


def use_cores(count: int) -> None:
  """Leaves this process, and those that it starts, so many cores; before JAX counts them.

  Raises:
    ValueError: there are fewer, or none are asked for.
  """
  there = sorted(os.sched_getaffinity(0))
  if not 1 <= count <= len(there):
    raise ValueError(f'--threads={count} is impossible: this process may use {len(there)} cores')
  os.sched_setaffinity(0, there[:count])


class Peer:
  """Holds a process of another environment, which ends with the `with` that it stands in.

  Attributes:
    versions: of its libraries.
  """

  def __init__(self, python: pathlib.Path, script: str, *, library: str, threads: int) -> None:
    """Starts a script of tools/peers/theirs.

    Args:
      python: of the environment.
      script: name of the file, without ending.
      library: whose version must be that of `WANTED`.
      threads: of its products.

    Raises:
      ValueError: it does not start, or with another version.
    """
    threads_of = {name: str(threads) for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')}
    offline = {'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false'}
    # A file, as nobody reads a pipe while an answer is waited for.
    self._open = contextlib.ExitStack()
    self._said = self._open.enter_context(tempfile.TemporaryFile('w+'))  # noqa: SIM115
    self._process = self._open.enter_context(subprocess.Popen(
        [str(python), str(HERE / 'theirs' / f'{script}.py')], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=self._said, text=True,
        env={**os.environ, **threads_of, **offline, 'PYTHONPATH': ''}))
    self._open.callback(self._process.kill)
    self.versions: dict[str, str] = self._line()
    if self.versions[library] != WANTED[library]:
      self.__exit__()
      raise ValueError(f'{python} has {library} {self.versions[library]}, and figures are of '
                       f'{WANTED[library]}: give an environment with that')

  def __enter__(self) -> Peer:
    return self

  def __exit__(self, *reasons: object) -> None:
    # Of a process that ended by itself, what was still to be sent stays behind.
    with contextlib.suppress(BrokenPipeError):
      self._open.close()

  def ask(self, do: str, **arguments: Any) -> Any:
    """Returns the answer to a request.

    Raises:
      ValueError: the other side failed.
    """
    assert self._process.stdin is not None
    # `_line` tells why nobody reads it.
    with contextlib.suppress(BrokenPipeError):
      print(json.dumps({'do': do, **arguments}), file=self._process.stdin, flush=True)
    line = self._line()
    if 'error' in line:
      raise ValueError(f'the other library cannot {do}: {line["error"]}')
    return line['answer']

  def _line(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      self._process.wait()
      self._said.seek(0)
      said = self._said.read().strip().splitlines() or ['nothing']
      self.__exit__()
      raise ValueError(f'{self._process.args[0]} ended, and said last: {said[-1]}')
    found: dict[str, Any] = json.loads(line)
    return found
