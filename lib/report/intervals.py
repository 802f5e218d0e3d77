"""Confidence intervals of what a sample of examples shows: a share, and a mean paired difference.

Axes: N examples, K draws of a baseline.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence

import numpy as np
import scipy.special

from lib.report.rows import Row

BETTER, WORSE = 'better', 'worse'


@dataclasses.dataclass(frozen=True)
class Difference:
  """Holds an estimated mean difference and how sure it is.

  Attributes:
    mean: the estimate.
    error: its standard error.
    freedom: the degrees of freedom of the error.
  """

  mean: float
  error: float
  freedom: float

  def interval(self, confidence: float) -> tuple[float, float]:
    """Returns the two ends of Student's interval at a confidence between 0 and 1."""
    if not self.error:
      return self.mean, self.mean
    half = self.error * float(scipy.special.stdtrit(self.freedom, (1 + confidence) / 2))
    return self.mean - half, self.mean + half


def wilson(successes: float, total: float, confidence: float = 0.95) -> tuple[float, float]:
  """Returns Wilson's score interval of a share.

  Unlike the mean plus or minus its error it stays within 0 and 1, and has a width where all of few
  examples are right. Wilson (1927), doi:10.1080/01621459.1927.10502953.

  Args:
    successes: how many of the examples are right.
    total: how many examples there are, at least one.
    confidence: between 0 and 1.
  """
  z, share = statistics.NormalDist().inv_cdf((1 + confidence) / 2), successes / total
  middle = share + z * z / (2 * total)
  half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
  scale = 1 + z * z / total
  return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def paired(values: np.ndarray, draws: np.ndarray) -> Difference:
  """Estimates how much higher values are than a baseline's on the same examples.

  The error has two parts that are independent: other examples would give another mean of the paired
  differences, and other draws another mean of the baseline, for all examples alike. One draw says
  nothing of the second part, and the difference is then from that draw. Degrees of freedom are
  those of Welch and Satterthwaite.

  Args:
    values: float[N], N at least 2.
    draws: float[K, N] of the baseline.

  Raises:
    ValueError: other numbers of examples.
  """
  if draws.shape[1:] != values.shape:
    raise ValueError(f'draws of shape {draws.shape} do not pair with {values.shape} values')
  differences = values - draws.mean(axis=0)
  parts = [(differences.var(ddof=1) / len(values), len(values) - 1)]
  if len(draws) > 1:
    parts.append((draws.mean(axis=1).var(ddof=1) / len(draws), len(draws) - 1))
  variance = sum(part for part, _ in parts)
  spread = sum(part ** 2 / freedom for part, freedom in parts)
  return Difference(float(differences.mean()), math.sqrt(variance),
                    float(variance ** 2 / spread) if spread else math.inf)


def judge(rows: Sequence[Row], confidence: float = 0.95) -> Iterator[Row]:
  """Yields rows with the interval of their difference from the baseline, and a verdict.

  Among many intervals of 95 % some exclude 0 by chance. These are Bonferroni's: with m rows
  compared, each has an error of (1 - confidence) / m, so that all hold together at `confidence`.

  Args:
    rows: those compared have nll_difference, nll_error and nll_freedom.
    confidence: of all intervals together.

  Yields:
    The rows in their order; those compared have nll_low, nll_high and verdict too: `BETTER` or
    `WORSE` where the interval excludes 0, '' elsewhere.
  """
  compared = sum(row.get('nll_difference') is not None for row in rows)
  for row in rows:
    if row.get('nll_difference') is None:
      yield row
      continue
    low, high = Difference(row['nll_difference'], row['nll_error'], row['nll_freedom']).interval(
        1 - (1 - confidence) / compared)
    verdict = BETTER if high < 0 else WORSE if low > 0 else ''
    yield {**row, 'nll_low': low, 'nll_high': high, 'verdict': verdict}
