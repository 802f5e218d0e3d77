"""Frames of a video: tokens of the same place, means and budgets by frame, segments of frames.

Axes: B batch, N slots, F frames, G groups, W tokens of a group at most, D features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from ops.assignments import Merge, expand_like, take
from ops.primitives.cluster import distances, peaks
from ops.primitives.crops import keep_flagged, ranks_within, sums
from ops.primitives.match import l2_normalize
from ops.primitives.select import ranks, top
from ops.signals import Signals
from ops.tokens import TokenSet, count, num_kept

Array = jax.Array
# What methods that go by frames need of a host.
FRAME_SIGNALS = frozenset({'crop', 'num_crops'})


class Frames(struct.PyTreeNode):
  """Says which frame each token is of, and where in it.

  Attributes:
    frame: int32[B, N], -1 where a token is of none (a newline), or may not be touched.
    place: int32[B, N], which of its frame's tokens it is.
    order: int32[B, N], slots by place, then frame; those of no frame last.
    number: F. Static.
  """

  frame: Array
  place: Array
  order: Array
  number: int = struct.field(pytree_node=False)

  @classmethod
  def of(cls, tokens: TokenSet, signals: Signals) -> Frames:
    """Makes it of the signals `FRAME_SIGNALS`."""
    slots, number = tokens.slots, signals.num_crops
    crop = signals.crop
    frame = jnp.where(tokens.free & (crop >= 0) & (crop < number), crop, -1)
    place = ranks_within(frame, jnp.zeros(frame.shape))
    own = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), frame.shape)
    order = jax.lax.sort((jnp.where(frame < 0, slots, place), frame, own), num_keys=2)[2]
    return cls(frame, place, order, number)

  @property
  def there(self) -> Array:
    """bool[B, N], whether a token is of a frame."""
    return self.frame >= 0

  @property
  def sizes(self) -> Array:
    """int32[B, F], tokens of each frame."""
    return sums(self.there, self.frame, self.number)

  @property
  def counts(self) -> Array:
    """int32[B, 1], frames of each row: those behind have no tokens."""
    return jnp.max(self.frame, axis=1, keepdims=True) + 1

  def at(self, frame: Array) -> Array:
    """Finds the slot of the same place in another frame, int32[B, N], N where there is none.

    Args:
      frame: int32[B, N]; no frame between may lack the place.
    """
    slots = self.frame.shape[1]
    index = ranks(self.order, slots) + frame - self.frame
    slot = take(self.order, jnp.clip(index, 0, slots - 1))
    same = (take(self.frame, slot) == frame) & (take(self.place, slot) == self.place)
    return jnp.where(same & self.there & (frame >= 0), slot, slots)

  def spread(self, values: Array) -> Array:
    """Gives each token what its frame has, [B, F] -> [B, N]; those of no frame get the first's."""
    return take(values, jnp.maximum(self.frame, 0))

  def means(self, x: Array) -> Array:
    """Averages features by frame, float[B, N, D] -> float32[B, F, D]; zeros where it has none."""
    total = sums(jnp.where(self.there[..., None], x, 0).astype(jnp.float32), self.frame,
                 self.number)
    return total / jnp.maximum(self.sizes, 1)[..., None]

  def likeness(self, x: Array, other: Array) -> Array:
    """Compares each token with that of another slot, by cosine: float32[B, N], -2 for slot N.

    Args:
      x: float[B, N, D].
      other: int32[B, N], as `at` has it.
    """
    unit = jax.lax.stop_gradient(l2_normalize(x))
    slots = x.shape[1]
    cosine = jnp.sum(unit * take(unit, jnp.minimum(other, slots - 1)), axis=2)
    return jnp.where(other < slots, cosine, -2.0)

  def runs(self, alike: Array) -> Array:
    """Counts frames in a row, int32[B, N]: how many before a token's are like the one after them.

    Args:
      alike: bool[B, N], whether a token is like the same place of the frame before; False where
        there is none.
    """
    own = jnp.broadcast_to(jnp.arange(alike.shape[1], dtype=jnp.int32), alike.shape)
    last = jax.lax.cummax(jnp.where(take(alike, self.order), 0, own), axis=1)
    return take(own - last, ranks(self.order, alike.shape[1]))

  def num_kept(self, tokens: TokenSet, num_slots: int) -> Array:
    """Counts the tokens that frames keep, int32[B, 1]: those of no frame stay, and are counted."""
    others = count(tokens.free & ~self.there)
    return jnp.maximum(num_kept(tokens, num_slots) - others, 0)


