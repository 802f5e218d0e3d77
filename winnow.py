"""Winnow in one import, for notebooks and scripts.

  import winnow

  tokens = winnow.reduce(x, 'tome', keep=98, keys=keys)     # bare arrays: float[B, N, D]
  tokens.x, tokens.owner, tokens.sizes

  model = winnow.load('results/digit_scenes')               # a run, a folder or a name on the hub
  model.generate('how many digits are there ?', images=['scene.png'])
  print(model.explain(reduce={'language': {'method': 'fastv', 'layers': 2, 'keep_ratio': 0.5}}))

`methods` lists what there is. Nothing is computed here: `load` is lib/notebook.py's, `reduce` is
models/arrays.py's.
"""

from lib.notebook import load
from models.arrays import reduce_arrays as reduce
from models.catalogue import entries

__all__ = ['load', 'methods', 'reduce']


def methods() -> dict[str, str]:
  """Returns every method's name with its one-line summary, in alphabetical order."""
  return {name: entry.summary for name, entry in entries().items()}
