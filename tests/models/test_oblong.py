"""Images that are no squares: shapes, methods that read the grid, positions, pixels, pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_long
from helpers.errors import said
from PIL import Image

from lib.cost import jaxpr as jaxpr_cost
from lib.cost import vit as vit_cost
from lib.data import augment
from models import checkpoints
from models.backbones.vit import ViT
from models.build import build
from ops.primitives.grids import sincos

MODEL = {'variant': 'Ti/4', 'width': 16, 'depth': 2, 'heads': 2, 'mlp': 24, 'num_classes': 5,
         'image_size': [16, 24]}


@pytest.mark.parametrize('positions', ['learned', 'sincos'])
@pytest.mark.parametrize('method', mostly_long(
    ['none', 'pool', 'radial', 'expedit', 'tome'], short=3))
def test_models_of_oblong_images(method, positions):
  vit = build(MODEL | {'positions': positions},
              {'method': method, 'layers': (0,), **({'keep': 12} if method != 'none' else {})},
              macs=vit_cost.solver)
  assert vit.grid == (4, 6)
  assert vit.host.slots == 25
  images = jnp.zeros((2, 16, 24, 3))
  (logits, out), _ = jax.eval_shape(vit.init_with_output, jax.random.key(0), images)
  assert logits.shape == (2, 5)
  assert out['tokens'].x.shape[1] == (25 if method == 'none' else 13)
  assert jaxpr_cost.of_vit(vit).macs[''] == vit_cost.of(vit).macs


def test_segments_of_oblong_images():
  vit = build(MODEL | {'num_classes': 0}, task={'name': 'segment', 'pixel_classes': 3, 'cells': 2})
  images = jnp.zeros((2, 16, 24, 3))
  (logits, _), _ = jax.eval_shape(vit.init_with_output, jax.random.key(0), images)
  assert logits.shape == (2, 16, 24, 3)


def test_sizes_that_do_not_fit():
  vit = build(MODEL)
  assert said(jax.eval_shape, vit.init, jax.random.key(0), jnp.zeros((1, 24, 16, 3))) == (
      'images of shape (1, 24, 16, 3) do not fit: expected [batch, 16, 24, 3]; resize them, or set '
      'image_size and channels')
  assert said(vit.clone, image_size=(16, 26)) == (
      'image_size=(16, 26) is not a multiple of patch=4: change one of them')


def test_positions_of_squares_on_an_oblong_grid():
  """A table that grows along one axis alone does not change along that axis."""
  square = ViT(width=8, depth=1, mlp=8, heads=1, patch=4, image_size=16, num_classes=0)
  grid = np.broadcast_to(np.arange(4.0)[:, None, None], (4, 4, 8)).reshape(1, 16, 8)
  table = np.concatenate([np.full((1, 1, 8), 7.0), grid], axis=1).astype(np.float32)
  made = checkpoints.resize_positions({'pos': table}, square, image_size=(16, 32))['pos']
  assert made.shape == (1, 33, 8)
  np.testing.assert_array_equal(made[:, 0], 7)
  rows = made[0, 1:].reshape(4, 8, 8)
  np.testing.assert_allclose(rows, np.broadcast_to(np.arange(4.0)[:, None, None], (4, 8, 8)),
                             atol=1e-5)
  back = checkpoints.resize_positions({'pos': made}, square.clone(image_size=(16, 32)),
                                      image_size=16)['pos']
  np.testing.assert_allclose(back, table, atol=1e-5)
  # The first halves tell columns apart, the second rows.
  fixed = sincos((4, 8), 16).reshape(4, 8, 16)
  assert (fixed[0, :, :8] == fixed[3, :, :8]).all()
  assert (fixed[:, 0, 8:] == fixed[:, 7, 8:]).all()


@pytest.mark.parametrize('method', augment.AUGMENTS)
def test_pixels_of_oblong_images(method):
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
  made = augment.AUGMENTS[method](image, (16, 24), np.random.default_rng(1), filter='bilinear')
  assert np.asarray(made).shape == (16, 24, 3)


def test_the_centre_has_the_shape_of_the_size():
  rows, columns = np.indices((8, 20)).astype(np.uint8)
  # Half as high as wide: of 8 x 20 pixels the inner 8 x 16.
  for values, wanted in ((rows, np.arange(8)[:, None]), (columns, np.arange(2, 18)[None])):
    made = np.asarray(augment.whole(Image.fromarray(values), (8, 16), filter='bilinear'))
    np.testing.assert_array_equal(made, np.broadcast_to(wanted, (8, 16)))
