"""CenterCLIP against the outputs of released code: exact indices, floats within 1e-5."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_vit, mostly_long
from helpers.golden_vit import arrays
from helpers.invariants import INVARIANTS

from ops import assignments
from ops import tokens as tk
from ops.primitives import cluster, kmedoids
from ops.reducers import REDUCERS
from ops.reducers.baselines.stride import Stride
from ops.reducers.vision.centerclip import CenterCLIP
from ops.signals import Signals
from ops.tokens import SPECIAL, TEXT, VISUAL, TokenSet

CLOSE = {'atol': 1e-5, 'rtol': 0}
ask = jax.jit(lambda method, tokens, num_slots: method(tokens, Signals(), num_slots=num_slots),
              static_argnums=(0, 2))
carry_out = jax.jit(tk.reduce)
CASES = {'a': 'euclidean', 'b': 'manhattan', 'c': 'cosine', 'd': 'chord'}


@pytest.mark.parametrize('case', mostly_long(CASES))
def test_medoids(case):
  """Distances, first centres, medoids and clusters.

  In case d the release measures lengths after normalising, where rounding decides which token is
  the longest: so the first centre is given, and the method is compared in row 1, where both agree.
  """
  raw = golden_vit.load('centerclip')
  x, count = raw[f'{case}_X'], int(raw[f'{case}_K'])
  method = CenterCLIP(distance=CASES[case], iterations=int(raw[f'{case}_iter_limit']))
  among = np.ones(x.shape[:2], bool)
  apart = np.asarray(jax.jit(kmedoids.pairwise, static_argnums=1)(x, CASES[case]))
  # The release shifts all distances by one number and the diagonal by one.
  released = raw[f'{case}_distance_matrix'] + np.eye(x.shape[1])
  released -= np.diagonal(released, axis1=1, axis2=2).mean()
  np.testing.assert_allclose(apart, released, **CLOSE)
  apart = apart - np.eye(x.shape[1], dtype=np.float32)
  length = np.linalg.norm(x, axis=2)
  if case == 'd':
    length = np.arange(x.shape[1])[None] == raw['d_kkz_init'][:, :1]
  first = jax.jit(kmedoids.seeds, static_argnames='clusters')(
      apart, length, among, clusters=count)
  np.testing.assert_array_equal(first, raw[f'{case}_kkz_init'])
  centres, joined = jax.jit(kmedoids.medoids, static_argnames='iterations')(
      apart, first, among, np.full(len(x), count), iterations=method.iterations)
  np.testing.assert_array_equal(centres, raw[f'{case}_medoids'])
  np.testing.assert_array_equal(np.sort(raw[f'{case}_unsorted_medoids']), centres)
  np.testing.assert_array_equal(joined, raw[f'{case}_assign'])
  loose = np.take_along_axis(*(raw[f'{case}_unsorted_{name}'] for name in ('medoids', 'assign')),
                             axis=1)
  np.testing.assert_array_equal(np.take_along_axis(np.asarray(centres), joined, axis=1), loose)
  picked = ask(method, TokenSet.create(jnp.asarray(x)), count)
  rows = slice(1, None) if case == 'd' else slice(None)
  np.testing.assert_array_equal(np.asarray(picked.src)[rows], raw[f'{case}_medoids'][rows])


def video(raw):
  """Two videos of four frames; a frame is a [CLS] token and 9 patches. The class tokens lead."""
  frames = raw['tc_x'].transpose(1, 0, 2).reshape(2, 4, 10, 8)
  x = np.concatenate([frames[:, :, 0], frames[:, :, 1:].reshape(2, 36, 8)], axis=1)
  kind = np.tile(np.repeat([SPECIAL, VISUAL], [4, 36]).astype(np.int8), (2, 1))
  return TokenSet.create(jnp.asarray(x), kind=kind, protected=4)


@pytest.mark.parametrize(('outputs', 'name'), [('medoids', 'med_out'), ('means', 'mean_out')])
def test_segments(outputs, name):
  raw = golden_vit.load('centerclip')
  tokens = video(raw)
  out = arrays(carry_out(tokens, ask(CenterCLIP(segments=2, outputs=outputs), tokens, 16)))
  released = raw[f'tc_{name}'].reshape(7, 2, 2, 8).transpose(1, 2, 0, 3)
  np.testing.assert_allclose(out.x[:, 4:].reshape(2, 2, 6, 8), released[:, :, 1:], **CLOSE)
  np.testing.assert_allclose(out.x[:, :4].reshape(2, 2, 2, 8).mean(2), released[:, :, 0], **CLOSE)


def test_sparse_sampling():
  """The release's other way to fewer tokens: the middle one of each run."""
  raw = golden_vit.load('centerclip')
  tokens = video(raw)
  out = arrays(carry_out(tokens, ask(Stride(phase='middle'), tokens, 16)))
  released = raw['tc_sparse_out'].reshape(7, 2, 2, 8).transpose(1, 2, 0, 3)
  np.testing.assert_array_equal(out.x[:, 4:].reshape(2, 2, 6, 8), released[:, :, 1:])
  np.testing.assert_allclose(out.x[:, :4].reshape(2, 2, 2, 8).mean(2), released[:, :, 0], **CLOSE)
  for count, slots in ((6, 18), (49, 147)):
    picked = ask(Stride(phase='middle'), TokenSet.create(jnp.ones((1, slots, 2))), count)
    np.testing.assert_array_equal(np.asarray(picked.src),
                                  [raw[f'sparse_sampling_{count}_of_{slots}_eval']])


