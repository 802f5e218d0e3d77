"""K-medoids from far apart centres, of features or of the eigenvectors of a graph.

Axes: R rows, L tokens of a row, K clusters, D features.

As `ops.primitives.cluster`, everything here decides which token goes where, so no gradient flows.
CenterCLIP (Zhao et al., 2022), Sec. 3, arXiv:2205.00823, puts it together; the choice of first
centres is that of Katsavounidis et al. (1994), IEEE Signal Processing Letters 1(10).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ops.argmax import min_and_index
from ops.moves.rows import take
from ops.primitives import cluster
from ops.primitives.match import cosine, l2_normalize

Array = jax.Array
DISTANCES = ('euclidean', 'manhattan', 'cosine', 'chord')


def pairwise(x: Array, distance: str) -> Array:
  """Distances of all pairs, by a name of `DISTANCES`: float[R, L, D] -> float32[R, L, L]."""
  if distance == 'cosine':
    x = jax.lax.stop_gradient(x)
    return 1 - cosine(x, x)
  if distance == 'manhattan':
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    # Row by row: all differences at once would be D times as large as what is wanted.
    rows = jax.lax.map(lambda row: jnp.sum(jnp.abs(row[:, None] - x), axis=2), x.swapaxes(0, 1))
    return rows.swapaxes(0, 1)
  return cluster.distances(l2_normalize(x) if distance == 'chord' else x)


def affinity(distance: Array, among: Array, *, sigma: float, graph: str,
             neighbours: int) -> Array:
  """Distances float32[R, L, L] to similarities, 0 between tokens that are not joined."""
  weight = jnp.exp(-distance ** 2 / (2 * sigma ** 2))
  weight = jnp.where(among[:, :, None] & among[:, None], weight, 0.0)
  if graph == 'nearest':
    least = jax.lax.top_k(weight, min(neighbours, weight.shape[1]))[0][:, :, -1:]
    near = weight >= least
    weight = jnp.where(near | near.swapaxes(1, 2), weight, 0.0)
  return weight


def embed(weight: Array, among: Array, count: Array, *, clusters: int) -> tuple[Array, Array]:
  """The first eigenvectors of the normalised Laplacian, as features of the tokens.

  Args:
    weight: float32[R, L, L], symmetric.
    among: bool[R, L].
    count: int32[R], eigenvectors to take, the smoothest first.
    clusters: K, the most of them.

  Returns:
    float32[R, L, K] of unit length, zero beyond `count`; float32[R, L], the length before.
  """
  degree = jnp.sum(weight, axis=2)
  scale = jnp.where(among, jax.lax.rsqrt(jnp.where(among, degree, 1.0)), 0.0)
  # Eigenvalues lie in [0, 2]; those of slots without a token go behind.
  laplacian = jnp.eye(weight.shape[1])[None] * jnp.where(among, 1.0, 3.0)[:, None]
  laplacian -= scale[:, :, None] * weight * scale[:, None]
  vectors = jnp.linalg.eigh(laplacian)[1][:, :, :clusters]
  vectors = jnp.where(jnp.arange(clusters)[None, None] < count[:, None, None], vectors, 0.0)
  return l2_normalize(vectors), jnp.linalg.norm(vectors, axis=2)


def seeds(distance: Array, length: Array, among: Array, *, clusters: int) -> Array:
  """First centres: the longest token, then always the farthest from its nearest centre.

  Args:
    distance: float32[R, L, L].
    length: float32[R, L].
    among: bool[R, L].
    clusters: K.

  Returns:
    int32[R, K], distinct as far as there are tokens.
  """
  iota, column = jnp.arange(among.shape[1])[None], jnp.arange(clusters)[None]

  def pick(step: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
    centres, gap = state
    score = jnp.where(gap == -jnp.inf, -jnp.inf, jnp.where(step == 0, length, gap))
    best = jnp.argmax(score, axis=1)[:, None].astype(jnp.int32)
    gap = jnp.where(iota == best, -jnp.inf, jnp.minimum(gap, take(distance, best)[:, 0]))
    return jnp.where(column == step, best, centres), gap

  start = jnp.zeros((len(among), clusters), jnp.int32), jnp.where(among, jnp.inf, -jnp.inf)
  return jax.lax.fori_loop(0, clusters, pick, start)[0]


def medoids(distance: Array, centres: Array, among: Array, count: Array, *,
            iterations: int) -> tuple[Array, Array]:
  """K-medoids until nothing moves: a medoid has the least summed distance to its own cluster.

  Args:
    distance: float32[R, L, L], least on the diagonal.
    centres: int32[R, K], where to begin.
    among: bool[R, L].
    count: int32[R], the first so many centres are clusters.
    iterations: rounds at most.

  Returns:
    int32[R, K], the medoids in rising order, L beyond `count`; int32[R, L], the cluster of each
    token.
  """
  column = jnp.arange(centres.shape[1], dtype=jnp.int32)[None]
  is_open = column < count[:, None]

  def assign(centres: Array) -> Array:
    reach = jnp.where(is_open[:, :, None], take(distance, centres), jnp.inf)
    return min_and_index(reach, axis=1).index

  def move(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    step, centres, _ = state
    joined = assign(centres)
    mates = (joined[:, :, None] == joined[:, None]) & among[:, None]
    cost = jnp.where(among, jnp.sum(jnp.where(mates, distance, 0.0), axis=2), jnp.inf)
    cost = jnp.where(joined[:, None] == column[:, :, None], cost[:, None], jnp.inf)
    moved = jnp.where(is_open, min_and_index(cost, axis=2).index, centres)
    return step + 1, moved, jnp.any(moved != centres)

  _, centres, _ = jax.lax.while_loop(
      lambda state: (state[0] < iterations) & state[2], move,
      (jnp.int32(0), centres, jnp.array(True)))
  centres = jnp.sort(jnp.where(is_open, centres, among.shape[1]), axis=1)
  return centres, assign(jnp.minimum(centres, among.shape[1] - 1))
