"""Queries whose attention ranks tokens: masks over the slots of a sequence, and attention itself.

Axes: B batch, N slots, R rows, C rows at a time, S sums, F MLP width, H heads, K kv heads, G heads
that share one, d features a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ops import attention
from ops.moves.rows import by_row, take
from ops.rope import sequence_index
from ops.signals import Signals, latest
from ops.tokens import SPECIAL, TEXT, VISUAL, TokenSet, count, key_bias

Array = jax.Array
T = TypeVar('T')
# Rows of a map that are formed at a time.
ROWS = 32


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
  logits = jnp.where(tokens.real, logits * keys.shape[2] ** -0.5, attention.HIDDEN_LOGIT)
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
      weights = jax.nn.softmax(jnp.where(real[None], logits, attention.HIDDEN_LOGIT), axis=1)
      return total + jnp.sum(jnp.where(counts, weights, 0.0), axis=0), None

    # One head after another, so that there is the map of one alone.
    return jax.lax.scan(add, jnp.zeros(len(free)), (queries, keys))[0] / len(queries)

  received = by_row(of_row, queries, keys, free, tokens.real)
  return jnp.where(free, received / jnp.maximum(count(free) - 1, 1), 0.0)


def latest_but(tokens: TokenSet, back: int, values: Array) -> Array:
  """Returns values [B, N, ...] of the token that is `back` from the end, 1 for the last: [B, ...].

  A row with fewer tokens gives those of its first.
  """
  order = latest(sequence_index(tokens.pos), tokens.valid, tokens.kind.shape)
  at = jnp.maximum(tokens.slots - jnp.minimum(back, count(tokens.real)), 0)
  return take(values, take(order, at))[:, 0]


def shared_neurons(hidden: Array, theirs: Array) -> Array:
  """Counts the neurons above 0, of [B, N, F], that are also in bool[B, F]: int32[B, N]."""
  shared = by_row(lambda hidden, theirs: (hidden > 0).astype(jnp.float32) @ theirs.astype(
      jnp.float32), hidden, theirs)
  return shared.astype(jnp.int32)


def sample_of(tokens: TokenSet) -> Array:
  """Counts the images that have begun, up to each slot: int32[B, N].

  An image ends where text follows; one that follows another at once belongs to it. Slots are in the
  order of the sequence, as in a language model, padding anywhere.
  """
  slot = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), tokens.kind.shape)
  latest = jax.lax.cummax(jnp.where(tokens.real, slot, -1), axis=1)
  before = jnp.pad(latest, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  visual = tokens.real & (tokens.kind == VISUAL)
  follows = (before >= 0) & take(visual, jnp.maximum(before, 0))
  return jnp.cumsum(visual & ~follows, axis=1, dtype=jnp.int32)


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


def sum_rows(tokens: TokenSet, signals: Signals, of: Array,
             heads: Callable[..., Array]) -> Array:
  """Adds up rows of a causal attention map, some at a time.

  Args:
    tokens: N slots.
    signals: with `queries` and `keys`.
    of: bool[S, B, N], the rows of S sums.
    heads: what makes one map of those of all heads, as jnp.max or jnp.mean.

  Returns:
    float32[S, B, N].
  """
  def add(total: Array, rows: Array, counts: Array) -> Array:
    return total + jnp.einsum('sbc,bcn->bsn', counts.astype(jnp.float32), heads(rows, axis=1),
                              precision='highest')

  batch, slots = tokens.kind.shape
  return jnp.moveaxis(fold_rows(tokens, signals, of, jnp.zeros((batch, len(of), slots)), add), 1, 0)


def sums_of_image_and_text(tokens: TokenSet, signals: Signals, after: Array) -> tuple[Array, Array]:
  """Adds up the attention that each token gets, the largest over heads: float32[B, N] twice.

  Args:
    tokens: N slots.
    signals: with `queries` and `keys`.
    after: bool[B, N], the text behind the images.

  Returns:
    That of image tokens, and that of this text.
  """
  image, text = sum_rows(tokens, signals, jnp.stack([
      tokens.real & (tokens.kind == VISUAL), after]), jnp.max)
  return image, text


def fold_rows(tokens: TokenSet, signals: Signals, of: Array, start: T,
              step: Callable[[T, Array, Array], T], *, most: int | None = None) -> T:
  """Goes over the rows of a causal attention map, some at a time.

  Args:
    tokens: N slots.
    signals: with `queries` and `keys`.
    of: bool[S, B, N], flags of the rows.
    start: what the first step is given; a tree of arrays [B, ...].
    step: (what the last step returned, C rows float32[B, H, C, N], their flags bool[S, B, C]), for
      any B.
    most: how many rows have flags at most, None for N; the fewer, the less is computed.

  Returns:
    What the last step returned.
  """
  place, bias = sequence_index(tokens.pos), key_bias(tokens, proportional=False)
  q, k = (jax.lax.stop_gradient(x) for x in (signals.queries, signals.keys))
  flagged = jnp.argsort(~of.any(axis=0), axis=1, stable=True)[:, :most]
  number = flagged.shape[1]
  chunks = np.arange(-(-number // ROWS) * ROWS).reshape(-1, ROWS)

  def of_row(*row: Any) -> T:
    start, q, k, place, bias, flagged, of = jax.tree.map(lambda x: x[None], row)

    def next_rows(state: T, chunk: Array) -> tuple[T, None]:
      at = jnp.take(flagged, jnp.minimum(chunk, number - 1), axis=1)
      rows = attention.rows(take(q, at), k, None, bias=bias, positions=place, last=take(place, at))
      flags = jnp.take_along_axis(of, at[:, None], axis=2) & (chunk < number)[None, None]
      return step(state, rows, jnp.swapaxes(flags, 0, 1)), None

    # The zeros depend on k so that they vary over the same mesh axes inside a shard_map.
    start = jax.tree.map(lambda x: x + 0.0 * jnp.sum(k[:0]), start)
    return jax.tree.map(lambda x: x[0], jax.lax.scan(next_rows, start, jnp.asarray(chunks))[0])

  return by_row(of_row, start, q, k, place, bias, flagged, jnp.swapaxes(of, 0, 1))
