"""Groups of tokens that are clustered by themselves, and merged.

Axes: B batch, N slots, M slots after, G groups, W tokens of a group at most, D features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from ops.assignments import Merge
from ops.moves.rows import expand_like, take
from ops.primitives.cluster import distances, peaks
from ops.primitives.crops.frames import Frames
from ops.primitives.crops.regions import keep_flagged, ranks_within, sums
from ops.primitives.select import ranks, top
from ops.tokens import TokenSet

Array = jax.Array


def merge_flagged(tokens: TokenSet, stays: Array, partner: Array, weight: Array, *,
                  num_slots: int) -> Merge:
  """Merges tokens into those that are named, in slot order.

  Args:
    tokens: N slots.
    stays: bool[B, N], tokens that have an output, no more than the row keeps.
    partner: int32[B, N], the slot that each token joins, itself for those that stay; N for none.
    weight: float32[B, N], its factor there.
    num_slots: M.
  """
  kept = keep_flagged(tokens, stays, num_slots=num_slots)
  own = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), partner.shape)
  partner = jnp.where(tokens.fixed, own, jnp.where(tokens.free, partner, tokens.slots))
  dst = take(jnp.pad(kept.dst, ((0, 0), (0, 1)), constant_values=num_slots), partner)
  return Merge(kept.src, dst, jnp.where(tokens.fixed, 1.0, weight), valid=kept.valid,
               wanted=kept.wanted)


def average_flagged(tokens: TokenSet, stays: Array, partner: Array, *, num_slots: int) -> Merge:
  """Averages tokens, by their sizes, into those that are named, as `merge_flagged`."""
  sizes = tokens.sizes
  total = take(joined(sizes, partner), jnp.minimum(partner, tokens.slots - 1))
  return merge_flagged(tokens, stays, partner, sizes / jnp.where(total > 0, total, 1.0),
                       num_slots=num_slots)


class Groups(struct.PyTreeNode):
  """Holds what a clustering of tokens by group found.

  Attributes:
    scores: float32[B, N], of each token as a centre, as `peaks` has it; -inf outside of groups.
    centre: int32[B, N], the slot of the centre that each token is nearest to, itself for centres; N
      outside of groups, and in groups without any.
  """

  scores: Array
  centre: Array


def cluster_groups(x: Array, group: Array, centres: Array, *, width: int, neighbours: int,
                   few: bool = False) -> Groups:
  """Clusters the tokens of each group by itself around density peaks (`peaks`).

  Args:
    x: float[B, N, D].
    group: int32[B, N] below G, -1 for none.
    centres: int32[B, G], how many centres each group has at most.
    width: W; what a group has beyond is left out.
    neighbours: nearest tokens that make up the density, the token itself among them.
    few: whether the density takes no more neighbours than there are centres.
  """
  batch, slots, features = x.shape
  groups = centres.shape[1]
  own = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), group.shape)
  rank = ranks_within(group, jnp.zeros(group.shape))
  index = jnp.where((group >= 0) & (rank < width), group * width + rank, groups * width)
  slot = jax.vmap(lambda i, o: jnp.full(groups * width, slots, jnp.int32).at[i].set(
      o, mode='drop'))(index, own)
  points = take(x, jnp.minimum(slot, slots - 1)).reshape(batch * groups, width, features)
  slot, centres = slot.reshape(-1, width), centres.reshape(-1, 1)
  among = slot < slots
  distance = distances(points) * features ** -0.5
  scores = peaks(distance, among,
                 neighbours=jnp.minimum(neighbours, centres) if few else neighbours)
  chosen = among & (ranks(top(scores, width, excluded=~among), width) < centres)
  reach = jnp.where(chosen[:, None], distance, jnp.inf)
  near = jnp.take_along_axis(slot, jnp.argmin(reach, axis=2), axis=1)
  near = jnp.where(chosen, slot, jnp.where(jnp.any(chosen, axis=1, keepdims=True), near, slots))

  def back(values: Array, fill: float) -> Array:
    values = jnp.pad(values.reshape(batch, -1), ((0, 0), (0, 1)), constant_values=fill)
    return take(values, index)

  return Groups(back(jnp.where(among, scores, -jnp.inf), -jnp.inf), back(near, slots))


def means_of_still(frames: Frames, x: Array, still: Array, first: Array,
                   last: Array) -> tuple[Array, Array, Array, Array]:
  """Averages places that stand still over frames, each in the first one.

  Args:
    frames: of N slots.
    x: float[B, N, D].
    still: bool[B, N], tokens of such places.
    first, last: int32[B, N], the frames over which they do.

  Returns:
    int32[B, N], the slot of the place in that frame, a token's own where it moves; int32[B, N], how
    many frames it is there, 1 where it moves; int32[B, N] below 2 F, groups to cluster: the moving
    tokens of each frame, then the places that stand still from each frame on, -1 for all but their
    first token; and float32[B, N, D], the tokens with these means.
  """
  own = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), still.shape)
  anchor = jnp.where(still, frames.at(first), own)
  length = jnp.where(still, last - first + 1, 1)
  parts = jnp.where(still[..., None], x.astype(jnp.float32), 0) / length[..., None]
  group = jnp.where(still, jnp.where(anchor == own, frames.number + first, -1), frames.frame)
  return anchor, length, group, jnp.where(still[..., None], joined(parts, anchor), x)


def joined(values: Array, partner: Array) -> Array:
  """Adds values up in the slot that each joins, [B, N, ...] -> [B, N, ...]; slot N is none."""
  slots = partner.shape[1]
  values = jnp.where(expand_like(partner < slots, values), values, 0)
  return sums(values, jnp.where(partner < slots, partner, -1), slots)
