"""PyramidKV: layers near the input keep more entries than those near the output.

Axes: B batch, N entries now, M entries after, K kv heads.
"""

import dataclasses
from fractions import Fraction
from typing import ClassVar

from ops.kv_cache import KVGather
from ops.reducers.scoring import Wrapper
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count


@dataclasses.dataclass(frozen=True)
class PyramidKV(Wrapper):
  """Keeps entries as the held method does, fewer with every layer, in all as many as the budget.

  PyramidKV (Cai et al., 2024), arXiv:2406.02069, Sec. 4.2, with the numbers of the kvpress library:
  the budget of all layers is that of the config, the window on top of the pyramid counts within,
  and prompts too short for a pyramid have the same number in every layer.

  Attributes:
    inner: the method that ranks entries, SnapKV in the paper.
    beta: how many times the last layer's share fits into the mean: the larger, the steeper.
  """

  beta: Count = 20
  default: ClassVar[dict[str, str]] = {'inner': 'snapkv'}
  allocates = True

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVGather:
    return self.inner(tokens, signals, num_slots=num_slots)

  def allocate(self, layer: int, depth: int, slots: int, asked: Fraction | None) -> int:
    """Returns the entries of a layer, as `CacheReducer.allocate`."""
    if asked is None:
      raise ValueError('pyramidkv needs a budget, whose layers it tilts: set keep_ratio or keep')
    # In floats, as published, so that halves fall to the same side.
    mean, window = float(asked), max(self.inner.span, 1)
    least = mean / self.beta
    most = 2 * mean - least
    if most >= slots - window:
      most = slots - window
      least = 2 * mean - most
    if not slots >= most >= least >= window:
      return max(1, round(mean))
    return round(most - layer * ((most - least) / (depth - 1) if depth > 1 else 0.0))
