"""PPE against its authors' code: exact indices, 1e-5 for floats.

Axes: B batch, N tokens, M clusters, A axes, K positions of a token on each.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import recorded

from ops import tokens as tk
from ops.primitives.cluster import average_clusters, density_clusters
from ops.reducers.projector.ppe import PPE
from ops.rope import Rope, member_positions
from ops.signals import Signals
from ops.tokens import TokenSet


def load(name):
  return recorded.arrays(f'vlm_pre/ppe_{name}')


def close(got, want):
  np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize('case', [0, 1])
def test_clusters_and_their_positions(case):
  raw = load(f'dpcknn_case{case}')
  clusters, parts = int(raw['clusters']), int(raw['ppe_k'])

  @jax.jit
  def run(x, noise, pos):
    tokens = TokenSet.create(x)
    src, dst = density_clusters(tokens, num_slots=clusters, neighbours=int(raw['knn']), noise=noise)
    merge = average_clusters(tokens, src, dst, tokens.real, smoothing=1e-6)
    own = PPE(neighbours=int(raw['knn']), smoothing=1e-6)(tokens, Signals(), num_slots=clusters)
    several = member_positions(jnp.repeat(pos.T[None], parts, axis=2), dst, groups=clusters,
                               parts=parts)
    return dst, tk.reduce(tokens, merge).x, own.dst, several

  dst, merged, own, several = run(raw['x'], raw['density_noise'], raw['position_ids_thw'])
  np.testing.assert_array_equal(dst, raw['idx_cluster'])
  np.testing.assert_array_equal(own, raw['idx_cluster'])
  close(merged, raw['merged'])
  np.testing.assert_array_equal(several[0].T, raw['out_position_ids_stable_sort'])
  # The release's own order of members is that of an unstable sort: all there are, or any K.
  sizes = np.bincount(dst[0], minlength=clusters)
  for found, wanted in zip(np.split(np.asarray(several[0]).T, 3),
                           np.split(raw['out_position_ids'], 3), strict=True):
    for cluster in np.flatnonzero(sizes <= parts):
      assert set(found[:, cluster]) == set(wanted[:, cluster])


def test_sections_turn_with_positions_of_their_own():
  raw = load('mrope')
  sections = tuple(int(section) for section in raw['mrope_section_expanded'])
  whole = tuple(int(section) for section in np.add.reduceat(sections, np.arange(0, 6, 2)))
  width = raw['q'].shape[-1]
  theta = float(raw['inv_freq'][1] ** (-width / 2))
  rope = Rope(width, theta=theta, sections=whole).split(2)
  assert rope.sections == sections
  np.testing.assert_allclose(rope.frequencies(), raw['inv_freq'], rtol=1e-5)
  pos = np.moveaxis(raw['positions'], 0, -1)
  pos = np.concatenate([np.zeros_like(pos[..., :1]), pos], axis=-1)
  for name in 'qk':
    turned = rope.rotate(jnp.moveaxis(raw[name], 1, 2), pos)
    close(jnp.moveaxis(turned, 2, 1), raw[f'{name}_rot'])


def test_sections_that_cannot_be_divided():
  with pytest.raises(ValueError, match=r'sections=\(2, 3, 3\) of RoPE cannot be divided into 2'):
    Rope(16, sections=(2, 3, 3)).split(2)
