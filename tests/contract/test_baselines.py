"""Baselines: random, evenly spaced and pooled tokens, against what each promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import tokens as tk
from ops.reducers.baselines.pool import Pool
from ops.reducers.baselines.radial import Radial
from ops.reducers.baselines.random import Random
from ops.reducers.baselines.stride import Stride
from ops.signals import Signals
from ops.tokens import SPECIAL, VISUAL, TokenSet

same = np.testing.assert_array_equal


def patches(count, *, batch=2, shuffle=False):
  """One special token and `count` patches, in raster order or not; x holds row numbers."""
  pos = np.concatenate([[-1], np.arange(count)])
  if shuffle:
    pos[1:] = np.random.default_rng(0).permutation(count)
  kind = np.where(pos < 0, SPECIAL, VISUAL).astype(np.int8)
  x = np.random.default_rng(1).normal(size=(batch, 1 + count, 4)).astype(np.float32)
  rows = (batch, 1 + count)
  return TokenSet.create(jnp.asarray(x), kind=jnp.broadcast_to(kind, rows), protected=1,
                         pos=jnp.broadcast_to(jnp.asarray(pos, jnp.int32), rows))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def reduced(method, tokens, num_slots, grid=None):
  return tk.reduce(tokens, method(tokens, Signals(grid=grid), num_slots=num_slots))


@pytest.mark.parametrize(('count', 'kept'), [(16, 8), (16, 5), (17, 16), (13, 1)])
def test_stride(count, kept):
  out = reduced(Stride(), patches(count), 1 + kept)
  expected = [-1] + [i * count // kept for i in range(kept)]
  same(out.pos, np.broadcast_to(expected, out.pos.shape))


def test_random():
  """Equal rows lose the same tokens; other seeds and other counts lose others, all over the row."""
  tokens = patches(40)
  choice = np.asarray(reduced(Random(), tokens, 21).pos)
  same(choice[0], choice[1])
  same(choice[:, 0], -1)
  same(choice, np.sort(choice, axis=1))
  assert set(choice[0]) != set(np.asarray(reduced(Random(seed=1), tokens, 21).pos)[0])

  counts = np.arange(20, 60)
  ragged = patches(60, batch=len(counts))
  ragged = ragged.replace(valid=jnp.asarray(np.arange(61)[None] <= counts[:, None]))
  kept = np.asarray(reduced(Random(), ragged, 11).pos)[:, 1:]
  assert len({tuple(row) for row in kept}) == len(counts)
  share = (kept + 0.5) / counts[:, None]
  assert share.max() < 1
  # 400 draws, uniform in (0, 1): their mean has deviation 0.014, each tenth holds 40 of them.
  assert abs(share.mean() - 0.5) < 0.06
  assert np.histogram(share, bins=10, range=(0, 1))[0].min() > 16


@pytest.mark.parametrize('shuffle', [False, True])
@pytest.mark.parametrize(('grid', 'cells'), [((4, 6), (2, 3)), ((8, 8), (4, 4)), ((6, 6), (2, 2))])
def test_pool_is_average_pooling(grid, cells, shuffle):
  """Where squares tile the grid, in any slot order."""
  tokens = patches(grid[0] * grid[1], shuffle=shuffle)
  out = reduced(Pool(), tokens, 1 + cells[0] * cells[1], grid)
  order = np.argsort(np.asarray(tokens.pos[0]))[1:]
  x = np.asarray(tokens.x)[:, order].reshape(2, cells[0], grid[0] // cells[0], cells[1], -1, 4)
  means = x.mean(axis=(2, 4)).reshape(2, -1, 4)
  np.testing.assert_allclose(out.x[:, 1:], means, atol=1e-6)
  same(out.x[:, 0], tokens.x[:, 0])
  same(out.size[:, 1:], np.full(means.shape[:2], x.shape[2] * x.shape[4]))


def test_pool_any_count():
  """Exactly as many cells as asked for, of nearly equal size, each in one place."""
  grid = (6, 7)
  tokens, row, column = patches(42, batch=1), np.arange(42) // 7, np.arange(42) % 7
  for cells in (1, 5, 11, 31):
    out = reduced(Pool(), tokens, 1 + cells, grid)
    sizes = np.asarray(out.size)[0, 1:]
    assert set(sizes) <= {42 // cells, -(-42 // cells)}
    assert sizes.sum() == 42
    owner = np.asarray(out.owner)[0, 1:]
    limit = 2 * np.sqrt(42 / cells) + 1
    for cell in range(1, cells + 1):
      assert np.ptp(row[owner == cell]) < limit
      assert np.ptp(column[owner == cell]) < limit


@pytest.mark.long
def test_pool_after_a_cut():
  """Whatever an earlier cut left is pooled to exactly the count, and a cell is never empty."""
  tokens = reduced(Random(), patches(42), 24)
  for keep in (2, 9, 23):
    out = reduced(Pool(), tokens, keep, (6, 7))
    assert out.valid is None
    assert (np.asarray(out.size) >= 1).all()
    same(out.size.sum(axis=1), np.full(2, 24.0))


@pytest.mark.parametrize(('count', 'kept'), [(16, 8), (16, 5), (17, 16), (13, 1), (18, 6)])
def test_stride_by_the_middle(count, kept):
  out = reduced(Stride(phase='middle'), patches(count), 1 + kept)
  expected = [-1] + [(2 * i + 1) * count // (2 * kept) for i in range(kept)]
  same(out.pos, [expected] * 2)
  with pytest.raises(ValueError, match="phase='last' is unknown: choose one of first, middle"):
    Stride(phase='last')


def test_radial_keeps_the_centre_of_an_oblong_grid():
  out = reduced(Radial(), patches(15, shuffle=True), 1 + 5, grid=(3, 5))
  same(np.sort(out.pos, axis=1), [[-1, 2, 6, 7, 8, 12]] * 2)
