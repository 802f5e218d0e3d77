"""What the commands of this folder have in common: flags, and how figures are written."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

from lib.report.rows import replace_file
from lib.runtime import timing
from tools.peers.environment import Peer, python_of, use_cores

# May override: a process of tests imports several commands.
FOLDER = flags.DEFINE_string('folder', 'real', 'What `python -m tools.real.fetch` filled.',
                             allow_override=True)
PEER = flags.DEFINE_string('peer', '', 'Python of an environment with the other library; without '
                           'it one is made in the folder.')
OUT = flags.DEFINE_string('out', '', 'File of the figures; results/peers_<name>.json if not given.',
                          allow_override=True)
ROUNDS = flags.DEFINE_integer('rounds', 8, 'Timed rounds.', lower_bound=0, allow_override=True)
THREADS = flags.DEFINE_integer('threads', 2, 'Cores of either side.', lower_bound=1)


def folder() -> pathlib.Path:
  """Returns the folder of weights and data."""
  return pathlib.Path(FOLDER.value)


def needed(part: str, file: str) -> pathlib.Path:
  """Returns the first file of a pattern in a part of the folder.

  Raises:
    ValueError: it is not there.
  """
  found = sorted((folder() / part).glob(file))
  if not found:
    raise ValueError(f'there is no {file} in {folder() / part}: `python -m tools.real '
                     f'--folder={folder()}` fetches what is missing')
  return found[0]


def start(name: str, library: str, script: str) -> Peer:
  """Starts the other side on as many cores as this one, before JAX counts them.

  Raises:
    ValueError: as `python_of`, `use_cores` and `Peer`.
  """
  python = python_of(name, PEER.value, folder())
  use_cores(THREADS.value)
  return Peer(python, script, library=library, threads=THREADS.value)


def about(peer: Peer) -> dict[str, Any]:
  """Describes both sides, as the entry 'machine'."""
  return {**timing.machine(), 'peer': peer.versions, 'threads': THREADS.value,
          'rounds': ROUNDS.value}


def versions(machine: Mapping[str, Any]) -> str:
  """Names the libraries of the other side."""
  return ', '.join(f'{name} {version}' for name, version in machine['peer'].items())


def out(name: str) -> pathlib.Path:
  """Returns the file of the figures."""
  return pathlib.Path(OUT.value or f'results/peers_{name}.json')


def write(path: pathlib.Path, entries: Mapping[str, Any],
          table: Callable[[Mapping[str, Any]], str]) -> None:
  """Writes figures, and their table beside them, which it prints too."""
  path.parent.mkdir(parents=True, exist_ok=True)
  replace_file(path, json.dumps(entries, indent=1).encode() + b'\n')
  text = table(entries)
  path.with_suffix('.md').write_text(text)
  print(text)
