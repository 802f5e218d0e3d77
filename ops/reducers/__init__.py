"""Methods without parameters: each folder's small dict, joined.

Tests, the README's table, the command line and the explain tool read it. Methods on the cache are
called otherwise and stand apart (ops/reducers/cache).
"""

from ops.reducers.baselines import BASELINES
from ops.reducers.language import LANGUAGE
from ops.reducers.projector import PROJECTOR
from ops.reducers.vision import VISION


def join(*folders: dict[str, type]) -> dict[str, type]:
  """Joins dicts of methods by name.

  Raises:
    ValueError: for a name that two of them have.
  """
  joined: dict[str, type] = {}
  for methods in folders:
    twice = sorted(joined.keys() & methods.keys())
    if twice:
      raise ValueError(f'methods named twice: {twice}; rename one where its folder '
                       'lists it')
    joined |= methods
  return joined


REDUCERS: dict[str, type] = join(BASELINES, VISION, PROJECTOR, LANGUAGE)
