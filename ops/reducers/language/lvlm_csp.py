"""LVLM_CSP: a few tokens go ahead, all come back, and most leave.

Axes: B batch, N slots now, D features.
"""

import dataclasses

from ops.assignments import Assignment
from ops.primitives.cluster import distances, peaks
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count


@dataclasses.dataclass(frozen=True)
class LVLMCSP(Reducer):
  """Keeps one token of each cluster of features, until all are back.

  The first stage of LVLM_CSP (Chen et al., 2025), arXiv:2504.10854, from its abstract: a subset of
  the image's tokens runs the first layers for a coarse understanding; then all do, for a fine one;
  then most are pruned. How the subset is chosen is not known here: these are the density peaks of
  DPC-KNN, arXiv:2204.08680. A config's `expand` is the layer behind which all are back, each of
  which kept what it had; and a second config prunes, as `fastv` does in a later layer.

  Attributes:
    neighbours: nearest tokens that make up a density.
  """

  neighbours: Count = 5
  reconstructed = 'the abstract'
  site = 'before'
  positions = 'keep'
  drops = 'pruning drops tokens'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    distance = distances(tokens.x) * tokens.x.shape[2] ** -0.5
    return keep_top(tokens, peaks(distance, tokens.free, neighbours=self.neighbours),
                    num_slots=num_slots)
