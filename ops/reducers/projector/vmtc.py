"""VMTC: keeps the primary tokens, and clusters the redundant ones.

Axes: B batch, N slots now, H heads.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.cluster import average_clusters, density_clusters
from ops.primitives.select import ranks, top
from ops.reducers.base import ByAttention
from ops.signals import Signals
from ops.tokens import TokenSet, of_kept
from ops.values import Count, Share


@dataclasses.dataclass(frozen=True)
class VMTC(ByAttention):
  """Keeps the tokens with the highest [CLS] attention and averages clusters of the others.

  Visual-Modality Token Compression (Yang et al., 2024), arXiv:2411.15453. There is no release, and
  only the abstract was read, which has primary tokens retained and redundant ones condensed by
  clustering and merging: that the primary ones are the most attended, and that clusters are those
  of DPC-KNN (arXiv:2204.08680), is this project's. Primary tokens lead in slot order, then
  clusters in the order of their centres' scores.

  Attributes:
    primary: the part of the tokens kept that are primary, rounded half to even; one at least is a
      cluster.
    neighbours: nearest tokens that make up the density of a centre.
  """

  primary: Share = 0.75
  neighbours: Count = 5
  reconstructed = 'the abstract'
  site = 'after'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    number = of_kept(tokens, num_slots, lambda kept: max(min(round(kept * self.primary), kept - 1),
                                                         0))
    attention = jax.lax.stop_gradient(self.attention(signals).mean(axis=1))
    order = top(attention, tokens.slots, excluded=~tokens.free)
    primary = tokens.free & (ranks(order, tokens.slots) < number)
    held = primary if tokens.held is None else primary | tokens.held
    budget = None if tokens.budget is None else tokens.budget - jnp.sum(
        primary, axis=1, dtype=jnp.int32)
    rest = tokens.replace(held=held, budget=budget)
    src, dst = density_clusters(rest, num_slots=num_slots, neighbours=self.neighbours)
    return average_clusters(rest, src, dst, rest.real, smoothing=0.0)
