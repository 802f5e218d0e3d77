"""Images of a batch, and the order in which a language model reads what a tower makes of them.

Axes: B batch, C rows of the tower (crops, frames) of a row of the batch, I images of a row, V most
tokens of an image, K features that one token is made of, S side of a crop, n tokens of a crop that
the tower passes on, P patches of a crop, D features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ops.moves.rows import take
from ops.splice import Visual
from ops.tokens import TokenSet

Array = jax.Array
# (C, I, V) of `Images`: rows of the tower, images, most tokens of one.
Layout = tuple[int, int, int]


@struct.dataclass
class Images:
  """The images of a batch.

  Attributes:
    pixels: float[B, C, S, S, 3], or patches float[B, C, R, C', P] for
      models/backbones/qwen_vision.py.
    sizes: int[B, C, 2], for patches alone.
    index: int32[B, I, V, K] or None: token v of image i is made of these features of the row,
      `c * n + p` for patch (or cell) p of crop c, n of which a crop has, and C * n for the newline.
      None for one image a crop, in raster order. Where a compressor reads all crops of an image at
      once (I = 1), it only says which there are: those up to the last one named.
    weight: float32[B, I, V, K], the share of each, all zero where there is no token.
    axes, extent: positions, as in `ops.splice.Visual`; None where they have one axis.
    tiling: int32[B, I, 2] or None, rows and columns of the crops that an image is cut into beside
      its first one; 0 for none. Methods that give each crop a budget read it.
  """

  pixels: Array
  sizes: Array | None = None
  index: Array | None = None
  weight: Array | None = None
  axes: Array | None = None
  extent: Array | None = None
  tiling: Array | None = None

  @property
  def layout(self) -> Layout:
    """Returns (C, I, V), which decide all shapes behind the tower; V is 0 for one image a crop."""
    crops = self.pixels.shape[1]
    if self.index is None:
      return crops, crops, 0
    return crops, self.index.shape[1], self.index.shape[2]


def arrange(tokens: TokenSet, images: Images,
            newline: Array | None) -> tuple[Visual, tuple[Array, Array] | None]:
  """Puts a tower's tokens in the order in which they are read.

  Args:
    tokens: x float[B * C, n, D], behind the projector; C is 1 where a row's crops were joined.
    images: of B rows.
    newline: float[D], what ends a row of patches, or None.

  Returns:
    The visual tokens, and index and weight as in `Images`, but of the tokens that the tower
    passed on; None where each is one visual token.
  """
  batch, each = len(images.pixels), tokens.slots
  crops = len(tokens.x) // batch
  stats = {name: value.reshape(batch, crops, each, *value.shape[2:])
           for name, value in tokens.stats.items()}
  x = tokens.x.reshape(batch, crops, each, tokens.x.shape[-1])
  valid = None if tokens.valid is None else tokens.valid.reshape(batch, crops, each)
  if images.index is None:
    stats['cell'] = tokens.pos.reshape(batch, crops, each)
    return Visual(x, valid, stats=stats), None
  assert images.weight is not None
  index, weight = images.index, images.weight
  if each < tokens.owner.shape[1]:
    index, weight = reduced_layout(tokens, index, weight)
  last = jnp.zeros(x.shape[-1:]) if newline is None else newline
  last = jnp.broadcast_to(last.astype(x.dtype), (batch, 1, x.shape[-1]))

  def mix(values: Array, last: Array) -> Array:
    flat = jnp.concatenate([values.reshape(batch, crops * each, *values.shape[3:]), last], axis=1)
    parts = take(flat, index.reshape(batch, -1)).reshape(*index.shape, *flat.shape[2:])
    weights = weight.reshape(weight.shape + (1,) * (flat.ndim - 2))
    return jnp.sum(parts * weights, axis=3).astype(values.dtype)

  # The newline is like no patch: it was attended by none.
  stats = {name: mix(value, jnp.zeros((batch, 1, *value.shape[3:]), value.dtype))
           for name, value in stats.items()}
  stats['cell'] = jnp.broadcast_to(jnp.arange(index.shape[2], dtype=jnp.int32), index.shape[:3])
  real = (weight > 0).any(axis=-1)
  if valid is not None:
    real &= mix(valid.astype(jnp.float32), jnp.ones((batch, 1))) > 0
  return Visual(mix(x, last), real, stats=stats), (index, weight)


def tiling_of(images: Images) -> Array:
  """Rows and columns of the crops of each image, int32[B, I, 2].

  Raises:
    ValueError: a layout that does not say.
  """
  if images.tiling is not None:
    return images.tiling
  if images.index is None:
    return jnp.zeros((*images.pixels.shape[:2], 2), jnp.int32)
  raise ValueError('the reduction at the projector goes by crops, and these images do not say how '
                   'they are cut: give Images their tiling (lib/data/pictures.py does)')


def image_counts(images: Images) -> np.ndarray:
  """Returns int[B, I], tokens of each image before any reduction, -1 where there is none.

  It runs on the host, for ops.splice.check. Without an index every crop is an image.
  """
  if images.index is None:
    return np.ones(images.pixels.shape[:2], np.int64)
  counts = (np.asarray(images.weight) > 0).any(axis=-1).sum(axis=-1)
  return np.where(counts == 0, -1, counts)


def reduced_layout(tokens: TokenSet, index: Array, weight: Array) -> tuple[Array, Array]:
  """A layout of all patches as a layout of the slots that a reduced tower left of them.

  A group stands where its anchor stood; newlines go, for their rows are no longer whole.

  Args:
    tokens: [B * C, n], whose owner is int32[B * C, P], P patches of a crop.
    index, weight: [B, I, V, 1] of `Images`.

  Returns:
    Index and weight [B, I, min(V, C * n), 1], real tokens first.

  Raises:
    ValueError: a layout that interpolates between patches.
  """
  each, patches, batch = tokens.slots, tokens.owner.shape[1], len(index)
  if index.shape[-1] > 1:
    raise ValueError('these images are laid out by interpolating between patches, of which a '
                     'reduction in the tower leaves too few: reduce at the projector '
                     '(config.reduce.projector), or lay them out in full')
  anchor = jnp.where(tokens.real, tokens.pos, patches)
  number = jnp.arange(each, dtype=jnp.int32)
  slot_of = jax.vmap(lambda at: jnp.full(patches, -1, jnp.int32).at[at].set(number, mode='drop'))(
      anchor).reshape(batch, -1)
  total = slot_of.shape[1]
  flat = index.reshape(batch, -1)
  patch = jnp.minimum(flat, total - 1)
  slot = take(slot_of, patch)
  # The slot's number among those of all crops of the row.
  row_slot = patch // patches * each + jnp.maximum(slot, 0)
  real = (slot >= 0) & (flat < total)
  weight = jnp.where(real.reshape(weight.shape), weight, 0.0)
  limit = min(index.shape[2], total // patches * each)
  order = jnp.argsort(weight[..., 0] == 0, axis=2, stable=True)[:, :, :limit, None]
  return (jnp.take_along_axis(row_slot.reshape(index.shape), order, axis=2),
          jnp.take_along_axis(weight, order, axis=2))
