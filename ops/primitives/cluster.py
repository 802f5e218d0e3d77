"""Clustering of tokens: density peaks, and medoids.

Axes: B batch, N slots now, M slots after, K clusters, D features.

All but `average_clusters` decides which token goes where and hands back indices, so no gradient
flows.
Slots outside `among` (padding, protected tokens) neither join a cluster nor move one.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from ops.argmax import min_and_index
from ops.assignments import Merge
from ops.moves.rows import take
from ops.primitives.products import pairs
from ops.primitives.select import rank_of, ranks, top
from ops.tokens import TokenSet, filled

Array = jax.Array


def distances(x: Array) -> Array:
  """Euclidean distances of all pairs: float[B, N, D] -> float32[B, N, N]."""
  chex.assert_rank(x, 3)
  x = jax.lax.stop_gradient(x)
  products = pairs(x, x)
  # Squares from the same product, so that equal tokens come out at exactly zero.
  squares = jnp.diagonal(products, axis1=1, axis2=2)
  return jnp.sqrt(jnp.maximum(squares[:, :, None] + squares[:, None, :] - 2 * products, 0.0))


def peaks(distance: Array, among: Array, *, neighbours: int | Array,
          noise: Array | None = None) -> Array:
  """Scores each slot as the centre of a cluster: DPC-KNN, arXiv:2204.08680, Sec. 3.

  Density is exp(-mean squared distance to the nearest neighbours, the slot itself included). A
  good centre is dense and far from any denser slot: the score is the product of the two, here as
  its logarithm, which does not underflow for features that lie far apart. A row with fewer slots
  than neighbours takes the mean over those it has.

  Args:
    distance: float32[B, N, N], over the square root of D.
    among: bool[B, N], the slots that count.
    neighbours: nearest slots that make up the density, or int32[B, 1], those of each row.
    noise: float[B, N] or None; 1e-6 times it is added to the densities to break ties.

  Returns:
    float32[B, N], meaningless outside `among`.
  """
  chex.assert_shape(distance, (*among.shape, among.shape[1]))
  near = jnp.where(among[:, None, :], distance, jnp.inf)
  slots = distance.shape[1]
  most = min(neighbours, slots) if isinstance(neighbours, int) else slots
  nearest = -jax.lax.top_k(-near, most)[0]
  finite = jnp.isfinite(nearest)
  if not isinstance(neighbours, int):
    finite &= jnp.arange(most)[None, None] < neighbours[:, :, None]
  total = jnp.sum(jnp.where(finite, nearest, 0.0) ** 2, axis=2)
  density = -total / jnp.maximum(jnp.sum(finite, axis=2), 1)
  if noise is not None:
    density = jnp.log(jnp.exp(density) + 1e-6 * noise)
  pairs = among[:, :, None] & among[:, None, :]
  widest = jnp.max(jnp.where(pairs, distance, 0.0), axis=(1, 2))
  denser = among[:, None, :] & (density[:, None, :] > density[:, :, None])
  gap = jnp.min(jnp.where(denser, distance, widest[:, None, None]), axis=2)
  return jnp.log(gap) + density


def nearest(distance: Array, centres: Array, is_open: Array, valid: Array | None = None) -> Array:
  """The cluster that each slot belongs to; a centre always belongs to its own.

  Args:
    distance: float32[B, N, N].
    centres: int32[B, K], distinct slots; of equally near ones the first wins.
    is_open: bool[B, K], clusters that other slots may join.
    valid: bool[B, K], clusters that there are; None for all.

  Returns:
    int32[B, N], K where no cluster is open.
  """
  slots, clusters = distance.shape[1], centres.shape[1]
  if valid is not None:
    is_open = is_open & valid
  reach = jnp.where(is_open[:, :, None], take(distance, centres), jnp.inf)
  joined = min_and_index(reach, axis=1).index
  joined = jnp.where(jnp.any(is_open, axis=1, keepdims=True), joined, clusters)
  # A cluster that is not there has no centre: its index is out of bounds, and dropped.
  own = ranks(centres if valid is None else jnp.where(valid, centres, slots), slots)
  return jnp.where(own < clusters, own, joined)


def density_clusters(tokens: TokenSet, *, num_slots: int, neighbours: int,
                     noise: Array | None = None) -> tuple[Array, Array]:
  """Groups the free tokens around density peaks.

  Args:
    tokens: N slots.
    num_slots: M, groups wanted; protected tokens are groups of their own and lead.
    neighbours, noise: see `peaks`.

  Returns:
    (src, dst): int32[B, M] the centre of each group, the best first, and int32[B, N] the group of
    each slot, M for padding.
  """
  distance = distances(tokens.x) * tokens.x.shape[2] ** -0.5
  scores = peaks(distance, tokens.free, neighbours=neighbours, noise=noise)
  centres = top(scores, num_slots, forced=tokens.fixed, excluded=~tokens.real)
  group = nearest(distance, centres, take(tokens.free, centres), filled(tokens, num_slots))
  return centres, jnp.where(tokens.real, group, num_slots)


def average_clusters(tokens: TokenSet, src: Array, dst: Array, weight: Array, *,
                     smoothing: float) -> Merge:
  """Averages the groups of `density_clusters`, weighted by float[B, N]; protected tokens stay."""
  weight = jnp.where(tokens.free, weight, tokens.fixed).astype(jnp.float32)
  merge = Merge.mean(src, dst, weight, valid=filled(tokens, src.shape[1]))
  if not smoothing:
    return merge
  total = merge.totals(weight)
  shrink = take(total / (total + smoothing), jnp.minimum(dst, src.shape[1] - 1))
  return merge.replace(weight=jnp.where(tokens.free, merge.weight * shrink, merge.weight))


def medoids(distance: Array, seeds: Array, weight: Array, among: Array, *,
            iterations: int, valid: Array | None = None) -> Array:
  """Moves cluster centres to medoids: the K-medoids of arXiv:2308.04657, Sec. 3.

  In the released code, followed here, the medoid of a cluster is the member with the least weighted
  distance to all slots, not to its cluster alone.

  Args:
    distance: float32[B, N, N].
    seeds: int32[B, K], distinct slots; those outside `among` stay where they are.
    weight: float32[B, N], factor of each slot's own total.
    among: bool[B, N], slots that form clusters.
    iterations: rounds of assigning and moving.
    valid: bool[B, K], clusters that there are; None for all.

  Returns:
    int32[B, K], distinct slots in the order of the seeds.
  """
  cost = weight * jnp.sum(jnp.where(among[:, None, :], distance, 0.0), axis=2)
  cost = jnp.where(among, cost, jnp.inf)[:, None, :]
  is_open = take(among, seeds)
  cluster = jnp.arange(seeds.shape[1], dtype=jnp.int32)[None, :, None]

  def move(_: int, centres: Array) -> Array:
    member = nearest(distance, centres, is_open, valid)[:, None, :] == cluster
    best = min_and_index(jnp.where(member, cost, jnp.inf), axis=2).index
    return jnp.where(is_open, best, centres)

  return jax.lax.fori_loop(0, iterations, move, seeds)


def farthest_first(distance: Array, among: Array, *, start: int, count: int) -> Array:
  """Scores float32[B, N] by which the `count` best slots are seeds, each far from those before.

  "Far" is the largest distance to an earlier seed, as in the code released with arXiv:2308.04657;
  farthest-first traversal as commonly defined takes the smallest.

  Args:
    distance: float32[B, N, N].
    among: bool[B, N], slots that may be seeds.
    start: the first seed, counted among those slots; the last of them where there are fewer.
    count: seeds wanted.
  """
  batch, slots = among.shape
  last = jnp.sum(among, axis=1, keepdims=True) - 1
  first = among & (rank_of(among) == jnp.minimum(start, last))
  chosen = jnp.argmax(first, axis=1)[:, None]
  iota = jnp.arange(slots)[None]

  def pick(step: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    score, far, chosen = state
    fresh = (iota == chosen) & among & (score == -count)
    score = jnp.where(fresh, -step.astype(jnp.float32), score)
    far = jnp.maximum(far, take(distance, chosen)[:, 0])
    left = jnp.where(among & (score == -count), far, -1.0)
    return score, far, jnp.argmax(left, axis=1)[:, None]

  state = jnp.full((batch, slots), -count, jnp.float32), jnp.zeros((batch, slots)), chosen
  return jax.lax.fori_loop(0, count, pick, state)[0]


def bounded_peaks(distance: Array, among: Array, *, cutoff: float, most: Array,
                  picks: int) -> tuple[Array, Array, Array]:
  """Picks centres that are farther from each other than a bound, the densest first.

  DBDPC of PACT (arXiv:2504.08966, Sec. 3.3): density is the sum of exp(-(distance / 2)²) over all
  slots; of equals the lowest slot comes first.

  Args:
    distance: float32[B, N, N].
    among: bool[B, N], slots that may be centres, and by which density goes.
    cutoff: distance up to which a slot needs no centre of its own.
    most: int32[B, 1], centres at most.
    picks: slots that `among` names at most.

  Returns:
    bool[B, N], the centres; int32[B, N], the nearest centre of every slot, its own of a centre; and
    float32[B, N], the distance to it, inf where there is none.
  """
  slots = jnp.arange(among.shape[1], dtype=jnp.int32)[None]
  density = jnp.sum(jnp.where(among[:, None], jnp.exp(-(distance / 2) ** 2), 0.0), axis=2)
  order = top(density, max(picks, 1), excluded=~among)

  def step(number: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    centre, label, nearest = state
    at = jax.lax.dynamic_slice_in_dim(order, number, 1, axis=1)
    own = slots == at
    new = jnp.any(own & among & (nearest > cutoff), axis=1, keepdims=True) & (
        jnp.sum(centre, axis=1, keepdims=True) < most)
    row = take(distance, at)[:, 0]
    nearer = new & (row < nearest)
    return (centre | (new & own), jnp.where(nearer & ~centre, at, label),
            jnp.where(nearer, row, nearest))

  start = (jnp.zeros(among.shape, bool), jnp.broadcast_to(slots, among.shape),
           jnp.full(among.shape, jnp.inf) + 0.0 * distance[:, 0])
  return jax.lax.fori_loop(0, picks, step, start)
