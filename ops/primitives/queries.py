"""Queries whose attention ranks tokens: masks over the slots of a sequence, and attention itself.

Axes: B batch, N slots, H heads, d features a head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ops.assignments import take
from ops.attention import HIDDEN_LOGIT
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
  free, real = tokens.free, tokens.real
  counts = free[:, :, None] & ~jnp.eye(tokens.slots, dtype=bool)[None]

  def of_head(head: tuple[Array, Array]) -> Array:
    q, k = (jax.lax.stop_gradient(each.astype(jnp.float32)) for each in head)
    logits = jnp.einsum('bnd,bmd->bnm', q, k, precision='highest') * q.shape[2] ** -0.5
    weights = jax.nn.softmax(jnp.where(real[:, None], logits, HIDDEN_LOGIT), axis=2)
    return jnp.sum(jnp.where(counts, weights, 0.0), axis=1)

  # One head after another, so that there is the map of one alone.
  heads = jax.lax.map(of_head, tuple(jnp.moveaxis(each, 2, 0)
                                     for each in (queries, keys)))
  return jnp.where(free, heads.mean(axis=0) / jnp.maximum(count(free) - 1, 1), 0.0)
