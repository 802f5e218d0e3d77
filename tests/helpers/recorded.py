"""Arrays that the reference libraries and the authors' code gave, as tests/fixtures holds them."""

import functools
import pathlib

import numpy as np

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
  """All arrays of a file, named from tests/fixtures and without its ending, as 'vit/tome'."""
  with np.load(FIXTURES / f'{name}.npz') as found:
    return dict(found)
