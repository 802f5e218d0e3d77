"""Trains a vision transformer, with or without token reduction.

  python -m train --config=configs/digits.py --workdir=runs/digits

Axes: B batch over all processes, A microbatches.
"""

import functools
import json
import math
import pathlib
import signal

import jax
import jax.numpy as jnp
import optax
from absl import flags, logging
from flax import struct
from ml_collections import config_flags

from lib import checkpoint, cli, cost, data, distill, launch, metrics, sharding
from models.build import build

CONFIG = config_flags.DEFINE_config_file('config', None, 'What to train.', lock_config=True)
WORKDIR = flags.DEFINE_string('workdir', None, 'Where checkpoints and logs go; resumes from it.')


@struct.dataclass
class State:
  """All that training changes, and all that a checkpoint holds beside the data iterator."""

  step: jax.Array
  params: dict
  opt_state: optax.OptState
  ema: dict


def main(argv):
  """Trains, or goes on training."""
  del argv
  config, workdir = CONFIG.value, pathlib.Path(WORKDIR.value)
  first = launch.start()
  workdir.mkdir(parents=True, exist_ok=True)

  # Devices, data, model.
  mesh = sharding.make_mesh(config.mesh)
  platform = mesh.devices.flat[0].platform
  info = data.info(config.data)
  iterator = data.train_iterator(
      config.data, seed=config.seed, process_index=jax.process_index(),
      process_count=jax.process_count())
  vit = build(config.model, config.reduce.vision, macs=cost.solver, mesh=mesh, platform=platform)
  check_fits(vit, info, config, mesh)
  if first:
    (workdir / 'config.json').write_text(config.to_json_best_effort(indent=2))
    print(cost.table(vit), flush=True)

  # State: shapes first, then placed where it will live.
  schedule = optax.warmup_cosine_decay_schedule(
      0.0, config.optimizer.peak_lr, config.optimizer.warmup_steps, config.total_steps)
  optimizer = optax.chain(
      optax.clip_by_global_norm(config.optimizer.clip_norm),
      optax.adamw(schedule, weight_decay=config.optimizer.weight_decay, mask=decayed))
  images = jnp.zeros((1, vit.image_size, vit.image_size, vit.channels))

  def init(key):
    # One image is too few to divide over a mesh, and shapes do not depend on it.
    params = vit.clone(mesh=None).init(key, images)['params']
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params), params)

  key = jax.random.key(config.seed)
  abstract = jax.eval_shape(init, key)
  places = sharding.place(abstract, config.sharding, mesh)
  template = jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
      abstract, places)

  # Resume: 1. the newest checkpoint that can be read, 2. its state, 3. its place in the data,
  # 4. else a fresh state.
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

  teacher = None
  if config.optimizer.distill.teacher:
    others = checkpoint.Checkpoints(pathlib.Path(config.optimizer.distill.teacher) / 'checkpoints')
    # The teacher is unreduced: it has the blocks, and no parameters of a learned method.
    plain = template.ema | {'stack': {'blocks': template.ema['stack']['blocks']}}
    teacher = others.read(others.best(), 'ema', plain)
    others.close()

  # The two compiled functions.
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  train_step = jax.jit(
      functools.partial(update, vit, optimizer, config.optimizer, schedule),
      in_shardings=(places, rows, whole, None),
      out_shardings=(places, whole), donate_argnums=0)
  count_right = jax.jit(functools.partial(count, vit), in_shardings=(places.ema, rows),
                        out_shardings=whole)

  # The loop.
  stop = launch.Stop(signal.SIGTERM, signal.SIGINT)
  writer = metrics.Writer(workdir, total_steps=config.total_steps, start=start, active=first)
  meter = cost.Meter(vit, batch_size=config.data.batch_size, device=mesh.devices.flat[0],
                     devices=mesh.size)
  accuracy = None
  for step in range(start + 1, config.total_steps + 1):
    batch = sharding.put(next(iterator), mesh)
    state, measured = train_step(state, batch, key, teacher)
    writer.advance(step)
    stopping = stop.agreed(step % config.log_steps == 0)
    last = step == config.total_steps or stopping
    if step % config.log_steps == 0 or last:
      measured = {name: float(value) for name, value in measured.items()}
      check_finite(measured, step, config, workdir)
      writer.write(step, measured | meter.lap(step, kept=measured['kept_tokens']))
    if (step % config.eval_steps == 0 or last) and not stopping:
      with meter.paused():
        accuracy = evaluate(count_right, state.ema, config.data, mesh)
      writer.write(step, {'accuracy': accuracy})
    if step % config.checkpoint_steps == 0 or last:
      with meter.paused():
        check_finite({'loss': float(measured['loss'])}, step, config, workdir)
        scores = None if accuracy is None else {'accuracy': accuracy}
        checkpoints.save(step, parts(state), iterator.get_state(), metrics=scores)
    if stopping:
      logging.warning('stopped by a signal at step %d; the same command goes on from there', step)
      break
  checkpoints.close()
  writer.close()
  if first and accuracy is not None:
    print(json.dumps({'step': int(state.step), 'accuracy': accuracy,
                      'train_seconds': round(meter.seconds, 1)}))


