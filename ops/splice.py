"""Splices visual tokens into text: spans, kinds, positions and masks are data.

A row of token ids holds one placeholder an image. Each gives way to the image's tokens, as many as
it has: rows differ in text, in images and in tokens an image, and none of it is a static number.

Axes: B batch, T ids of a row, I images of a row, V most tokens of an image, N slots, D features,
A axes of a position beside its place in the sequence (3 for M-RoPE: time, height, width).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ops import choices
from ops.moves.rows import take
from ops.tokens import TEXT, VISUAL, TokenSet

Array = jax.Array
SIDES = ('left', 'right')


class Visual(struct.PyTreeNode):
  """The visual tokens of a batch of rows.

  Attributes:
    x: float[B, I, V, D].
    valid: bool[B, I, V] or None, False for padding, which may lie anywhere; None says that all are
      real.
    kind: int8[B, I, V] or None for all VISUAL.
    axes: int32[B, I, V, A] or None, what a token's position has beside its place, counted from the
      image's first token.
    extent: int32[B, I] or None, by how much an image moves on the positions of what follows: with
      `axes` the largest of its sides, else (None) its number of tokens. An image that lost tokens
      and keeps its extent leaves the text where it was.
    stats: {name: [B, I, V, ...]}, what else travels with the tokens.
  """

  x: Array
  valid: Array | None = None
  kind: Array | None = None
  axes: Array | None = None
  extent: Array | None = None
  stats: dict[str, Array] = struct.field(default_factory=dict)


def splice(embedded: Array, valid: Array, is_image: Array, visual: Visual | None, *,
           side: str = 'right', slots: int | None = None,
           axes: int = 0) -> tuple[TokenSet, Array]:
  """Joins text and images into one sequence a row.

  `pos` is the place among the row's real tokens, int32[B, N]; with `visual.axes` it is
  int32[B, N, 1 + A]: the place, then the position along each axis. Text has the same number on
  every axis, one more than the largest before it (Qwen2-VL, Sec. 2.1, arXiv:2409.12191).
  Every row has I * V slots that are not TEXT: padding counts as VISUAL where a row has fewer visual
  tokens, because budgets are static. (With fewer slots than the default, as far as there is room.)

  Args:
    embedded: float[B, T, D], text; what stands at placeholders is of no account.
    valid: bool[B, T], False for padding, which may lie on either side.
    is_image: bool[B, T], the placeholders.
    visual: the images in the order of the placeholders, or None for text alone. Images beyond a
      row's placeholders are left out (`check` finds them).
    side: where padding goes.
    slots: N; T + I * V when None, which always fits.
    axes: A, where positions have any; `visual.axes` may only be None where it is 0, or where there
      is no image.

  Returns:
    The tokens, with stats 'group' int32[B, N] (number of the image, -1 for text and padding) and
    those of `visual`; and int32[B, T], the slot of each id (an image's first; N for padding, and
    for an image without tokens).

  Raises:
    ValueError: an unknown side, or images with other axes.
  """
  choices.check('side=', side, SIDES)
  visual_axes = 0 if visual is None or visual.axes is None else visual.axes.shape[-1]
  if visual is not None and visual_axes != axes:
    raise ValueError(f'images have positions along {visual_axes} axes and the model takes {axes}: '
                     'give the images their axes (lib/data/anyres.py), or none')
  batch, length, _ = embedded.shape
  is_image = is_image & valid
  if visual is None:
    visual = Visual(jnp.zeros((batch, 1, 1, embedded.shape[2]), embedded.dtype),
                    valid=jnp.zeros((batch, 1, 1), bool),
                    axes=jnp.zeros((batch, 1, 1, axes), jnp.int32) if axes else None)
    images = each = 0
  else:
    images, each = visual.x.shape[1:3]
  total = length + images * each if slots is None else slots
  picked, counts = _compact(visual)

  number = jnp.maximum(jnp.cumsum(is_image, axis=1, dtype=jnp.int32) - 1, 0)
  number = jnp.minimum(number, visual.x.shape[1] - 1)
  own = jnp.take_along_axis(counts, number, axis=1)
  count = jnp.where(is_image, own, valid.astype(jnp.int32))
  ends = jnp.cumsum(count, axis=1, dtype=jnp.int32)
  starts, used = ends - count, ends[:, -1:]
  shift = total - used if side == 'left' else jnp.zeros_like(used)
  place = jnp.arange(total, dtype=jnp.int32)[None] - shift
  source = _sources(place, starts, ends, used, is_image, number, picked, visual.x.shape[2])
  kind, pos = _kinds(visual, source, images * each), jnp.maximum(place, 0)
  if visual.axes is not None:
    extent = counts if visual.extent is None else visual.extent
    step = jnp.where(is_image, jnp.take_along_axis(extent, number, axis=1), count)
    along = _positions(visual.axes, step, source)
    pos = jnp.concatenate([pos[..., None], along], axis=-1)
  stats = {'group': jnp.where(source.image, source.number, -1),
           **{name: source.visual_alone(values) for name, values in visual.stats.items()}}
  tokens = TokenSet.create(source.hidden(source.mixed(embedded, visual.x)), pos=pos, kind=kind,
                           valid=source.real, stats=stats, texts=length,
                           padding='last' if side == 'right' else 'anywhere')
  return tokens, jnp.where(count > 0, starts + shift, total)


def unmerged(tokens: TokenSet, slot: Array, valid: Array, is_image: Array, owner: Array,
             kept: Array, *, side: str = 'right') -> TokenSet:
  """Returns a sequence that knows the original tokens of its images (ops/unmerge.py).

  Args:
    tokens: of `splice`, N slots.
    slot: int32[B, T], the slot of each id, of `splice`.
    valid, is_image: bool[B, T], of `splice`.
    owner: int32[B, I, P], for each original token of an image that of its V tokens that holds it,
      -1 for none.
    kept: bool[B, I, V], which of these are real.
    side: where padding goes.

  Returns:
    The tokens, with owner and places int32[B, T + I P], and each at the latest of its places.
  """
  rank = jnp.cumsum(kept, axis=2, dtype=jnp.int32) - 1
  held = jnp.maximum(owner, 0)
  number = jnp.where((owner >= 0) & jnp.take_along_axis(kept, held, axis=2),
                     jnp.take_along_axis(rank, held, axis=2), -1)
  order = jnp.argsort(~(is_image & valid), axis=1, stable=True)[:, :owner.shape[1]]
  first = take(slot, order)[..., None]
  # What is spliced is the number of the slot that holds each token.
  numbers = jnp.where(number >= 0, first + number, -1)[..., None].astype(jnp.float32)
  whole, _ = splice(slot[..., None].astype(jnp.float32), valid, is_image, Visual(numbers),
                    side=side)
  owner = jnp.where(whole.real, whole.x[..., 0].astype(jnp.int32), -1)
  latest = jax.vmap(functools.partial(jax.ops.segment_max, num_segments=tokens.slots))(
      whole.pos, jnp.where(owner >= 0, owner, tokens.slots))
  return tokens.replace(owner=owner, places=whole.pos, pos=jnp.maximum(latest, 0))


class _Sources(NamedTuple):
  """Holds the source of each slot of a sequence.

  Attributes:
    real: bool[B, N].
    ids: int32[B, N], the id: an image's placeholder for its tokens.
    image: bool[B, N], whether it is a token of an image.
    number: int32[B, N], which image's.
    flat: int32[B, N], the token among the row's I * V.
    length: T.
  """

  real: Array
  ids: Array
  image: Array
  number: Array
  flat: Array
  length: int

  def mixed(self, text: Array, values: Array) -> Array:
    """Text's values where there is text, images' where there are images."""
    values = values.reshape(values.shape[0], -1, *values.shape[3:])
    values = take(values, self.flat).astype(text.dtype)
    choose = self.image.reshape(self.image.shape + (1,) * (values.ndim - 2))
    return jnp.where(choose, values, take(text, self.ids))

  def hidden(self, values: Array) -> Array:
    """Values, 0 for padding."""
    return jnp.where(self.real.reshape(self.real.shape + (1,) * (values.ndim - 2)), values, 0)

  def visual_alone(self, values: Array) -> Array:
    """Images' values, 0 for text and padding."""
    text = jnp.zeros((values.shape[0], self.length, *values.shape[3:]), values.dtype)
    return self.hidden(self.mixed(text, values))


