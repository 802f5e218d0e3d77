"""VFlowOpt's stage behind the tower against its authors' code: exact indices, 1e-5 for floats.

Axes: B batch, H heads, N tokens, D features.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import recorded

from ops import tokens as tk
from ops.reducers.projector.vflowopt import VFlowOpt, patch_entropy, recycle
from ops.signals import Signals
from ops.tokens import TokenSet


def load(name):
  return recorded.arrays(f'vlm_pre/vflowopt_{name}')


def close(got, want):
  np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


def told_by(attention):
  """Queries and keys of which the attention is this map float32[B, H, N, N]."""
  width = attention.shape[-1]
  keys = np.sqrt(width) * np.eye(width, dtype=np.float32)[:, None]
  return Signals(queries=jnp.moveaxis(jnp.log(attention), 1, 2),
                 keys=np.broadcast_to(keys, (len(attention), width, attention.shape[1], width)),
                 received_attention=attention.mean(axis=2))


@pytest.mark.parametrize('threshold', [None, 50.0])
def test_importance(threshold):
  """By those above the threshold; by the one with the most where none is."""
  raw = load('importance_case0')
  attention = raw['attn_weights']
  method = VFlowOpt(threshold=threshold or float(raw['t']))
  x = jnp.zeros((*attention.shape[::3], 1))
  found = jax.jit(lambda x, told: method.watch(TokenSet.create(x), told)['importance'])(
      x, told_by(attention))
  mean = attention.mean(axis=1)
  most = np.argmax(mean.mean(axis=1), axis=1)
  close(found, mean[np.arange(len(x)), most] if threshold else raw['importance'])


def test_entropy_of_patches():
  raw = load('patch_entropy')
  close(jax.jit(patch_entropy)(raw['patches_0_255']), raw['entropy_bits'])


def test_recycled_cells():
  """A thumbnail of 27 x 27 in front of an image; cells of both are apart."""
  raw = load('anyres_case0')
  width, height = raw['local_grid_wh']
  side, sides = float(raw['grid_cell']), [(27, 27), (height, width)]
  cell, cells = [], 0
  for rows, columns in sides:
    row, column = np.indices((rows, columns)).reshape(2, -1) // side
    across = int(np.ceil(columns / side))
    cell.append(cells + row * across + column)
    cells += int(np.ceil(rows / side)) * across
  cell = np.concatenate(cell)[None].astype(np.int32)

  @jax.jit
  def run(x, importance, cell):
    tokens = TokenSet.create(x, stats={'importance': importance})
    return tk.reduce(tokens, recycle(tokens, importance, cell, num_slots=len(raw['out_tokens']),
                                     cells=cells))

  reduced = run(raw['features'][None], raw['importance'][None], cell)
  keep = round(len(raw['features']) * float(raw['ratio']))
  alone = keep - int(raw['num_merged_tokens'])
  assert alone + cells == len(raw['out_tokens'])
  assert reduced.valid.all()
  np.testing.assert_array_equal(reduced.pos[0], np.flatnonzero(raw['keep_mask']))
  close(reduced.x[0], raw['out_tokens'])
  close(reduced.stats['importance'][0], raw['out_importance'])
  np.testing.assert_array_equal(np.asarray(reduced.owner) >= 0, True)


def test_crops_share_a_budget():
  """The same by the crops that tokens are of, beside an image of one crop."""
  raw, side = load('anyres_case0'), 27
  width, height = raw['local_grid_wh']
  row, column = np.indices((height, width)).reshape(2, -1)
  place = row % side * side + column % side
  crop = np.concatenate([np.zeros(side * side, int), 1 + row // side * 2 + column // side])
  patch = np.concatenate([np.arange(side * side), place])
  slots, few = len(crop), 60
  valid = np.arange(slots)[None] < np.array([[slots], [side * side]])
  told = Signals(crop=np.stack([crop, 0 * crop]), patch=np.stack([patch] * 2),
                 tiling=np.array([[2, 2], [0, 0]], np.int32), crop_grid=(side, side), num_crops=5)
  method = VFlowOpt(cell=float(raw['grid_cell']), over='crops')

  @jax.jit
  def run(x, importance, valid, budget, told):
    tokens = TokenSet.create(x, valid=valid, budget=budget, stats={'importance': importance})
    return tk.reduce(tokens, method(tokens, told, num_slots=len(raw['out_tokens'])))

  left = run(np.stack([raw['features']] * 2), np.stack([raw['importance']] * 2), valid,
             np.array([len(raw['out_tokens']), few], np.int32), told)
  np.testing.assert_array_equal(left.pos[0], np.flatnonzero(raw['keep_mask']))
  close(left.x[0], raw['out_tokens'])
  order = np.argsort(-raw['importance'][:side * side], kind='stable')
  cell = (order // side // 17.4).astype(int) * 2 + (order % side // 17.4).astype(int)
  anchors = [order[few - 4:][cell[few - 4:] == each][0] for each in range(4)]
  assert np.asarray(left.real)[1].sum() == few
  np.testing.assert_array_equal(np.asarray(left.pos)[1, :few],
                                np.sort([*order[:few - 4], *anchors]))


def test_entropy_counts_by_alpha():
  x = np.random.default_rng(0).normal(size=(1, 16, 2)).astype(np.float32)
  told = Signals(received_attention=np.full((1, 1, 16), 1 / 16, np.float32), grid=(4, 4))
  entropy = np.where(np.arange(16) == 7, 8.0, 1.0)[None].astype(np.float32)
  tokens = TokenSet.create(jnp.asarray(x), stats={'entropy': entropy})
  anchors = jax.jit(lambda tokens, told: [
      VFlowOpt(cell=4.0, alpha=alpha)(tokens, told, num_slots=1).src for alpha in (0.0, 0.5)])(
          tokens, told)
  np.testing.assert_array_equal(np.ravel(anchors), [0, 7])
  with pytest.raises(ValueError, match=r'alpha=0\.5 weighs an entropy that these'):
    VFlowOpt(alpha=0.5)(TokenSet.create(jnp.asarray(x)), told, num_slots=4)
