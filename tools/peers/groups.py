"""Groupings of the same things, compared."""

from __future__ import annotations

import numpy as np


def same_groups(one: np.ndarray, other: np.ndarray) -> bool:
  """Tells whether two numberings int[N] of groups have the same members together."""
  pairs = np.unique(np.stack([one, other]), axis=1).shape[1]
  return pairs == len(np.unique(one)) == len(np.unique(other))


def shared_pairs(one: np.ndarray, other: np.ndarray) -> float:
  """Computes the Jaccard index of the pairs that are together in two numberings int[N]."""
  upper = np.triu_indices(len(one), k=1)
  first, second = ((each[:, None] == each[None])[upper] for each in (one, other))
  return float((first & second).sum() / max(1, (first | second).sum()))
