"""Queries whose attention ranks tokens: masks over the slots of a sequence.

Axes: B batch, N slots, R rows, H heads, K kv heads, G heads that share one, d features a head.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ops import attention
from ops.assignments import take
from ops.rope import sequence_index
from ops.signals import Signals
from ops.tokens import TEXT, VISUAL, TokenSet, key_bias

Array = jax.Array


def text_after_images(tokens: TokenSet) -> Array:
  """bool[B, N], text after the last visual token of its row; all text where there is none."""
  place = sequence_index(tokens.pos)
  visual = tokens.real & (tokens.kind == VISUAL)
  last = jnp.max(jnp.where(visual, place, -1), axis=1, keepdims=True)
  return tokens.real & (tokens.kind == TEXT) & (place > last)


def heads_in_turn(tokens: TokenSet, signals: Signals,
                  at: Array) -> tuple[tuple[Array, Array], Callable[[tuple[Array, Array]], Array]]:
  """Prepares causal attention rows that are computed kv head by kv head, for a scan or a map.

  Args:
    tokens: N slots.
    signals: with `queries` and `keys`.
    at: int32[B, R], the queries.

  Returns:
    Queries [K, B, R, G, d] and keys [K, B, N, 1, d], and what makes rows float32[B, G, R, N] of one
    of these.
  """
  heads, width = signals.keys.shape[2:]
  queries = take(signals.queries, at).reshape(*at.shape, heads, -1, width)
  keys = signals.keys[:, :, :, None]
  place, bias = sequence_index(tokens.pos), key_bias(tokens, proportional=False)

  def rows(item: tuple[Array, Array]) -> Array:
    return attention.rows(*item, None, bias=bias, positions=place, last=take(place, at))

  return (jnp.moveaxis(queries, 2, 0), jnp.moveaxis(keys, 2, 0)), rows
