"""Training under reduction: every method learns; annealing, consistency and patch dropout.

Every learned method's step is traced: its parameters have places, its losses add up.
"""

import functools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mostly_long
from helpers.parity import FOLDER, case

import train
from configs import deit_s16_finetune, digits
from lib.cost import vit as vit_cost
from lib.data import images as image_data
from lib.runtime import checkpoint, launch, sharding
from lib.tasks import anneal, distill
from lib.tasks.image import loss
from models.build import build
from models.checkpoints import merge_params
from models.compressors import COMPRESSORS
from models.plan import methods
from ops.budgets import Cut, Limits, annealed_keep_ratio, part_of, phases, resolve

SMALL = {'variant': 'Ti/8', 'width': 32, 'depth': 2, 'heads': 2, 'mlp': 32, 'image_size': 32,
         'channels': 1, 'num_classes': 10}
ROWS = 4
HOST = build(SMALL, {}).host


def step(method, *, distil):
  """Shapes of a training step under a method: the state before, after, and what is measured."""
  config = digits.get_config()
  settings = config.optimizer
  settings.distill.teacher = 'some run' if distil else ''
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  vit = build(SMALL, {'method': method, 'layers': (1,), 'keep': 9}, macs=vit_cost.solver, mesh=mesh)
  optimizer = optax.adamw(1e-3)

  def init(key):
    params = vit.clone(mesh=None).init(key, jnp.zeros((1, 32, 32, 1)))['params']
    return train.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), params)

  before = jax.eval_shape(init, jax.random.key(0))
  places = sharding.make_shardings(before, config.sharding, mesh)
  batch = {'image': jax.ShapeDtypeStruct((ROWS, 32, 32, 1), np.float32),
           'label': jax.ShapeDtypeStruct((ROWS,), np.int32)}
  teacher = {**before.params, 'stack': {'blocks': before.params['stack']['blocks']}}
  update = functools.partial(train.update, functools.partial(loss, vit, settings), optimizer,
                             settings, optax.constant_schedule(1e-3))
  key = jax.eval_shape(jax.random.key, 0)
  after, measured = jax.eval_shape(update, before, batch, key, teacher if distil else None)
  return before, places, after, measured


@pytest.mark.parametrize('distil', [False, True], ids=['alone', 'distilled'])
@pytest.mark.parametrize('method', mostly_long(sorted(COMPRESSORS.keys() & methods(HOST)), short=2))
def test_a_learned_method_trains(method, distil):
  before, places, after, measured = step(method, distil=distil)
  assert 'reducer_01' in before.params['stack']
  chex.assert_trees_all_equal_structs(before, places)
  chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
  assert {value.shape for value in measured.values()} == {()}
  distilled = {name for name in measured if name.startswith('distill')}
  assert distilled == ({'distill_logits', 'distill_tokens'} if distil else set())


# -- every method learns -------------------------------------------------------------------------

TINY = {'variant': 'Ti/4', 'width': 16, 'depth': 2, 'heads': 2, 'mlp': 16, 'image_size': 16,
        'channels': 1, 'num_classes': 3}


def tiny(method='none', **reduce):
  # A cut in the last layer would come after the last attention, and change no logit.
  given = {'layers': (0,), 'keep': 8} if method != 'none' else {}
  return build(TINY, {'method': method, **given, **reduce})


def batch_of(rows=8, seed=0):
  random = np.random.default_rng(seed)
  label = np.arange(rows, dtype=np.int32) % 3
  image = random.normal(size=(rows, 16, 16, 1)) + label[:, None, None, None]
  return {'image': image.astype(np.float32), 'label': label}


def learn(vit, settings, steps=3):
  """Parameters before, and what each of a few steps on one batch measured."""
  optimizer, batch = optax.adamw(3e-3), batch_of()
  params = jax.jit(vit.init)(jax.random.key(0), batch['image'])['params']
  # A head of zeros would keep the first gradients from everything below it.
  head = jax.random.normal(jax.random.key(1), params['head']['kernel'].shape)
  params = params | {'head': params['head'] | {'kernel': 0.3 * head}}
  state = train.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), params)
  update = jax.jit(functools.partial(train.update, functools.partial(loss, vit, settings),
                                     optimizer, settings, optax.constant_schedule(3e-3)))
  measured = []
  for _ in range(steps):
    state, scalars = update(state, batch, jax.random.key(2), None)
    measured.append({name: float(value) for name, value in scalars.items()})
  return params, measured


@pytest.mark.parametrize(('method', 'mode'), mostly_long([
    ('tome', 'gather'), ('dynamicvit', 'gather'), ('topk', 'mask')]))
