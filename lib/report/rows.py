"""Measurements as JSON lines, one a row: read, appended, updated, healed.

A row is a dict. Every key is optional; those known here:

  method, budget      names, as shown
  accuracy            share of images classified right, 0 to 1
  accuracy_low, accuracy_high
                      ends of its confidence interval
  nll                 mean cross-entropy of the labels
  nll_difference, nll_error, nll_freedom
                      how much higher than the baseline's, paired; its standard error, and the
                      error's degrees of freedom
  nll_low, nll_high, verdict
                      ends of the difference's confidence interval; 'better', 'worse' or ''
  miou                mean over classes of intersection over union of pixels, 0 to 1
  tokens              tokens in each layer, a list
  kept_mean           tokens kept, averaged as the writer of the row says
  kv_mb               megabytes of keys and values after one prompt
  gmacs, gmacs_ratio  10^9 multiply-accumulates of one image; their share of the unreduced model's
  median_ms, low_ms, high_ms
                      latency: median and quartiles
  speedup             unreduced latency over this one
  compile_s           seconds to compile
  note                what a reader must know, such as 'untrained: has learned parameters'
  fault               what is wrong with the thing measured, '' for nothing
  failed              True where nothing could be measured; `note` says why
  made_of             all that the row depends on and that its other keys do not say: nested, or a
                      digest
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

Row = Mapping[str, Any]


def append_jsonl(path: str | Path, row: Row) -> None:
  """Adds a row to a file of JSON lines, whole or not at all, and makes the file if need be.

  Rows already there are never touched, whoever else is writing. What a killed writer left of a
  line is removed first. NumPy and JAX values become plain ones; NaN and infinity become null.
  """
  line = json.dumps(plain(row), allow_nan=False).encode() + b'\n'
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('a+b') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    tail = _tail(file)
    if tail and _row(tail) is None:
      file.truncate(file.seek(0, os.SEEK_END) - len(tail))
    elif tail:
      line = b'\n' + line
    file.write(line)
    file.flush()
    os.fsync(file.fileno())


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
  """Reads all rows of a file of JSON lines; a last line that was cut off is left out.

  Raises:
    ValueError: another line is not a JSON object; says which.
  """
  *lines, last = Path(path).read_bytes().split(b'\n')
  rows = []
  for number, line in enumerate(lines, start=1):
    row = _row(line)
    if row is None and line.strip():
      raise ValueError(f'{path}, line {number} is not a JSON object: {_excerpt(line)!r}; '
                       'repair or delete that line')
    rows += [] if row is None else [row]
  row = _row(last)
  return rows if row is None else [*rows, row]


def update_json(path: str | Path, entries: Mapping[str, Any]) -> None:
  """Puts entries into a JSON file of named ones, in place of those that had their names."""
  path = Path(path)
  before = json.loads(path.read_text()) if path.exists() else {}
  path.parent.mkdir(parents=True, exist_ok=True)
  replace_file(path, json.dumps(before | plain(entries), indent=1).encode() + b'\n')


def keep_rows(path: str | Path, key: Callable[[Row], Any]) -> None:
  """Leaves in a file of JSON lines the last row of each key, in the order of the keys.

  Lines that are no JSON object go; a file that is already so, or does not exist, is not touched.

  Args:
    path: the file; the only writer may be this process.
    key: row -> what sorts it and tells it from others, None for a row that goes.
  """
  path = Path(path)
  content = path.read_bytes() if path.exists() else b''
  lines = {}
  for line in content.split(b'\n'):
    row = _row(line)
    if row is not None and (place := key(row)) is not None:
      lines[place] = line + b'\n'
  kept = b''.join(lines[place] for place in sorted(lines))
  if kept != content:
    replace_file(path, kept)


def replace_file(path: str | Path, content: bytes) -> None:
  """Writes a file whole or not at all: a kill leaves what was there before."""
  path = Path(path).resolve()
  draft = path.with_name(f'{path.name}.draft')
  with draft.open('wb') as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  draft.replace(path)


def plain(value: Any) -> Any:
  """Returns a value of a row in JSON's types: arrays as lists, NaN and infinity as None."""
  if isinstance(value, Mapping):
    return {str(key): plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(item) for item in value]
  if hasattr(value, 'tolist'):
    return plain(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _row(line: bytes) -> dict[str, Any] | None:
  """Parses the row in a line; None where the line is no whole JSON object."""
  try:
    row = json.loads(line)
  except ValueError:
    return None
  return row if isinstance(row, dict) else None


def _excerpt(line: bytes) -> str:
  return line[:40].decode(errors='replace')


def _tail(file: BinaryIO) -> bytes:
  """Reads the bytes after the last newline of a binary file."""
  end, tail = file.seek(0, os.SEEK_END), b''
  while end and b'\n' not in tail:
    start = max(0, end - 4096)
    file.seek(start)
    tail, end = file.read(end - start) + tail, start
  return tail.rpartition(b'\n')[2]
