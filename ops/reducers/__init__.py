"""Methods without parameters: each folder's small dict, joined.

Tests, the README's table, the command line and the explain tool read it. Methods on the cache are
called otherwise and stand apart (ops/reducers/cache).
"""

from collections.abc import Mapping
from typing import TypeVar

from ops.reducers.baselines import BASELINES
from ops.reducers.language import LANGUAGE
from ops.reducers.method import Method
from ops.reducers.projector import PROJECTOR
from ops.reducers.vision import VISION

T = TypeVar('T', bound=type)


def join(*folders: Mapping[str, T]) -> dict[str, T]:
  """Joins dicts of methods by name.

  Raises:
    ValueError: for a name that two of them have.
  """
  joined: dict[str, T] = {}
  for methods in folders:
    twice = sorted(joined.keys() & methods.keys())
    if twice:
      raise ValueError(f'methods named twice: {twice}; rename one where its folder '
                       'lists it')
    joined |= methods
  return joined


REDUCERS: dict[str, type[Method]] = join(BASELINES, VISION, PROJECTOR, LANGUAGE)