def test_a_few_steps_lower_the_loss(method, mode):
  """Tokens joined, dropped by sampled decisions, and masked."""
  _, measured = learn(tiny(method, mode=mode), digits.get_config().optimizer, steps=6)
  assert all(math.isfinite(value) for row in measured for value in row.values())
  assert all(row['grad_norm'] > 0 for row in measured)
  assert measured[-1]['loss'] < measured[0]['loss']


# -- annealing -----------------------------------------------------------------------------------


def test_phases_are_the_cosine_at_their_middles():
  found = phases(10, 50, 2)
  assert [first for first, _ in found] == [0, 10, 30, 50]
  cosine = [(1 - math.cos(math.pi * part)) / 2 for part in (0.25, 0.75)]
  np.testing.assert_allclose([share for _, share in found], [0, *cosine, 1], rtol=1e-12)
  assert phases(0, 3, 3)[0] == (0, pytest.approx((1 - math.cos(math.pi / 6)) / 2))
  with pytest.raises(ValueError, match='phases=4 must be 1 to the 3 steps'):
    phases(0, 3, 4)


def test_a_share_of_cuts():
  limits = Limits(depth=12, slots=65, protected=1)
  cuts = resolve({'keep_ratio': 0.5, 'layers': (3, 6)}, limits)
  assert part_of(cuts, 1, limits) == cuts
  assert part_of(cuts, 0, limits) == ()
  # Half of the removal keeps 3/4 of the patches, twice: 48, then 36, beside [CLS].
  assert part_of(cuts, 0.5, limits) == (Cut(3, 65, 49), Cut(6, 49, 37))
  ratio = annealed_keep_ratio(0.5, step=3, start_step=0, stop_step=10)
  share = 1 - annealed_keep_ratio(0.0, step=3, start_step=0, stop_step=10)
  assert part_of(cuts, share, limits) == resolve({'keep_ratio': ratio, 'layers': (3, 6)}, limits)
  pairs = Limits(depth=12, slots=65, protected=1, min_slots=lambda slots: slots - 4)
  assert part_of((Cut(0, 65, 61),), 0.9, pairs) == (Cut(0, 65, 62),)
  with pytest.raises(ValueError, match=r'fraction=1\.5 is outside'):
    part_of(cuts, 1.5, limits)


@pytest.mark.long
def test_phases_of_a_model():
  vit = tiny('evit')
  found = anneal.phases(vit, {'start_step': 2, 'stop_step': 8, 'phases': 2})
  kept = [[cut.slots_out for cut in phase.model.plan.events] for phase in found]
  # 9 of 16 free slots are to stay (8 and the fused one): 1 - share * 7 / 16 of them, rounded up.
  assert kept == [[], [16], [12], [10]]
  assert [anneal.at(found, done).start_step for done in (0, 1, 2, 4, 5, 7, 8, 99)] == [
      0, 0, 2, 2, 5, 5, 8, 8]
  assert found[-1].model.plan == vit.plan
  assert anneal.phases(vit, None) == (anneal.Phase(0, vit),)
  assert anneal.describe(found).splitlines()[1] == 'from step 2: tokens left 16 in layer 0'
  once = {'start_step': 0, 'stop_step': 8, 'phases': 2}
  with pytest.raises(ValueError, match='nothing is reduced'):
    anneal.phases(tiny(), once)
  with pytest.raises(ValueError, match='parameters of sit depend on how many tokens'):
    anneal.phases(tiny('sit'), once)
  assert len(anneal.phases(tiny('dynamicvit'), once)) == 3


def tiny_run(tmp_path, method):
  """A config of small images, with one cut."""
  config = digits.get_config()
  config.model.update({name: TINY[name] for name in ('width', 'depth', 'heads', 'mlp')})
  config.model.image_size = config.data.image_size = 16
  config.data.update(batch_size=8, data_dir=str(tmp_path / 'data'))
  config.reduce.vision.update(method=method, layers=(0,), keep=8)
  return config


