"""K-medoids: prunes to one representative token of each cluster.

Axes: B batch, N slots now, M slots after, H heads.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.assignments import Assignment, Gather
from ops.primitives import cluster
from ops.primitives.select import top
from ops.reducers.base import Checked, Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, filled
from ops.values import CountOrZero, Iterations, OneOf

Array = jax.Array
WEIGHTS = ('attention', 'equal')


@dataclasses.dataclass(frozen=True)
class KMedoids(Checked, Reducer):
  """Keeps the medoids of clusters of tokens.

  The K-medoids baseline of Which Tokens to Use? (Haurum et al., 2023), Sec. 3, arXiv:2308.04657,
  as released. Medoids stand in the order of their seeds. In the release a token's weight multiplies
  its own distances, so the least attended member of a cluster is preferred. Two things differ, in
  ties only: a centre always stays in its own cluster, and a token is never picked twice.

  Attributes:
    weights: 'attention' seeds with the tokens that receive most attention in the layer before and
      weights by it; 'equal' seeds farthest-first and weights all alike.
    start: for 'equal', the first seed, counted among the free tokens; the release draws it.
    iterations: rounds of assigning tokens and moving centres.
  """

  weights: Annotated[str, OneOf(WEIGHTS)] = 'attention'
  start: CountOrZero = 0
  iterations: Iterations = 3
  site = 'before'
  drops = 'pruning drops tokens'

  @property
  def needs(self) -> frozenset[str]:
    return frozenset({'received_attention'} if self.weights == 'attention' else ())

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    distance = cluster.distances(tokens.x)
    if self.weights == 'attention':
      weight = scores = jax.lax.stop_gradient(signals.received_attention.mean(axis=1))
    else:
      weight = jnp.ones(tokens.x.shape[:2])
      scores = cluster.farthest_first(distance, tokens.free, start=self.start, count=num_slots)
    seeds = top(scores, num_slots, forced=tokens.fixed, excluded=~tokens.real)
    valid = filled(tokens, num_slots)
    picked = cluster.medoids(distance, seeds, weight, tokens.free, iterations=self.iterations,
                             valid=valid)
    return Gather(picked, tokens.slots, valid=valid)
