"""Methods before a language model that were never released: what their papers claim of them.

Axes: B batch, N tokens, M tokens left, D features.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_long
from scipy.cluster import hierarchy

from ops import tokens as tk
from ops.primitives.crops.quarters import average_linkage
from ops.reducers.projector.dc2 import DC2
from ops.reducers.projector.fastervlm import FasterVLM
from ops.reducers.projector.fopru import FoPru
from ops.reducers.projector.todre import ToDRE
from ops.reducers.projector.token_corr import TokenCorr
from ops.reducers.projector.vmtc import VMTC
from ops.signals import Signals
from ops.tokens import TokenSet


@functools.partial(jax.jit, static_argnums=0, static_argnames='num_slots')
def reduce(method, x, told, *, num_slots, stats=None):
  tokens = TokenSet.create(x, stats=stats or {})
  answer = method(tokens, told, num_slots=num_slots)
  return answer, tk.reduce(tokens, answer)


def attention(rng, slots, *, by='cls_attention', **others):
  values = rng.uniform(0.1, 1, size=(2, 3, slots)).astype(np.float32)
  return values.mean(axis=1), Signals(**{by: values}, **others)


def sorted_top(scores, count):
  return np.sort(np.argsort(-scores, axis=1, kind='stable')[:, :count], axis=1)


def test_fopru_keeps_the_most_significant_tokens_or_whole_rows_in_their_order():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 20, 3)).astype(np.float32)
  scores, told = attention(rng, 20, by='received_attention', grid=(4, 5))
  answer, _ = reduce(FoPru(), x, told, num_slots=10)
  np.testing.assert_array_equal(answer.src, sorted_top(scores, 10))
  sums = scores.reshape(2, 4, 5).sum(axis=2)
  for rows in (1, 2, 3):
    answer, _ = reduce(FoPru(strategy='row'), x, told, num_slots=5 * rows)
    best = sorted_top(sums, rows)
    np.testing.assert_array_equal(answer.src, (5 * best[..., None] + np.arange(5)).reshape(2, -1))
  # Of one row more two tokens fit.
  more, _ = reduce(FoPru(strategy='row'), x, told, num_slots=12)
  for row in range(2):
    third = np.argsort(-sums[row])[2]
    own = 5 * third + np.argsort(-scores[row, 5 * third:5 * third + 5])[:2]
    whole = (5 * np.argsort(-sums[row])[:2, None] + np.arange(5)).ravel()
    np.testing.assert_array_equal(more.src[row], np.sort([*whole, *own]))


def greedy(x, first, count, selection):
  """The paper's rule, over all picked tokens at every step."""
  x = x / np.linalg.norm(x, axis=1, keepdims=True)
  picked = [first]
  while len(picked) < count:
    alike = x @ x[picked].T
    alike = alike.sum(axis=1) if selection == 'max_sum' else alike.max(axis=1)
    alike[picked] = np.inf
    picked.append(int(np.argmin(alike)))
  return np.sort(picked)


@pytest.mark.parametrize('selection', ['max_sum', 'k_center'])
def test_todre_adds_what_is_least_like_those_before(selection):
  rng = np.random.default_rng(1)
  x = rng.normal(size=(2, 40, 6)).astype(np.float32)
  scores, told = attention(rng, 40)
  answer, _ = reduce(ToDRE(selection=selection), x, told, num_slots=9)
  for row in range(2):
    np.testing.assert_array_equal(
        answer.src[row], greedy(x[row], int(np.argmax(scores[row])), 9, selection))


@pytest.mark.parametrize('selection', mostly_long(['max_sum', 'k_center']))
def test_todre_meets_every_part_of_an_image_where_attention_stays_in_one(selection):
  rng = np.random.default_rng(2)
  part = np.repeat(np.arange(4), (21, 3, 3, 3))
  x = 5 * np.eye(8, dtype=np.float32)[part] + rng.normal(0, 0.05, (2, 30, 8)).astype(np.float32)
  told = Signals(cls_attention=np.where(part == 0, 1.0, 0.1)[None, None].repeat(2, 0).astype(
      np.float32) + rng.uniform(0, 0.01, (2, 1, 30)).astype(np.float32))
  diverse, _ = reduce(ToDRE(selection=selection), x, told, num_slots=4)
  attended, _ = reduce(FasterVLM(), x, told, num_slots=4)
  np.testing.assert_array_equal(part[diverse.src], np.tile(np.arange(4), (2, 1)))
  assert (part[attended.src] == 0).all()


def test_vmtc_retains_primary_tokens_and_condenses_redundant_ones():
  """Three groups of patches that repeat each other become one token each; nothing is lost."""
  rng = np.random.default_rng(3)
  scores, told = attention(rng, 24)
  primary = sorted_top(scores, 9)
  group = np.arange(24) % 3
  x = 9 * np.eye(8, dtype=np.float32)[group] + rng.normal(0, 0.1, (2, 24, 8)).astype(np.float32)
  answer, reduced = reduce(VMTC(primary=0.75, neighbours=3), x, told, num_slots=12)
  np.testing.assert_array_equal(answer.src[:, :9], primary)
  np.testing.assert_array_equal(reduced.x[:, :9], np.take_along_axis(x, primary[..., None], 1))
  assert (np.asarray(reduced.owner) >= 0).all()
  for row in range(2):
    rest = np.setdiff1d(np.arange(24), primary[row])
    for output in range(9, 12):
      members = np.flatnonzero(answer.dst[row] == output)
      own, = set(group[members])
      np.testing.assert_array_equal(members, rest[group[rest] == own])
      np.testing.assert_allclose(reduced.x[row, output], x[row, members].mean(axis=0), atol=1e-5)


