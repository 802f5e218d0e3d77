"""Trains a vision transformer, with or without token reduction.

  python -m train --config=configs/digits.py --workdir=runs/digits
  python -m train --config=configs/digit_segments.py --workdir=runs/segments

Axes: B batch over all processes, A microbatches.
"""

import dataclasses
import functools
import json
import math
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags, logging
from flax import struct

from lib import anneal, checkpoint, cli, cost, data, distill, launch, metrics, sharding, tasks
from models import weights
from models.build import build, pretrained


@struct.dataclass
class State:
  """All that training changes, and all that a checkpoint holds beside the data iterator."""

  step: jax.Array
  params: dict
  opt_state: optax.OptState
  ema: dict


@dataclasses.dataclass(frozen=True)
class Setup:
  """All that training needs and that does not depend on the seed.

  Attributes:
    vit: the model under its plan, as it is evaluated.
    task: what it is trained for.
    phases: what trains when (lib/anneal.py).
    optimizer: of optax.
    init: key -> State.
    places: of a State's arrays on the mesh.
    train_steps: first step of each phase -> (State, batch, key, teacher) -> (State, scalars),
      compiled when first called.
    count_batch: (parameters, batch) -> what the batch adds to the task's score, compiled likewise.
  """

  vit: Any
  task: tasks.Task
  phases: tuple[anneal.Phase, ...]
  optimizer: optax.GradientTransformation
  init: Callable[[jax.Array], State]
  places: State
  train_steps: dict[int, Callable[..., tuple[State, dict]]]
  count_batch: Callable[..., jax.Array]

  def train_step(self, done: int) -> Callable[..., tuple[State, dict]]:
    """The training step after so many are done."""
    return self.train_steps[anneal.at(self.phases, done).start_step]


def main(argv):
  """Trains, or goes on training."""
  del argv
  run(launch.CONFIG.value, pathlib.Path(launch.WORKDIR.value), first=launch.start())


def setup(config, mesh):
  """Model, optimizer and compiled functions of a config, on a mesh."""
  task = tasks.of(config)
  vit = build(config.model, config.reduce.vision, macs=cost.solver, mesh=mesh,
              platform=mesh.devices.flat[0].platform, task=config.get('task'))
  phases = anneal.phases(vit, config.get('anneal'))
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

  places = sharding.place(jax.eval_shape(init, jax.random.key(0)), config.sharding, mesh)
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  train_steps = {
      phase.start_step: jax.jit(
          functools.partial(update, phase.vit, optimizer, config.optimizer, schedule),
          in_shardings=(places, rows, whole, None), out_shardings=(places, whole),
          donate_argnums=0)
      for phase in phases}
  count_batch = jax.jit(functools.partial(count, vit, task), in_shardings=(places.ema, rows),
                        out_shardings=whole)
  return Setup(vit, task, phases, optimizer, init, places, train_steps, count_batch)


def run(config, workdir, *, first):
  """Trains as a config says, or goes on where the workdir stands; True once it is through.

  Args:
    config: as the files in configs/ make it.
    workdir: pathlib.Path, where checkpoints and logs go.
    first: whether this process is the one that writes logs.
  """
  workdir.mkdir(parents=True, exist_ok=True)

  # Devices, data, task, model.
  mesh = sharding.make_mesh(config.mesh)
  info = data.info(config.data)
  iterator = data.train_iterator(
      config.data, seed=config.seed, process_index=jax.process_index(),
      process_count=jax.process_count())
  made = setup(config, mesh)
  vit, task = made.vit, made.task
  check_fits(vit, info, config, mesh)
  if first:
    (workdir / 'config.json').write_text(config.to_json_best_effort(indent=2))
    print(cost.table(vit), flush=True)
    print(anneal.describe(made.phases), end='', flush=True)

  # State: shapes first, then placed where it will live.
  key = jax.random.key(config.seed)
  template = sharding.shapes(jax.eval_shape(made.init, key), made.places)

  # Resume: 1. the newest checkpoint that can be read, 2. its state, 3. its place in the data,
  # 4. else a fresh state, 5. with pretrained parameters where the config names some.
  checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints', metric=task.score)
  found = checkpoints.restore(parts(template))
  if found:
    start, saved, position = found
    state = saved['state'].replace(ema=saved['ema'])
    iterator.set_state(position)
    if first:
      print(f'resumed at step {start} of {config.total_steps}', flush=True)
  else:
    start, state = 0, jax.jit(made.init, out_shardings=made.places)(key)
    loaded = pretrained(config.model, vit)
    if loaded:
      # Made twice: one of them is donated in every step.
      state = state.replace(params=weights.overlay(state.params, loaded),
                            ema=weights.overlay(state.ema, loaded))

  teacher = None
  if config.optimizer.distill.teacher:
    others = checkpoint.Checkpoints(pathlib.Path(config.optimizer.distill.teacher) / 'checkpoints',
                                    metric=task.score)
    # The teacher is unreduced: it has the blocks, and no parameters of a learned method.
    plain = template.ema | {'stack': {'blocks': template.ema['stack']['blocks']}}
    teacher = others.read(others.best(), 'ema', plain)
    others.close()

  # The loop.
  stop = launch.Stop(signal.SIGTERM, signal.SIGINT)
  writer = metrics.Writer(workdir, total_steps=config.total_steps, start=start, active=first)
  meter = cost.Meter(vit, batch_size=config.data.batch_size, device=mesh.devices.flat[0],
                     devices=mesh.size)
  score, stopping = None, False
  for step in range(start + 1, config.total_steps + 1):
    batch = sharding.put(next(iterator), mesh)
    meter.counts(anneal.at(made.phases, step - 1).vit)
    state, measured = made.train_step(step - 1)(state, batch, key, teacher)
    writer.advance(step)
    stopping = stop.agreed(step % config.log_steps == 0)
    last = step == config.total_steps or stopping
    if step % config.log_steps == 0 or last:
      measured = {name: float(value) for name, value in measured.items()}
      check_finite(measured, step, config, workdir)
      writer.write(step, measured | meter.lap(step, kept=measured['kept_tokens']))
    if (step % config.eval_steps == 0 or last) and not stopping:
      with meter.paused():
        score = evaluate(made.count_batch, task, state.ema, config.data, mesh)
      writer.write(step, {task.score: score})
    if step % config.checkpoint_steps == 0 or last:
      with meter.paused():
        check_finite({'loss': float(measured['loss'])}, step, config, workdir)
        scores = None if score is None else {task.score: score}
        checkpoints.save(step, parts(state), iterator.get_state(), metrics=scores)
    if stopping:
      logging.warning('stopped by a signal at step %d; the same command goes on from there', step)
      break
  checkpoints.close()
  writer.close()
  stop.close()
  iterator.close()
  if first and score is not None:
    print(json.dumps({'step': int(state.step), task.score: score,
                      'train_seconds': round(meter.seconds, 1)}))
  return not stopping


