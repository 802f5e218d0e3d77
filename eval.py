"""Loads a trained model once, and sweeps methods and budgets over it.

  python -m eval --config=configs/digits_sweep.py --workdir=runs/digits
  python -m eval --config=configs/digit_segments_sweep.py --workdir=runs/segments

Writes sweep.jsonl (a row a method and budget; rows that are there are not made again), a table,
plots of the score against cost and latency, and pictures of what was kept, merged and dropped.

Axes: B batch, N slots.
"""

import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import struct
from tqdm import tqdm

from lib import (
    checkpoint,
    cli,
    cost,
    data,
    launch,
    overlay,
    report,
    sharding,
    tasks,
    timing,
)
from models import weights
from models.build import build, pretrained
from models.compressors import COMPRESSORS
from models.plan import methods
from models.stack import best_form, unstack


@struct.dataclass
class Candidate:
  """A method under a budget, compiled.

  Attributes:
    vit: the model with its plan. Static.
    params: in the form that runs fastest here.
    run: (params, images) -> (logits, cuts without features).
    compile_s: seconds that compiling took. Static.
  """

  vit: object = struct.field(pytree_node=False)
  params: dict
  run: object = struct.field(pytree_node=False)
  compile_s: float = struct.field(pytree_node=False)


def main(argv):
  """Loads, sweeps, shows."""
  del argv
  config, workdir = launch.CONFIG.value, pathlib.Path(launch.WORKDIR.value)
  first = launch.start()
  mesh, task = sharding.make_mesh(config.mesh), tasks.of(config)
  step, trained = load(config, workdir, mesh)
  batches = [(batch, sharding.put(batch, mesh)) for batch in data.eval_batches(
      config.data, process_index=jax.process_index(), process_count=jax.process_count())]

  path = workdir / 'sweep.jsonl'
  before = {name(row): row for row in report.read_jsonl(path)} if path.exists() else {}
  how = {'step': step, 'form': config.sweep.form, 'layers': list(config.sweep.layers),
         'way': config.get('task', {}).get('way', '')}
  base, rows = None, []
  host = build(config.model, task=config.get('task')).host
  wanted = list(candidates(config.sweep, host))
  for method, budget in tqdm(wanted, disable=not sys.stderr.isatty(), unit='candidate'):
    known = before.get(name({**how, 'method': method, 'budget': str(budget)}))
    if known is None:
      base = base or prepare(config, 'none', 1.0, trained, mesh, batches)
      known = {**how, 'method': method, 'budget': str(budget), **timing.machine()}
      try:
        made = base if method == 'none' else prepare(config, method, budget, trained, mesh, batches)
        known |= measure(made, base, task, batches, config.sweep)
      except ValueError as reason:  # A budget that this method cannot meet ends only its own row.
        known['note'] = str(reason)
      if first:
        report.append_jsonl(path, known)
    rows.append(known)
  if first:
    show(rows, task, workdir, config.sweep)
    pictures(config, step, trained, mesh, batches, workdir)


def name(row):
  """What makes a row of sweep.jsonl the same measurement."""
  return (row['step'], row['form'], tuple(row['layers']), row.get('way', ''), row['method'],
          row['budget'])


def candidates(sweep, host):
  """(method, budget) pairs, the unreduced model first; all that a host can run by default."""
  yield 'none', 1.0
  for method in sweep.methods or [known for known in methods(host) if known != 'none']:
    for budget in sweep.budgets:
      yield method, budget


def load(config, workdir, mesh):
  """The best checkpoint's step and its averaged parameters, placed on the mesh.

  A workdir without any starts from the weights that the config names, as step 0.
  """
  vit = build(config.model, task=config.get('task'))
  images = jnp.zeros((1, vit.image_size, vit.image_size, vit.channels))
  abstract = jax.eval_shape(vit.init, jax.random.key(0), images)['params']
  places = sharding.place(abstract, config.sharding, mesh)
  template = sharding.shapes(abstract, places)
  checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints', metric=tasks.of(config).score)
  step = checkpoints.best()
  loaded = step is None and pretrained({**config.model, 'fresh': ()}, vit)
  if loaded:
    return 0, weights.overlay(template, loaded)
  if step is None:
    raise FileNotFoundError(f'no checkpoint in {workdir / "checkpoints"}: train first, with '
                            f'python -m train --config=configs/digits.py --workdir={workdir}, or '
                            'name pretrained ones in config.model.weights')
  params = checkpoints.read(step, 'ema', template)
  checkpoints.close()
  return step, params


def prepare(config, method, budget, trained, mesh, batches):
  """Builds and compiles one candidate."""
  platform = mesh.devices.flat[0].platform
  reduce = {'method': method, 'layers': tuple(config.sweep.layers), config.sweep.form: budget,
            **config.sweep.overrides.get(method, {})}
  vit = build(config.model, reduce, macs=cost.solver, mesh=mesh if mesh.size > 1 else None,
              platform=platform, task=config.get('task'))
  params = fastest(vit, complete(vit, trained, seed=config.seed), platform)
  return Candidate(vit, params, *compiled(vit, params, batches[0][1]['image']))


def complete(vit, trained, *, seed):
  """Parameters that lack nothing: the trained ones, and fresh ones of a learned method."""
  plan = vit.plan
  if plan is None or plan.name not in COMPRESSORS:
    return trained
  learned = {f'reducer_{cut.layer:02d}' for cut in plan.cuts}
  if learned <= trained['stack'].keys():
    return trained
  images = jnp.zeros((1, vit.image_size, vit.image_size, vit.channels))

  def fresh(key):
    stack = vit.clone(mesh=None).init(key, images)['params']['stack']
    return {name: stack[name] for name in learned}

  return trained | {'stack': jax.jit(fresh)(jax.random.key(seed)) | trained['stack']}