@pytest.mark.long
def test_token_corr_keeps_more_of_a_dense_image_than_of_a_plain_one():
  """A page with 10 patches of print among white ones, and one with 25: the count is theirs."""
  rng = np.random.default_rng(4)
  keys = rng.normal(size=(2, 40, 2, 32)).astype(np.float32)
  white = np.arange(40)[None] >= np.array([[10], [25]])
  keys[white] = rng.normal(size=(2, 32)) + rng.normal(0, 0.02, (white.sum(), 2, 32))
  scores, told = attention(rng, 40, keys=keys)
  local = rng.uniform(0.1, 1, size=(2, 40)).astype(np.float32)
  x = rng.normal(size=(2, 40, 4)).astype(np.float32)
  method = TokenCorr()
  answer, _ = reduce(method, x, told, num_slots=30, stats={'local': local})
  np.testing.assert_array_equal(answer.valid.sum(axis=1), [10, 25])
  np.testing.assert_array_equal(answer.wanted, [10, 25])
  for row, count in enumerate((10, 25)):
    best = sorted_top((scores + local)[row:row + 1], count)[0]
    np.testing.assert_array_equal(answer.src[row, :count], best)
  few, _ = reduce(method, x, told, num_slots=12, stats={'local': local})
  np.testing.assert_array_equal(few.valid.sum(axis=1), [10, 12])
  np.testing.assert_array_equal(few.wanted, [10, 25])
  assert method.watched((22,)) == (11,)
  np.testing.assert_allclose(
      method.watch(TokenSet.create(jnp.asarray(x)), told)['local'], scores, atol=1e-6)


def test_quarters_are_clustered_as_scipy_clusters_them():
  """The release's cut of average linkage by cosine, at every height."""
  rng = np.random.default_rng(5)
  parts = rng.normal(size=(6, 4, 3)) + 1
  unit = parts / np.linalg.norm(parts, axis=2, keepdims=True)
  heights, joins = jax.jit(average_linkage)(
      (unit @ unit.swapaxes(1, 2))[..., :3].astype(np.float32))
  for row in range(6):
    tree = hierarchy.linkage(parts[row], method='average', metric='cosine')
    np.testing.assert_allclose(np.sort(1 - heights[row, 1:]), tree[:, 2], atol=1e-6)
    for cut in (*(tree[:2, 2] + tree[1:, 2]) / 2, 2.0):
      label, first = hierarchy.fcluster(tree, cut, criterion='distance'), np.arange(4)
      for part in range(1, 4):
        if 1 - heights[row, part] <= cut:
          first[part] = first[joins[row, part]]
      np.testing.assert_array_equal(first, [np.argmax(label == own) for own in label])


def crops_of(tiling, side, num_crops):
  """Signals of an image in small, and of its crops, in raster order."""
  number = np.arange(num_crops * side * side, dtype=np.int32)[None].repeat(2, 0)
  return Signals(crop=number // side ** 2, patch=number % side ** 2, crop_grid=(side, side),
                 tiling=np.array([tiling] * 2, np.int32), num_crops=num_crops)


@pytest.mark.long
def test_dc2_merges_crops_that_are_alike_place_by_place():
  """Of four crops two show the same: they become one, each token with that at its place."""
  rng = np.random.default_rng(6)
  x = rng.normal(size=(2, 5, 4, 8)).astype(np.float32)
  x[:, 4] = x[:, 1] + rng.normal(0, 0.1, (2, 4, 8))
  flat = x.reshape(2, 20, 8)
  answer, reduced = reduce(DC2(least=2), flat, crops_of((2, 2), 2, 5), num_slots=16)
  np.testing.assert_array_equal(answer.src, np.arange(16)[None].repeat(2, 0))
  np.testing.assert_array_equal(answer.dst[:, 16:], np.arange(4, 8)[None].repeat(2, 0))
  np.testing.assert_allclose(reduced.x[:, 4:8], (x[:, 1] + x[:, 4]) / 2, atol=1e-6)
  # By the release's threshold it is the image that decides: the second row's crops are other ones.
  flat = flat.copy()
  flat[1, 16:] = rng.normal(size=(4, 8))
  answer, reduced = reduce(DC2(least=2, threshold=0.9), flat, crops_of((2, 2), 2, 5), num_slots=19)
  np.testing.assert_array_equal(answer.valid.sum(axis=1), [16, 19])
  assert (np.asarray(reduced.owner) >= 0).all()


@pytest.mark.long
def test_dc2_divides_plain_parts_least():
  """A quarter of sky becomes one token before any token of the rest merges."""
  rng = np.random.default_rng(7)
  x = rng.normal(size=(2, 4, 4, 8)).astype(np.float32)
  x[:, :2, 2:] = x[:, :1, 2:3] + rng.normal(0, 0.02, (2, 2, 2, 8))
  answer, reduced = reduce(DC2(), x.reshape(2, 16, 8), crops_of((0, 0), 4, 1), num_slots=13)
  sky = [2, 3, 6, 7]
  for row in range(2):
    np.testing.assert_array_equal(answer.src[row], np.setdiff1d(np.arange(16), sky[1:]))
    np.testing.assert_array_equal(answer.dst[row, sky], 2)
    np.testing.assert_allclose(reduced.x[row, 2], x[row, :2, 2:].mean(axis=(0, 1)), atol=1e-6)
