"""Sums of merged rows: every device's form gives the same, and so do gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_long

from ops import tokens as tk
from ops.assignments import Gather, Merge
from ops.moves import segments
from ops.reducers import REDUCERS
from ops.signals import Signals
from ops.tokens import SPECIAL, VISUAL, TokenSet

SLOTS, OUTPUTS = 13, 9
# Methods that merge by keys alone.
MERGING = ('tome', 'tome_kth', 'pitome', 'atc', 'dymu')
KINDS_OF_SLOTS = np.broadcast_to(np.where(np.arange(21) == 0, SPECIAL, VISUAL), (3, 21)).astype(
    np.int8)


def merges(rng, batch, *, moved):
  """Anchors, and where each slot goes: `moved` slots join others, the rest are anchors or gone."""
  src, dst = np.zeros((batch, OUTPUTS), np.int32), np.full((batch, SLOTS), OUTPUTS, np.int32)
  for row in range(batch):
    order = rng.permutation(SLOTS)
    src[row] = order[:OUTPUTS]
    dst[row, src[row]] = np.arange(OUTPUTS)
    dst[row, order[OUTPUTS:OUTPUTS + moved]] = rng.integers(0, OUTPUTS, moved)
  return src, dst


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('moved', [0, 2, 4])
def test_forms_of_devices_agree(dtype, moved):
  rng = np.random.default_rng(moved)
  src, dst = merges(rng, 3, moved=moved)
  values = jnp.asarray(rng.normal(size=(3, SLOTS, 6)), dtype)
  weight = rng.uniform(0.1, 1, (3, SLOTS)).astype(np.float32)
  wanted = np.zeros((3, OUTPUTS + 1, 6))
  for row in range(3):
    np.add.at(wanted[row], dst[row], np.asarray(values, np.float64)[row] * weight[row, :, None])
  bound = 1e-5 if dtype == 'float32' else 2 ** -8 * np.abs(wanted).max()
  for form in (segments.of_segments, segments.of_product,
               lambda *args: segments.of_moved(*args, most_moved=SLOTS - OUTPUTS)):
    found = jax.jit(form)(values, weight, dst, src)
    assert found.dtype == values.dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted[:, :OUTPUTS], atol=bound,
                               rtol=0)


@pytest.mark.parametrize('platform', mostly_long(['cuda', 'tpu', 'cpu'], short=2))
def test_merges_and_their_gradients_are_products(trace_for, monkeypatch, platform):
  trace_for(platform)
  monkeypatch.setattr(segments, 'FEW', 1)
  rng = np.random.default_rng(0)
  src, dst = merges(rng, 2, moved=3)
  values = rng.normal(size=(2, SLOTS, 2, 3)).astype(np.float32)
  weight = rng.uniform(0.1, 1, (2, SLOTS)).astype(np.float32)
  valid = np.arange(OUTPUTS) < np.array([[OUTPUTS], [6]])
  grad = rng.normal(size=(2, OUTPUTS, 2, 3)).astype(np.float32)

  def made(weight):
    return Merge(src, dst, weight, valid=valid, most_moved=SLOTS - OUTPUTS)

  def by_matrix(values, weight):
    return jnp.einsum('bmn,bnij->bmij', made(weight).matrix(), values)

  def by_head(values, weight):
    heads = jnp.moveaxis(values, 2, 1)
    return jnp.moveaxis(made(weight).apply_by_head(heads), 1, 2)

  wanted, exact = jax.vjp(by_matrix, values, weight)
  for form in (lambda values, weight: made(weight).apply(values), by_head):
    found, back = jax.vjp(form, values, weight)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    for one, other in zip(back(grad), exact(grad), strict=True):
      np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_gradient_of_a_pick_is_a_pick():
  rng = np.random.default_rng(0)
  src = np.stack([rng.permutation(SLOTS)[:OUTPUTS] for _ in range(2)]).astype(np.int32)
  valid = np.arange(OUTPUTS) < np.array([[OUTPUTS], [6]])
  src[1, 6:] = src[1, 0]  # Padding outputs may repeat a slot.
  x, grad = (rng.normal(size=(2, count, 3)).astype(np.float32) for count in (SLOTS, OUTPUTS))
  kept = Gather(src, SLOTS, valid)
  found, back = jax.vjp(kept.apply, x)
  np.testing.assert_array_equal(found, np.where(valid[..., None], x[np.arange(2)[:, None], src], 0))
  wanted = np.zeros_like(x)
  for row in range(2):
    wanted[row, src[row][valid[row]]] = grad[row][valid[row]]
  np.testing.assert_array_equal(back(grad)[0], wanted)
  text = str(jax.make_jaxpr(lambda x, grad: jax.vjp(kept.apply, x)[1](grad))(x, grad))
  assert 'scatter-add' not in text


@pytest.mark.long
@pytest.mark.parametrize('budgets', [False, True])
@pytest.mark.parametrize('name', MERGING)
def test_reductions_are_those_of_a_cpu_on_every_platform(trace_for, monkeypatch, name, budgets):
  """Rows with padding, and with budgets of their own."""
  monkeypatch.setattr(segments, 'FEW', 1)
  rng = np.random.default_rng(0)
  x, keys = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 21, 8), (3, 21, 2, 4)))
  valid = np.arange(21) < np.array([[21], [18], [7]])
  fields = {'budget': np.array([12, 9, 4], np.int32)} if budgets else {}
  method = REDUCERS[name]()

  def reduced(x, keys):
    tokens = TokenSet.create(x, protected=1, valid=valid, kind=KINDS_OF_SLOTS, **fields)
    signals = Signals(keys=keys, layer=0, depth=4, slots=21)
    return tk.reduce(tokens, method(tokens, signals, num_slots=14))

  found = {}
  for platform in ('cpu', 'cuda', 'tpu'):
    trace_for(platform)
    made = jax.jit(lambda *args: reduced(*args))(x, keys)
    found[platform] = np.where(np.asarray(made.real)[..., None], made.x, 0), made.sizes, made.pos
  for platform in ('cuda', 'tpu'):
    for one, other in zip(found[platform], found['cpu'], strict=True):
      np.testing.assert_allclose(one, other, atol=1e-5)
