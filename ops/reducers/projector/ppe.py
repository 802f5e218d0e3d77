"""PPE: clusters around density peaks, which keep the positions of several of their members.

Axes: B batch, N slots now, M slots after, K positions of a token.
"""

import dataclasses

from ops.assignments import Assignment
from ops.primitives.cluster import average_clusters, density_clusters
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, NotNegative


@dataclasses.dataclass(frozen=True)
class PPE(Reducer):
  """Averages the tokens around each density peak, and keeps the positions of several of them.

  Positional preservation embedding (PPE, 2025), arXiv:2510.22936, as released, with its merging:
  that of `dpcknn` on each image (or frame). Behind the projector of a model with M-RoPE, K parts of
  every section turn with the positions of K members each, the last one first, and in turn where
  there are fewer; text has the same number in all parts. Elsewhere a token has its centre's. The
  release keeps 0.45 of the tokens, rounded up, in the order of the clusters (order='method'), and
  breaks ties by random noise.

  Attributes:
    members: K, which must divide every section of the rotary positions.
    neighbours: nearest tokens that make up the density.
    smoothing: added to the size of each cluster, 1e-6 in the release.
  """

  members: Count = 8
  neighbours: Count = 5
  smoothing: NotNegative = 0.0
  site = 'after'

  @property
  def member_positions(self) -> int:
    return self.members

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    src, dst = density_clusters(tokens, num_slots=num_slots, neighbours=self.neighbours)
    return average_clusters(tokens, src, dst, tokens.real, smoothing=self.smoothing)
