"""Words the error of every value that must be one of a few."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


def near(value: object, choices: Iterable[object]) -> str:
  """Returns " (did you mean 'x'?)" for the choice most like a value, '' where none is."""
  matches = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
  return f' (did you mean {matches[0]!r}?)' if matches else ''


def check(what: str, value: object, choices: Iterable[object]) -> None:
  """Raises a ValueError, which lists the choices, unless a value is among them.

  Args:
    what: the words in front of the value, as 'mode=' or 'method '.
    value: the value.
    choices: the values that are allowed.
  """
  choices = list(choices)
  if value not in choices:
    raise ValueError(f'{what}{reprlib.repr(value)} is unknown{near(value, choices)}: choose one of '
                     f'{", ".join(map(str, choices))}')


def check_key(what: str, key: object, keys: Iterable[object]) -> None:
  """Raises a ValueError, which lists the keys, unless a key is among them.

  Args:
    what: the words in front of the key, as 'a ViT has no setting '.
    key: the key.
    keys: the keys that there are.
  """
  keys = list(keys)
  if key not in keys:
    raise ValueError(f'{what}{key!r}{near(key, keys)}: choose from {", ".join(map(str, keys))}')
