"""Keys of configs that have a new name; the old one works for one release, and says so once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from absl import logging

# Part of a config: {old key: new key}. 'reduce' stands for each `config.reduce.<place>`.
RENAMED = {
    'reduce': {'of': 'token_kinds'},
    'task': {'way': 'fill'},
    'sweep': {'form': 'budget'},
}
_said: set[tuple[str, str]] = set()


def current(part: str, config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a part of a config under the current names of its keys.

  Args:
    part: a key of `RENAMED`.
    config: that part of a config.

  Raises:
    ValueError: a key is set under both of its names.
  """
  old = RENAMED[part].keys() & {key for key, value in config.items() if value is not None}
  plain = {key: value for key, value in config.items() if key not in RENAMED[part]}
  return plain | {_renamed(part, key, config): config[key] for key in old}


def flag(argument: str) -> str:
  """Returns a command line argument that names a renamed key with its current name."""
  for part, names in RENAMED.items():
    place = r'\.\w+' if part == 'reduce' else ''
    for old in names:
      match = re.match(rf'(--?(?:config\.)?{part}{place}\.){old}(?=$|=)', argument)
      if match:
        return match[1] + _renamed(part, old, {}) + argument[match.end():]
  return argument


def _renamed(part: str, key: str, config: Mapping[str, Any]) -> str:
  new = RENAMED[part][key]
  if config.get(new) is not None:
    raise ValueError(f'{part}: {key!r} is the old name of {new!r}, and both are set: leave out '
                     f'{key!r}')
  if (part, key) not in _said:
    _said.add((part, key))
    logging.warning('%s: %r is now called %r; the old name goes with the next release', part, key,
                    new)
  return new