@pytest.mark.long
def test_resumed_inside_a_phase_every_loss_is_the_same(tmp_path, monkeypatch):
  config = tiny_run(tmp_path, 'topk')
  config.update(total_steps=6, log_steps=1, eval_steps=6, checkpoint_steps=6)
  config.optimizer.warmup_steps = 2
  config.anneal.update(start_step=0, stop_step=5, phases=1)

  def losses(workdir):
    rows = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    return {row['step']: (row['loss'], row['kept_tokens']) for row in rows if 'loss' in row}

  # One set of programs for the three runs; tests/runtime/test_life.py resumes in another process.
  made = train.make_setup(config, sharding.make_mesh(config.mesh))
  monkeypatch.setattr(train, 'make_setup', lambda *_: made)
  assert train.run(config, tmp_path / 'whole', first=True)

  class StopAfterThree(launch.Stop):
    steps = 0

    def should_stop(self, exchange):
      self.steps += 1
      return self.steps == 3

  with monkeypatch.context() as patched:
    patched.setattr(launch, 'Stop', StopAfterThree)
    assert not train.run(config, tmp_path / 'cut', first=True)
  assert max(losses(tmp_path / 'cut')) == 3
  assert train.run(config, tmp_path / 'cut', first=True)
  assert losses(tmp_path / 'cut') == losses(tmp_path / 'whole')
  assert [kept for _, kept in losses(tmp_path / 'whole').values()] == [13] * 5 + [9]

  # Another run begins with what this one ended with.
  template = sharding.shapes(jax.eval_shape(made.init, jax.random.key(0)), made.shardings).ema
  _, ended = checkpoint.best(tmp_path / 'whole', template, metric='accuracy')
  begun, run = [], made.train_steps[0]
  made.train_steps[0] = lambda state, *rest: (
      begun.append(jax.device_get((state.params, state.ema))), run(state, *rest))[1]
  with config.unlocked():
    config.start = str(tmp_path / 'whole')
  assert train.run(config, tmp_path / 'more', first=True)
  for params in begun[0]:
    chex.assert_trees_all_equal(params, ended)
  config.start = str(tmp_path / 'nothing')
  with pytest.raises(FileNotFoundError, match='name the workdir of a run that has one'):
    train.run(config, tmp_path / 'none', first=True)

  # Packed, the same parameters are a few kilobytes.
  packed = checkpoint.pack(ended, 6, tmp_path / 'packed')
  assert packed.stat().st_size < 100_000
  step, again = checkpoint.best(tmp_path / 'packed', template, metric='accuracy')
  assert step == 6
  chex.assert_trees_all_equal(again, ended)
  other = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*leaf.shape, 1), leaf.dtype), template)
  with pytest.raises(ValueError, match='in the checkpoint and'):
    checkpoint.best(tmp_path / 'packed', other, metric='accuracy')


@pytest.mark.long
def test_a_tree_of_each_layer_trains_as_a_stack_does_and_is_saved_as_one(tmp_path, monkeypatch):
  """As on GPUs; and either goes on where the other stopped."""
  config = tiny_run(tmp_path, 'dynamicvit')
  config.update(total_steps=4, log_steps=1, eval_steps=4, checkpoint_steps=2)
  config.optimizer.warmup_steps = 1
  mesh = sharding.make_mesh(config.mesh)
  made = {}
  for storage in ('stacked', 'unstacked'):
    monkeypatch.setattr(train, 'training_storage', lambda platform, storage=storage: storage)
    made[storage] = train.make_setup(config, mesh)
  key = jax.random.key(config.seed)
  template = sharding.shapes(jax.eval_shape(made['stacked'].init, key), made['stacked'].shardings)
  own = jax.eval_shape(made['unstacked'].lay_out, template)
  assert isinstance(own.params['stack']['blocks'], tuple)
  assert jax.tree.structure(jax.eval_shape(made['unstacked'].stack, own)) == jax.tree.structure(
      template)

  class StopAfterTwo(launch.Stop):
    def should_stop(self, step):
      return step == 2

  ended, losses = {}, {}
  for first, then in (('stacked', 'stacked'), ('unstacked', 'stacked'), ('stacked', 'unstacked')):
    workdir = tmp_path / f'{first}_{then}'
    with monkeypatch.context() as patched:
      patched.setattr(launch, 'Stop', StopAfterTwo)
      patched.setattr(train, 'make_setup', lambda *_, first=first: made[first])
      assert not train.run(config, workdir, first=True)
      patched.undo()
    with monkeypatch.context() as patched:
      patched.setattr(train, 'make_setup', lambda *_, then=then: made[then])
      assert train.run(config, workdir, first=True)
    rows = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    losses[workdir] = [row['loss'] for row in rows if 'loss' in row]
    ended[workdir] = checkpoint.best(workdir, template.ema, metric='accuracy')[1]
  wanted, *others = ended
  assert len(losses[wanted]) == 4
  for other in others:
    np.testing.assert_allclose(losses[other], losses[wanted], rtol=1e-5)
    chex.assert_trees_all_close(ended[other], ended[wanted], atol=1e-5)


# -- consistency ---------------------------------------------------------------------------------


