"""Schedules of counts by layer, searched for: the fewest tokens, or the best ones of a budget.

Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction (Zhao et
al., 2024), arXiv:2412.00556. Only the abstract was to be had: the searches are reconstructed from
what it says of them, a greedy one from shallow layers to deep ones under the assumption that no
layer needs more tokens than the one before, and a sigmoid whose parameters Bayesian optimisation
finds. The formula of the sigmoid, and the search within a layer by halves, are ours. The search of
what layers may lose is FitPrune's (Ye et al., 2024), arXiv:2409.10197.

Axes: L layers that a reduction acts in.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from lib.search.bayes import Point, maximise

Counts = tuple[int, ...]


def g_search(score: Callable[[Counts], float], *, layers: int, tokens: int, least: float,
             step: int = 1) -> Counts:
  """Finds the fewest tokens of each layer with which a score stays up, from shallow to deep.

  A layer is tried with all deeper ones at the same count, and by halves: it is taken for granted
  that more tokens are never worse. About L log2(tokens / step) calls.

  Args:
    score: int[L], tokens left from each layer on -> a score.
    layers: L.
    tokens: those before the first layer, which never leave all at once.
    least: the score that must be reached.
    step: counts are multiples of it.

  Returns:
    int[L], never rising; `tokens` throughout where nothing may go.
  """
  known = functools.cache(score)
  counts: list[int] = []
  for layer in range(layers):
    before = counts[-1] if counts else tokens
    fails, holds = 0, math.ceil(before / step)
    while fails + 1 < holds:
      middle = (fails + holds) // 2
      tried = min(middle * step, before)
      if known((*counts, *[tried] * (layers - layer))) >= least:
        holds = middle
      else:
        fails = middle
    counts.append(min(holds * step, before))
  return tuple(counts)


def sigmoid_counts(steepness: float, floor: float, *, layers: int, tokens: int,
                   mean: float) -> Counts:
  """Returns counts that fall over the layers as a sigmoid, and have a mean.

  Args:
    steepness: 0 for the same in all layers; the higher, the more like one step down.
    floor: the share of the tokens that the deepest layers would keep in the end.
    layers: L.
    tokens: before the first layer.
    mean: share of the tokens over all layers, above 0 and at most 1.

  Returns:
    int[L], 1 or more, never rising. Their mean is as close to the one asked for as the floor lets
    it be, rounded down.
  """
  steepness = max(steepness, 1e-6)

  def shares(middle: float) -> list[float]:
    places = [(layer + 0.5) / layers for layer in range(layers)]
    return [floor + (1 - floor) / (1 + math.exp(min(steepness * (place - middle), 700)))
            for place in places]

  # The mean rises with the middle: with it far away all tokens stay, or the floor is reached.
  reach = 1 + 40 / steepness
  low, high = -reach, 1 + reach
  for _ in range(100):
    middle = (low + high) / 2
    low, high = (low, middle) if sum(shares(middle)) / layers > mean else (middle, high)
  # What should be whole may come out a rounding below.
  return tuple(max(1, min(tokens, int(share * tokens + 1e-3))) for share in shares(low))


def p_sigmoid(score: Callable[[Counts], float], *, layers: int, tokens: int, mean: float,
              calls: int, steepness: Sequence[float] = (1.0, 60.0),
              seed: int = 0) -> tuple[Counts, list[tuple[Point, float]]]:
  """Finds the best sigmoid among those with a mean.

  Args:
    score, layers, tokens: as of `g_search`.
    mean: as of `sigmoid_counts`.
    calls: of the search; equal counts are scored once.
    steepness: bounds, searched by their logarithms.
    seed: of the search.

  Returns:
    The counts with the highest score, the first of equals; and all points (log steepness, floor)
    with their scores.
  """
  known = functools.cache(score)

  def counts(point: Point) -> Counts:
    return sigmoid_counts(math.exp(point[0]), point[1], layers=layers, tokens=tokens, mean=mean)

  bounds = [(math.log(steepness[0]), math.log(steepness[1])), (0.0, mean)]
  found = maximise(lambda point: known(counts(point)), bounds, calls=calls, seed=seed)
  best = max(range(len(found)), key=lambda number: found[number][1])
  return counts(found[best][0]), found


def fit_within(removed: Callable[[float], Counts], cost: Callable[[Counts], float], *,
               most: float, tolerance: float = 0.01) -> Counts:
  """Finds the counts of the smallest loss that meets a budget, by halves.

  Args:
    removed: the share that each layer may lose, between 0 and 1 -> tokens that leave each, int[L].
    cost: of such counts.
    most: the cost that is allowed. Layers behind the one in which it is reached let none leave.
    tolerance: of the share.

  Returns:
    int[L].

  Raises:
    ValueError: where no share meets the budget.
  """
  low, high, best = 0.0, 1.0, None
  while high - low > tolerance:
    share = (low + high) / 2
    found = _until(removed(share), cost, most)
    if found is None:
      low = share
    else:
      high, best = share, found
  if best is None:
    raise ValueError(f'a cost of {most:.4g} is below what is left when almost all goes: allow '
                     'more')
  return best


def _until(removed: Counts, cost: Callable[[Counts], float], most: float) -> Counts | None:
  """The counts up to the layer in which a budget is reached; None where it is not."""
  for layers in range(len(removed) + 1):
    tried = (*removed[:layers], *[0] * (len(removed) - layers))
    if cost(tried) <= most:
      return tried
  return None
