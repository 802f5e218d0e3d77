"""The speed table: its programs do what their names say, and its columns count right."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_vit

from models.plan import make_plan
from tools import speed


@functools.cache
def asked(name):
  """A tiny model, a plan in one layer, its logits, and what was recorded of the method."""
  model = golden_vit.model()
  plan = make_plan({'method': name, 'layers': (2,), 'keep_ratio': 0.5}, model.host)
  images = jax.random.normal(jax.random.key(0), (2, model.image_size, model.image_size, 3))
  function, args = speed.forward(model, plan, golden_vit.params(), images)
  return plan, args, jax.jit(function)(*args), speed.record(model, plan, *args), model


@pytest.mark.long
@pytest.mark.parametrize('name', ['tome', 'mctf', 'ats', 'flowcut', 'dynamicvit', 'sinkhorn'])
def test_pieces_redo_what_the_model_did(name):
  plan, args, _, recorded, model = asked(name)
  pieces = speed.parts(plan, args[0]['stack'], recorded)
  assert ('scoring' in pieces) == bool((plan.only.method.needs | plan.only.method.watch_needs)
                                       & speed.COMPUTED)
  answers = {part: jax.jit(run)(*given) for part, (run, given) in pieces.items()}
  for one, again in zip(recorded, answers['selection'], strict=True):
    chex.assert_trees_all_close(one.answer, again, rtol=1e-5, atol=1e-5)
  cut, = (one for one in recorded if one.keep is not None)
  _, out = model.clone(plan=plan).apply({'params': args[0]}, args[1])
  np.testing.assert_allclose(answers['applying'][0].x, out['cuts'][2].x, rtol=1e-5, atol=1e-5)
  if 'scoring' in pieces:
    row = plan.only.method.needs & speed.COMPUTED
    for name in row:
      np.testing.assert_allclose(getattr(answers['scoring'][-1], name), getattr(cut.signals, name),
                                 rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(('site', 'merges'), [('between', True), ('inside', True),
                                             ('inside', False)])
def test_slicing_keeps_the_first_slots(site, merges):
  plan, args, _, _, model = asked('tome')
  sliced = plan.with_method(speed.Slicing(merges), site=site)
  _, out = model.clone(plan=sliced).apply({'params': args[0]}, args[1])
  before, after = out['before'][2], out['cuts'][2]
  np.testing.assert_array_equal(after.x, before.x[:, :after.slots])
  np.testing.assert_array_equal(after.pos, before.pos[:, :after.slots])


def test_floor_counts_products_and_what_is_read_and_written():
  def function(a, b, unused):
    return a @ b + 0 * unused.shape[0]

  a, b = jnp.ones((4, 8)), jnp.ones((8, 16))
  assert speed.floor(function, (a, b, a)) == (4 * 8 * 16, 4 * (4 * 8 + 8 * 16 + 4 * 16))


def row(batch, value):
  row = {'method': 'tome', 'schedule': '3 cuts', 'variant': 'S/16', 'batch': batch,
         'macs_ratio': 1.5, 'dtype': 'float32', 'cores': 2, 'cpu': 'chip', 'jax': '1', 'date': 'd',
         'speedup': value, 'speedup_low': value, 'speedup_high': value,
         'of_macs_ratio': value / 1.5, 'own_gflops': 1.0, 'own_mbytes': 2.0, 'floor_ms': 3.0}
  for number, part in enumerate(speed.PARTS):
    row |= {f'{part}_ms': number, f'{part}_share': 0.01 * number}
  return row


def test_table_names_the_batch_that_breaks_even():
  line = speed.table([row(8, 1.2), row(1, 0.9)]).splitlines()[-1]
  assert '0.90 [0.90, 0.90], 0.60 | 1.20 [1.20, 1.20], 0.80 | 8 | 0.0 | 1.0 | 2.0' in line
  assert '| never |' in speed.table([row(1, 0.9)])
  assert len(speed.newest([row(8, 1.0), row(8, 2.0)])) == 1


def test_slice_says_who_joins_what():
  made = speed.Slice(3, 5, 2)
  np.testing.assert_array_equal(made.src, [[0, 1, 2]] * 2)
  np.testing.assert_array_equal(made.dst, [[0, 1, 2, 3, 3]] * 2)