def shares(sizes: Array, total: Array) -> Array:
  """Divides a number among frames by their sizes, rounded down; the first ones get what is left.

  Args:
    sizes: int32[B, F].
    total: int32[B, 1], at most the sum of the sizes.
  """
  whole = jnp.maximum(jnp.sum(sizes, axis=1, keepdims=True), 1)
  least = sizes * total // whole
  left = total - jnp.sum(least, axis=1, keepdims=True)
  room = least < sizes
  return least + (room & (jnp.cumsum(room, axis=1) <= left))


def asked(frames: Frames, tokens: TokenSet, num_slots: int, share: float | None) -> Array:
  """Counts the tokens that each frame keeps, int32[B, F]: of `share`, rounded down, or the budget.
  """
  if share is None:
    return shares(frames.sizes, frames.num_kept(tokens, num_slots))
  # A product that should be whole may come out a rounding below.
  return jnp.floor(frames.sizes * share + 1e-4).astype(jnp.int32)


def check_share(share: float | None) -> None:
  """Raises a ValueError unless it is a share of the tokens, or None for that of the budget."""
  if share is not None and not 0 < share <= 1:
    raise ValueError(f'share={share} must be above 0 and at most 1, or None for that of the budget')


def segments(starts: Array, counts: Array) -> tuple[Array, Array]:
  """Finds the first and the last frame of each frame's segment, int32[B, F] twice.

  Args:
    starts: bool[B, F], True where a segment begins, as one does at 0.
    counts: int32[B, 1], frames that there are; those behind are segments of their own.
  """
  own = jnp.arange(starts.shape[1], dtype=jnp.int32)[None]
  starts = starts | (own == 0) | (own >= counts)
  first = jax.lax.cummax(jnp.where(starts, own, 0), axis=1)
  ends = jnp.concatenate([starts[:, 1:], jnp.ones_like(starts[:, :1])], axis=1)
  last = jax.lax.cummin(jnp.where(ends, own, starts.shape[1]), axis=1, reverse=True)
  return first, last


def best(tokens: TokenSet, stays: Array, scores: Array, *, num_slots: int) -> Array:
  """Names the best of some tokens, as many as the row keeps at most.

  Args:
    tokens: N slots.
    stays: bool[B, N].
    scores: float32[B, N].
    num_slots: M.

  Returns:
    bool[B, N].
  """
  stays = stays & tokens.free
  place = ranks(top(scores, tokens.slots, excluded=~stays), tokens.slots)
  return stays & (place < num_kept(tokens, num_slots))


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
  scores = peaks(distance, among, neighbours=neighbours, most=centres if few else None)
  chosen = among & (ranks(top(scores, width, excluded=~among), width) < centres)
  reach = jnp.where(chosen[:, None], distance, jnp.inf)
  near = jnp.take_along_axis(slot, jnp.argmin(reach, axis=2), axis=1)
  near = jnp.where(chosen, slot, jnp.where(jnp.any(chosen, axis=1, keepdims=True), near, slots))

  def back(values: Array, fill: float) -> Array:
    values = jnp.pad(values.reshape(batch, -1), ((0, 0), (0, 1)), constant_values=fill)
    return take(values, index)

  return Groups(back(jnp.where(among, scores, -jnp.inf), -jnp.inf), back(near, slots))


def joined(values: Array, partner: Array) -> Array:
  """Adds values up in the slot that each joins, [B, N, ...] -> [B, N, ...]; slot N is none."""
  slots = partner.shape[1]
  values = jnp.where(expand_like(partner < slots, values), values, 0)
  return sums(values, jnp.where(partner < slots, partner, -1), slots)