def test_pooling_over_frames():
  """And another: the mean over the frames of a segment, place by place; a merge of given groups."""
  raw = golden_vit.load('centerclip')
  tokens = video(raw)
  patch = np.arange(36)
  place = np.concatenate([np.arange(4) // 2 * 10, patch // 18 * 10 + patch % 9 + 1])
  src = np.stack([np.flatnonzero(place == output)[0] for output in range(20)])
  dst = np.tile(place, (2, 1)).astype(np.int32)
  pooled = jax.jit(lambda tokens, src, dst: assignments.Merge.mean(
      src, dst, tokens.sizes).apply(tokens.x))(tokens, np.tile(src.astype(np.int32), (2, 1)), dst)
  released = raw['tc_pool_out'].transpose(1, 0, 2).reshape(2, 20, 8)
  np.testing.assert_allclose(pooled, released, **CLOSE)


@pytest.mark.parametrize(('graph', 'name'), [('all', 'HeatKernel'), ('nearest', 'KNN')])
def test_spectral(graph, name):
  raw = golden_vit.load('centerclip')
  x = jnp.asarray(raw['sp_X'])
  weight = jax.jit(lambda x: kmedoids.affinity(
      cluster.distances(x), jnp.ones(x.shape[:2], bool), sigma=2.0, graph=graph, neighbours=5))(x)
  np.testing.assert_allclose(weight, raw[f'sp_{name}_W'], **CLOSE)
  assignment = ask(CenterCLIP(by='spectral', graph=graph, outputs='means'), TokenSet.create(x), 4)
  np.testing.assert_array_equal(assignment.src, raw[f'sp_{name}_medoids'])
  np.testing.assert_array_equal(assignment.dst, raw[f'sp_{name}_assign'])


def test_every_slot_is_filled_whatever_the_segments():
  """Eleven tokens in three segments of 4, 4 and 3; seven clusters: 3, 2 and 2. Text is skipped."""
  kind = np.array([[SPECIAL] + [VISUAL] * 5 + [TEXT] + [VISUAL] * 6], np.int8)
  x = np.random.default_rng(0).normal(size=(1, 13, 4)).astype(np.float32)
  tokens = TokenSet.create(jnp.asarray(x), kind=kind, protected=2)
  for method in (CenterCLIP(segments=3), CenterCLIP(segments=3, by='spectral')):
    src = np.asarray(ask(method, tokens, 9).src)[0]
    assert {0, 6} < set(src)
    groups = [[1, 2, 3, 4], [5, 7, 8, 9], [10, 11, 12]]
    assert [len(set(src) & set(group)) for group in groups] == [3, 2, 2]


@pytest.mark.long
def test_segments_do_not_touch():
  """Changes one segment, which no other notices; repeats of a token are not confused."""
  x = np.random.default_rng(1).normal(size=(1, 12, 4)).astype(np.float32)
  other = x.copy()
  other[:, 6:] *= 3
  one, two = (np.asarray(ask(CenterCLIP(segments=2), TokenSet.create(jnp.asarray(a)), 6).src)
              for a in (x, other))
  np.testing.assert_array_equal(one[:, :3], two[:, :3])
  same = ask(CenterCLIP(outputs='means'), TokenSet.create(jnp.ones((1, 6, 2))), 4)
  np.testing.assert_array_equal(same.src, [[0, 1, 2, 3]])
  np.testing.assert_array_equal(same.dst, [[0, 1, 2, 3, 0, 0]])


@pytest.mark.parametrize('args', [{'by': 'kmeans'}, {'outputs': 'mean'}, {'distance': 'l2'},
                                  {'graph': 'knn'}, {'segments': 0}, {'sigma': 0.0}])
def test_bad_settings(args):
  with pytest.raises(ValueError, match=next(iter(args))):
    CenterCLIP(**args)


# The contract runs a method as its defaults make it; these are other ways of this one.
@dataclasses.dataclass(frozen=True)
class Spectral(CenterCLIP):
  by: str = 'spectral'


@dataclasses.dataclass(frozen=True)
class Means(CenterCLIP):
  outputs: str = 'means'
  distance: str = 'manhattan'
  segments: int = 3


@pytest.mark.parametrize('made', [Spectral, Means])
@pytest.mark.parametrize('invariant', mostly_long(['matrix', 'mass', 'padding', 'short'], short=2))
def test_contract_of_other_settings(made, invariant, monkeypatch):
  monkeypatch.setitem(REDUCERS, made.__name__, made)
  INVARIANTS[invariant](made.__name__)
