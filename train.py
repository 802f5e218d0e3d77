"""Trains a model, with or without token reduction: on classes, pixels, or questions and answers.

  python -m train --config=configs/digits.py --workdir=runs/digits
  python -m train --config=configs/digit_segments.py --workdir=runs/segments
  python -m train --config=configs/digit_scenes.py --workdir=runs/scenes

The same command goes on from its workdir (what may differ then: lib/runtime/run_identity.py).
SIGTERM, SIGINT (Ctrl-C) and SIGHUP let it finish its step and save. It exits with 0 when training
is through or was stopped so, whether or not anyone still reads its output; with 2 where it refuses,
which changes no file. Before training has begun a signal ends it at once.

What a task learns from is lib/tasks/image.py's or lib/tasks/qa.py's. Axis: A microbatches.
"""

import dataclasses
import functools
import json
import math
import pathlib
import signal
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from absl import flags, logging
from flax import struct

from lib.runtime import (
    checkpoint,
    cli,
    launch,
    lock,
    memory,
    metrics,
    run_identity,
    screen,
    sharding,
)
from lib.runtime.meter import Meter
from lib.tasks import pretrained, registry
from lib.tasks.base import Task, sum_counts
from lib.tasks.settings import TRAINING, check_config, check_sources
from models import checkpoints as weights
from models.storage import all_to_storage, training_storage

CHANGE = flags.DEFINE_list(
    'change', [], 'Keys of the config, comma-separated, that a run which goes on changes on '
    'purpose: optimizer.peak_lr, total_steps. config.json records since which step.')


@struct.dataclass
class TrainState:
  """Holds all that training changes; a checkpoint adds only the data iterator.

  Parameters that are frozen (lib/tasks/pretrained.py) are none of it.
  """

  step: jax.Array
  params: dict
  opt_state: optax.OptState
  ema: dict


@dataclasses.dataclass(frozen=True)
class Setup:
  """Holds the parts of training that do not depend on the seed.

  Attributes:
    task: the model, and what it is trained for.
    optimizer: of optax.
    init: key -> TrainState.
    shardings: of a TrainState's arrays on the mesh, as `init` makes it and files hold it.
    lay_out: such a TrainState -> as the steps take it: a layer may have a tree of its own.
    stack: the other way round.
    train_steps: of each phase, (TrainState, batch, key, teacher, frozen parameters) -> (TrainState,
      scalars), compiled when first called.
    count_batch: (parameters, batch, frozen parameters) -> what the batch adds to the scores,
      compiled likewise.
  """

  task: Task
  optimizer: optax.GradientTransformation
  init: Callable[[jax.Array], TrainState]
  shardings: TrainState
  lay_out: Callable[[TrainState], TrainState]
  stack: Callable[[TrainState], TrainState]
  train_steps: list[Callable[..., tuple[TrainState, dict]]]
  count_batch: Callable[..., jax.Array]

  def train_step(self, done: int) -> Callable[..., tuple[TrainState, dict]]:
    """The training step after so many are done."""
    return self.train_steps[self.task.phase(done)]


def main(argv):
  """Trains, or goes on training."""
  del argv
  screen.outlive()
  # Until there is something to save. Python's own exception can get lost in a library's callback.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  with launch.start() as first:
    run(launch.CONFIG.value, pathlib.Path(launch.WORKDIR.value), first=first,
        on_purpose=CHANGE.value)


def make_setup(config, mesh):
  """Model, optimizer and compiled functions of a config, on a mesh."""
  task = registry.make_task(config, mesh)
  schedule = optax.warmup_cosine_decay_schedule(
      0.0, config.optimizer.peak_lr, config.optimizer.warmup_steps, config.total_steps)
  optimizer = optax.chain(
      optax.clip_by_global_norm(config.optimizer.clip_norm),
      optax.adamw(schedule, weight_decay=config.optimizer.weight_decay, mask=decayed))

  frozen = pretrained.names(config)

  def init(key):
    params, _ = pretrained.split(task.init(key), frozen)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), params)

  shapes = jax.eval_shape(init, jax.random.key(0))
  memory.check_state(shapes, mesh)
  shardings = sharding.make_shardings(shapes, config.sharding, mesh)
  storage = training_storage(mesh.devices.flat[0].platform)
  laid_out = sharding.make_shardings(
      jax.eval_shape(functools.partial(all_to_storage, storage=storage), shapes),
      config.sharding, mesh)
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  train_steps = [
      jax.jit(
          functools.partial(update, task.loss(phase.model), optimizer, config.optimizer,
                            schedule),
          in_shardings=(laid_out, rows, whole, None, None), out_shardings=(laid_out, whole),
          donate_argnums=0)
      for phase in task.phases]

  def count(params, batch, fixed):
    return task.count(pretrained.join(params, fixed), batch)

  count_batch = jax.jit(count, in_shardings=(laid_out.ema, rows, None), out_shardings=whole)

  def move(to, placed):
    if storage == 'stacked':
      return lambda state: state  # Compiled, it would be copied.
    return jax.jit(functools.partial(all_to_storage, storage=to), out_shardings=placed)

  return Setup(task, optimizer, init, shardings, move(storage, laid_out),
               move('stacked', shardings), train_steps, count_batch)


