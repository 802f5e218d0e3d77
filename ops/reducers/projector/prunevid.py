"""PruneVid's stage before the language model: scenes, places that stand still in them, clusters.

Axes: B batch, N slots now, F frames, D features.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.moves.rows import take
from ops.primitives.crops.frames import FRAME_SIGNALS, Frames, best, check_share, shares
from ops.primitives.crops.groups import cluster_groups, joined, means_of_still, merge_flagged
from ops.primitives.crops.regions import sums
from ops.primitives.crops.segments import contiguous, segments
from ops.primitives.match import l2_normalize
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, CountOrZero, Share

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PruneVid(Reducer):
  """Averages places that stand still over a scene, and clusters what is left of each frame.

  The stage of PruneVid (Huang et al., 2024), arXiv:2412.16117, before the language model, as
  released; that in it is not here. Means of frames are clustered around density peaks (DPC-KNN);
  of every cluster its longest runs of frames stay, and others join the longer neighbour: scenes. A
  place with a high mean cosine over all pairs of frames of a scene becomes one token, their mean.
  Then the still places of a scene, and the others of each frame, are clustered likewise, and
  averaged; groups of few tokens stay as they are. Clusters are as many as the budget has room for,
  by the groups' sizes; where there is none, the weakest peaks go with what they stand for.

  Newlines stay. Tokens keep the order of their cluster's centre, where the release puts a scene's
  still places first, and clusters in no order. Its noise of 1e-6 on densities is not here.

  Attributes:
    threshold: mean cosine above which a place stands still.
    scenes: clusters of frames, as a share of them.
    few: tokens of a group that is left as it is, at most.
    neighbours: nearest tokens, or frames, that make up the density.
    share: of a group's tokens that clusters are, None for what makes the budget.
  """

  threshold: float = 0.8
  scenes: Share = 0.25
  few: CountOrZero = 14
  neighbours: Count = 7
  share: float | None = None
  needs = FRAME_SIGNALS | {'crop_grid'}
  site = 'after'
  adaptive = 'places that stand still are fewer tokens'

  def __post_init__(self) -> None:
    check_share(self.share)

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    frames, x, slots = Frames.of(tokens, signals), jax.lax.stop_gradient(tokens.x), tokens.slots
    own = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), frames.frame.shape)
    ends = segments(self._starts(frames, x), frames.counts)
    first, last = (frames.spread(frame) for frame in ends)
    still = frames.there & (mean_cosine(l2_normalize(x), frames.at(first), last - first + 1)
                            > self.threshold)
    anchor, length, group, x = means_of_still(frames, x, still, first, last)
    sizes = sums(group >= 0, group, 2 * frames.number)
    found = cluster_groups(x, group,
                           self._centres(sizes, frames.num_kept(tokens, num_slots)),
                           neighbours=self.neighbours,
                           width=signals.crop_grid[0] * signals.crop_grid[1])
    partner = jnp.where(frames.there, take(found.centre, anchor), own)
    scores = jnp.where(frames.there, found.scores, jnp.inf)
    stays = best(tokens, partner == own, scores, num_slots=num_slots)
    members = joined((group >= 0).astype(jnp.float32), found.centre)
    members = jnp.maximum(take(members, jnp.minimum(partner, slots - 1)), 1.0)
    return merge_flagged(tokens, stays, partner, 1 / (members * length), num_slots=num_slots)

  def _starts(self, frames: Frames, x: Array) -> Array:
    """bool[B, F], where scenes begin."""
    means, real = frames.means(x), jnp.arange(frames.number)[None] < frames.counts
    centres = jnp.maximum(jnp.floor(frames.counts * self.scenes + 1e-4), 1).astype(jnp.int32)
    found = cluster_groups(means, jnp.where(real, 0, -1), centres, width=frames.number,
                           neighbours=self.neighbours)
    label = contiguous(found.centre, real)
    return jnp.pad(label[:, 1:] != label[:, :-1], ((0, 0), (1, 0)))

  def _centres(self, sizes: Array, kept: Array) -> Array:
    """int32[B, G], clusters of each group."""
    small = jnp.where(sizes <= self.few, sizes, 0)
    large = sizes - small
    if self.share is not None:
      return small + jnp.floor(large * self.share + 1e-4).astype(jnp.int32)
    room = kept - jnp.sum(small, axis=1, keepdims=True)
    return small + shares(large, jnp.clip(room, 0, jnp.sum(large, axis=1, keepdims=True)))


def mean_cosine(unit: Array, start: Array, length: Array) -> Array:
  """Averages the cosines of all pairs of tokens of a place in a scene, float32[B, N].

  Args:
    unit: float32[B, N, D], of length one.
    start: int32[B, N], the slot of the place in the scene's first frame, N where there is none.
    length: int32[B, N], frames of the scene; of one there are no pairs: -2.
  """
  slots = unit.shape[1]
  total = jnp.sum(joined(unit, start) ** 2, axis=2)
  count = joined(jnp.ones(start.shape), start)
  total, count = (take(values, jnp.minimum(start, slots - 1)) for values in (total, count))
  mean = (total - length) / jnp.maximum(length * (length - 1), 1)
  return jnp.where((length > 1) & (start < slots) & (count == length), mean, -2.0)
