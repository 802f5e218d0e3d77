"""Trains a language model, or one that sees, to answer questions, with or without token reduction.

  python -m train_answers --config=configs/digit_scenes.py --workdir=runs/scenes
  python -m train_answers --config=configs/stdlib_needle.py --workdir=runs/needle

The loss is that of the answers' tokens alone. As train.py, whose state, checkpoints and checks it
shares. Axes: B batch over all processes.
"""

import functools
import json
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging

from lib import answers, checkpoint, cli, launch, metrics, questions, sharding, tasks
from train import State, check_finite, decayed, parts


def main(argv):
  """Trains, or goes on training."""
  del argv
  config, workdir = launch.CONFIG.value, pathlib.Path(launch.WORKDIR.value)
  first = launch.start()
  workdir.mkdir(parents=True, exist_ok=True)

  # Devices, data, model.
  mesh = sharding.make_mesh(config.mesh)
  info = questions.info(config.data)
  iterator = questions.train_iterator(
      config.data, seed=config.seed, process_index=jax.process_index(),
      process_count=jax.process_count())
  model = answers.build(config.model, config.reduce, info, context=config.data.context, mesh=mesh,
                        platform=mesh.devices.flat[0].platform)
  if first:
    (workdir / 'config.json').write_text(config.to_json_best_effort(indent=2))

  # State: shapes first, then placed where it will live.
  schedule = optax.warmup_cosine_decay_schedule(
      0.0, config.optimizer.peak_lr, config.optimizer.warmup_steps, config.total_steps)
  optimizer = optax.chain(
      optax.clip_by_global_norm(config.optimizer.clip_norm),
      optax.adamw(schedule, weight_decay=config.optimizer.weight_decay, mask=decayed))

  def init(key):
    params = initial(model, info, config.data.context, key)
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params), params)

  key = jax.random.key(config.seed)
  abstract = jax.eval_shape(init, key)
  places = sharding.place(abstract, config.sharding, mesh)
  template = sharding.shapes(abstract, places)

  # Resume.
  checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints')
  found = checkpoints.restore(parts(template))
  if found:
    start, saved, position = found
    state = saved['state'].replace(ema=saved['ema'])
    iterator.set_state(position)
    if first:
      print(f'resumed at step {start} of {config.total_steps}', flush=True)
  else:
    start, state = 0, jax.jit(init, out_shardings=places)(key)
  if first:
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f'{size:,} parameters, {info.num_train:,} questions', flush=True)

  # The two compiled functions.
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  train_step = jax.jit(
      functools.partial(update, model, optimizer, config.optimizer, schedule),
      in_shardings=(places, rows, whole), out_shardings=(places, whole), donate_argnums=0)
  kinds = info.kinds or ('all',)
  count_batch = jax.jit(functools.partial(count, model, len(kinds)),
                        in_shardings=(places.ema, rows), out_shardings=whole)

  # The loop.
  stop = launch.Stop(signal.SIGTERM, signal.SIGINT)
  writer = metrics.Writer(workdir, total_steps=config.total_steps, start=start, active=first)
  score = None
  for step in range(start + 1, config.total_steps + 1):
    state, measured = train_step(state, sharding.put(next(iterator), mesh), key)
    writer.advance(step)
    stopping = stop.agreed(step % config.log_steps == 0)
    last = step == config.total_steps or stopping
    if step % config.log_steps == 0 or last:
      measured = {name: float(value) for name, value in measured.items()}
      check_finite(measured, step, config, workdir)
      writer.write(step, measured)
    if (step % config.eval_steps == 0 or last) and not stopping:
      score = evaluate(count_batch, state.ema, config.data, kinds, mesh)
      writer.write(step, score)
    if step % config.checkpoint_steps == 0 or last:
      check_finite({'loss': float(measured['loss'])}, step, config, workdir)
      checkpoints.save(step, parts(state), iterator.get_state(),
                       metrics=score and {'accuracy': score['accuracy']})
    if stopping:
      logging.warning('stopped by a signal at step %d; the same command goes on from there', step)
      break
  checkpoints.close()
  writer.close()
  if first and score is not None:
    print(json.dumps({'step': int(state.step), **score}))


def initial(model, info, context, key):
  """Fresh parameters; shapes do not depend on the batch."""
  ids = jnp.full((1, context), info.pad, jnp.int32)
  batch = {'ids': ids, 'valid': jnp.ones(ids.shape, bool)}
  if info.image_shape:
    batch['image'] = jnp.zeros((1, *info.image_shape))

  # One row is too few to divide over a mesh.
  if hasattr(model, 'tower'):
    alone = model.clone(tower=model.tower.clone(mesh=None), lm=model.lm.clone(mesh=None))
  else:
    alone = model.clone(mesh=None)
  return alone.init(key, *inputs(model, batch))['params']


def inputs(model, batch):
  """A batch as the model's arguments."""
  if not hasattr(model, 'tower'):
    return batch['ids'], batch['valid']
  return batch['ids'], batch['valid'], answers.Images(batch['image'][:, None])


def update(model, optimizer, settings, schedule, state, batch, key):
  """One step: State, batch of lib/questions.py -> State, scalars."""
  key = jax.random.fold_in(key, state.step)

  def loss_of(params):
    logits, out = answers.apply(model, params, batch, rngs={'dropout': key})
    found = answers.losses(logits, out, batch)
    total = found['loss'] + settings.patch_weight * found.get('patch_loss', 0.0)
    return total, found

  grads, scalars = jax.grad(loss_of, has_aux=True)(state.params)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = optax.incremental_update(params, state.ema, 1 - settings.ema_decay)
  scalars |= {'grad_norm': optax.tree.norm(grads), 'learning_rate': schedule(state.step)}
  return State(state.step + 1, params, opt_state, ema), scalars


def count(model, kinds, params, batch):
  """Answers of each kind that are right, and all there are."""
  logits, out = answers.apply(model, params, batch)
  return answers.right_and_all(logits, out, batch, kinds)


def evaluate(count_batch, params, config, kinds, mesh):
  """Scores on the test split."""
  batches = questions.eval_batches(config, process_index=jax.process_index(),
                                   process_count=jax.process_count())
  counts = tasks.add_up([count_batch(params, sharding.put(batch, mesh)) for batch in batches])
  return answers.scores(np.asarray(counts), kinds)


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
