"""Training on questions: the loss is of answers alone, scores count whole answers, runs resume."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import processes
from helpers.qa import NEEDLE, ROWS, SCENES, batch_of, made, small

import train
from configs import digit_scenes as scenes_config
from configs import stdlib_needle as needle_config
from lib.runtime import sharding
from lib.tasks import qa as qa_task

CASES = {
    'scenes': (scenes_config, SCENES, {}),
    'vision': (scenes_config, SCENES, {'vision': {'method': 'tome', 'remove': 3}}),
    'projector': (scenes_config, SCENES, {'projector': {'method': 'topk', 'keep': 5}}),
    'language': (scenes_config, SCENES, {'language': {
        'method': 'stride', 'token_kinds': 'visual', 'site': 'before', 'layers': (1,),
        'keep_ratio': 0.5}}),
    'needle': (needle_config, NEEDLE, {}),
}


@pytest.fixture(scope='module', params=CASES)
def case(request):
  config, info, reduce = CASES[request.param]
  config = small(config)
  config.data.context = 14
  with config.unlocked():
    model, params = made(config, info, **reduce)
  run = jax.jit(functools.partial(qa_task.apply, model))
  return request.param, config, info, model, params, run


@pytest.mark.long
def test_a_step_is_taken_and_every_parameter_has_a_place(case):
  name, config, info, model, params, _ = case
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  optimizer = optax.adamw(1e-3)
  state = train.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), params)
  sharding.make_shardings(state, config.sharding, mesh)
  update = functools.partial(train.update, functools.partial(qa_task.loss, model, config.optimizer),
                             optimizer, config.optimizer, optax.constant_schedule(1e-3))
  batch, before = batch_of(info, 14), None
  if name not in ('scenes', 'needle'):
    after, measured = jax.eval_shape(update, state, batch, jax.random.key(0), None)
    chex.assert_trees_all_equal_shapes(after.params, params)
    assert 'patch_loss' in measured
    return
  chex.clear_trace_counter()
  step = jax.jit(chex.assert_max_traces(
      lambda state, batch: update(state, batch, jax.random.key(0), None), n=1))
  for _ in range(3):
    state, measured = step(state, batch)
    assert before is None or measured['loss'] < before
    before = measured['loss']
  assert ('patch_loss' in measured) == (name != 'needle')
  chex.assert_trees_all_equal_shapes(state.params, params)


@pytest.mark.long
def test_a_compressor_trains_with_the_model():
  config = small(scenes_config)
  config.data.context = 14
  with config.unlocked():
    config.model.compressor = {'name': 'tokenpacker', 'args': {
        'heads': 2, 'levels': (0,) * 4}}
    model, params = made(config, SCENES)
  sharding.make_shardings(params, config.sharding, sharding.make_mesh({'data': 1},
                                                                      jax.devices()[:1]))
  assert 'projector' not in params
  assert qa_task.training_macs(model, context=14) > 0
  loss = functools.partial(qa_task.loss, model, config.optimizer, teacher=None)
  _, grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
      params, batch_of(SCENES, 14), key=jax.random.key(0))
  assert all(jnp.any(grad != 0) for grad in jax.tree.leaves(grads['compressor']['mlp']))


@pytest.mark.long
@pytest.mark.parametrize(('name', 'args'), [
    ('crosslmm', {'side': 2, 'every': 1}),
    ('vision_remember', {'every': 1, 'heads': 2, 'inner': 8, 'levels': (0, 1)}),
    ('vlora', {'layers': 2, 'every': 1, 'rank': 2, 'inner': 8, 'depth': 1, 'heads': 2, 'mlp': 8})])
def test_layers_that_read_a_memory_train(name, args):
  config = small(scenes_config)
  config.data.context = 14
  with config.unlocked():
    config.model.lm.kv_heads = 2
    config.model.compressor = {'name': name, 'args': args}
    model, params = made(config, SCENES)
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  optimizer = optax.adam(1e-2)
  state = train.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), params)
  sharding.make_shardings(state, config.sharding, mesh)
  assert qa_task.training_macs(model, context=14) > 0
  step = jax.jit(functools.partial(
      train.update, functools.partial(qa_task.loss, model, config.optimizer), optimizer,
      config.optimizer, optax.constant_schedule(1e-2)))
  losses = []
  for _ in range(4):
    state, measured = step(state, batch_of(SCENES, 14), jax.random.key(0), None)
    losses.append(float(measured['loss']))
  assert losses[-1] < losses[0]
  own = [part.get(each, {}) for tree in (params, state.params)
         for part, each in ((tree['lm'], 'reader'), (tree, 'compressor'))]
  still = jax.tree.map(lambda new, old: bool((new == old).all()), own[2:], own[:2])
  paths = ['/'.join(str(key.key) for key in path[1:]) for path, stays in
           jax.tree_util.tree_flatten_with_path(still)[0] if stays]
  # What visual tokens read in the last layer, no answer knows.
  assert not [path for path in paths if not path.startswith('visual_1/')], paths


def test_one_of_several_counts_trains_in_each_step_or_all_of_them():
  config = small(scenes_config)
  with config.unlocked():
    config.model.compressor = {
        'name': 'tokenpacker', 'args': {'heads': 2, 'levels': (0,) * 4}, 'train': 'draw',
        'turns': ({'side': 1}, {'side': 2}, {'side': 4})}
  found = [qa_task.build(each, config.reduce, SCENES, context=14).passed_on[0]
           for each in qa_task.in_turns(config.model)]
  assert found == [16, 4, 1]


@pytest.mark.long
def test_a_router_trains_with_the_model():
  """By its own loss too; all its layers share one."""
  config = small(scenes_config)
  config.data.context = 14
  with config.unlocked():
    model, params = made(config, SCENES, language={
        'method': 'gamma_mod', 'layers': (0, 1), 'keep_ratio': 0.5})
  sharding.make_shardings(params, config.sharding, sharding.make_mesh({'data': 1},
                                                                      jax.devices()[:1]))
  loss = functools.partial(qa_task.loss, model, config.optimizer, teacher=None)
  (total, scalars), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
      params, batch_of(SCENES, 14), key=jax.random.key(0))
  others = (scalars['loss'] + config.optimizer.text_weight * scalars['text_loss']
            + config.optimizer.patch_weight * scalars['patch_loss'])
  np.testing.assert_allclose(total - others, scalars['route_00'] + scalars['route_01'], atol=1e-5)
  assert scalars['route_00'] > 0
  assert jnp.any(grads['lm']['stack']['reducer_gamma_mod']['router']['kernel'] != 0)


@pytest.mark.long
def test_the_loss_is_that_of_the_answers_alone(case):
  *_, info, _, params, run = case
  batch = batch_of(info, 14)
  logits, out = run(params, batch)
  found = np.asarray(qa_task.predictions(logits, out))
  wanted = 0.0
  for row in range(ROWS):
    for place in np.flatnonzero(batch['answer'][row]):
      wanted -= jax.nn.log_softmax(found[row, place])[batch['ids'][row, place]]
  loss = qa_task.losses(logits, out, batch)['loss']
  np.testing.assert_allclose(loss, wanted / batch['answer'].sum(), rtol=1e-5)
  # What stands in the answer or behind it does not change what predicts its first token.
  other = {**batch, 'ids': np.where(batch['answer'], 29, batch['ids'])}
  again = np.asarray(qa_task.predictions(*run(params, other)))
  for row in range(ROWS):
    first = np.flatnonzero(batch['answer'][row])[0]
    np.testing.assert_allclose(again[row, first], found[row, first], atol=1e-5)


@pytest.mark.long
def test_scores_count_whole_answers_by_kind(case):
  *_, info, _, params, run = case
  batch = batch_of(info, 14)
  logits, out = run(params, batch)
  # All tokens right in rows 0 and 1, one of two in row 2, none that counts in row 3.
  likeliest = np.array(qa_task.predictions(logits, out).argmax(axis=-1))
  ids = np.where(batch['answer'], likeliest, batch['ids'])
  ids[2, np.flatnonzero(batch['answer'][2])[1]] += 1
  batch = {**batch, 'mask': np.float32([1, 1, 1, 0])}
  fixed = {**batch, 'ids': ids}
  counts = qa_task.correct_and_total(logits, out, fixed, 3)
  assert counts.tolist() == [[1, 1], [1, 2], [0, 0]]
  found = qa_task.scores(np.asarray(counts), ('a', 'b', 'c'))
  assert found == {'accuracy': pytest.approx(2 / 3), 'accuracy_a': 1, 'accuracy_b': 0.5,
                   'accuracy_c': 0}


@pytest.mark.long
def test_logits_of_the_answers_alone_tell_the_same(case):
  *_, info, model, params, run = case
  batch = batch_of(info, 14)
  whole = run(params, batch)
  alone = jax.jit(functools.partial(qa_task.apply, model, places=3))(params, batch)
  assert alone[0].shape[:2] == (ROWS, 3)
  losses = [qa_task.losses(*each, batch) for each in (whole, alone)]
  np.testing.assert_allclose(losses[1]['loss'], losses[0]['loss'], rtol=1e-5)
  assert 'text_loss' not in losses[1]
  counts = [qa_task.correct_and_total(*each, batch, 3) for each in (whole, alone)]
  np.testing.assert_array_equal(*counts)


@pytest.mark.long
def test_patches_carry_the_label_of_their_cell():
  config = small(scenes_config)
  config.model.tower.patch = 8
  with config.unlocked():
    model, params = made(config, SCENES)
  batch = batch_of(SCENES, 12)
  _, out = jax.jit(lambda batch: qa_task.apply(model, params, batch))(batch)
  _, tokens = out['patches']
  labels = qa_task.patch_labels(batch['cells'], tokens).reshape(ROWS, 8, 8)
  np.testing.assert_array_equal(labels, batch['cells'].repeat(2, axis=1).repeat(2, axis=2))


@pytest.mark.parametrize(('reduce', 'message'), [
    ({'prompt': {'method': 'topk'}}, 'choose from vision, projector, language, cache'),
    ({'projector': {'method': 'topk', 'keep': 4}}, 'this set has none'),
])
def test_reductions_in_places_that_are_not_there(reduce, message):
  config = small(needle_config)
  with pytest.raises(ValueError, match=message):
    qa_task.build(config.model, reduce, NEEDLE, context=14)


@pytest.mark.long
def test_a_run_trains_scores_and_goes_on(tmp_path):
  command = [
      '-c',
      'import sys, dataclasses; from lib.data.datasets import stdlib_needle as s;'
      'B = s.StdlibNeedle; c = [dataclasses.replace(B.BUILDER_CONFIGS[0], train=24, test=6)];'
      'B.BUILDER_CONFIGS = c; B.builder_configs = {"64": c[0]};'
      'import train; from lib.runtime import cli; cli.run(train.main)',
      '--config=configs/stdlib_needle.py', f'--workdir={tmp_path / "run"}', '--compile_cache=',
      f'--config.data.data_dir={tmp_path}', '--config.data.batch_size=4', '--config.log_steps=1',
      '--config.optimizer.warmup_steps=1', '--config.model.lm.width=16',
      '--config.model.lm.depth=1', '--config.model.lm.mlp=16']
  outputs = []
  for steps in (2, 3):
    done = processes.run(*command, f'--config.total_steps={steps}')
    assert done.returncode == 0, done.stderr[-2000:]
    outputs.append(done.stdout)
  assert 'resumed at step 2 of 3' in outputs[1]
  last = json.loads(outputs[1].splitlines()[-1])
  assert last['step'] == 3
  assert 0 <= last['accuracy'] <= 1
  assert dataclasses.asdict(NEEDLE)['vocabulary'] == 258


@pytest.mark.long
def test_answers_are_learned_from_a_teacher_too(tmp_path):
  config = small(scenes_config)
  config.data.context = 14
  config.optimizer.distill.update(teacher=str(tmp_path), logit_weight=0.5)
  (tmp_path / 'config.json').write_text(config.to_json())
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  taught_by = qa_task.teacher_of(config, SCENES, mesh)
  with config.unlocked():
    config.model.compressor.update(name='tokenflex', args={'side': 2})
    model, params = made(config, SCENES)
  theirs = jax.jit(functools.partial(qa_task.init, taught_by, SCENES, 14))(jax.random.key(1))
  theirs = jax.tree.map(lambda leaf: 4 * leaf, theirs)  # Sure of what it says, so far from ours.
  # Of another structure than the model's own.
  shapes = qa_task.shapes_of(taught_by, SCENES, config, mesh)
  chex.assert_trees_all_equal_shapes_and_dtypes(shapes, theirs)
  assert 'projector' in theirs
  assert 'compressor' in params
  batch, key = batch_of(SCENES, 14), jax.random.key(2)
  found = []
  for places in (None, 2):
    run = jax.jit(functools.partial(qa_task.loss, model, config.optimizer, places=places,
                                    taught_by=taught_by))
    found.append(run(params, batch, key, theirs)[1]['distill_logits'])
  alone = jax.jit(functools.partial(qa_task.loss, model, config.optimizer))(
      params, batch, key, None)[1]
  assert 'distill_logits' not in alone
  # Slot by slot in numpy: an answer's token is predicted by what stands before it.
  predicted = jax.jit(lambda params, theirs: [
      qa_task.predictions(*qa_task.apply(each, own, batch, rngs=rngs)) for each, own, rngs in (
          (model, params, {'dropout': key}), (taught_by, theirs, None))])
  ours, wanted = (np.asarray(x, np.float64) for x in predicted(params, theirs))
  ours, wanted = (x - np.log(np.exp(x).sum(axis=2, keepdims=True)) for x in (ours, wanted))
  each = (np.exp(wanted) * (wanted - ours)).sum(axis=2)[batch['answer']]
  np.testing.assert_allclose(found, 0.5 * each.mean(), rtol=1e-5)
  # Nothing flows into the teacher.
  grads = jax.jit(jax.grad(lambda own: qa_task.loss(
      model, config.optimizer, params, batch, key, own, taught_by=taught_by)[0]))(theirs)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_a_teacher_of_something_else_ends_in_one_line(tmp_path):
  config = small(scenes_config)
  config.optimizer.distill.teacher = str(tmp_path)
  (tmp_path / 'config.json').write_text(small(needle_config).to_json())
  with pytest.raises(ValueError, match=r'distill\.teacher=.* did not learn what this run is to'):
    qa_task.teacher_of(config, SCENES, None)


HALF = {'method': 'llavolta', 'layers': (1,), 'token_kinds': 'visual', 'keep_ratio': 0.5}


def staged(*starts, total=8):
  config = small(scenes_config)
  config.total_steps = total
  reduces = ({'language': HALF | {'keep_ratio': 0.25}}, {'language': HALF}, {})
  with config.unlocked():
    config.stages = tuple({'start_step': start, 'reduce': reduce}
                          for start, reduce in zip(starts, reduces, strict=False))
  return config


def test_stages_train_under_reductions_of_their_own():
  config = staged(0, 3, 5)
  found = qa_task.stages(config, lambda reduce: qa_task.build(
      config.model, reduce, SCENES, context=14))
  assert [phase.start_step for phase in found] == [0, 3, 5]
  left = [[event.slots_out for event in model.lm.plan.events] if model.lm.plan else []
          for (model,) in (phase.model for phase in found)]
  assert left == [[14 + 4], [14 + 8], []]
  assert qa_task.stages(small(scenes_config), None) == ()


@pytest.mark.parametrize('starts', [(1, 3), (0, 3, 3), (0, 5, 3), (0, 8)])
def test_stages_that_cannot_follow_each_other(starts):
  with pytest.raises(ValueError, match=r'config\.stages start at .*: begin with 0'):
    qa_task.stages(staged(*starts), lambda reduce: None)


def test_stages_and_turns_exclude_each_other():
  config = staged(0, 3)
  with config.unlocked():
    config.model.compressor.turns = ({'side': 2},)
  with pytest.raises(ValueError, match='both say what a step trains'):
    qa_task.stages(config, lambda reduce: None)
