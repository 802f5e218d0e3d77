"""Quarters of an image that is cut into crops: the image as one plane, and clusters of four parts.

Axes: B batch, N slots, G crops times patches of one, R fours of parts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from ops.argmax import max_and_index
from ops.moves.rows import take
from ops.signals import Signals
from ops.tokens import TokenSet

Array = jax.Array


class Mosaic(struct.PyTreeNode):
  """Says where tokens are in their image: crops beside each other, one that is whole by itself.

  Attributes:
    crop: int32[B, N], -1 for what is no patch, or may not be touched.
    place: int32[B, N, 2], row and column in the whole, of which the crop is a part.
    first, size: int32[B, N, 2], the first row and column of that whole, and how many it has.
    across: int32[B, N], crops beside each other; 0 where the crop is a whole by itself.
    slots: int32[B, G], the slot of each patch of each crop, N where there is none.
    grid: (rows, columns) of a crop. Static.
  """

  crop: Array
  place: Array
  first: Array
  size: Array
  across: Array
  slots: Array
  grid: tuple[int, int] = struct.field(pytree_node=False)

  @classmethod
  def of(cls, tokens: TokenSet, signals: Signals) -> Mosaic:
    """Makes it of the signals `CROP_SIGNALS`."""
    crop, patch, (rows, columns) = signals.crop, signals.patch, signals.crop_grid
    crop = jnp.where(tokens.free & (crop >= 0) & (crop < signals.num_crops), crop, -1)
    across = jnp.where(crop > 0, signals.tiling[:, 1:], 0)
    part, tiled = crop - 1, (across > 0)[..., None]
    base = jnp.stack([part // jnp.maximum(across, 1) * rows,
                      part % jnp.maximum(across, 1) * columns], axis=2)
    place = jnp.where(tiled, base, 0) + jnp.stack([patch // columns, patch % columns], axis=2)
    # Crops may lack the padding around the image.
    low = jnp.min(jnp.where(tiled, place, jnp.iinfo(jnp.int32).max), axis=1, keepdims=True)
    high = jnp.max(jnp.where(tiled, place, -1), axis=1, keepdims=True)
    key = jnp.where(crop < 0, signals.num_crops * rows * columns, crop * rows * columns + patch)
    own = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), crop.shape)
    slots = jax.vmap(lambda k, o: jnp.full(signals.num_crops * rows * columns, tokens.slots).at[
        k].min(o, mode='drop'))(key, own)
    return cls(crop, place, jnp.where(tiled, low, 0),
               jnp.where(tiled, high - low + 1, jnp.array([[signals.crop_grid]])), across, slots,
               signals.crop_grid)

  @property
  def longest(self) -> int:
    """The longest side that an image can have."""
    return self.slots.shape[1] // min(self.grid)

  def key(self, place: Array) -> Array:
    """Numbers places int32[B, N, 2], each in the whole of its token: int32[B, N], below G."""
    rows, columns = self.grid
    (row, column), across = (place[..., 0], place[..., 1]), self.across
    crop = jnp.where(across > 0, 1 + row // rows * across + column // columns, self.crop)
    return jnp.maximum(crop, 0) * rows * columns + row % rows * columns + column % columns

  def slot(self, place: Array) -> Array:
    """Finds the slots at places int32[B, N, 2], each in the whole of its token; N for none."""
    inside = jnp.all(place < self.first + self.size, axis=2)
    key = jnp.clip(self.key(place), 0, self.slots.shape[1] - 1)
    return jnp.where(inside, take(self.slots, key), self.crop.shape[1])


def average_linkage(similar: Array) -> tuple[Array, Array]:
  """Clusters four parts, the most similar two clusters at a time, by the mean over their pairs.

  Args:
    similar: float32[R, 4, 3], of each part to each before it; -inf where one is missing.

  Returns:
    float32[R, 4], the similarity at which each part's cluster joins one that begins before it, -inf
    where it never does; int32[R, 4], the first part of that one.
  """
  part = jnp.arange(4)[None]
  earlier = part < part.T
  similar = jnp.pad(similar, ((0, 0), (0, 0), (0, 1)))
  there = earlier[None] & (similar > -jnp.inf)
  cosines, ones = (values + jnp.swapaxes(values, 1, 2) for values in (
      jnp.where(there, similar, 0.0), there.astype(jnp.float32)))

  def join(_: int, state: tuple[Array, ...]) -> tuple[Array, ...]:
    heights, joins, member = state  # Clusters, and the parts of each.
    total, pairs = (jnp.einsum('rap,rpq,rbq->rab', member, values, member, precision='highest')
                    for values in (cosines, ones))
    mean = jnp.where(earlier[None] & (pairs > 0), total / jnp.maximum(pairs, 1), -jnp.inf)
    height, pick = max_and_index(mean.reshape(-1, 16), axis=1)
    later, first = (part == index[:, None] for index in (pick // 4, pick % 4))
    merges = later & (height > -jnp.inf)[:, None]
    moved = jnp.sum(jnp.where(merges[..., None], member, 0.0), axis=1, keepdims=True)
    member = jnp.where(merges[..., None], 0.0, member) + jnp.where(first[..., None], moved, 0.0)
    return (jnp.where(merges, height[:, None], heights),
            jnp.where(merges, (pick % 4)[:, None], joins), member)

  # Zeros that depend on the input, so that they vary over the same axes of a mesh.
  nothing = 0.0 * ones[..., 0]
  start = (nothing - jnp.inf, nothing.astype(jnp.int32), jnp.eye(4)[None] + 0.0 * ones)
  return jax.lax.fori_loop(0, 3, join, start)[:2]
