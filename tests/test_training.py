"""Every learned method's training step, traced: its parameters have places, its losses add up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train
from configs import digits
from lib import cost, sharding
from models.build import build
from models.compressors import COMPRESSORS

SMALL = {'variant': 'Ti/8', 'width': 32, 'depth': 2, 'heads': 2, 'mlp': 32, 'image_size': 32,
         'channels': 1, 'num_classes': 10}
ROWS = 4


def step(method, *, distil):
  """Shapes of a training step under a method: the state before, after, and what is measured."""
  config = digits.get_config()
  settings = config.optimizer
  settings.distill.teacher = 'some run' if distil else ''
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  vit = build(SMALL, {'method': method, 'layers': (1,), 'keep': 9}, macs=cost.solver, mesh=mesh)
  optimizer = optax.adamw(1e-3)

  def init(key):
    params = vit.clone(mesh=None).init(key, jnp.zeros((1, 32, 32, 1)))['params']
    return train.State(jnp.zeros((), jnp.int32), params, optimizer.init(params), params)

  before = jax.eval_shape(init, jax.random.key(0))
  places = sharding.place(before, config.sharding, mesh)
  batch = {'image': jax.ShapeDtypeStruct((ROWS, 32, 32, 1), np.float32),
           'label': jax.ShapeDtypeStruct((ROWS,), np.int32)}
  teacher = {**before.params, 'stack': {'blocks': before.params['stack']['blocks']}}
  update = functools.partial(train.update, vit, optimizer, settings, optax.constant_schedule(1e-3))
  key = jax.eval_shape(jax.random.key, 0)
  after, measured = jax.eval_shape(update, before, batch, key, teacher if distil else None)
  return before, places, after, measured


@pytest.mark.parametrize('distil', [False, True], ids=['alone', 'distilled'])
@pytest.mark.parametrize('method', sorted(COMPRESSORS))
def test_a_learned_method_trains(method, distil):
  before, places, after, measured = step(method, distil=distil)
  assert 'reducer_01' in before.params['stack']
  assert jax.tree.structure(before) == jax.tree.structure(places)
  same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), before, after)
  assert all(jax.tree.leaves(same))
  assert {value.shape for value in measured.values()} == {()}
  distilled = {name for name in measured if name.startswith('distill')}
  assert distilled == ({'distill_logits', 'distill_tokens'} if distil else set())
