"""Methods that give every crop of an image a budget, against released code: exact sets of tokens.

Axes: B batch, N slots, C crops of an image, n patches of a crop, H heads.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import recorded

from lib.data.token_layout import unpadded
from ops import tokens as tk
from ops.reducers.projector.globalcom2 import GlobalCom2
from ops.reducers.projector.hired import HiRED
from ops.signals import Signals
from ops.tokens import TokenSet

SIDE, PATCHES = 24, 576


def load(name):
  return recorded.arrays(f'vlm_pre/{name}')


@functools.partial(jax.jit, static_argnums=0, static_argnames=('num_slots', 'grid'))
def compiled(method, told, valid, stats, budget, *, num_slots, grid):
  tokens = TokenSet.create(jnp.zeros((*valid.shape, 1)), valid=valid, stats=stats, budget=budget)
  return tk.reduce(tokens, method(tokens, told.replace(crop_grid=grid), num_slots=num_slots))


def kept(method, told, valid, *, budget, stats=None, grid=(SIDE, SIDE)):
  """bool[B, N], the slots that stay."""
  left = compiled(method, told, jnp.asarray(valid), stats or {}, jnp.asarray(budget, jnp.int32),
                  num_slots=int(max(budget)), grid=grid)
  flags = np.zeros(valid.shape, bool)
  for row, real in enumerate(np.asarray(left.real)):
    flags[row, np.asarray(left.pos)[row][real]] = True
  return flags


def stacked(rows, crops):
  """Rows of so many crops each, [C, n, ...], as one array [B, crops * n, ...] and what is there."""
  out = np.zeros((len(rows), crops * PATCHES, *rows[0].shape[2:]), rows[0].dtype)
  valid = np.zeros(out.shape[:2], bool)
  for number, row in enumerate(rows):
    out[number, :row.shape[0] * PATCHES] = row.reshape(-1, *row.shape[2:])
    valid[number, :row.shape[0] * PATCHES] = True
  return out, valid


def layout(tilings):
  """crop and patch int32[B, N], and the tiling int32[B, 2]."""
  crops = 1 + max(rows * columns for rows, columns in tilings)
  slot = np.arange(crops * PATCHES, dtype=np.int32)
  whole = (len(tilings), len(slot))
  return (np.broadcast_to(slot // PATCHES, whole), np.broadcast_to(slot % PATCHES, whole),
          np.asarray(tilings, np.int32))


HIRED = {'hired_next_case0': [(2, 2)], 'hired_next_case1': [(2, 2), (1, 3)]}


@pytest.mark.parametrize('name', HIRED)
def test_hired(name):
  raw, tilings = load(name), HIRED[name]
  ends = np.cumsum(raw['crops_per_image'])[:-1]
  early, late = (stacked(np.split(raw[f'{which}_layer_cls_attn'][:, :, 1:].swapaxes(1, 2), ends), 5)
                 for which in ('top', 'bottom'))
  crop, patch, tiling = layout(tilings)
  told = Signals(cls_attention=late[0].swapaxes(1, 2), crop=crop, patch=patch, tiling=tiling)
  rate = float(raw['budget_rate'].astype(np.float64).round(6))
  budget = [int(count * PATCHES * rate) for count in raw['crops_per_image']]
  flags = kept(HiRED(variant='release'), told, late[1], budget=budget,
               stats={'early': early[0].sum(axis=2)})
  for number, count in enumerate(raw['crops_per_image']):
    got = flags[number].reshape(-1, PATCHES)
    np.testing.assert_array_equal(got[:count], raw[f'mask_img{number}'])
    np.testing.assert_array_equal(got.sum(axis=1)[:count], raw[f'budget_img{number}'])
    assert not got[count:].any()


def test_hired_of_one_crop():
  raw = load('hired_llava15_case0')
  slot = np.arange(64, dtype=np.int32)[None]
  told = Signals(cls_attention=raw['cls_attn'][:, :, 1:], crop=0 * slot, patch=slot,
                 tiling=np.zeros((1, 2), np.int32))
  flags = kept(HiRED(), told, slot >= 0, budget=[int(64 * 0.2)], grid=(8, 8))
  np.testing.assert_array_equal(flags[0], raw['mask'])


def test_hired_counts_what_lies_where_a_crop_is():
  # All that is attended early is in the lower right quarter, which is the fourth crop.
  crop, patch, tiling = layout([(2, 2)])
  early = ((patch // SIDE >= 12) & (patch % SIDE >= 12) & (crop == 0)).astype(np.float32)
  told = Signals(cls_attention=np.random.default_rng(0).random((1, 1, 5 * PATCHES), np.float32),
                 crop=crop, patch=patch, tiling=tiling)
  found = {}
  for variant in ('paper', 'release'):
    flags = kept(HiRED(alpha=0.75, variant=variant), told, crop >= 0, budget=[400],
                 stats={'early': early})
    found[variant] = flags.reshape(5, PATCHES).sum(axis=1).tolist()
  assert found == {'paper': [300, 0, 0, 0, 100], 'release': [300, 0, 0, 50, 50]}


@pytest.mark.parametrize('case', [0, 1])
def test_globalcom2(case):
  raw = load(f'globalcom2_case{case}')
  columns, rows = (int(x) for x in raw['grid_wh'])
  crop, patch, tiling = layout([(rows, columns)])
  there = np.zeros((rows * SIDE, columns * SIDE), bool)
  there[unpadded(there.shape, tuple(int(x) for x in raw['image_size_wh'][::-1]))] = True
  there = there.reshape(rows, SIDE, columns, SIDE).swapaxes(1, 2).reshape(1, -1)
  valid = np.concatenate([np.ones((1, PATCHES), bool), there], axis=1)
  told = Signals(cls_logits=raw['cls_scores'].reshape(1, 1, -1), crop=crop, patch=patch,
                 tiling=tiling)
  flags = kept(GlobalCom2(share=float(raw['retention'])), told, valid, budget=[valid.sum()])[0]
  got = flags.reshape(-1, PATCHES)
  np.testing.assert_array_equal(np.flatnonzero(got[0]), np.sort(raw['thumb_indices_in_order']))
  tokens = raw['crops_out_fp16'].astype(int)
  tokens = tokens[tokens[:, 0] >= 0]  # No newlines.
  assert set(zip(*np.nonzero(got[1:]), strict=True)) == {
      (number - 1, token) for number, token in tokens[:, :2].tolist()}
