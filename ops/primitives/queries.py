"""Queries whose attention ranks tokens: masks over the slots of a sequence.

Axes: B batch, N slots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ops.rope import sequence_index
from ops.tokens import TEXT, VISUAL, TokenSet

Array = jax.Array


def text_after_images(tokens: TokenSet) -> Array:
  """bool[B, N], text after the last visual token of its row; all text where there is none."""
  place = sequence_index(tokens.pos)
  visual = tokens.real & (tokens.kind == VISUAL)
  last = jnp.max(jnp.where(visual, place, -1), axis=1, keepdims=True)
  return tokens.real & (tokens.kind == TEXT) & (place > last)
