"""Checksums of a folder's files, in a list that `sha256sum --check SHA256SUMS` reads as well."""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
from collections.abc import Collection

LIST = 'SHA256SUMS'


class Damaged(ValueError):
  """Files are not what was written."""


def write(folder: str | pathlib.Path, names: Collection[str] = ()) -> None:
  """Writes the list of a folder's files.

  Args:
    folder: which the list is put into.
    names: of its files; none for all of them, those in folders below too.
  """
  folder = pathlib.Path(folder)
  (folder / LIST).write_text(''.join(
      f'{_digest(folder / name)}  {name}\n' for name in sorted(names or _files(folder))))


def check(folder: str | pathlib.Path, names: Collection[str] = ()) -> bool:
  """Reads files and compares them with the list; returns whether there is one.

  Args:
    folder: with the list.
    names: of its files, and of its folders for all that is in them; none for everything.

  Raises:
    Damaged: a file differs from its checksum, is missing, or is not on the list.
    OSError: one cannot be read.
  """
  folder = pathlib.Path(folder)
  found = {name: _digest(folder / name) for name in sorted(_files(folder))
           if not names or name.split('/')[0] in names}
  try:
    lines = (folder / LIST).read_bytes().decode(errors='replace').splitlines()
  except FileNotFoundError:
    return False
  pairs = [re.fullmatch('([0-9a-f]{64})  (.+)', line) for line in lines]
  listed = {pair[2]: pair[1] for pair in pairs
            if pair and (not names or pair[2].split('/')[0] in names)}
  for name in sorted(listed.keys() | found.keys()):
    if listed.get(name) != found.get(name):
      raise Damaged(f'{folder / name} {"differs from" if name in found else "is missing, see"} '
                    f'its checksum in {LIST}')
  if not all(pairs):
    raise Damaged(f'{folder / LIST} is not a list of checksums')
  return True


def _files(folder: pathlib.Path) -> set[str]:
  """Names of all files that are not hidden; what other programs leave behind is."""
  def stop(error: OSError) -> None:
    raise error

  return {(pathlib.Path(place) / name).relative_to(folder).as_posix()
          for place, _, names in os.walk(folder, onerror=stop)
          for name in names if name != LIST and not name.startswith('.')}


def _digest(path: pathlib.Path) -> str:
  # Whoever opens a pipe waits for ever, and a device has no end.
  if path.exists() and not path.is_file():
    raise Damaged(f'{path} is no regular file')
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