def test_consistency_loss_against_numpy():
  random = np.random.default_rng(0)
  ours, theirs = random.normal(size=(2, 5, 7)).astype(np.float32)
  np.testing.assert_allclose(distill.consistency_loss(ours, theirs),
                             ((ours - theirs) ** 2).sum(1) / 7, rtol=1e-6)
  total = lambda *features: distill.consistency_loss(*features).sum()  # noqa: E731
  ours_grad, theirs_grad = jax.grad(total, argnums=(0, 1))(ours, theirs)
  np.testing.assert_allclose(ours_grad, 2 * (ours - theirs) / 7, rtol=1e-5)
  assert not theirs_grad.any()


@pytest.mark.long
def test_training_adds_the_loss_of_a_gentler_plan():
  """With one level, that is the unreduced model."""
  settings, vit = digits.get_config().optimizer, tiny('tome')
  settings.consistency.levels, settings.label_smoothing = 1, 0.0
  params, (measured, *_) = learn(vit, settings, steps=1)
  batch = batch_of()
  (_, less), (logits, whole) = (jax.jit(model.apply)({'params': params}, batch['image'])
                                for model in (vit, vit.clone(plan=None)))
  logs = np.asarray(logits) - np.log(np.exp(logits).sum(-1, keepdims=True))
  assert measured['weak_plan_loss'] == pytest.approx(-logs[np.arange(8), batch['label']].mean(),
                                                     rel=1e-5)
  apart = np.asarray(less['pre_logits']) - np.asarray(whole['pre_logits'])
  assert measured['consistency'] == pytest.approx(3 * (apart ** 2).mean(), rel=1e-4)
  assert measured['consistency'] > 0


def test_levels_remove_less_and_less():
  found = anneal.levels(tiny('tome'), {'levels': 2})
  assert [[cut.slots_out for cut in vit.plan.events] for vit in found] == [[], [13]]
  with pytest.raises(ValueError, match=r'optimizer\.consistency\.levels asks for fewer tokens'):
    anneal.levels(tiny(), {'levels': 2})


# -- patch dropout -------------------------------------------------------------------------------


@pytest.mark.long
def test_patch_dropout_draws_anew_in_training_and_is_off_otherwise():
  plain = tiny()
  vit, images = plain.clone(training_patches=5), batch_of()['image']
  params = jax.jit(plain.init)(jax.random.key(0), images)['params']
  apply = jax.jit(lambda key: vit.apply({'params': params}, images, rngs={'dropout': key})[1])
  pos = [np.asarray(apply(jax.random.key(step))['tokens'].pos) for step in range(2)]
  assert pos[0].shape == (8, 6)
  assert (pos[0][:, 0] == -1).all()
  assert (np.diff(pos[0], axis=1) > 0).all()
  assert len({tuple(row) for row in np.concatenate(pos)}) > 10
  run = lambda model: jax.jit(model.apply)({'params': params}, images)[0]  # noqa: E731
  np.testing.assert_array_equal(run(vit), run(plain))
  with pytest.raises(ValueError, match='training_patches=17 is impossible: give 1 to 16'):
    jax.eval_shape(plain.clone(training_patches=17).apply, {'params': params}, images)


# -- from pretrained weights ---------------------------------------------------------------------


@pytest.mark.long
def test_a_config_trains_from_pretrained_image_weights(monkeypatch):
  """One step of configs/deit_s16_finetune.py, on a tiny checkpoint in timm's layout."""
  config = deit_s16_finetune.get_config()
  config.model.update(case('timm_vit')['image'], variant='Ti/8', dtype='float32',
                      weights=str(FOLDER / 'timm_vit.safetensors'))
  config.reduce.vision.remove, config.data.image_size = 2, 24
  info = image_data.DataInfo(5, 8, 8, (24, 24, 3), tuple('abcde'))
  monkeypatch.setattr(image_data, 'info', lambda data: info)
  setup = train.make_setup(config, sharding.make_mesh({'data': 1}, jax.devices()[:1]))
  state, loaded = setup.init(jax.random.key(0)), setup.task.pretrained()
  state = state.replace(params=merge_params(state.params, loaded),
                        ema=merge_params(state.ema, loaded))
  np.testing.assert_array_equal(state.params['head']['kernel'], loaded['head']['kernel'])
  batch = {'image': np.random.default_rng(0).normal(size=(4, 24, 24, 3)).astype(np.float32),
           'label': np.arange(4, dtype=np.int32)}
  state, scalars = setup.train_step(0)(state, batch, jax.random.key(1), None, {})
  assert float(scalars['kept_tokens']) == 6
  assert float(scalars['grad_norm']) > 0
