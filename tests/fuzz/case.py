"""Bad inputs as cases, and what makes them: values of the wrong kind or range, damaged files."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

NAN, INFINITY = float('nan'), float('inf')
FAULTY = 'faults'
# Impossible values of a key, by the kind of what belongs there.
BAD: Mapping[type, tuple[Any, ...]] = {
    bool: ('abc', 5, NAN, [], {}),
    int: (NAN, INFINITY, -1, -10 ** 12, 10 ** 12, 2 ** 70, 1.5, 'abc', '', [], {}, True),
    float: (NAN, INFINITY, -INFINITY, -1.5, 'abc', '', [], {}, True),
    str: (5, NAN, True, ['abc'], {'abc': 1}, 'no such thing', '\ud800'),
    tuple: (5, NAN, 'abc', True, {'abc': 1}, [NAN], [{}], [[[]]]),
    dict: (5, NAN, 'abc', True, [1], {'no such key': 1})}
BAD = {**BAD, list: BAD[tuple]}


class Accepted(BaseException):
  """Stops a case where the work would begin: the input was taken."""


@dataclasses.dataclass(frozen=True)
class Case:
  """Holds one input and who gets it.

  Attributes:
    name: unique among the cases of its kind.
    call: (folder for the case's own files, folder that all cases share) -> nothing of interest.
    says: one of these must be in the error's line; () for anything.
    fine: whether the input is a good one: the others are what it was before.
    seconds: that it may take.
  """

  name: str
  call: Callable[[pathlib.Path, pathlib.Path], Any]
  says: tuple[str, ...] = ()
  fine: bool = False
  seconds: float = 20.0


def shown(value: Any) -> str:
  """Returns a value in a few letters."""
  text = ascii(value)
  return text if len(text) <= 40 else f'{text[:37]}...'


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
  """Yields (path, value) of a tree of dicts; an empty dict is a leaf."""
  if isinstance(tree, Mapping) and tree:
    for key, value in tree.items():
      yield from leaves(value, (*path, key))
  else:
    yield path, tree


def changed(tree: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
  """Returns a copy of a tree of dicts with another value at a path."""
  first, *rest = path
  return {**tree, first: changed(tree[first], tuple(rest), value) if rest else value}


def bad_values(tree: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
  """Yields (path, impossible value) for all values of every key of a tree."""
  for path, value in leaves(tree):
    for bad in BAD.get(type(value), ()):
      yield path, bad


def some_bad_values(tree: Mapping[str, Any],
                    rng: random.Random) -> Iterator[tuple[tuple[str, ...], Any]]:
  """Yields one of them for every key."""
  for path, value in leaves(tree):
    if type(value) in BAD:
      yield path, rng.choice(BAD[type(value)])


# Files.


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes JSON; NaN as Python does, half characters as escapes."""
  path.write_text(json.dumps(content))


def truncated(path: pathlib.Path, rng: random.Random) -> None:
  """Cuts a file at a random place."""
  os.truncate(path, rng.randrange(path.stat().st_size))


def flipped(path: pathlib.Path, rng: random.Random, end: int | None = None) -> None:
  """Turns a random bit of a file, or of its first bytes up to `end`."""
  content = bytearray(path.read_bytes())
  content[rng.randrange(end or len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


def overwritten(path: pathlib.Path, rng: random.Random) -> None:
  """Fills a file with random bytes."""
  path.write_bytes(rng.randbytes(path.stat().st_size))


def zeros(path: pathlib.Path, rng: random.Random) -> None:
  """Fills a file with zeros."""
  del rng
  path.write_bytes(bytes(path.stat().st_size))


Damage = Callable[[pathlib.Path, random.Random], Any]


def _is(content: bytes) -> Damage:
  return lambda path, rng: path.write_bytes(content)


def _rewritten(change: Callable[[str], bytes]) -> Damage:
  return lambda path, rng: path.write_bytes(change(path.read_text()))


def _instead(make: Callable[[pathlib.Path], Any]) -> Damage:
  def damage(path: pathlib.Path, rng: random.Random) -> None:
    path.unlink()
    make(path)
  return damage


# What may have become of a file whose content has a form: (path, rng) -> nothing.
DAMAGE = {
    'truncated': truncated, 'overwritten': overwritten, 'empty': _is(b''), 'zeros': zeros,
    'folder': _instead(pathlib.Path.mkdir), 'pipe': _instead(os.mkfifo),
    'device': _instead(lambda path: path.symlink_to('/dev/zero')),
    'dangling': _instead(lambda path: path.symlink_to('nowhere')),
    'itself': _instead(lambda path: path.symlink_to(path.name)),
    'web page': _is(b'<!DOCTYPE html><html><body>404</body></html>'),
    'pointer': _is(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n'),
    'pickle': _is(b'cos\nsystem\n(S"exit 1"\ntR.')}
# The same of JSON, in ways that other files cannot be.
JSON_DAMAGE = {
    'list': _is(b'[{"a": 1}]'), 'number': _is(b'3'), 'null': _is(b'null'), 'text': _is(b'"a"'),
    'deep': _is(b'[' * 100_000), 'deep objects': _is(b'{"a":' * 100_000),
    'digits': _is(b'{"a": ' + b'9' * 9999 + b'}'), 'Latin': _is(b'{"a": "\xe9"}'),
    'UTF-16': _rewritten(lambda text: text.encode('utf-16')),
    'NaN': _rewritten(lambda text: text.replace('{', '{"a": NaN, ', 1).encode()),
    'twice': _is(b'{"a": 1, "a": 2}'), 'comment': _is(b'{"a": 1} // one'),
    'comma': _is(b'{"a": 1,}')}


def copied(source: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """Returns a copy of a folder inside another."""
  return pathlib.Path(shutil.copytree(source, folder / 'copy'))


def once(folder: pathlib.Path, make: Callable[[pathlib.Path], Any]) -> pathlib.Path:
  """Returns a folder that `make` fills, unless a worker before this one has."""
  if not folder.exists():
    unfinished = folder.with_name(f'{folder.name}-unfinished')
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    make(unfinished)
    unfinished.rename(folder)
  return folder


# Outcomes that are faults, for the test of what runs the cases.


def _unsaid(folder: pathlib.Path, shared: pathlib.Path) -> None:
  raise ValueError('no')


def faulty() -> Iterator[Case]:
  """Yields a case of every fault that there is."""
  yield Case('traceback', lambda folder, shared: {}['abc'])
  yield Case('accepted', lambda folder, shared: None)
  yield Case('never ends', lambda folder, shared: time.sleep(60), seconds=0.5)
  yield Case('died', lambda folder, shared: os.abort())
  yield Case("in a library's words", lambda folder, shared: json.loads('abc'))
  yield Case('refused without a word of key', _unsaid, says=('key',))
  yield Case('is fine, and was not accepted', _unsaid, fine=True)


KINDS = {FAULTY: faulty}
