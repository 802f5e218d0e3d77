"""CTM: clusters around density peaks, averaged by a learned token score.

Axes: B batch, N slots now, M slots after, D features.
"""

import flax.linen as nn
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.cluster import average_clusters, density_clusters
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, NotNegative


class CTM(Reducer, nn.Module):
  """Averages DPC-KNN clusters of tokens by a learned token score.

  The weight of a token is exp(w . x + b). Clustering-based token merging of TCFormer (Zeng et al.,
  2022), Sec. 3, arXiv:2204.08680, in the plain form of Which Tokens to Use? (Haurum et al., 2023),
  arXiv:2308.04657: without TCFormer's convolution and norm before the score, its bias on attention,
  and its random tie-breaks.

  Attributes:
    neighbours: nearest tokens that make up the density.
    smoothing: added to the weights of each group. The release has 1e-6, which shrinks groups of
      low weight; with 0, a token alone in its group stays exactly as it is.
  """

  neighbours: Count = 5
  smoothing: NotNegative = 0.0
  site = 'before'

  @nn.compact
  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    src, dst = density_clusters(tokens, num_slots=num_slots, neighbours=self.neighbours)
    score = nn.Dense(1, dtype=jnp.float32, kernel_init=nn.initializers.normal(0.02),
                     name='score')(tokens.x)[..., 0]
    # Before the exponential: what padding and protected tokens hold may overflow it.
    weight = jnp.exp(jnp.where(tokens.free, score, 0.0))
    return average_clusters(tokens, src, dst, weight, smoothing=self.smoothing)
