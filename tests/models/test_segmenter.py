"""Dense outputs: three ways back to the grid, against matrices and by hand, and the pixel head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_vit
from helpers.compiler import EMITTERS

from models.backbones import segmenter as dense
from models.backbones.segmenter import SegmentViT
from models.backbones.vit import ViT
from models.plan import make_plan
from ops import tokens as tk
from ops.assignments import Gather, Merge
from ops.tokens import SPECIAL, VISUAL, TokenSet

GRID, SPECIALS, WIDTH = (3, 4), 1, 5
TOTAL = SPECIALS + GRID[0] * GRID[1]


def fresh(batch=2):
  kind = np.repeat(np.array([SPECIAL, VISUAL], np.int8), (SPECIALS, TOTAL - SPECIALS))
  x = jax.random.normal(jax.random.key(0), (batch, TOTAL, WIDTH))
  return TokenSet.create(x, protected=SPECIALS, kind=jnp.broadcast_to(kind, (batch, TOTAL)))


def chain(kinds, valid=False):
  """Tokens through a cut a kind, their features changed between: (final, before, cuts, first)."""
  return jax.tree.map(np.asarray, jax.jit(lambda: _chained(kinds, valid))())


# The ways back to the grid, compiled.
restore, bypass, interpolate = (jax.jit(way, static_argnums=3) for way in (
    dense.restore, dense.bypass, dense.interpolate))


def _chained(kinds, valid):
  random = np.random.default_rng(0)
  tokens, before, cuts, assignments = fresh(), {}, {}, []
  for layer, (kind, keep) in enumerate(kinds):
    batch, slots = tokens.x.shape[:2]
    tokens = tokens.replace(x=jnp.tanh(tokens.x * (layer + 2)))
    src = np.stack([np.concatenate([[0], 1 + np.sort(random.permutation(slots - 1)[:keep - 1])])
                    for _ in range(batch)]).astype(np.int32)
    real = jnp.asarray(random.random((batch, keep)) < 0.7).at[:, 0].set(True) if valid else None
    if kind == 'gather':
      assignment = Gather(jnp.asarray(src), slots, valid=real)
    else:
      dst = random.integers(1, keep + 1, (batch, slots)).astype(np.int32)
      np.put_along_axis(dst, src, np.arange(keep, dtype=np.int32)[None].repeat(batch, 0), 1)
      assignment = Merge.mean(jnp.asarray(src), jnp.asarray(dst), tokens.sizes, valid=real)
    before[layer], tokens = tokens, tk.reduce(tokens, assignment)
    cuts[layer] = tokens
    assignments.append(assignment)
  return tokens, before, cuts, functools.reduce(tk.compose, assignments)


CASES = [([('gather', 8), ('gather', 5)], False), ([('merge', 8), ('merge', 4)], False),
         ([('gather', 9), ('merge', 4)], False), ([('gather', 9), ('gather', 6)], True),
         ([('merge', 9), ('gather', 6)], True)]


@pytest.mark.parametrize(('kinds', 'valid'), CASES, ids=str)
def test_restore_is_the_transposed_matrix(kinds, valid):
  tokens, before, cuts, composed = chain(kinds, valid)
  # A cut that drops says so in the matrix: its columns are zero.
  joined = (np.asarray(composed.matrix()) > 0).astype(np.float32)
  expected = np.einsum('bmt,bmd->btd', joined, tokens.x)[:, SPECIALS:]
  got = restore(tokens, before, cuts, GRID)
  np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(('kinds', 'valid'), CASES, ids=str)
def test_bypass_follows_every_patch_to_its_last_slot(kinds, valid):
  tokens, before, cuts, _ = chain(kinds, valid)
  got = np.asarray(bypass(tokens, before, cuts, GRID))
  dropped = 0
  for row in range(2):
    for patch in range(SPECIALS, TOTAL):
      held = np.asarray(tokens.x[row]), int(tokens.owner[row, patch])
      for layer in sorted(cuts, reverse=True):
        if cuts[layer].owner[row, patch] < 0 <= before[layer].owner[row, patch]:
          held = np.asarray(before[layer].x[row]), int(before[layer].owner[row, patch])
          dropped += 1
      np.testing.assert_array_equal(got[row, patch - SPECIALS], held[0][held[1]])
  assert dropped > 0


def test_interpolate_weighs_kept_patches_by_distance():
  tokens, before, cuts, _ = chain([('gather', 6)])
  got = np.asarray(interpolate(tokens, before, cuts, GRID))
  back = np.asarray(restore(tokens, before, cuts, GRID), np.float64)
  for row in range(2):
    kept = np.flatnonzero(np.asarray(tokens.owner[row, SPECIALS:]) >= 0)
    assert 0 < len(kept) < 12
    for patch in range(12):
      if patch in kept:
        np.testing.assert_array_equal(got[row, patch], back[row, patch].astype(np.float32))
        continue
      away = np.hypot(*(np.array(divmod(patch, 4))[:, None] - np.array(divmod(kept, 4))))
      weights = away ** -4.0 / (away ** -4.0).sum()
      np.testing.assert_allclose(got[row, patch], weights @ back[row, kept], rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_a_row_that_kept_no_patch_is_finite():
  tokens = fresh()
  src = jnp.zeros((2, 1), jnp.int32)
  reduced = tk.reduce(tokens, Gather(src, TOTAL))
  for way in dense.FILLS.values():
    found = way(reduced, {0: tokens}, {0: reduced}, GRID)
    assert np.isfinite(found).all()
  np.testing.assert_array_equal(dense.bypass(reduced, {0: tokens}, {0: reduced}, GRID),
                                tokens.x[:, 1:])


def test_a_soft_decision_drops_as_a_hard_one_does():
  """In training a dropped token keeps its slot at size 0: it counts as gone from that cut on."""
  tokens = fresh()
  policy = (np.random.default_rng(0).random((2, TOTAL)) < 0.5).astype(np.float32)
  policy[:, 0] = 1
  soft = tk.reduce(tokens, tk.identity(tokens).replace(policy=jnp.asarray(policy)))
  later = soft.replace(x=2 * soft.x)
  gone = np.asarray(policy[:, 1:, None] == 0)
  x = np.asarray(tokens.x[:, 1:])
  np.testing.assert_array_equal(dense.restore(later, {0: tokens}, {0: soft}, GRID),
                                np.where(gone, 0, 2 * x))
  np.testing.assert_array_equal(dense.bypass(later, {0: tokens}, {0: soft}, GRID),
                                np.where(gone, x, 2 * x))


# The model.


def segmenter(**settings):
  plain = golden_vit.model()
  fields = {name: getattr(plain, name) for name in
            ('width', 'mlp', 'heads', 'patch', 'image_size')}
  return SegmentViT(**(fields | {'depth': 2, 'pixel_classes': 3, 'cells': 2} | settings))


@functools.cache
def trained():
  """The first two layers of the golden backbone under a random pixel head."""
  head = {'kernel': 0.1 * jax.random.normal(jax.random.key(5), (golden_vit.WIDTH, 12)),
          'bias': jnp.linspace(-1.0, 1.0, 12)}
  backbone = {k: v for k, v in golden_vit.params().items() if k != 'head'}
  blocks = jax.tree.map(lambda leaf: leaf[:2], backbone['stack']['blocks'])
  return backbone | {'stack': {'blocks': blocks}, 'pixels': head}


def run(vit, params=None):
  apply = jax.jit(vit.apply, compiler_options=EMITTERS)
  return apply({'params': params or trained()}, golden_vit.images())


@pytest.mark.long
def test_without_reduction_every_way_is_the_plain_head():
  logits, out = run(segmenter())
  vit = golden_vit.model().clone(depth=2, num_classes=0, capture=False)
  _, plain = jax.jit(vit.apply)({'params': {k: v for k, v in trained().items() if k != 'pixels'}},
                                golden_vit.images())
  x = np.asarray(plain['tokens'].x[:, 1:])
  np.testing.assert_allclose(out['dense'], x, atol=1e-5)
  head = trained()['pixels']
  expected = np.asarray(out['dense']) @ np.asarray(head['kernel']) + np.asarray(head['bias'])
  # Patch (r, c), cell (i, j): pixel cell (2 r + i, 2 c + j).
  expected = expected.reshape(2, 8, 8, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, 16, 3)
  expected = jax.image.resize(expected, (2, 32, 32, 3), 'bilinear')
  np.testing.assert_allclose(logits, expected, atol=1e-5)
  for way in dense.FILLS:
    np.testing.assert_array_equal(run(segmenter(fill=way))[0], logits)


def test_one_prediction_a_pixel_is_not_resized():
  vit = segmenter(cells=4, pixel_classes=1)
  params = trained() | {'pixels': {'kernel': jnp.zeros((golden_vit.WIDTH, 16)),
                                   'bias': jnp.arange(16.0)}}
  logits, _ = run(vit, params)
  np.testing.assert_array_equal(logits[1, :, :, 0], np.tile(np.arange(16.0).reshape(4, 4), (8, 8)))


# Before attention, inside it, between, and after; prunes, merges, fuses, and pads.
METHODS = {'evit': {}, 'tome': {}, 'ats': {}, 'dpcknn': {}, 'random': {'site': 'after'}}


@pytest.mark.long
@pytest.mark.parametrize('name', METHODS)
def test_every_way_works_under_every_kind_of_method(name):
  plan = make_plan({'method': name, 'layers': (0, 1), 'keep': (48, 36), **METHODS[name]},
                   segmenter().host)
  logits, out = run(segmenter(fill='bypass', plan=plan))
  assert logits.shape == (2, 32, 32, 3)
  owner = np.asarray(out['tokens'].owner[:, 1:])
  back = np.take_along_axis(np.asarray(out['tokens'].x), np.maximum(owner, 0)[..., None], axis=1)
  there = (owner >= 0)[..., None]
  assert (~there).any() == (name in ('ats', 'random'))
  rest = out['tokens'], out['before'], out['cuts'], (8, 8)
  np.testing.assert_array_equal(restore(*rest), np.where(there, back, 0))
  filled = np.asarray(interpolate(*rest))
  np.testing.assert_array_equal(np.where(there, filled, 0), np.where(there, back, 0))
  assert (np.abs(filled).max(axis=-1) > 0).all()
  # Bypassed features: those before the cut, through the model's own final norm.
  x, norm = np.asarray(out['dense']), golden_vit.params()['norm']
  np.testing.assert_array_equal(np.where(there, x, 0), np.where(there, back, 0))
  for layer in (0, 1):
    came, left = (np.asarray(out[when][layer].owner[:, 1:]) for when in ('before', 'cuts'))
    for row, patch in np.argwhere((came >= 0) & (left < 0)):
      raw = np.asarray(out['before'][layer].x[row, came[row, patch]])
      normed = (raw - raw.mean()) / np.sqrt(raw.var() + 1e-6) * norm['scale'] + norm['bias']
      np.testing.assert_allclose(x[row, patch], normed, atol=1e-5)


@pytest.mark.long
def test_windows_and_a_convolution_fit_together():
  vit = segmenter(window=(4, 4), whole_layers=(0,), decoder='conv', cells=4)
  vit = vit.clone(plan=make_plan({'method': 'tome', 'layers': (1,), 'keep': 40}, vit.host))
  params = jax.jit(vit.init)(jax.random.key(0), golden_vit.images())['params']
  assert {'conv', 'pixels'} <= params.keys()
  logits, out = run(vit, params)
  assert logits.shape == (2, 32, 32, 3)
  owner = np.asarray(out['tokens'].owner[:, 1:])
  np.testing.assert_array_equal(out['dense'], np.take_along_axis(
      np.asarray(out['tokens'].x), owner[..., None], axis=1))


def test_settings_that_cannot_be_are_refused():
  for settings, fault in (({'fill': 'unpool'}, 'restore, bypass, interpolate'),
                          ({'decoder': 'mlp'}, 'linear, conv'), ({'cells': 5}, '1 to patch=4'),
                          ({'num_classes': 10}, 'pixel_classes')):
    with pytest.raises(ValueError, match=fault):
      run(segmenter(**settings))
  assert issubclass(SegmentViT, ViT)
