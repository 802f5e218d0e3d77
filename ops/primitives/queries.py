"""Queries whose attention ranks tokens: masks over the slots of a sequence, and attention itself.

Axes: B batch, N slots, H heads, d features a head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ops.assignments import take
from ops.attention import HIDDEN_LOGIT
from ops.primitives.products import by_row
from ops.rope import sequence_index
from ops.tokens import SPECIAL, TEXT, VISUAL, TokenSet, count

Array = jax.Array


def text_after_images(tokens: TokenSet) -> Array:
  """bool[B, N], text after the last visual token of its row; all text where there is none."""
  place = sequence_index(tokens.pos)
  visual = tokens.real & (tokens.kind == VISUAL)
  last = jnp.max(jnp.where(visual, place, -1), axis=1, keepdims=True)
  return tokens.real & (tokens.kind == TEXT) & (place > last)


def whole_attention(tokens: TokenSet, queries: Array, keys: Array) -> Array:
  """Attention of [CLS], all heads taken as one: float32[B, N, H d] twice -> float32[B, N]."""
  first = jnp.argmax(tokens.real & (tokens.kind == SPECIAL), axis=1)[:, None]
  logits = jnp.einsum('bd,bnd->bn', take(queries, first)[:, 0], keys, precision='highest')
  logits = jnp.where(tokens.real, logits * keys.shape[2] ** -0.5, HIDDEN_LOGIT)
  return jnp.where(tokens.real, jax.nn.softmax(logits, axis=1), 0.0)


def received_from_others(tokens: TokenSet, queries: Array, keys: Array) -> Array:
  """Returns the attention that each free token gets from other free ones, a mean over these.

  Args:
    tokens: N slots.
    queries, keys: float[B, N, H, d].

  Returns:
    float32[B, N], 0 for tokens that are not free.
  """
  free = tokens.free
  queries, keys = (jnp.moveaxis(jax.lax.stop_gradient(x.astype(jnp.float32)), 2, 1)
                   for x in (queries, keys))

  def of_row(queries: Array, keys: Array, free: Array, real: Array) -> Array:
    counts = free[:, None] & ~jnp.eye(len(free), dtype=bool)

    def add(total: Array, head: tuple[Array, Array]) -> tuple[Array, None]:
      logits = jnp.einsum('nd,md->nm', *head, precision='highest') * queries.shape[2] ** -0.5
      weights = jax.nn.softmax(jnp.where(real[None], logits, HIDDEN_LOGIT), axis=1)
      return total + jnp.sum(jnp.where(counts, weights, 0.0), axis=0), None

    # One head after another, so that there is the map of one alone.
    return jax.lax.scan(add, jnp.zeros(len(free)), (queries, keys))[0] / len(queries)

  received = by_row(of_row, queries, keys, free, tokens.real)
  return jnp.where(free, received / jnp.maximum(count(free) - 1, 1), 0.0)
