"""Windows: folding and its inverse, windowed attention, reductions that act window by window."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_vit, mostly_long

from lib.cost import jaxpr as jaxpr_cost
from lib.cost import vit as vit_cost
from models.backbones.windows import Windows
from models.plan import make_plan, methods
from ops import tokens as tk
from ops.signals import Signals
from ops.tokens import SPECIAL, VISUAL, TokenSet

GRID, WINDOW = (4, 6), (2, 3)


def tokens_of(windows, *, batch=2, width=8, seed=0):
  """Fresh tokens of a grid, as a ViT makes them."""
  patches = windows.grid[0] * windows.grid[1]
  total = windows.special + patches
  kind = np.repeat(np.array([SPECIAL, VISUAL], np.int8), (windows.special, patches))
  pos = np.concatenate([np.full(windows.special, -1), np.arange(patches)]).astype(np.int32)
  x = jax.random.normal(jax.random.key(seed), (batch, total, width))
  return TokenSet.create(x, protected=windows.special, kind=jnp.broadcast_to(kind, (batch, total)),
                         pos=jnp.broadcast_to(pos, (batch, total)),
                         size=jnp.ones((batch, total)))


def corner(windows, values, window):
  """The patches of one window of [rows * columns, ...], by slicing the grid."""
  (high, wide), (rows, columns) = windows.window, windows.grid
  grid = np.asarray(values).reshape(rows, columns, *values.shape[1:])
  down, right = divmod(window, columns // wide)
  part = grid[down * high:(down + 1) * high, right * wide:(right + 1) * wide]
  return part.reshape(high * wide, *values.shape[1:])


@pytest.mark.parametrize('special', [0, 2])
def test_a_row_holds_a_window(special):
  windows = Windows(GRID, WINDOW, special)
  tokens = tokens_of(windows)
  folded = jax.jit(lambda tokens: windows.fold(windows.arrange(tokens)))(tokens)
  assert folded.x.shape == (2 * 4, special + 6, 8)
  local = np.concatenate([np.full(special, -1), np.arange(6)])
  for row in range(8):
    image, window = divmod(row, 4)
    np.testing.assert_array_equal(folded.x[row, :special], tokens.x[image, :special])
    np.testing.assert_array_equal(folded.x[row, special:],
                                  corner(windows, tokens.x[image, special:], window))
    np.testing.assert_array_equal(folded.pos[row], local)
    np.testing.assert_array_equal(folded.owner[row], np.arange(special + 6))


@pytest.mark.parametrize('special', [0, 2])
def test_unfolding_undoes_folding(special):
  windows = Windows(GRID, WINDOW, special)
  arranged, there = jax.jit(lambda tokens: (
      windows.arrange(tokens), windows.unfold(windows.fold(windows.arrange(tokens)))))(
          tokens_of(windows))
  chex.assert_trees_all_equal(there, arranged)
  # Slots moved, provenance did not: every patch still finds its features.
  np.testing.assert_array_equal(tk.restore(there, there.x), tokens_of(windows).x)


def by_hand(windows, tokens, keys, method, num_slots):
  """The reducer on each window alone, as slices of the image: a row an image, in window order."""
  special, size = windows.special, windows.window[0] * windows.window[1]
  pos = np.concatenate([np.full(special, -1), np.arange(size)]).astype(np.int32)

  @jax.jit
  def alone(x, kind, sizes, keys):
    tokens = TokenSet.create(x, protected=special, kind=kind, pos=jnp.asarray(pos)[None],
                             size=sizes)
    signals = Signals(keys=keys, cls_attention=keys[..., 0].transpose(0, 2, 1),
                      grid=windows.window, layer=1, depth=4)
    return tk.reduce(tokens, method(tokens, signals, num_slots=num_slots))

  def cut(values, image, window):
    lead, patches = values[image, :special], values[image, special:]
    return jnp.concatenate([lead, corner(windows, patches, window)])[None]

  return [[alone(*(cut(values, image, window) for values in
                   (tokens.x, tokens.kind, tokens.size, keys)))
           for window in range(windows.count)] for image in range(len(tokens.x))]


@pytest.mark.long
@pytest.mark.parametrize('name', ['tome', 'topk', 'pool'])
def test_a_reduction_acts_on_every_window_by_itself(name):
  windows, method = Windows(GRID, WINDOW, 1), methods()[name]()
  tokens = tokens_of(windows)
  keys = jax.random.normal(jax.random.key(1), (2, 25, 3, 4))
  expected = by_hand(windows, tokens, keys, method, num_slots=5)

  @jax.jit
  def together(tokens, keys):
    arranged = windows.arrange(tokens)
    keys = windows.fold_values(keys[:, arranged.pos[0] + 1])
    folded = windows.fold(arranged)
    signals = Signals(keys=keys, cls_attention=keys[..., 0].transpose(0, 2, 1), grid=WINDOW,
                      layer=1, depth=4)
    return windows.unfold(tk.reduce(folded, method(folded, signals, num_slots=5)))

  reduced = together(tokens, keys)
  assert reduced.slots == 1 + 4 * 4
  for image, row in enumerate(expected):
    for window, alone in enumerate(row):
      there = slice(1 + 4 * window, 5 + 4 * window)
      np.testing.assert_allclose(reduced.x[image, there], alone.x[0, 1:], atol=1e-6)
      np.testing.assert_allclose(reduced.size[image, there], alone.size[0, 1:], atol=1e-6)
      # Patch p of the window has the slot that it had alone, counted from the window's first.
      places = corner(windows, np.arange(24), window)
      owner = np.asarray(reduced.owner[image, 1 + places])
      own = np.asarray(alone.owner[0, 1:])
      np.testing.assert_array_equal(owner, np.where(own < 0, -1, own + 4 * window))
      np.testing.assert_array_equal(
          reduced.pos[image, there], places[np.asarray(alone.pos[0, 1:])])


# The model.


@functools.cache
def params():
  """The first three layers of the golden model."""
  blocks = golden_vit.params()['stack']['blocks']
  return golden_vit.params() | {'stack': {'blocks': jax.tree.map(lambda x: x[:3], blocks)}}


def model(**settings):
  return golden_vit.model().clone(depth=3, **settings)


def run(vit, images=None):
  images = golden_vit.images() if images is None else images
  return jax.jit(vit.apply)({'params': params()}, images)


@pytest.mark.long
def test_one_window_of_the_whole_grid_changes_nothing():
  budget = {'method': 'tome', 'remove': 8, 'layers': (1, 2)}
  vit = model(plan=make_plan(budget, model().host))
  expected, out = run(vit)
  logits, windowed = run(vit.clone(window=(8, 8), whole_layers=(1,)))
  np.testing.assert_allclose(logits, expected, atol=1e-5)
  np.testing.assert_array_equal(windowed['tokens'].owner, out['tokens'].owner)


@pytest.mark.long
def test_whole_layers_everywhere_are_the_plain_model():
  expected, _ = run(model())
  logits, out = run(model(window=(4, 4), whole_layers=(0, 1, 2)))
  np.testing.assert_allclose(logits, expected, atol=1e-5)
  assert len(out['hidden']) == 3
  changed, _ = run(model(window=(4, 4), whole_layers=(0, 2)))
  assert np.abs(changed - expected).max() > 1e-3


def test_without_whole_layers_windows_do_not_see_each_other():
  vit = model(window=(4, 4))
  images = golden_vit.images()
  other = images.at[:, :16, :16].set(0.0)
  _, first = run(vit, images)
  _, second = run(vit, other)
  # Four windows of 16 tokens behind [CLS]; [CLS] itself is averaged only at the end.
  same = first['tokens'].x[:, 17:], second['tokens'].x[:, 17:]
  np.testing.assert_array_equal(*same)
  assert np.abs(first['tokens'].x[:, 1:17] - second['tokens'].x[:, 1:17]).max() > 1e-3


@pytest.mark.long
@pytest.mark.parametrize('name', ['tome', 'ats'])
def test_every_window_keeps_equally_many(name):
  vit = model()
  plan = make_plan({'method': name, 'layers': (1, 2), 'keep': (40, 28)}, vit.host)
  _, out = run(vit.clone(plan=plan, window=(4, 4), whole_layers=(0,)))
  assert [out['cuts'][layer].slots for layer in (1, 2)] == [41, 29]
  tokens = out['tokens']
  window = np.asarray(tokens.pos[:, 1:]) // 32 * 2 + np.asarray(tokens.pos[:, 1:]) % 8 // 4
  np.testing.assert_array_equal(window, np.broadcast_to(np.repeat(np.arange(4), 7), (2, 28)))
  if name != 'ats':
    counts = np.asarray(tokens.size[:, 1:]).reshape(2, 4, 7).sum(axis=2)
    np.testing.assert_allclose(counts, 16.0, rtol=1e-5)


@pytest.mark.long
def test_a_windowed_layer_with_a_cut_equals_the_block_on_each_window():
  """The folded batch against the plain model on crops: one layer, no positions, no [CLS]."""
  vit = dataclasses.replace(model(), class_token=False, pool='mean', depth=1, parent=None)
  blocks = jax.tree.map(lambda leaf: leaf[:1], params()['stack']['blocks'])
  weights = params() | {'stack': {'blocks': blocks}, 'pos': jnp.zeros((1, 64, golden_vit.WIDTH))}
  plan = make_plan({'method': 'tome', 'layers': (0,), 'keep': 40}, vit.host)
  images = golden_vit.images()
  _, out = jax.jit(vit.clone(plan=plan, window=(4, 4)).apply)({'params': weights}, images)

  crops = images.reshape(2, 2, 16, 2, 16, 3).transpose(0, 1, 3, 2, 4, 5).reshape(8, 16, 16, 3)
  small = vit.clone(image_size=16)
  small = small.clone(plan=make_plan({'method': 'tome', 'layers': (0,), 'keep': 10}, small.host))
  weights |= {'pos': jnp.zeros((1, 16, golden_vit.WIDTH))}
  _, alone = jax.jit(small.apply)({'params': weights}, crops)
  np.testing.assert_allclose(out['tokens'].x.reshape(8, 10, -1), alone['tokens'].x, atol=1e-5)


@pytest.mark.parametrize('budget', mostly_long(
    [None, {'method': 'tome', 'layers': (1, 2), 'keep': (48, 32)},
                                    {'method': 'topk', 'site': 'before', 'layers': 1, 'keep': 16}]),
                         ids=str)
def test_the_cost_is_that_of_the_traced_program(budget):
  vit = model(window=(4, 4), whole_layers=(1,), registers=2)
  vit = vit.clone(plan=budget and make_plan(budget, vit.host))
  assert jaxpr_cost.of_vit(vit).macs[''] == vit_cost.of(vit).macs
  whole = vit_cost.of(vit.clone(whole_layers=(0, 1, 2)))
  for layer in (0, 2):
    assert vit_cost.of(vit).layers[layer].scores < whole.layers[layer].scores


def test_what_cannot_be_is_refused():
  with pytest.raises(ValueError, match='do not tile a grid of 8 x 8'):
    run(model(window=(3, 4)))
  host = model().host
  for budget, fault in (
      ({'method': 'topk', 'layers': (1,), 'keep': 41}, 'multiple of 4'),
      ({'method': 'mctf', 'layers': (1, 2), 'keep': (32, 16)}, 'cannot leave 9 of the 17'),
      ({'method': 'ats', 'layers': (2,), 'keep': 40}, 'take it out of whole_layers')):
    with pytest.raises(ValueError, match=fault):
      run(model(plan=make_plan(budget, host), window=(4, 4), whole_layers=(2,)))
  with pytest.raises(ValueError, match='the layers are 0 to 2'):
    run(model(window=(4, 4), whole_layers=(3,)))
  with pytest.raises(ValueError, match='window=None'):
    run(model(window=(4, 4), layers=(0, 2)))
