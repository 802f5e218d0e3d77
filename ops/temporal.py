"""Streams of frames: reuses the previous frame's tokens where nothing changed.

Axes: B batch (one stream a row), N slots, P patches, p pixels of a patch, S image side, C channels,
D features.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from ops.moves.rows import take
from ops.primitives.select import ranks, top
from ops.tokens import TokenSet

Array = jax.Array
# Luma of red, green and blue, ITU-R BT.601.
LUMA = (0.299, 0.587, 0.114)


class Stream(struct.PyTreeNode):
  """Holds the memory of a stream between frames.

  Attributes:
    frame: int32[B], frames seen. Setting a row to 0 starts its stream anew.
    gray: float32[B, P, p], gray values of the last frame's patches.
    x: float[B, N, D], the last frame's features, after fusion.
  """

  frame: Array
  gray: Array
  x: Array


@dataclasses.dataclass(frozen=True)
class TTF:
  """Replaces the tokens of patches that neither changed nor matter by those of the frame before.

  Temporal token fusion after TTF-VLA (Liu et al., 2025), arXiv:2508.19257, as far as its abstract
  tells: gray-scale differences of pixels, relevance by attention, hard fusion (a token is the old
  or the new one, never a mixture), and keyframes that renew everything, so that errors do not add
  up. Not known here, so ours: a patch changes by its mean absolute difference from the last frame,
  the most attended tokens are renewed, and either is enough. The paper's thresholds are not known
  either, so nothing has a default; its figures are not ours.

  A step is a pure function of the stream and a frame, for jit and scan alike:
  `stream, tokens, reused = ttf(stream, tokens, images, attention)`. A vision-language model runs it
  behind its tower, over the frames of each row: `VLM(…, frames=TTF(…))`.

  Attributes:
    threshold: mean absolute gray difference above which a patch has changed, in units of the image.
    attended: free tokens that are renewed for being attended to most, 0 for none.
    keyframe_every: frames from one keyframe to the next; 1 renews all tokens always.
  """

  threshold: float
  attended: int
  keyframe_every: int

  def __post_init__(self) -> None:
    if self.threshold < 0 or self.attended < 0 or self.keyframe_every < 1:
      raise ValueError(f'threshold={self.threshold} and attended={self.attended} must not be '
                       f'negative, and keyframe_every={self.keyframe_every} at least 1')

  def start(self, tokens: TokenSet, images: Array, *, grid: tuple[int, int]) -> Stream:
    """A stream before its first frame, for tokens and images of these shapes."""
    gray = gray_patches(images, grid=grid)
    return Stream(jnp.zeros(len(tokens.x), jnp.int32), jnp.zeros_like(gray),
                  jnp.zeros_like(tokens.x))

  def __call__(self, stream: Stream, tokens: TokenSet, images: Array, attention: Array, *,
               grid: tuple[int, int]) -> tuple[Stream, TokenSet, Array]:
    """One frame.

    Args:
      stream: what the frames before left.
      tokens: N slots of this frame, one free slot a patch, whose `pos` is the patch in raster
        order; slots are in the same order in every frame. Other slots and padding are always new.
      images: float[B, S, S, C], this frame's pixels.
      attention: float32[B, N], how relevant each token is, of this frame or, where it is known only
        later, of the last.
      grid: (rows, columns) of patches.

    Returns:
      The stream after this frame, its tokens, and bool[B, N], which of them are the old ones.

    Raises:
      ValueError: tokens that were reduced, or images that the grid does not divide.
    """
    patches = grid[0] * grid[1]
    if tokens.slots - tokens.protected != patches:
      raise ValueError(f'{tokens.slots - tokens.protected} tokens cannot be fused from frame to '
                       f'frame, as a frame has {patches} patches: fuse before any reduction')
    gray = gray_patches(images, grid=grid)
    difference = jnp.mean(jnp.abs(gray - stream.gray), axis=2)
    changed = take(difference > self.threshold, jnp.maximum(tokens.pos, 0))
    order = top(attention, min(self.attended, tokens.slots), excluded=~tokens.free)
    relevant = ranks(order, tokens.slots) < order.shape[1]
    keyframe = (stream.frame % self.keyframe_every == 0)[:, None]
    reused = tokens.free & ~(changed | relevant | keyframe)
    fused = tokens.replace(x=jnp.where(reused[..., None], stream.x, tokens.x))
    return Stream(stream.frame + 1, gray, fused.x), fused, reused


def fuse_frames(ttf: TTF, tokens: TokenSet, images: Array, attention: Array, *,
                grid: tuple[int, int]) -> tuple[TokenSet, Array]:
  """Runs whole streams through `TTF`, frame after frame.

  Args:
    ttf: the rule.
    tokens: [B * F, N], the frames of a stream in the order of time.
    images: float[B, F, S, S, C].
    attention: float32[B * F, N].
    grid: (rows, columns) of patches.

  Returns:
    The tokens after fusion, and bool[B * F, N], which of them are older ones.
  """
  frames = images.shape[1]

  def by_frame(x: Array) -> Array:
    return jnp.moveaxis(x.reshape(-1, frames, *x.shape[1:]), 1, 0)

  def step(stream: Stream,
           item: tuple[TokenSet, Array, Array]) -> tuple[Stream, tuple[Array, Array]]:
    stream, fused, reused = ttf(stream, *item, grid=grid)
    return stream, (fused.x, reused)

  each = jax.tree.map(by_frame, tokens)
  start = ttf.start(jax.tree.map(lambda x: x[0], each), images[:, 0], grid=grid)
  items = each, jnp.moveaxis(images, 1, 0), by_frame(attention)
  results = jax.lax.scan(step, start, items)[1]
  x, reused = (jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]) for x in results)
  return tokens.replace(x=x), reused


def gray_patches(images: Array, *, grid: tuple[int, int]) -> Array:
  """Gray values by patch, in raster order: float[B, S, S, C] -> float32[B, P, p].

  Raises:
    ValueError: images that the grid does not divide, or with neither 1 nor 3 channels.
  """
  batch, height, width, channels = images.shape
  rows, columns = grid
  if height % rows or width % columns:
    raise ValueError(f'images of {height} x {width} pixels do not divide into {rows} x {columns} '
                     'patches: resize them')
  if channels not in (1, 3):
    raise ValueError(f'images with {channels} channels have no gray value: give 1 or 3')
  images = images.astype(jnp.float32)
  gray = images[..., 0]
  if channels == 3:
    gray = jnp.einsum('bhwc,c->bhw', images, jnp.asarray(LUMA), precision='highest')
  cut = gray.reshape(batch, rows, height // rows, columns, width // columns)
  return cut.transpose(0, 1, 3, 2, 4).reshape(batch, rows * columns, -1)
