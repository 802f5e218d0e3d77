"""Frames of a video: tokens of the same place, means and budgets by frame.

Axes: B batch, N slots, M slots after, F frames, D features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from ops.moves.rows import take
from ops.primitives.crops.regions import ranks_within, sums
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
    crop, number = signals.crop, signals.num_crops
    frame = jnp.where(tokens.free & (crop >= 0) & (crop < number), crop, -1)
    return cls.by(frame, ranks_within(frame, jnp.zeros(frame.shape)), number)

  @classmethod
  def by(cls, frame: Array, place: Array, number: int = 1) -> Frames:
    """Makes it of `frame`, `place` and `number`."""
    slots = frame.shape[1]
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
