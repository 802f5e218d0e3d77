"""Segments of frames: where they begin, and how videos are divided into them.

Axes: B batch, N slots, F frames, W frames of a window.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ops.moves.rows import take
from ops.primitives.crops.frames import Frames
from ops.primitives.crops.regions import sums

Array = jax.Array
State = tuple[Array, Array, Array]


def segments(starts: Array, counts: Array) -> tuple[Array, Array]:
  """Finds the first and the last frame of each frame's segment, int32[B, F] twice.

  Args:
    starts: bool[B, F], True where a segment begins, as one does at 0.
    counts: int32[B, 1], frames that there are; those behind are segments of their own.
  """
  own = jnp.arange(starts.shape[1], dtype=jnp.int32)[None]
  starts = starts | (own == 0) | (own >= counts)
  first = jax.lax.cummax(jnp.where(starts, own, 0), axis=1)
  ends = jnp.concatenate([starts[:, 1:], jnp.ones_like(starts[:, :1])], axis=1)
  last = jax.lax.cummin(jnp.where(ends, own, starts.shape[1]), axis=1, reverse=True)
  return first, last


def windows(frames: Frames, runs: Array) -> tuple[Array, Array]:
  """Divides a video into the windows that save most tokens.

  A window of W frames saves W - 1 tokens for every place that stands still in it.

  Args:
    frames: of N slots.
    runs: int32[B, N], as `Frames.runs` has it.

  Returns:
    bool[B, F], where windows begin, the shortest of equals; and int32[B, 1], what they save.
  """
  number = frames.number
  index = jnp.where(frames.there, frames.frame * number + jnp.minimum(runs, number - 1), -1)
  still = sums(frames.there, index, number * number).reshape(-1, number, number)
  still = jnp.flip(jnp.cumsum(jnp.flip(still, axis=2), axis=2), axis=2)
  back = jnp.arange(number, dtype=jnp.int32)

  def extend(saved: Array, item: tuple[Array, Array]) -> tuple[Array, Array]:
    """Finds what the frames up to this one save at most, and how far back its window begins."""
    end, gain = item
    before = jnp.where((back <= end)[None], saved[:, jnp.maximum(end - back, 0)] + gain, -1)
    return saved.at[:, end + 1].set(jnp.max(before, axis=1)), jnp.argmax(before, axis=1)

  saved = jnp.zeros((len(runs), number + 1), jnp.int32)
  saved, lengths = jax.lax.scan(extend, saved, (back, (still * back[None, None]).swapaxes(0, 1)))

  def mark(end: Array, item: tuple[Array, Array]) -> tuple[Array, Array]:
    """Finds the end of the window read now, and where it begins, F for frames within it."""
    frame, length = item
    begin = jnp.where(frame == end, frame - length, number)
    return jnp.where(frame == end, begin - 1, end), begin

  last = jnp.full(len(runs), number - 1, jnp.int32)
  _, begins = jax.lax.scan(mark, last, (back, lengths.astype(jnp.int32)), reverse=True)
  return jnp.any(begins.T[:, :, None] == back[None, None], axis=1), saved[:, -1:]


def contiguous(label: Array, real: Array) -> Array:
  """Makes clusters of frames runs of frames.

  The longest runs of each cluster stay, if they are longer than one. What lies between two that
  stay joins the longer one, with what has joined it before, and of equals the earlier.

  Args:
    label: int32[B, F], the cluster of each frame.
    real: bool[B, F], frames that there are: the first ones.
  """
  number = label.shape[1]
  own = jnp.broadcast_to(jnp.arange(number, dtype=jnp.int32), label.shape)
  label = jnp.where(real, label, number)
  change = jnp.pad(label[:, 1:] != label[:, :-1], ((0, 0), (1, 0)))
  run = jnp.cumsum(change, axis=1)
  length = take(sums(real, run, number), run)
  longest = jax.vmap(lambda n, i: jax.ops.segment_max(n, i, num_segments=number + 1))(length, label)
  longest = take(longest, label)
  stays = real & (length == longest) & (longest > 1)
  ahead = jax.lax.cummin(jnp.where(stays, own, number), axis=1, reverse=True)
  there = ahead < number
  next_label, next_length = (jnp.where(there, take(values, jnp.minimum(ahead, number - 1)), none)
                             for values, none in ((label, -1), (length, 0)))

  def read(state: State, frame: tuple[Array, ...]) -> tuple[State, Array]:
    """The cluster of the frame before, for how long, and whether it has stayed; now this one's."""
    before, long, stayed = state
    stays, label, ahead, far = frame
    joins = jnp.where(stayed & (far > long), ahead, before)
    now = jnp.where(stays, label, joins)
    return (now, jnp.where(now == before, long + 1, 1), stays), now

  state = (jnp.full(len(label), -1), jnp.zeros(len(label), jnp.int32), jnp.ones(len(label), bool))
  frames = tuple(values.T for values in (stays, label, next_label, next_length))
  return jax.lax.scan(read, state, frames)[1].T
