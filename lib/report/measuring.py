"""Measures row by row: reads the rows that a file has, measures the missing ones, adds them.

A row (lib/report/rows.py) is told from others by its head: the keys that it has before anything is
measured, such as a method and a batch size. Of several rows with one head the newest counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lib import programs
from lib.report.rows import Row, append_jsonl, plain, read_jsonl

# What a wrong setting, or a method that cannot do what is asked of it, raises.
FAILURES = (ValueError, FloatingPointError)


def measure_rows(heads: Iterable[Row], measure: Callable[[Row], Row], *,
                 path: str | Path | None = None, about: Row | None = None, again: bool = False,
                 write: bool = True, failures: tuple[type[Exception], ...] = FAILURES,
                 essential: Callable[[Row], bool] = lambda head: False) -> list[dict[str, Any]]:
  """Returns a row for each head: the newest one in the file, or else a row that is measured now.

  A failure costs only its own row, which gets `failed` and, as `note`, the reason. It is measured
  again the next time, and written again only if the reason is another one.

  Args:
    heads: the first keys of each row, in the order to measure; all heads have the same keys.
    measure: takes a head and returns the other keys of its row.
    path: a file of JSON lines, to which each row is added as soon as it is measured. None measures
      every row and writes none.
    about: keys that every new row gets, such as `timing.machine()`; those of `measure` win.
    again: measures also the rows that the file has.
    write: whether this process writes; of several only one may.
    failures: exceptions that end a row instead of the loop.
    essential: whether nothing is worth measuring without the row of a head.

  Raises:
    ValueError: an essential row failed; it is in the file.
  """
  heads = list(heads)
  stored = newest(path, tuple(heads[0])) if path is not None and heads else {}
  rows = []
  with tqdm(heads, disable=not sys.stderr.isatty(), unit='row') as bar:
    for head in bar:
      bar.set_description(', '.join(map(str, head.values()))[:60])
      before = stored.get(identity(head, tuple(head)))
      if before is not None and not again and not before.get('failed'):
        rows.append(before)
        continue
      row = plain({**head, **(about or {}), **_measured(head, measure, failures)})
      if path is not None and write and not _same_failure(row, before):
        append_jsonl(path, row)
      programs.let_go()
      if row.get('failed') and essential(head):
        raise ValueError(row['note'])
      rows.append(row)
  return rows


def newest(path: str | Path, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Reads {`identity`: row} from a file of JSON lines; of rows alike in `keys` the last counts.

  The order is that in which the identities first appear. A file that does not exist has no rows.
  """
  rows = read_jsonl(path) if Path(path).exists() else []
  return {identity(row, keys): row for row in rows}


def identity(row: Row, keys: Sequence[str]) -> str:
  """Returns the values of a row's keys as text, the same before and after a file has held them."""
  return json.dumps([plain(row.get(key, '')) for key in keys], sort_keys=True)


def measured(rows: Iterable[Row]) -> list[Row]:
  """Returns the rows that did not fail."""
  return [row for row in rows if not row.get('failed')]


def faults(rows: Iterable[Row], keys: Sequence[str]) -> list[str]:
  """Returns a text for each row that failed (`failed`, `note`) or is at fault (`fault`).

  Args:
    rows: as measured.
    keys: those of the head, which name the row.
  """
  reasons = [(row, row.get('note') if row.get('failed') else row.get('fault')) for row in rows]
  return [f'{", ".join(str(row[key]) for key in keys)}: {reason}'
          for row, reason in reasons if reason]


def check_faults(rows: Sequence[Row], keys: Sequence[str]) -> None:
  """Raises ValueError with all `faults`, for a command to end with; does nothing without any."""
  texts = faults(rows, keys)
  if texts:
    raise ValueError(f'{len(texts)} of {len(rows)} rows are not as they should be: '
                     f'{"; ".join(texts)}')


def _measured(head: Row, measure: Callable[[Row], Row],
              failures: tuple[type[Exception], ...]) -> Mapping[str, Any]:
  try:
    return measure(head)
  except failures as reason:
    return {'failed': True, 'note': ' '.join(str(reason).split())}


def _same_failure(row: Row, before: Row | None) -> bool:
  return bool(row.get('failed') and before and before.get('failed')
              and row['note'] == before['note'])