def update(vit, optimizer, settings, schedule, state, batch, key, teacher):
  """One step: State, batch {image: [B, S, S, C], label: int[B]} -> State, scalars.

  `teacher` holds the parameters of the unreduced model to hold on to, or is None.
  """
  key = jax.random.fold_in(key, state.step)

  def loss_of(params, part, key):
    logits, out = vit.apply({'params': params}, part['image'], rngs={'dropout': key})
    wanted = optax.smooth_labels(jax.nn.one_hot(part['label'], vit.num_classes),
                                 settings.label_smoothing)
    loss = optax.softmax_cross_entropy(logits, wanted).mean()
    extra = {name: value.mean() for name, value in out['losses'].items()}
    right = (logits.argmax(-1) == part['label']).mean()
    # While it learns, a soft decision keeps a dropped token's slot, at size 0.
    kept = (out['tokens'].real & (out['tokens'].sizes > 0)).sum(axis=1).mean()
    scalars = {'loss': loss, 'train_accuracy': right, 'kept_tokens': kept, **extra}
    # A method's losses are its mean over cuts; the teacher's are one each.
    total = loss + sum(extra.values()) / max(1, len(vit.plan.cuts) if vit.plan else 0)
    if teacher is not None:
      whole = vit.clone(plan=None)
      taught, its = whole.apply({'params': teacher}, part['image'])
      held = distill.distill(logits, out['tokens'], taught, its['tokens'],
                             logit_weight=settings.distill.logit_weight,
                             token_weight=settings.distill.token_weight)
      held = {name: value.mean() for name, value in held.items()}
      scalars, total = scalars | held, total + sum(held.values())
    return total, scalars

  def gradient(carry, item):
    part, index = item
    grads, scalars = jax.grad(loss_of, has_aux=True)(
        state.params, part, jax.random.fold_in(key, index))
    return jax.tree.map(jnp.add, carry, grads), scalars

  pieces = settings.accumulate
  # Microbatches are taken across, not along, so that each stays divided over all devices.
  split = jax.tree.map(
      lambda rows: rows.reshape(-1, pieces, *rows.shape[1:]).swapaxes(0, 1), batch)
  if pieces == 1:
    grads, scalars = gradient(jax.tree.map(jnp.zeros_like, state.params),
                              (batch, jnp.zeros((), jnp.int32)))
  else:
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    grads, scalars = jax.lax.scan(gradient, zeros, (split, jnp.arange(pieces)))
    grads = jax.tree.map(lambda g: g / pieces, grads)
    scalars = jax.tree.map(lambda s: s.mean(axis=0), scalars)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = optax.incremental_update(params, state.ema, 1 - settings.ema_decay)
  scalars |= {'grad_norm': optax.tree.norm(grads), 'learning_rate': schedule(state.step)}
  return State(state.step + 1, params, opt_state, ema), scalars


def count(vit, params, batch):
  """How many of a batch are right, and how many there are; padding has mask 0."""
  logits, _ = vit.apply({'params': params}, batch['image'])
  right = (logits.argmax(-1) == batch['label']) * batch['mask']
  return right.sum(), batch['mask'].sum()


def evaluate(count_right, params, config, mesh):
  """Accuracy on the test split."""
  batches = data.eval_batches(config, process_index=jax.process_index(),
                              process_count=jax.process_count())
  counts = [count_right(params, sharding.put(batch, mesh)) for batch in batches]
  right, total = (float(sum(column)) for column in zip(*counts, strict=True))
  return right / total


def parts(state):
  """What a checkpoint holds: evaluation reads the averaged parameters alone."""
  return {'state': state.replace(ema=None), 'ema': state.ema}


def decayed(params):
  """Weight decay is for matrices: not for biases, norms, or single tokens."""
  plain = ('bias', 'scale', 'cls', 'dist', 'pos', 'registers')
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in plain, params)


def check_fits(vit, info, config, mesh):
  """Raises where model, data and mesh contradict each other."""
  if vit.num_classes != info.num_classes:
    raise ValueError(f'model.num_classes={vit.num_classes}, but {config.data.name} has '
                     f'{info.num_classes} classes: set it to that')
  batch, pieces = config.data.batch_size, config.optimizer.accumulate
  devices = mesh.shape['data'] * mesh.shape['fsdp']
  if batch % (devices * pieces):
    raise ValueError(f'data.batch_size={batch} cannot be divided over {devices} devices in '
                     f'{pieces} microbatches: make it a multiple of {devices * pieces}')


def check_finite(measured, step, config, workdir):
  """Raises before a bad state can be saved or reported."""
  bad = sorted(name for name, value in measured.items() if not math.isfinite(value))
  if bad:
    raise FloatingPointError(
        f'{", ".join(bad)} is not finite in steps {step - config.log_steps + 1} to {step}: the '
        f'last good checkpoint is in {workdir / "checkpoints"}; lower optimizer.peak_lr or '
        'clip_norm')


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
