"""DPC-KNN: clusters around density peaks, each averaged into one token.

Axes: B batch, N slots now, M slots after.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment, Merge, take
from ops.primitives import cluster
from ops.primitives.select import top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet

Array = jax.Array


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

  neighbours: int = 5
  smoothing: float = 0.0
  site = 'before'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    src, dst = density_clusters(tokens, num_slots=num_slots, neighbours=self.neighbours)
    return average(tokens, src, dst, tokens.real, smoothing=self.smoothing)


def density_clusters(tokens: TokenSet, *, num_slots: int, neighbours: int,
                     noise: Array | None = None) -> tuple[Array, Array]:
  """Groups the free tokens around density peaks.

  Args:
    tokens: N slots.
    num_slots: M, groups wanted; protected tokens are groups of their own and lead.
    neighbours, noise: see `ops.primitives.cluster.peaks`.

  Returns:
    (src, dst): int32[B, M] the centre of each group, the best first, and int32[B, N] the group of
    each slot, M for padding.
  """
  distance = cluster.distances(tokens.x) * tokens.x.shape[2] ** -0.5
  scores = cluster.peaks(distance, tokens.free, neighbours=neighbours, noise=noise)
  centres = top(scores, num_slots, forced=tokens.fixed, excluded=~tokens.real)
  group = cluster.nearest(distance, centres, take(tokens.free, centres))
  return centres, jnp.where(tokens.real, group, num_slots)


def average(tokens: TokenSet, src: Array, dst: Array, weight: Array, *, smoothing: float) -> Merge:
  """Averages the groups of `density_clusters`, weighted by float[B, N]; protected tokens stay."""
  weight = jnp.where(tokens.free, weight, tokens.fixed).astype(jnp.float32)
  merge = Merge.mean(src, dst, weight)
  if not smoothing:
    return merge
  total = merge.totals(weight)
  shrink = take(total / (total + smoothing), jnp.minimum(dst, src.shape[1] - 1))
  return merge.replace(weight=jnp.where(tokens.free, merge.weight * shrink, merge.weight))
