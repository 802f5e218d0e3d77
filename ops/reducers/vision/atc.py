"""ATC: joins the two nearest clusters of tokens again and again, then averages each cluster.

Axes: B batch, N slots now, M slots after, H heads, d features a head.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.argmax import min_and_index
from ops.assignments import Assignment
from ops.moves.rows import take
from ops.primitives.match import join, pairwise_cosine
from ops.reducers.base import Checked, Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, count, num_kept
from ops.values import OneOf

Array = jax.Array

# Lance-Williams updates: the distance of every cluster to a cluster just joined, from the distances
# float32[B, N] to its two parts and the counts float32[B, 1] of tokens in these.
LINKAGES: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
    'single': lambda a, b, count_a, count_b: jnp.minimum(a, b),
    'complete': lambda a, b, count_a, count_b: jnp.maximum(a, b),
    'average': lambda a, b, count_a, count_b: (count_a * a + count_b * b) / (count_a + count_b),
}


@dataclasses.dataclass(frozen=True)
class ATC(Checked, Reducer):
  """Averages clusters of tokens, built bottom up from the cosine distances of keys.

  Agglomerative Token Clustering (Haurum et al., 2024), Sec. 3, arXiv:2409.11923. The slots that a
  cut starts from count once each in a cluster, however many tokens they stand for. Clusters stand
  in the order of their lowest slots, protected tokens first; the release numbers them as its
  clustering library does. One cut takes N - M steps over float32[B, N, N], one after another.

  Attributes:
    linkage: distance of two clusters: 'single' of their nearest members, 'complete' of their
      farthest, 'average' the mean over all pairs.
    proportional: whether attention counts a slot as often as it has tokens.
  """

  linkage: Annotated[str, OneOf(LINKAGES)] = 'average'
  proportional: bool = True
  needs = frozenset({'keys'})

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    keys = jax.lax.stop_gradient(signals.keys.astype(jnp.float32))
    free = count(tokens.free)
    merges = jnp.minimum(free - num_kept(tokens, num_slots), jnp.maximum(free - 1, 0))
    cluster = agglomerate(1 - pairwise_cosine(keys.mean(axis=2), tokens.free), merges,
                          most=max(tokens.slots - num_slots, 0), linkage=self.linkage)
    own = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), cluster.shape)
    return join(tokens, cluster, own, num_slots=num_slots)


def agglomerate(distance: Array, merges: Array, *, most: int, linkage: str) -> Array:
  """Joins the two nearest clusters `merges` times; of equally near pairs the lowest slots win.

  Args:
    distance: float32[B, N, N], symmetric, inf where two slots may not meet and on the diagonal.
    merges: int32[B, 1], how often each row joins.
    most: the largest of `merges` that there can be.
    linkage: a name in `LINKAGES`.

  Returns:
    int32[B, N], the lowest slot of the cluster that each slot ends in.
  """
  batch, slots, _ = distance.shape
  iota = jnp.arange(slots, dtype=jnp.int32)[None]

  def step(number: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    distance, count, cluster = state
    # The first row that holds the smallest, so a < b. Rows first: a search of the whole matrix for
    # its smallest number takes longer than all other work of a step.
    a = min_and_index(jnp.min(distance, axis=2), axis=1).index[:, None]
    row_a = take(distance, a)[:, 0]
    b = min_and_index(row_a, axis=1).index[:, None]
    goes_on = number < merges
    is_a, is_b = (iota == a) & goes_on, (iota == b) & goes_on
    count_a, count_b = take(count, a), take(count, b)
    new = LINKAGES[linkage](row_a, take(distance, b)[:, 0], count_a, count_b)
    new = jnp.where(is_a | is_b, jnp.inf, new)
    distance = jnp.where(is_a[:, :, None], new[:, None], distance)
    distance = jnp.where(is_a[:, None], new[:, :, None], distance)
    distance = jnp.where(is_b[:, :, None] | is_b[:, None], jnp.inf, distance)
    count = jnp.where(is_a, count_a + count_b, count)
    return distance, count, jnp.where(goes_on & (cluster == b), a, cluster)

  start = (distance, jnp.ones((batch, slots)), jnp.broadcast_to(iota, (batch, slots)))
  return jax.lax.fori_loop(0, most, step, start)[2]
