"""Masks and positions of language models that read images, against released code: exact."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import recorded

from ops import masks
from ops.rope import v2pe_positions

STRIDES = (1, 16, 64, 256)


def load(name):
  return recorded.arrays(f'in_llm/{name}')


@pytest.mark.parametrize('case', ['full', 'padded'])
def test_mutual_mask(case):
  raw = load('aki_mma_mask')
  image, question, end = raw['img_start_text_start_text_end']
  slots = np.arange(24)[None]
  seen = masks.modality_mutual_mask(jnp.asarray((slots >= image) & (slots < question)),
                                    jnp.asarray((slots >= question) & (slots < end)),
                                    valid=jnp.asarray(raw[f'attn2d_{case}'])[None] == 1)
  np.testing.assert_array_equal(seen, raw[f'mask_{case}'] == 1)


@pytest.mark.parametrize('window', [3, 7])
def test_neighbours(window):
  np.testing.assert_array_equal(masks.local_2d_mask((24, 24), window=window),
                                load('yopo_neighbor_mask')[f'allowed_w{window}'])


def test_neighbours_of_a_wide_grid():
  seen = np.asarray(masks.local_2d_mask((2, 5), window=3))
  np.testing.assert_array_equal(np.flatnonzero(seen[4]), [3, 4, 8, 9])


def visual_tokens():
  """bool[1, N]: what the release counts as visual, the tokens between its two marks."""
  ids = load('v2pe_position_ids')['input_ids']
  inside = (np.cumsum(ids == 1, axis=1) - np.cumsum(ids == 2, axis=1)) > 0
  return inside & (ids != 1)


@pytest.mark.parametrize('stride', STRIDES)
def test_variable_positions(stride):
  raw = load('v2pe_position_ids')
  visual = visual_tokens()
  assert visual.sum() == 256 * raw['num_tiles'].sum()
  got = v2pe_positions(jnp.asarray(visual), stride=stride)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got[0], raw[f'pos_stride{stride}'])


@pytest.mark.parametrize('stride', STRIDES)
def test_variable_positions_among_padding(stride):
  visual = visual_tokens()
  places = np.sort(np.random.default_rng(0).permutation(900)[:visual.shape[1]])
  wide, valid = np.ones((1, 900), bool), np.zeros((1, 900), bool)
  wide[:, places], valid[:, places] = visual, True
  got = jax.jit(lambda v, r: v2pe_positions(v, stride=stride, valid=r))(wide, valid)
  np.testing.assert_array_equal(got[:, places], v2pe_positions(jnp.asarray(visual), stride=stride))


def test_variable_positions_of_an_image_that_nothing_comes_before():
  visual = jnp.asarray([[True, True, True, False, False, True]])
  np.testing.assert_array_equal(v2pe_positions(visual, stride=128), [[-0.5, 0, 0.5, 2, 3, 3.5]])
  with pytest.raises(ValueError, match='stride=0 must be in 1 to 256'):
    v2pe_positions(visual, stride=0)
