"""What eval.py sweeps over models of images: methods, each under budgets, against no reduction.

Axes: B batch, N slots.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lib.cost import vit as vit_cost
from lib.data import images as image_data
from lib.report import overlay, plots, tables
from lib.runtime import checkpoint, sharding, timing
from lib.tasks import base as tasks
from models import checkpoints
from models.build import build, pretrained
from models.compressors import COMPRESSORS
from models.plan import methods
from models.storage import fastest_storage, to_storage


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


class Sweep:
  """A trained model, its test images, and what config.sweep asks to be measured on them."""

  def __init__(self, config, workdir, mesh):
    self.config, self.mesh, self.task = config, mesh, tasks.of(config)
    self.step, self.params = load(config, workdir, mesh)
    self.batches = [(batch, sharding.put(batch, mesh)) for batch in image_data.eval_batches(
        config.data, process_index=jax.process_index(), process_count=jax.process_count())]
    self._base = None

  def rows(self):
    """What is to be measured: the first keys of each row, that tell it from others."""
    config, sweep = self.config, self.config.sweep
    how = {'step': self.step, 'form': sweep.budget, 'layers': list(sweep.layers),
           'way': config.get('task', {}).get('fill', '')}
    yield {**how, 'method': 'none', 'budget': '1.0'}
    host = build(config.model, task=config.get('task')).host
    for method in sweep.methods or [known for known in methods(host) if known != 'none']:
      for budget in sweep.budgets:
        yield {**how, 'method': method, 'budget': str(budget)}

  def prepare(self, method, budget):
    """Builds and compiles one candidate."""
    config, sweep = self.config, self.config.sweep
    platform = self.mesh.devices.flat[0].platform
    reduce = {'method': method, 'layers': tuple(sweep.layers), sweep.budget: budget,
              **sweep.overrides.get(method, {})}
    vit = build(config.model, reduce, macs=vit_cost.solver, platform=platform,
                mesh=self.mesh if self.mesh.size > 1 else None, task=config.get('task'))
    params = to_storage(complete(vit, self.params, seed=config.seed),
                        fastest_storage(vit.plan, platform=platform))
    return Candidate(vit, params, *compiled(vit, params, self.batches[0][1]['image']))

  def measure(self, row):
    """The other keys of a row: score, tokens, cost and latency.

    Raises:
      ValueError: a budget that this method cannot meet.
    """
    self._base = self._base or self.prepare('none', 1.0)
    base = self._base
    made = base if row['method'] == 'none' else self.prepare(row['method'], float(row['budget']))
    task, counts, total, kept = self.task, [], 0.0, {}
    for _, placed in self.batches:
      logits, cuts = made.run(made.params, placed['image'])
      counts.append(task.counts(logits, placed['label'], placed['mask']))
      total += float(jnp.sum(placed['mask']))
      for layer, cut in cuts.items():
        kept[layer] = kept.get(layer, 0.0) + float(jnp.sum(cut.real.sum(1) * placed['mask']))
    slots, tokens = made.vit.host.slots, []
    for layer in range(made.vit.depth):
      slots = kept[layer] / total if layer in kept else slots
      tokens.append(round(slots, 1))

    images = self.batches[0][1]['image']
    runs = {'base': functools.partial(base.run, base.params, images),
            'made': functools.partial(made.run, made.params, images)}
    times = timing.interleave(runs, rounds=self.config.sweep.rounds)
    faster = timing.speedup(times['base'], times['made'])
    own, full = vit_cost.of(made.vit).macs, vit_cost.of(base.vit).macs
    learned = made.vit.plan is not None and made.vit.plan.name in COMPRESSORS
    return {
        task.score: task.total(tasks.sum_counts(counts)),
        'tokens': tokens, 'kept_mean': sum(tokens) / len(tokens),
        'gmacs': own / 1e9, 'gmacs_ratio': own / full, 'batch': images.shape[0],
        'dtype': str(jnp.dtype(made.vit.dtype)), 'median_ms': times['made'].median_ms,
        'low_ms': times['made'].low_ms, 'high_ms': times['made'].high_ms, 'speedup': faster.ratio,
        'speedup_low': faster.low, 'speedup_high': faster.high, 'compile_s': made.compile_s,
        'note': 'its own parameters are untrained' if learned else '',
    }

  def show(self, rows, workdir):
    """Prints the table, writes the plots of those that are ready to be judged, and pictures."""
    sweep, score = self.config.sweep, self.task.score
    columns = [score if name == 'accuracy' else name for name in tables.USUAL]
    print(tables.table(rows, columns))
    # Each method ran beside the unreduced model, at another time than the other methods: its
    # speed-up is free of the machine's drift, its milliseconds are not.
    full = rows[0]['median_ms']
    ready = [row for row in rows if not row['note']]
    steady = [row | {'median_ms': full / row['speedup'], 'low_ms': full / row['speedup_high'],
                     'high_ms': full / row['speedup_low']} for row in ready]
    for axis, drawn, file in (('gmacs', ready, f'{score}_cost.png'),
                              ('median_ms', steady, f'{score}_latency.png')):
      print(plots.plot_accuracy_cost(
          drawn, workdir / file, title=sweep.title, cost=axis, score=score,
          baselines=tuple(sweep.baselines), reference='none'))
    self._pictures(workdir / 'overlays')

  def _pictures(self, folder):
    """Draws what the named methods keep, merge and drop on the first test images."""
    config, sweep = self.config, self.config.sweep
    drawn = folder / 'drawn.json'
    settings = json.dumps({'step': self.step, 'sweep': sweep.to_dict()}, sort_keys=True) + '\n'
    if drawn.exists() and drawn.read_text() == settings:
      return
    batch, placed = self.batches[0]
    count = min(sweep.pictured_images, len(batch['label']))
    mean, std = (np.asarray(values, np.float32) for values in (config.data.mean, config.data.std))
    shown = np.clip(batch['image'][:count] * std + mean, 0, 1)
    by_method = {}
    for method in sweep.pictured:
      made = self.prepare(method, sweep.budgets[len(sweep.budgets) // 2])
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


def load(config, workdir, mesh):
  """The best checkpoint's step and its averaged parameters, placed on the mesh.

  A workdir without any starts from the weights that the config names, as step 0.
  """
  vit = build(config.model, task=config.get('task'))
  images = jnp.zeros((1, *vit.input_shape))
  abstract = jax.eval_shape(vit.init, jax.random.key(0), images)['params']
  template = sharding.shapes(abstract, sharding.make_shardings(abstract, config.sharding, mesh))
  found = checkpoint.best(workdir, template, metric=tasks.of(config).score)
  if found:
    return found
  loaded = pretrained({**config.model, 'fresh': ()}, vit)
  if loaded:
    return 0, checkpoints.merge_params(template, loaded)
  raise FileNotFoundError(f'no checkpoint in {workdir / "checkpoints"}: train first, with '
                          f'python -m train --config=configs/digits.py --workdir={workdir}, or '
                          'name pretrained ones in config.model.weights')


def complete(vit, trained, *, seed):
  """Parameters that lack nothing: the trained ones, and fresh ones of a learned method."""
  plan = vit.plan
  if plan is None or plan.name not in COMPRESSORS:
    return trained
  learned = {f'reducer_{cut.layer:02d}' for cut in plan.cuts}
  if learned <= trained['stack'].keys():
    return trained
  images = jnp.zeros((1, *vit.input_shape))

  def fresh(key):
    stack = vit.clone(mesh=None).init(key, images)['params']['stack']
    return {name: stack[name] for name in learned}

  return trained | {'stack': jax.jit(fresh)(jax.random.key(seed)) | trained['stack']}


def compiled(vit, params, images):
  """(params, images) -> (logits, cuts without features), compiled, and the seconds it took."""

  def forward(params, images):
    logits, out = vit.apply({'params': params}, images)
    cuts = {layer: cut.replace(x=cut.x[..., :0], stats={}) for layer, cut in out['cuts'].items()}
    return logits, cuts

  made = timing.compile_seconds(jax.jit(forward).lower(params, images))
  return made.run, made.seconds
