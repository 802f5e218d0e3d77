"""Attention masks other than causal ones, as pure functions of token kinds and positions.

Axes: B batch, N tokens, P patches of an image.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array
# A stat of tokens, bool[B, N]: those that stand for what came before them.
SUMMARY = 'summary'
# A stat of tokens, int32[B, N]: the frame of a video that each is of, -1 for none.
FRAME = 'frame'


def modality_mutual_mask(image: Array, question: Array, *, valid: Array | None = None) -> Array:
  """Causal attention in which an image also sees the question that follows it.

  The modality-mutual mask of AKI (Wang et al., 2025), arXiv:2503.02597. With several
  images the release keeps the last one's rows alone; here all of them see the question.

  Args:
    image: bool[B, N], tokens of images.
    question: bool[B, N], tokens of the question.
    valid: bool[B, N] or None, False for padding, which no token sees.

  Returns:
    bool[B, N, N], True where query i (the second axis) sees key j.
  """
  order = jnp.arange(image.shape[1])
  seen = (order[None, :] <= order[:, None])[None] | (image[:, :, None] & question[:, None])
  return seen if valid is None else seen & valid[:, None]


def local_2d_mask(grid: tuple[int, int], *, window: int) -> Array:
  """Attention among patches that sees a square around each, in both directions.

  Treat Visual Tokens as Text? (Zhang et al., 2024), arXiv:2410.06169, as released.

  Args:
    grid: rows and columns of patches.
    window: side of the square, an odd number.

  Returns:
    bool[P, P], True where patch i sees patch j.
  """
  rows, columns = grid
  place = jnp.arange(rows * columns)
  row, column = place // columns, place % columns
  apart = jnp.maximum(jnp.abs(row[:, None] - row[None]), jnp.abs(column[:, None] - column[None]))
  return apart <= window // 2


def around_summaries(place: Array, marked: Array) -> tuple[Array, Array]:
  """Divides a sequence at the tokens that stand for what came before them.

  VoCo-LLaMA (Ye et al., 2024), Sec. 3, arXiv:2406.12275, as released: with causal attention, what
  stands behind the last of them sees nothing before the first one.

  Args:
    place: int32[B, N], the order of the tokens.
    marked: bool[B, N], those tokens.

  Returns:
    bool[B, N] both: tokens before the first marked one, and behind the last. None of either in a
    row without.
  """
  some = jnp.any(marked, axis=1, keepdims=True)
  first = jnp.min(jnp.where(marked, place, jnp.iinfo(place.dtype).max), axis=1, keepdims=True)
  last = jnp.max(jnp.where(marked, place, -1), axis=1, keepdims=True)
  return some & (place < first), some & (place > last)


def frames_begun(frame: Array) -> Array:
  """Counts the frames of a video that have begun at each token, its own among them.

  Args:
    frame: int32[B, N], the number of each token's frame, -1 for none; numbers ascend.

  Returns:
    int32[B, N].
  """
  latest = jax.lax.cummax(frame, axis=1)
  before = jnp.pad(latest, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  return jnp.cumsum(frame > before, axis=1, dtype=jnp.int32)
