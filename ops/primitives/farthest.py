"""Choosing tokens that differ: greedy selections that hold one row of similarities at a time.

Axes: B batch, N slots, D features, C slots compared at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from ops.assignments import by_row
from ops.primitives.match import l2_normalize

Array = jax.Array


def largest_cosine(vectors: Array, among: Array, *, chunk: int = 64) -> Array:
  """Finds each slot's similarity to its nearest neighbour, C = `chunk` slots at a time.

  Args:
    vectors: float32[B, N, D], of length one.
    among: bool[B, N], slots that count as neighbours.
    chunk: how many slots are compared with all others at once.

  Returns:
    float32[B, N], the largest cosine with another slot, -2 where there is none.
  """
  return _largest_cosine(vectors, among, jnp.not_equal, chunk=chunk)


def num_similar(vectors: Array, among: Array, *, threshold: float, chunk: int = 64) -> Array:
  """Counts the other slots of which each has a larger cosine than a threshold, int32[B, N].

  Args:
    vectors: float32[B, N, D], of length one.
    among: bool[B, N], slots that count.
    threshold: of the cosine.
    chunk: C, how many slots are compared with all others at once.
  """
  def number(others: Array, cosines: Array) -> Array:
    return jnp.sum(others & (cosines > threshold), axis=1, dtype=jnp.int32)

  return _by_slot(vectors, among, jnp.not_equal, number, chunk=chunk)


def largest_later_cosine(x: Array, among: Array, *, chunk: int = 64) -> Array:
  """Finds the largest cosine of each token with a later one, C = `chunk` slots at a time.

  Args:
    x: float[B, N, D].
    among: bool[B, N], tokens that count.
    chunk: how many slots are compared with all others at once.

  Returns:
    float32[B, N], -2 where no token follows.
  """
  vectors = jax.lax.stop_gradient(l2_normalize(x))
  return _largest_cosine(vectors, among, jnp.greater, chunk=chunk)


def farthest_first(vectors: Array, among: Array, first: Array, *, count: int,
                   weight: Array | None = None, far_from: str = 'nearest') -> Array:
  """Picks slots one by one, each the farthest from all picked so far.

  Distance is 1 minus the cosine with the nearest of them, times a weight; or, far_from='all', 1
  minus the sum of the cosines with all of them. Of equals the lowest slot
  wins. It takes `count` steps, one after another, of a row of N cosines each.

  Args:
    vectors: float32[B, N, D], of length one.
    among: bool[B, N], slots that may be picked.
    first: int32[B], the one to start with.
    count: how many to pick.
    weight: float32[B, N], 0 or more, or None for 1.
    far_from: 'nearest' or 'all'.

  Returns:
    int32[B, N], at which step each slot was picked, `count` where it was not.
  """
  chex.assert_equal_shape_prefix((vectors, among), 2)

  def look(data: tuple[Array, Array | None], nearest: Array, pick: Array,
           number: Array) -> tuple[Array, Array]:
    del number
    vectors, weight = data
    row = jnp.einsum('d,nd->n', vectors[pick], vectors, precision='highest')
    nearest = jnp.maximum(nearest, row) if far_from == 'nearest' else nearest + row
    return nearest, 1 - nearest if weight is None else (1 - nearest) * weight

  start = jax.nn.one_hot(first, vectors.shape[1])
  near = jnp.full(among.shape, -2.0 if far_from == 'nearest' else 0.0)
  return pick_greedily(look, (vectors, weight), among, start, near, count=count)


def pick_greedily(look: Callable[..., tuple[Any, Array]], data: Any, among: Array, gain: Array,
                  state: Any, *, count: int) -> Array:
  """Picks slots one by one, each the one that gains most by then; of equals the lowest.

  Args:
    look: of one row: (data, state, the pick int32[], how many came before it) -> state, and what
      each slot gains as the next, float32[N].
    data: arrays [B, ...] that `look` reads.
    among: bool[B, N], slots that may be picked.
    gain: float32[B, N], what each gains as the first.
    state: arrays [B, ...] that `look` remembers.
    count: how many to pick.

  Returns:
    int32[B, N], at which step each slot was picked, `count` where it was not.
  """
  slots = jnp.arange(among.shape[1], dtype=jnp.int32)

  def pick_in_row(data: Any, among: Array, gain: Array, state: Any) -> Array:
    def step(number: Array, carried: tuple[Array, Any, Array]) -> tuple[Array, Any, Array]:
      gain, state, turn = carried
      left = among & (turn == count)
      pick = jnp.argmax(jnp.where(left, gain, -jnp.inf)).astype(jnp.int32)
      turn = jnp.where((slots == pick) & left, number, turn)
      state, gain = look(data, state, pick, number)
      return gain, state, turn

    never = jnp.full(among.shape, count, jnp.int32)
    return jax.lax.fori_loop(0, count, step, (gain, state, never))[2]

  return by_row(pick_in_row, data, among, gain, state)


def _largest_cosine(vectors: Array, among: Array, counts: Callable[[Array, Array], Array], *,
                    chunk: int) -> Array:
  """Finds the largest cosine of each slot with those for which counts(their slot, its slot)."""
  def largest(others: Array, cosines: Array) -> Array:
    return jnp.max(jnp.where(others, cosines, -2.0), axis=1)

  return _by_slot(vectors, among, counts, largest, chunk=chunk)


def _by_slot(vectors: Array, among: Array, counts: Callable[[Array, Array], Array],
             reduce: Callable[[Array, Array], Array], *, chunk: int) -> Array:
  """Reduces each slot's cosines with all, C slots at a time: a product of two matrices each.

  Args:
    vectors: float32[B, N, D].
    among: bool[B, N], slots that count.
    counts: (their slots [1, N], its slot [C, 1]) -> bool[C, N], whether they count for it.
    reduce: (those that count bool[C, N], cosines float32[C, N]) -> [C].
    chunk: C.

  Returns:
    [B, N].
  """
  slots = jnp.arange(vectors.shape[1], dtype=jnp.int32)
  chunk = min(chunk, len(slots))
  chunks = jnp.minimum(jnp.arange(-(-len(slots) // chunk) * chunk), len(slots) - 1)

  def of_row(vectors: Array, among: Array) -> Array:
    def of(at: Array) -> Array:
      cosines = jnp.einsum('cd,nd->cn', vectors[at], vectors, precision='highest')
      return reduce(among[None] & counts(slots[None], at[:, None]), cosines)

    return jax.lax.map(of, chunks.reshape(-1, chunk)).reshape(-1)[:len(slots)]

  return by_row(of_row, vectors, among)
