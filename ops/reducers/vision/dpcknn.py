"""DPC-KNN: clusters around density peaks, each averaged into one token.

Axes: B batch, N slots now, M slots after.
"""

import dataclasses

from ops.assignments import Assignment
from ops.primitives.cluster import average_clusters, density_clusters
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, NotNegative


@dataclasses.dataclass(frozen=True)
class DPCKNN(Reducer):
  """Averages the tokens around each of the highest density peaks.

  Which Tokens to Use? (Haurum et al., 2023), Sec. 3, arXiv:2308.04657, with equal weights: each
  slot counts once, however many tokens it stands for. TCFormer (Zeng et al., 2022), Sec. 3,
  arXiv:2204.08680, learns the weights: see `ctm`. Clusters stand in the order of their centres'
  scores. The release breaks ties by random noise of 1e-6; here the lowest slot wins.

  Attributes:
    neighbours: nearest tokens that make up the density.
    smoothing: added to the weights of each group. The release has 1e-6, which shrinks every token
      by as much; with 0, a token alone in its group stays exactly as it is.
  """

  neighbours: Count = 5
  smoothing: NotNegative = 0.0
  site = 'before'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    src, dst = density_clusters(tokens, num_slots=num_slots, neighbours=self.neighbours)
    return average_clusters(tokens, src, dst, tokens.real, smoothing=self.smoothing)