def run(config, workdir, *, first, on_purpose=()):
  """Trains as a config says, or goes on where the workdir stands; True once it is through.

  Args:
    config: as the files in configs/ make it.
    workdir: pathlib.Path, where checkpoints and logs go.
    first: whether this process is the one that writes logs.
    on_purpose: keys of the config that a run which goes on may change.

  Raises:
    ValueError, OSError: settings, data or a workdir with which nothing can be trained; no file is
      changed.
    FloatingPointError: a loss that is not finite.
  """
  with lock.held(workdir, first=first):
    return train(config, workdir, first=first, on_purpose=on_purpose)


def train(config, workdir, *, first, on_purpose):
  """Trains in a workdir that is locked, as `run`."""
  # Devices, task, model, data; nothing is compiled and nothing written before all of it fits.
  check_config(config, *TRAINING)
  check_sources(config)
  changes = run_identity.compare(config, workdir, on_purpose=on_purpose)
  mesh = sharding.make_mesh(config.mesh)
  check_batch(config, mesh)
  setup = make_setup(config, mesh)
  task = setup.task
  iterator = task.train_iterator(
      config.data, seed=config.seed, process_index=jax.process_index(),
      process_count=jax.process_count())

  # What is frozen comes from its files, also where a run goes on.
  frozen = pretrained.read_frozen(task.init, task.pretrained, config, mesh)

  # State: shapes first, then placed where it will live.
  key = jax.random.key(config.seed)
  template = sharding.shapes(jax.eval_shape(setup.init, key), setup.shardings)
  teacher = None
  if 'distill' in config.optimizer and config.optimizer.distill.teacher:
    # It has no parameters of a learned method, or is another model altogether.
    teacher = parameters_of('optimizer.distill.teacher', config.optimizer.distill.teacher,
                            task.unreduced(template.ema), task.score)

  # Resume: 1. the newest checkpoint that can be read, 2. its state, 3. its place in the data,
  # 4. else a fresh state.
  folder = workdir / 'checkpoints'
  # Made before the folder is, since what it starts from may not be there.
  state = None if folder.exists() else fresh_state(config, setup, template, key)
  checkpoints = checkpoint.Checkpoints(folder, metric=task.score)
  restored = checkpoints.restore(parts(template))
  if restored:
    start, saved, position = restored
    state = saved['state'].replace(ema=saved['ema'])
    iterator.set_state(position)
  else:
    start, state = 0, state or fresh_state(config, setup, template, key)
  state = setup.lay_out(state)
  if first:
    print(task.summary, end='', flush=True)
  if first and restored:
    print(f'resumed at step {start} of {config.total_steps}', flush=True)

  # The loop. A run that is through stays as it is on disk.
  writes = first and start < config.total_steps
  if writes:
    run_identity.record(config, workdir, changes, step=start)
    for change in changes:
      print(f'from step {start} on: {change}', flush=True)
  stop = launch.Stop()
  writer = metrics.Writer(workdir, total_steps=config.total_steps, start=start, active=writes)
  macs = [task.macs(phase.model) for phase in task.phases]
  meter = Meter(task.slots, batch_size=config.data.batch_size,
                device=mesh.devices.flat[0], devices=mesh.size)
  scores, stopping = {}, False
  if start >= config.total_steps:
    if first:
      print(f'nothing left to train: the run is at step {start}, and total_steps is '
            f'{config.total_steps}', flush=True)
    scores = evaluate(setup, state.ema, frozen, config.data, mesh)
  for step in range(start + 1, config.total_steps + 1):
    batch = sharding.put(next(iterator), mesh)
    phase = task.phase(step - 1)
    state, measured = setup.train_steps[phase](state, batch, key, teacher, frozen)
    writer.advance(step)
    stopping = stop.should_stop(step)
    last = step == config.total_steps or stopping
    if step % config.log_steps == 0 or last:
      measured = {name: float(value) for name, value in measured.items()}
      check_finite(measured, step, config, workdir)
      writer.write(step, measured | meter.lap(step, kept=measured['kept_tokens'],
                                              macs=macs[phase]))
    scored = (step % config.eval_steps == 0 or last) and not stopping
    if scored:
      with meter.paused():
        scores = evaluate(setup, state.ema, frozen, config.data, mesh)
      writer.write(step, scores)
    if step % config.checkpoint_steps == 0 or last:
      with meter.paused():
        check_finite({'loss': float(measured['loss'])}, step, config, workdir)
        best = {task.score: scores[task.score]} if scored else None
        checkpoints.save(step, parts(setup.stack(state)), iterator.get_state(), metrics=best)
    if stopping:
      logging.warning('stopped by a signal at step %d; the same command goes on from there', step)
      break
  checkpoints.close()
  writer.close()
  stop.close()
  iterator.close()
  if first and scores:
    print(json.dumps({'step': int(state.step), **scores,
                      'train_seconds': round(meter.seconds, 1)}))
  return not stopping