def fastest(vit, params, platform):
  """Parameters in the form that runs fastest on a platform."""
  if best_form(vit.plan, platform=platform) == 'stacked':
    return params
  blocks = unstack(params['stack']['blocks'], vit.depth)
  return params | {'stack': params['stack'] | {'blocks': blocks}}


def compiled(vit, params, images):
  """(params, images) -> (logits, cuts without features), compiled, and the seconds it took."""

  def forward(params, images):
    logits, out = vit.apply({'params': params}, images)
    cuts = {layer: cut.replace(x=cut.x[..., :0], stats={}) for layer, cut in out['cuts'].items()}
    return logits, cuts

  made = timing.compile_seconds(jax.jit(forward).lower(params, images))
  return made.run, made.seconds


def measure(made, base, task, batches, sweep):
  """Score, tokens, cost and latency of a candidate: the fields of its row."""
  counts, total, kept = [], 0.0, {}
  for _, placed in batches:
    logits, cuts = made.run(made.params, placed['image'])
    counts.append(task.counts(logits, placed['label'], placed['mask']))
    total += float(jnp.sum(placed['mask']))
    for layer, cut in cuts.items():
      kept[layer] = kept.get(layer, 0.0) + float(jnp.sum(cut.real.sum(1) * placed['mask']))
  slots, tokens = made.vit.host.slots, []
  for layer in range(made.vit.depth):
    slots = kept[layer] / total if layer in kept else slots
    tokens.append(round(slots, 1))

  images = batches[0][1]['image']
  runs = {'base': functools.partial(base.run, base.params, images),
          'made': functools.partial(made.run, made.params, images)}
  times = timing.interleave(runs, rounds=sweep.rounds)
  faster = timing.speedup(times['base'], times['made'])
  own, full = cost.of(made.vit).macs, cost.of(base.vit).macs
  learned = made.vit.plan is not None and made.vit.plan.name in COMPRESSORS
  return {
      task.score: task.total(tasks.add_up(counts)),
      'tokens': tokens, 'kept_mean': sum(tokens) / len(tokens),
      'gmacs': own / 1e9, 'gmacs_ratio': own / full, 'batch': images.shape[0],
      'dtype': str(jnp.dtype(made.vit.dtype)), 'median_ms': times['made'].median_ms,
      'low_ms': times['made'].low_ms, 'high_ms': times['made'].high_ms, 'speedup': faster.ratio,
      'speedup_low': faster.low, 'speedup_high': faster.high, 'compile_s': made.compile_s,
      'note': 'its own parameters are untrained' if learned else '',
  }


def show(rows, task, workdir, sweep):
  """Prints the table, and writes the plots of those that are ready to be judged."""
  columns = [task.score if name == 'accuracy' else name for name in report.USUAL]
  print(report.table(rows, columns))
  baselines = tuple(sweep.baselines)
  # Each method ran beside the unreduced model, at another time than the other methods: its speed-up
  # is free of the machine's drift, its milliseconds are not.
  full = rows[0]['median_ms']
  ready = [row for row in rows if not row['note']]
  steady = [row | {'median_ms': full / row['speedup'], 'low_ms': full / row['speedup_high'],
                   'high_ms': full / row['speedup_low']} for row in ready]
  for axis, drawn, file in (('gmacs', ready, f'{task.score}_cost.png'),
                            ('median_ms', steady, f'{task.score}_latency.png')):
    print(report.plot_accuracy_cost(drawn, workdir / file, title=sweep.title, cost=axis,
                                    score=task.score, baselines=baselines, reference='none'))


def pictures(config, step, trained, mesh, batches, workdir):
  """Draws what the named methods keep, merge and drop on the first test images."""
  sweep = config.sweep
  folder = workdir / 'overlays'
  drawn = folder / 'drawn.json'
  settings = json.dumps({'step': step, 'sweep': sweep.to_dict()}, sort_keys=True) + '\n'
  if drawn.exists() and drawn.read_text() == settings:
    return
  batch, placed = batches[0]
  count = min(sweep.pictured_images, len(batch['label']))
  mean, std = (np.asarray(values, np.float32) for values in (config.data.mean, config.data.std))
  shown = np.clip(batch['image'][:count] * std + mean, 0, 1)
  by_method = {}
  for method in sweep.pictured:
    made = prepare(config, method, sweep.budgets[len(sweep.budgets) // 2], trained, mesh, batches)
    logits, cuts = jax.device_get(made.run(made.params, placed['image']))
    by_method[method] = cuts
    if batch['label'].ndim > 1:
      print(overlay.segments(shown, batch['label'][:count], logits[:count].argmax(-1), cuts,
                             made.vit.grid, folder / f'{method}.png', title=method))
      continue
    names = [f'{label}, read as {read}' for label, read in
             zip(batch['label'][:count], logits[:count].argmax(-1), strict=True)]
    print(overlay.overlay(shown, cuts, made.vit.grid, folder / f'{method}.png', names=names,
                          title=method))
  print(overlay.compare(shown[0], by_method, made.vit.grid, folder / 'compare.png',
                        title=sweep.title))
  drawn.write_text(settings)


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