def _sources(place: Array, starts: Array, ends: Array, used: Array, is_image: Array, number: Array,
             picked: Array, each: int) -> _Sources:
  """Finds where each slot comes from.

  Args:
    place: int32[B, N], of each slot among the row's real tokens.
    starts, ends: int32[B, T], the place of each id's first token, and of the first after its last.
    used: int32[B, 1], real tokens.
    is_image, number: bool and int32[B, T], whether an id is a placeholder, and of which image.
    picked: int32[B, I * V], as `_compact` gives it.
    each: V.
  """
  real = (place >= 0) & (place < used)
  # The id that each slot comes from: the first whose end is beyond it.
  ids = jax.vmap(lambda e, p: jnp.searchsorted(e, p, side='right'))(ends, place)
  ids = jnp.clip(ids, 0, starts.shape[1] - 1).astype(jnp.int32)
  offset = place - take(starts, ids)
  image, number = take(is_image, ids) & real, take(number, ids)
  flat = number * each + jnp.clip(offset, 0, each - 1)
  flat = jnp.take_along_axis(picked, flat, axis=1)
  return _Sources(real, ids, image, number, flat, starts.shape[1])


def _kinds(visual: Visual, source: _Sources, visuals: int) -> Array:
  """int8[B, N], the kinds of slots; padding is VISUAL as far as a row lacks visual tokens."""
  kinds = jnp.full(visual.x.shape[:3], VISUAL, jnp.int8) if visual.kind is None else visual.kind
  text = jnp.full((len(source.real), source.length), TEXT, jnp.int8)
  kind = source.mixed(text, kinds)
  lacking = visuals - jnp.sum(source.image, axis=1, keepdims=True)
  filler = ~source.real & (jnp.cumsum(~source.real, axis=1) <= lacking)
  return jnp.where(source.real, kind, jnp.where(filler, VISUAL, TEXT)).astype(jnp.int8)