def fresh_state(config, setup, template, key):
  """Makes a TrainState at step 0, of new parameters, another run's or pretrained ones.

  Args:
    config: as of `run`.
    setup: its Setup.
    template: shapes of a TrainState, placed.
    key: of initial parameters.
  """
  begun = loaded = None
  if config.get('start'):
    begun = parameters_of('start', config.start, template.ema, setup.task.score)
  else:
    loaded = pretrained.trained_part(setup.task.pretrained(), config)
  state = jax.jit(setup.init, out_shardings=setup.shardings)(key)
  # Two copies in both cases: the parameters are donated in every step.
  if begun:
    state = state.replace(params=begun, ema=jax.tree.map(jnp.copy, begun))
  elif loaded:
    state = state.replace(params=weights.merge_params(state.params, loaded),
                          ema=weights.merge_params(state.ema, loaded))
  return state


def update(loss, optimizer, settings, schedule, state, batch, key, teacher, frozen=None):
  """Takes one step: TrainState, batch -> TrainState, scalars.

  Args:
    loss: (parameters, batch, key, teacher) -> (what to lower, {name: scalar}).
    optimizer, schedule: of optax.
    settings: `config.optimizer`.
    state, batch, key, teacher, frozen: arrays; the last two may be None.
  """
  key, rows = jax.random.fold_in(key, state.step), len(jax.tree.leaves(batch)[0])

  def trained_loss(params, *rest):
    return loss(pretrained.join(params, frozen), *rest)

  def gradient(part, row):
    return jax.grad(trained_loss, has_aux=True)(
        state.params, part, jax.random.fold_in(key, row[0]), teacher)

  if settings.accumulate > 1:
    # It takes microbatches across, not along, so that each stays divided over all devices.
    gradient = optax.microbatching.microbatch(
        gradient, (0, 1), rows // settings.accumulate, optax.microbatching.AccumulationType.MEAN)
  grads, scalars = gradient(batch, jnp.arange(rows))
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = optax.incremental_update(params, state.ema, 1 - settings.ema_decay)
  scalars |= {'grad_norm': optax.tree.norm(grads), 'learning_rate': schedule(state.step)}
  return TrainState(state.step + 1, params, opt_state, ema), scalars


def evaluate(setup, params, frozen, config, mesh):
  """The scores on the test split."""
  batches = setup.task.eval_batches(config, process_index=jax.process_index(),
                                    process_count=jax.process_count())
  return setup.task.scores(sum_counts(
      [setup.count_batch(params, sharding.put(batch, mesh), frozen) for batch in batches]))


def parameters_of(key, workdir, template, score):
  """The averaged parameters of another run's best checkpoint, which the config names by `key`."""
  best = checkpoint.best(workdir, template, metric=score)
  if best is None:
    raise FileNotFoundError(f'{key}={workdir} has no checkpoint: name the workdir of a run that '
                            'has one')
  return best[1]


def parts(state):
  """Returns the parts of a checkpoint; evaluation reads the averaged parameters alone."""
  return {'state': state.replace(ema=None), 'ema': state.ema}


def decayed(params):
  """Returns the weight decay mask: True for matrices, not for biases, norms or single tokens."""
  plain = ('bias', 'scale', 'cls', 'dist', 'pos', 'registers', 'probe', 'ls1', 'ls2')
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in plain, params)


def check_batch(config, mesh):
  """Raises where a batch cannot be divided over the mesh."""
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
