"""Attention masks other than causal ones, as pure functions of token kinds and positions.

Axes: B batch, N tokens, P patches of an image.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


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