def update(vit, optimizer, settings, schedule, state, batch, key, teacher):
  """One step: State, batch {image: [B, S, S, C], label: int[B] or [B, S, S]} -> State, scalars.

  `teacher` holds the parameters of the unreduced model to hold on to, or is None.
  """
  key = jax.random.fold_in(key, state.step)
  gentler = anneal.levels(vit, settings.get('consistency'))

  def loss_of(params, part, key):
    logits, out = vit.apply({'params': params}, part['image'], rngs={'dropout': key})
    loss = tasks.cross_entropy(logits, part['label'], label_smoothing=settings.label_smoothing)
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
    if gentler:
      held = at_another_level(gentler, settings, params, part, key, out['pre_logits'])
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


def at_another_level(gentler, settings, params, part, key, features):
  """The losses of the same images under a plan that removes less, drawn anew in every step.

  Token reduction consistency of MCTF (Lee et al., 2024), Sec. 3.4, arXiv:2403.10030: that plan
  learns the labels too, and the features of the plan proper are drawn to its own.

  Args:
    gentler: the models to draw from (`anneal.levels`).
    settings: `config.optimizer`.
    params: of all of them.
    part: the batch.
    key: of this step.
    features: float32[B, D], what the plan proper classifies by.

  Returns:
    'gentler_loss' and 'consistency', scalars that add to the loss.
  """

  def branch(model):
    def apply(params, images):
      logits, out = model.apply({'params': params}, images, rngs={'dropout': key})
      return logits, out['pre_logits']
    return apply

  which = jax.random.randint(jax.random.fold_in(key, len(gentler)), (), 0, len(gentler))
  logits, whole = jax.lax.switch(which, [branch(model) for model in gentler], params,
                                 part['image'])
  apart = distill.consistency_loss(features, whole).mean()
  return {'gentler_loss': tasks.cross_entropy(logits, part['label'],
                                              label_smoothing=settings.label_smoothing),
          'consistency': settings.consistency.weight * apart}


def count(vit, task, params, batch):
  """What a batch adds to the task's score; padding has mask 0."""
  logits, _ = vit.apply({'params': params}, batch['image'])
  return task.counts(logits, batch['label'], batch['mask'])


def evaluate(count_batch, task, params, config, mesh):
  """The task's score on the test split."""
  batches = data.eval_batches(config, process_index=jax.process_index(),
                              process_count=jax.process_count())
  return task.total(tasks.add_up(
      [count_batch(params, sharding.put(batch, mesh)) for batch in batches]))


def parts(state):
  """What a checkpoint holds: evaluation reads the averaged parameters alone."""
  return {'state': state.replace(ema=None), 'ema': state.ema}


def decayed(params):
  """Weight decay is for matrices: not for biases, norms, or single tokens."""
  plain = ('bias', 'scale', 'cls', 'dist', 'pos', 'registers', 'probe', 'ls1', 'ls2')
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in plain, params)


def check_fits(vit, info, config, mesh):
  """Raises where model, data and mesh contradict each other."""
  if vit.classes != info.num_classes:
    raise ValueError(f'model.num_classes (task.pixel_classes) is {vit.classes}, but '
                     f'{config.data.name} has {info.num_classes} classes: set it to that')
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
