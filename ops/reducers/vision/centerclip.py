"""CenterCLIP: the medoids of the tokens of consecutive frames, segment by segment.

Axes: B batch, N slots now, M slots after, S segments, L slots of the longest segment, R segments of
all rows (B S), K clusters of a segment.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ops import tokens as tk
from ops.assignments import Assignment, Merge
from ops.moves.rows import put, take
from ops.primitives import cluster, kmedoids
from ops.primitives.select import keep_top, ranks
from ops.reducers.base import Checked, Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import OneOf

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class CenterCLIP(Checked, Reducer):
  """Clusters the tokens of each video segment and keeps the medoids.

  CenterCLIP (Zhao et al., 2022), Sec. 3, arXiv:2205.00823, as released: k-medoids++, whose first
  centre is the longest token and each next one the farthest from those before (KKZ). The free
  tokens of a row in slot order, frames one after the other, are divided evenly into segments, and
  so are the slots to be filled; what does not divide goes to the first segments. An image is one
  segment. Tokens stay in slot order. In the release every frame has a [CLS] token, and its caller
  averages those of a segment; here protected tokens stay.

  Attributes:
    segments: of a row.
    by: the vectors to cluster: 'medoids' the features, 'spectral' the eigenvectors of the
      normalised Laplacian of a graph of similarities.
    outputs: the output of a cluster: its 'medoids', or 'means', in which each slot counts once.
    distance: of features: 'euclidean', 'manhattan', 'cosine' (one minus the cosine) or 'chord'
      (euclidean at unit length). Eigenvectors are always compared by 'euclidean'.
    graph: for 'spectral': 'all' pairs are joined, or those where one is among the `neighbours`
      of the other.
    sigma: for 'spectral': a pair at distance d has similarity exp(-d^2 / (2 sigma^2)).
    neighbours: nearest tokens of each, itself included.
    iterations: at most so many rounds of assigning tokens and moving centres.
  """

  segments: int = 1
  by: Annotated[str, OneOf(('medoids', 'spectral'))] = 'medoids'
  outputs: Annotated[str, OneOf(('medoids', 'means'))] = 'medoids'
  distance: Annotated[str, OneOf(kmedoids.DISTANCES)] = 'euclidean'
  graph: Annotated[str, OneOf(('all', 'nearest'))] = 'all'
  sigma: float = 2.0
  neighbours: int = 5
  iterations: int = 100
  site = 'before'

  def __post_init__(self) -> None:
    super().__post_init__()
    for field in ('segments', 'neighbours', 'iterations', 'sigma'):
      if getattr(self, field) <= 0:
        raise ValueError(f'{field}={getattr(self, field)} must be positive')

  @property
  def drops(self) -> str:
    return 'pruning drops tokens' if self.outputs == 'medoids' else ''

  def min_slots(self, slots: int, protected: int) -> int:
    return min(slots, protected + self.segments)

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    slot, among, count = divide(tokens, segments=self.segments, num_slots=num_slots)
    x = jax.vmap(take, (None, 1), 1)(tokens.x, slot).reshape(*among.shape, -1)
    clusters = min(-(-(num_slots - tokens.protected) // self.segments), among.shape[1])
    if self.by == 'spectral':
      alike = kmedoids.affinity(cluster.distances(x), among, sigma=self.sigma, graph=self.graph,
                                neighbours=self.neighbours)
      x, length = kmedoids.embed(alike, among, count, clusters=clusters)
      apart = kmedoids.pairwise(x, 'euclidean')
    else:
      length = jnp.linalg.norm(x.astype(jnp.float32), axis=2)
      apart = kmedoids.pairwise(x, self.distance)
    # A token is nearest to itself, even where others are equal to it.
    apart = apart - jnp.eye(apart.shape[1])[None]
    centres = kmedoids.seeds(apart, jax.lax.stop_gradient(length), among, clusters=clusters)
    centres, joined = kmedoids.medoids(apart, centres, among, count, iterations=self.iterations)

    # Back from segments to rows: the medoid of each slot, itself where it is not in a segment.
    medoid = take(slot.reshape(among.shape), take(centres, joined)).reshape(len(slot), -1)
    place = jnp.where(among.reshape(medoid.shape), slot.reshape(medoid.shape), tokens.slots)
    own = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), tokens.kind.shape)
    medoid = put(own, place, medoid)
    picked = keep_top(tokens, (medoid == own) & tokens.free, num_slots=num_slots)
    if self.outputs == 'medoids':
      return picked
    return Merge.mean(picked.src, take(ranks(picked.src, tokens.slots), medoid), tokens.real,
                      valid=picked.valid)


def divide(tokens: TokenSet, *, segments: int, num_slots: int) -> tuple[Array, Array, Array]:
  """Divides the free tokens of each row, and the slots to be filled, evenly.

  Returns:
    int32[B, S, L], the slots of each segment; bool[R, L], which of them are tokens; int32[R], the
    clusters of each segment, never more than it has tokens.
  """
  num_free = tk.count(tokens.free)
  s = jnp.arange(segments, dtype=jnp.int32)[None]
  length, start = num_free // segments + (s < num_free % segments), num_free // segments * s
  start = (start + jnp.minimum(s, num_free % segments))[:, :, None]
  room = tk.num_kept(tokens, num_slots)
  count = room // segments + (s < room % segments)
  i = jnp.arange(-(-(tokens.slots - tokens.protected) // segments), dtype=jnp.int32)[None, None]
  order = jnp.argsort(~tokens.free, axis=1, stable=True).astype(jnp.int32)
  index = jnp.minimum(start + i, tokens.slots - 1)
  slot = take(order, index.reshape(len(order), -1)).reshape(index.shape)
  among = jnp.broadcast_to(i < length[:, :, None], slot.shape)
  return slot, among.reshape(-1, i.shape[2]), count.reshape(-1)
