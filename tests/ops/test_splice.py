"""Images in their places among the text, row by row, against loops over lists."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.splice import Visual, check, collapse, next_positions, splice
from ops.tokens import SPECIAL, TEXT, VISUAL

IMAGE, PAD, WIDTH = 9, 0, 3
# Text alone, an image in front, in the middle and at the end, two in a row, nothing but an image.
ROWS = [[1, 2, 3], [9, 1, 2, 3, 4], [1, 9, 2], [1, 2, 9], [5, 9, 9, 6], [9]]
COUNTS = [[-1, -1], [3, -1], [1, -1], [4, -1], [2, 4], [3, -1]]
EACH, IMAGES = 4, 2


def batch(side='right', seed=0):
  """ids, valid, and visual tokens whose padding lies anywhere and is full of 1e3."""
  random = np.random.default_rng(seed)
  length = max(map(len, ROWS))
  ids, valid = np.full((len(ROWS), length), PAD), np.zeros((len(ROWS), length), bool)
  x = np.full((len(ROWS), IMAGES, EACH, WIDTH), 1e3, np.float32)
  real = np.zeros(x.shape[:3], bool)
  for row, (own, counts) in enumerate(zip(ROWS, COUNTS, strict=True)):
    place = slice(length - len(own), None) if side == 'left' else slice(len(own))
    ids[row, place], valid[row, place] = own, True
    for image, count in enumerate(counts):
      chosen = np.sort(random.permutation(EACH)[:max(count, 0)])
      real[row, image, chosen] = True
      x[row, image, chosen] = random.normal(size=(len(chosen), WIDTH))
  table = random.normal(size=(10, WIDTH)).astype(np.float32)
  return ids, valid, x, real, table


def by_hand(row, x, real, table, axes=None, extent=None):
  """Tokens, kinds, images and axis positions of a row, in order."""
  made, number, base = [], 0, 0
  for token in ROWS[row]:
    if token != IMAGE:
      made.append((table[token], TEXT, -1, [base] * 3))
      base += 1
      continue
    for spot in np.flatnonzero(real[row, number]):
      along = base + axes[row, number, spot] if axes is not None else [0] * 3
      made.append((x[row, number, spot], VISUAL, number, along))
    base += extent[row, number] if extent is not None else 0
    number += 1
  return made


@pytest.mark.long
@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('given', ['left', 'right'])
def test_rows_of_all_kinds(side, given):
  ids, valid, x, real, table = batch(given)
  run = jax.jit(lambda *args: splice(*args, side=side))
  tokens, slot = run(table[ids], valid, ids == IMAGE, Visual(jnp.asarray(x), valid=real))
  slots = len(ids[0]) + IMAGES * EACH
  assert tokens.slots == slots
  for row, own in enumerate(ROWS):
    wanted = by_hand(row, x, real, table)
    place = np.flatnonzero(tokens.valid[row])
    first = slots - len(wanted) if side == 'left' else 0
    np.testing.assert_array_equal(place, first + np.arange(len(wanted)))
    np.testing.assert_array_equal(tokens.x[row][place], [each[0] for each in wanted])
    assert tokens.kind[row][place].tolist() == [each[1] for each in wanted]
    assert tokens.stats['group'][row][place].tolist() == [each[2] for each in wanted]
    assert tokens.pos[row][place].tolist() == list(range(len(wanted)))
    padding = ~np.asarray(tokens.valid[row])
    assert not np.asarray(tokens.x[row])[padding].any()
    assert (np.asarray(tokens.stats['group'][row])[padding] == -1).all()
    # Where each id went.
    for spot, token in zip(np.flatnonzero(valid[row]), own, strict=True):
      if token != IMAGE:
        np.testing.assert_array_equal(tokens.x[row, slot[row, spot]], table[token])
  assert (np.asarray(tokens.kind) == VISUAL).sum(axis=1).tolist() == [IMAGES * EACH] * len(ROWS)
  assert (np.asarray(slot)[~valid] == slots).all()


@pytest.mark.long
def test_positions_along_axes():
  ids, valid, x, real, table = batch()
  random = np.random.default_rng(1)
  axes = random.integers(0, 5, (*real.shape, 3)).astype(np.int32)
  extent = random.integers(5, 9, real.shape[:2]).astype(np.int32)
  visual = Visual(jnp.asarray(x), valid=real, axes=axes, extent=extent)
  tokens, _ = splice(table[ids], valid, ids == IMAGE, visual, axes=3)
  after = next_positions(tokens)
  for row in range(len(ROWS)):
    wanted = by_hand(row, x, real, table, axes, extent)
    found = tokens.pos[row, :len(wanted)]
    np.testing.assert_array_equal(found[:, 0], np.arange(len(wanted)))
    np.testing.assert_array_equal(found[:, 1:], [each[3] for each in wanted])
    top = max(max(each[3]) for each in wanted) + 1
    assert after[row].tolist() == [len(wanted), top, top, top]


@pytest.mark.long
def test_text_alone_and_images_that_are_whole():
  ids, valid, x, _, table = batch()
  tokens, slot = splice(table[ids], valid, np.zeros(ids.shape, bool), None)
  np.testing.assert_array_equal(tokens.x[valid], table[ids][valid])
  np.testing.assert_array_equal(tokens.valid, valid)
  assert (np.asarray(tokens.kind) == TEXT).all()
  assert slot[1].tolist() == list(range(5))
  assert next_positions(tokens).tolist() == valid.sum(axis=1).tolist()
  # Every token of every image, and kinds of its own for some.
  kind = np.full(x.shape[:3], VISUAL, np.int8)
  kind[:, :, -1] = SPECIAL
  whole, _ = splice(table[ids], valid, ids == IMAGE, Visual(jnp.asarray(x), kind=kind))
  row = 4
  assert whole.valid[row].sum() == 2 + 2 * EACH
  assert whole.kind[row, :10].tolist() == [TEXT, *([VISUAL] * 3 + [SPECIAL]) * 2, TEXT]


@pytest.mark.long
def test_stats_travel_and_fewer_slots_are_enough():
  ids, valid, x, real, table = batch()
  visual = Visual(jnp.asarray(x), valid=real, stats={'own': x[..., 0]})
  tokens, _ = splice(table[ids], valid, ids == IMAGE, visual, slots=8)
  assert tokens.slots == 8
  here = np.asarray(tokens.kind == VISUAL) & np.asarray(tokens.valid)
  np.testing.assert_array_equal(np.asarray(tokens.stats['own'])[here],
                                np.asarray(tokens.x)[here][:, 0])
  assert not np.asarray(tokens.stats['own'])[~here].any()


@pytest.mark.long
def test_gradients_reach_the_image_alone_where_it_is():
  ids, valid, x, real, table = batch()

  def total(x):
    tokens, _ = splice(table[ids], valid, ids == IMAGE, Visual(x, valid=real))
    return tokens.x.sum()

  used = real & (np.asarray(COUNTS) >= 0)[..., None]
  np.testing.assert_array_equal(jax.grad(total)(jnp.asarray(x)),
                                np.broadcast_to(used[..., None], x.shape))


@pytest.mark.parametrize(('row', 'counts', 'slots', 'message'), [
    ([9, 1], [-1, -1], None, 'row 0 has 1 image tokens (9) and 0 images: give an image'),
    ([1, 2], [3, -1], None, 'row 0 has 1 images and 0 image tokens'),
    ([9, 1], [3, 2], None, 'row 0 has 2 images and 1 image tokens'),
    ([9, 1], [0, -1], None, 'image 0 of row 0 has no token left'),
    ([9, 1], [3, -1], 3, 'row 0 has 4 tokens, text and images, and there are 3 slots'),
])
def test_errors(row, counts, slots, message):
  ids = np.array([row])
  with pytest.raises(ValueError, match=re.escape(message)):
    check(ids, ids > 0, np.array([counts]), image=IMAGE, slots=slots)


def test_a_good_batch_passes():
  ids, valid, *_ = batch()
  check(ids, valid, np.array(COUNTS), image=IMAGE)
  with pytest.raises(ValueError, match='choose one of left, right'):
    splice(jnp.zeros((1, 1, 1)), jnp.ones((1, 1), bool), jnp.zeros((1, 1), bool), None, side='top')


def test_repeated_placeholders_collapse():
  ids = np.array([[0, 1, 9, 9, 9, 2, 9, 9], [3, 9, 9, 9, 9, 4, 0, 0]])
  made, valid = collapse(ids, ids > 0, image=IMAGE)
  assert made.tolist() == [[1, 9, 2, 9], [3, 9, 4, 0]]
  assert valid.tolist() == [[True] * 4, [True] * 3 + [False]]
  made, _ = collapse(ids, ids > 0, image=IMAGE, counts=[[3, 2], [1, 3]])
  assert made.tolist() == [[1, 9, 2, 9], [3, 9, 9, 4]]
  with pytest.raises(ValueError, match='must add up'):
    collapse(ids, ids > 0, image=IMAGE, counts=[[3, 1], [1, 3]])
