"""Reads the text and JSON files around a checkpoint, which anybody may have written."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from ops import values

# Twice the largest tokenizer.json that is published.
MOST_BYTES = 64 << 20
# Characters of a wrong value that an error repeats.
SHOWN = 200


def read_text(path: pathlib.Path) -> str:
  """Returns the text of a file in UTF-8.

  Raises:
    ValueError: no regular file (a pipe would wait for ever), over `MOST_BYTES`, or no UTF-8.
    OSError: the file is not there, or may not be read.
  """
  if os.path.lexists(path) and not path.is_file():
    raise ValueError(f'{path} is no regular file, but a folder, a pipe or a link that leads '
                     'nowhere: put the file itself there')
  with path.open('rb') as file:
    if os.fstat(file.fileno()).st_size > MOST_BYTES:
      raise ValueError(f'{path} has more than {MOST_BYTES >> 20} MB, which no such file has: fetch '
                       'it again')
    content = file.read()
  try:
    return content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is no text in UTF-8 ({error.reason} at byte {error.start}): fetch '
                     'it again, or save it as UTF-8') from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns the object that a JSON file holds.

  Raises:
    ValueError: as `read_text`; no JSON, nested too deeply, NaN or a key given twice, or no object.
    OSError: as `read_text`.
  """
  text = read_text(path)
  try:
    content = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is no valid JSON ({error}): fetch it again') from error
  if not isinstance(content, dict):
    raise ValueError(f'{path} holds {shown(content)}, and an object with keys is expected: fetch '
                     'it again')
  return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns the pairs of an object as a dict, where no key is given twice."""
  content: dict[str, Any] = {}
  for key, value in pairs:
    if key in content:
      raise ValueError(f'the key {shown(key)} is given twice')
    content[key] = value
  return content


def _refuse(constant: str) -> None:
  raise ValueError(f'{constant} is no number of JSON')


def read_json_if_there(path: pathlib.Path) -> dict[str, Any]:
  """Returns the same, {} where nothing has that name."""
  return read_json(path) if os.path.lexists(path) else {}


def value_of(content: Mapping[str, Any], key: str, kind: Any, default: Any = None) -> Any:
  """Returns the value of a key, `default` where it is missing, None where it is null.

  Raises:
    ValueError: a value of another type than `kind`, as `ops.values.check`.
  """
  value = content.get(key, default)
  if value is not None:
    values.check(key, value, kind)
  return value


def needed(content: Mapping[str, Any], key: str, kind: Any) -> Any:
  """Returns the value of a key that must be there.

  Raises:
    ValueError: it is missing or null, or as `value_of`.
  """
  value = value_of(content, key, kind)
  if value is None:
    raise ValueError(f'{key} is missing: it must be {values.describe(kind)}')
  return value


@contextlib.contextmanager
def naming(path: Any) -> Iterator[None]:
  """Puts the name of a file in front of what is said of its content."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error


def shown(value: Any) -> str:
  """Returns a wrong value as an error repeats it: one line, not too long."""
  text = repr(value)
  return text if len(text) <= SHOWN else f'{text[:SHOWN]}…'
