"""Bayesian optimisation of a few numbers: a Gaussian process says where to look next."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

# Points that the process is asked about before each call.
CANDIDATES = 2048

Point = tuple[float, ...]


def maximise(score: Callable[[Point], float], bounds: Sequence[tuple[float, float]], *,
             calls: int, seed: int = 0) -> list[tuple[Point, float]]:
  """Looks for the point with the highest score, by expected improvement (Jones et al., 1998).

  Args:
    score: a point within `bounds` -> its score; it may be noisy.
    bounds: (least, most) of each number.
    calls: of `score`. The first ones, twice as many as there are numbers and one more, are drawn
      evenly, as far as there are so many.
    seed: of all draws.

  Returns:
    All points with their scores, in the order of the calls.

  Raises:
    ValueError: no bounds, or some without a least number below the most; fewer calls than 1.
  """
  if not bounds or any(low >= high for low, high in bounds) or calls < 1:
    raise ValueError(f'bounds={tuple(bounds)} must be pairs (least, most), at least one, and '
                     f'calls={calls} at least 1')
  low, high = np.asarray(bounds, float).T
  random = np.random.default_rng(seed)
  found: list[tuple[Point, float]] = []
  for call in range(calls):
    share = random.random((CANDIDATES, len(bounds)))
    best = share[0]
    if call > 2 * len(bounds):
      best = share[np.argmax(_improvement(found, low, high, share, seed))]
    point = tuple(float(value) for value in low + (high - low) * best)
    found.append((point, float(score(point))))
  return found


def _improvement(found: Sequence[tuple[Point, float]], low: np.ndarray, high: np.ndarray,
                 share: np.ndarray, seed: int) -> np.ndarray:
  """Expected improvement over the best score so far, at points given as shares of the bounds."""
  places = (np.asarray([point for point, _ in found]) - low) / (high - low)
  scores = np.asarray([value for _, value in found])
  kernel = (ConstantKernel(1.0, (1e-2, 1e2)) * Matern(0.3, (5e-2, 5.0), nu=2.5)
            + WhiteKernel(1e-2, (1e-6, 1.0)))
  process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed)
  with warnings.catch_warnings():
    # Of a kernel at one of its bounds, as scores without noise have.
    warnings.simplefilter('ignore', ConvergenceWarning)
    mean, spread = process.fit(places, scores).predict(share, return_std=True)
  gain = mean - scores.max()
  ratio = gain / np.maximum(spread, 1e-12)
  return gain * norm.cdf(ratio) + spread * norm.pdf(ratio)