def _positions(axes: Array, step: Array, source: _Sources) -> Array:
  """int32[B, N, A], positions along axes; `step` int32[B, T] is how far each id moves them on."""
  base = jnp.cumsum(step, axis=1, dtype=jnp.int32) - step
  text = jnp.zeros((len(axes), source.length, axes.shape[-1]), jnp.int32)
  along = source.mixed(text, axes)
  return source.hidden(along + take(base, source.ids)[..., None])


def _compact(visual: Visual) -> tuple[Array, Array]:
  """int32[B, I * V], tokens of each image with the real ones first; int32[B, I], how many."""
  batch, images, each = visual.x.shape[:3]
  if visual.valid is None:
    picked = jnp.arange(images * each, dtype=jnp.int32)[None]
    return (jnp.broadcast_to(picked, (batch, images * each)),
            jnp.full((batch, images), each, jnp.int32))
  order = jnp.argsort(~visual.valid, axis=2, stable=True).astype(jnp.int32)
  order = order + each * jnp.arange(images, dtype=jnp.int32)[None, :, None]
  return order.reshape(batch, -1), jnp.sum(visual.valid, axis=2, dtype=jnp.int32)


def next_positions(tokens: TokenSet) -> Array:
  """int32[B] or [B, 1 + A]: the position of the first token after each row."""
  real = tokens.real
  if tokens.pos.ndim == 2:
    return jnp.max(jnp.where(real, tokens.pos, -1), axis=1) + 1
  top = jnp.max(jnp.where(real[..., None], tokens.pos, -1), axis=1) + 1
  # All axes of text move on from the largest of them.
  along = jnp.broadcast_to(jnp.max(top[:, 1:], axis=1, keepdims=True), top[:, 1:].shape)
  return jnp.concatenate([top[:, :1], along], axis=1)


def check(ids: np.ndarray, valid: np.ndarray, counts: np.ndarray, *, image: int,
          slots: int | None = None) -> None:
  """Raises if prompts and their images do not fit; on the host, before anything runs.

  Args:
    ids: int[B, T].
    valid: bool[B, T].
    counts: int[B, I], tokens of each image of a row, -1 where the row has no such image.
    image: the placeholder's id.
    slots: N, where it is not the default.

  Raises:
    ValueError: a placeholder without an image, an image without a placeholder, an image of which no
      token is left, or a row that does not fit into the slots.
  """
  for row, (own, real, sizes) in enumerate(zip(ids, valid, np.asarray(counts), strict=True)):
    placeholders, images = int(((own == image) & real).sum()), int((sizes >= 0).sum())
    if placeholders > images:
      raise ValueError(f'row {row} has {placeholders} image tokens ({image}) and {images} images: '
                       'give an image for each, or take the tokens out of the text')
    if images > placeholders:
      raise ValueError(f'row {row} has {images} images and {placeholders} image tokens ({image}): '
                       'put one into the text for each image')
    empty = np.flatnonzero(sizes == 0)
    if empty.size:
      raise ValueError(f'image {empty[0]} of row {row} has no token left: keep at least one of '
                       'each image (config.reduce.projector), or take the image out')
    length = int(real.sum()) - placeholders + int(sizes[sizes > 0].sum())
    if slots is not None and length > slots:
      raise ValueError(f'row {row} has {length} tokens, text and images, and there are {slots} '
                       'slots: raise slots, or shorten it')


def collapse(ids: np.ndarray, valid: np.ndarray, *, image: int,
             counts: list[list[int]] | None = None) -> tuple[np.ndarray, np.ndarray]:
  """Collapses placeholders repeated for every token of an image into one for each image.

  Args:
    ids: int[B, T].
    valid: bool[B, T].
    image: the placeholder's id.
    counts: tokens of each image of each row, needed where two images follow each other directly;
      None takes every run as one image.

  Returns:
    ids int32[B, T'] and valid bool[B, T'], padded on the right.

  Raises:
    ValueError: counts that do not add up to the placeholders of a row.
  """
  rows = []
  for row, (own, real) in enumerate(zip(ids, valid, strict=True)):
    own = own[real]
    spots = np.flatnonzero(own == image)
    if counts is None:
      first = spots[np.diff(spots, prepend=-2) != 1]
    else:
      if sum(counts[row]) != len(spots):
        raise ValueError(f'row {row} has {len(spots)} image tokens and its images {counts[row]}: '
                         'they must add up')
      first = spots[np.cumsum([0, *counts[row]])[:-1].astype(int)] if counts[row] else spots
    gone = np.setdiff1d(spots, first)
    rows.append(np.delete(own, gone))
  length = max(map(len, rows))
  padded = np.zeros((len(rows), length), np.int32)
  is_real = np.zeros(padded.shape, bool)
  for number, own in enumerate(rows):
    padded[number, :len(own)], is_real[number, :len(own)] = own, True
  return padded, is_real
