"""Several processes that train together: what they tell each other."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def gather(value: Any) -> list[Any]:
  """Returns every process's value, in order; all of them must ask.

  Args:
    value: JSON-like.
  """
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.asarray(text.size))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[:text.size] = text
  return [json.loads(row[:size].tobytes())
          for row, size in zip(multihost_utils.process_allgather(padded), sizes, strict=True)]
