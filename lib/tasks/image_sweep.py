"""The sweep over models of images: methods, each under budgets, against no reduction.

Axes: B batch, N slots.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lib.cost import vit as vit_cost
from lib.data import images as image_data
from lib.report import intervals, overlay, plots, tables
from lib.report.rows import Row
from lib.runtime import checkpoint, memory, sharding, timing
from lib.tasks import image as image_task
from lib.tasks.base import sum_counts
from lib.tasks.image_metrics import cross_entropies, metric_of
from lib.tasks.sweep import Candidate, Sweep, fingerprint
from models import checkpoints
from models.backbones.vit import ViT
from models.build import build, pretrained
from models.plan import methods
from models.storage import fastest_storage, to_storage

Params = dict[str, Any]


class ImageSweep(Sweep):
  """Measures methods under budgets on the test images of a set.

  `config.sweep` has `methods` (() for all), `budgets`, the `form` of those (a budget's key in a
  reduction), `layers`, and `overrides`, keys of a reduction by method. Where it has a `baseline`,
  the name of a method, every row is compared with that at the same budget, averaged over so many
  `baseline_draws`, seeds from 0 on; 0 for a method without a seed.
  """

  def __init__(self, config: ConfigDict, workdir: pathlib.Path, mesh: Mesh):
    super().__init__(config, workdir, mesh)
    self.metric = metric_of(config)
    self.step, self.params = load(config, workdir, mesh)
    self.weights = fingerprint(self.params)
    self.batches = [(batch, sharding.put(batch, mesh)) for batch in image_data.eval_batches(
        config.data, process_index=jax.process_index(), process_count=jax.process_count())]
    self._baseline: dict[str, np.ndarray] = {}  # By budget, the cross-entropies of its draws.

  def rows(self) -> Iterator[Row]:
    """Yields the rows to measure, as `Sweep.rows`."""
    config, sweep = self.config, self.config.sweep
    shared = {'step': self.step, 'form': sweep.budget, 'layers': list(sweep.layers),
              'way': config.get('task', {}).get('fill', '')}
    if sweep.get('baseline'):
      shared |= {'baseline': sweep.baseline, 'baseline_draws': sweep.baseline_draws}
    yield {**shared, 'method': 'none', 'budget': '1.0', 'made_of': self._made_of('none')}
    host = build(config.model, task=config.get('task')).host
    for method in sweep.methods or [name for name in methods(host) if name != 'none']:
      for budget in sweep.budgets:
        yield {**shared, 'method': method, 'budget': str(budget),
               'made_of': self._made_of(method)}

  def _made_of(self, *reductions: str) -> Row:
    """Returns `made_of` of a row, or picture, of these methods."""
    config, sweep = self.config, self.config.sweep
    chosen = {name: sweep.overrides[name] for name in (*reductions, sweep.get('baseline'))
              if name in sweep.overrides}
    # The seed is that of parameters of a method that are untrained.
    return self.made_of(config.data, overrides=ConfigDict(chosen).to_dict(), seed=config.seed)

  @functools.cached_property
  def base(self) -> Candidate:
    """The unreduced model, compiled when it is first needed."""
    return self.prepare('none', 1.0)

  def prepare(self, method: str, budget: float) -> Candidate:
    """Builds and compiles one candidate; it runs on images, and gives logits and cuts."""
    vit = self._build(method, budget, {})
    # Here, so that the row says it, and is tried again once it is mended.
    image_task.check_images(vit, self.config.data)
    params = self._stored(vit)
    return Candidate(vit, params, *compiled(vit, params, self.batches[0][1]['image']))

  def _build(self, method: str, budget: float, args: Mapping[str, Any]) -> ViT:
    """Builds the model under one reduction; `args` of the method replace those of `overrides`."""
    config, sweep = self.config, self.config.sweep
    reduce = {'method': method, 'layers': tuple(sweep.layers), sweep.budget: budget,
              **sweep.overrides.get(method, {})}
    if args:
      reduce['args'] = {**reduce.get('args', {}), **args}
    return build(config.model, reduce, macs=vit_cost.solver,
                 platform=self.mesh.devices.flat[0].platform,
                 mesh=self.mesh if self.mesh.size > 1 else None, task=config.get('task'))

  def _stored(self, vit: ViT) -> Params:
    """Returns all parameters of a model, in the storage that runs fastest here."""
    platform = self.mesh.devices.flat[0].platform
    return to_storage(complete(vit, self.params, seed=self.config.seed),
                      fastest_storage(vit.plan, platform=platform))

  def measure(self, row: Row) -> Row:
    """Returns score, tokens, cost and latency of a row, as `Sweep.measure`."""
    base = self.base
    candidate = base if row['method'] == 'none' else self.prepare(row['method'],
                                                                  float(row['budget']))
    images = self.batches[0][1]['image']
    latency = self.latency(functools.partial(base.run, base.params, images),
                           functools.partial(candidate.run, candidate.params, images))
    own, full = vit_cost.of(candidate.model).macs, vit_cost.of(base.model).macs
    plan = candidate.model.plan
    learned = plan is not None and any(part.learned for part in plan.reductions)
    return {
        **self._evaluated(candidate), **self._compared(row, candidate),
        'gmacs': own / 1e9, 'gmacs_ratio': own / full, 'batch': images.shape[0],
        'dtype': str(jnp.dtype(candidate.model.dtype)), **latency,
        'compile_s': candidate.compile_s,
        'note': 'its own parameters are untrained' if learned else '',
    }

  def show(self, rows: Sequence[Row], workdir: pathlib.Path) -> None:
    """Prints the table, plots the rows without a note, and draws pictures."""
    sweep, score = self.config.sweep, self.metric.score
    if sweep.get('baseline'):
      print(self._show_compared(rows, workdir))
    else:
      columns = [score if name == 'accuracy' else name for name in tables.USUAL]
      print(tables.table(rows, columns))
    # Each method ran beside the unreduced model, at another time than the other methods: its
    # speed-up is free of the machine's drift, its milliseconds are not.
    full = rows[0].get('median_ms')
    ready = [row for row in rows if not row['note']]
    drawn = {'gmacs': (ready, f'{score}_cost.png')}
    if full:
      drawn['median_ms'] = ([{**row, 'median_ms': full / row['speedup'],
                              'low_ms': full / row['speedup_high'],
                              'high_ms': full / row['speedup_low']} for row in ready],
                            f'{score}_latency.png')
    for axis, (own, file) in drawn.items():
      print(plots.plot_accuracy_cost(
          own, workdir / file, title=sweep.title, cost=axis, score=score,
          baselines=tuple(sweep.baselines), reference='none'))
    self._draw(workdir / 'overlays')

  def _evaluated(self, candidate: Candidate) -> Row:
    """Returns the score, the mean tokens left of each layer, and their mean over layers."""
    metric, counts, total = self.metric, [], 0.0
    left: dict[int, float] = {}
    for _, placed in self.batches:
      logits, cuts = candidate.run(candidate.params, placed['image'])
      counts.append(metric.counts(logits, placed['label'], placed['mask']))
      total += float(jnp.sum(placed['mask']))
      for layer, cut in cuts.items():
        left[layer] = left.get(layer, 0.0) + float(jnp.sum(cut.real.sum(1) * placed['mask']))
    slots, tokens = candidate.model.host.slots, []
    for layer in range(candidate.model.depth):
      slots = left[layer] / total if layer in left else slots
      tokens.append(round(slots, 1))
    interval = metric.interval(sum_counts(counts)) if self.config.sweep.get('baseline') else {}
    return {metric.score: metric.total(sum_counts(counts)), **interval,
            'tokens': tokens, 'kept_mean': sum(tokens) / len(tokens)}

  def _compared(self, row: Row, candidate: Candidate) -> Row:
    """Returns the keys of a row that compare it with the baseline; none without a baseline.

    `random` drops the same places of all images, so that one draw of it can be lucky as a whole:
    the baseline is the mean over several draws, and the difference's error has a part of the draws.
    The baseline's own row has the mean of all draws as its NLL.
    """
    baseline = self.config.sweep.get('baseline')
    if not baseline:
      return {}
    own = self._cross_entropies(lambda batch: cross_entropies(
        candidate.run(candidate.params, batch['image'])[0], batch['label']))
    if row['method'] == 'none':
      return {'images': len(own), 'nll': float(own.mean())}
    draws = self._draws(row['budget'])
    if row['method'] == baseline:
      return {'images': len(own), 'nll': float(draws.mean())}
    difference = intervals.paired(own, draws)
    return {'images': len(own), 'nll': float(own.mean()), 'nll_difference': difference.mean,
            'nll_error': difference.error, 'nll_freedom': difference.freedom}

  def _draws(self, budget: str) -> np.ndarray:
    """Returns the cross-entropies of the baseline's draws at a budget: float64[draws, images]."""
    sweep = self.config.sweep
    if budget not in self._baseline:
      params = self._stored(self._build(sweep.baseline, float(budget), {}))

      @jax.jit
      def losses(params: Params, batch: Mapping[str, jax.Array], args: dict[str, Any]) -> jax.Array:
        # Its seed is an input, so that all draws are one program.
        vit = self._build(sweep.baseline, float(budget), args)
        return cross_entropies(vit.apply({'params': params}, batch['image'])[0], batch['label'])

      draws = [{'seed': seed} for seed in range(sweep.baseline_draws)] or [{}]
      self._baseline[budget] = np.stack([self._cross_entropies(
          lambda batch: losses(params, batch, args)) for args in draws])
    return self._baseline[budget]

  def _cross_entropies(self, losses: Callable[[Mapping[str, jax.Array]], jax.Array]) -> np.ndarray:
    """Returns the cross-entropy of each test image: float64[images].

    Args:
      losses: batch -> float32[B].
    """
    parts = []
    for _, placed in self.batches:
      values, mask = multihost_utils.process_allgather((losses(placed), placed['mask']), tiled=True)
      parts.append(values[mask > 0].astype(np.float64))
    return np.concatenate(parts)

  def _show_compared(self, rows: Sequence[Row], workdir: pathlib.Path) -> str:
    """Draws the differences from the baseline; returns how to read the table, and the table.

    The table goes from budget to budget, and from the lowest NLL to the highest.
    """
    sweep, score, images = self.config.sweep, self.metric.score, rows[0]['images']
    draws = max(1, sweep.baseline_draws)
    judged = sorted(intervals.judge(rows), key=lambda row: (
        -float(row['budget']), row.get('nll', math.inf)))
    compared = [row for row in judged if 'verdict' in row]
    if compared:
      print(plots.plot_differences(compared, workdir / 'nll_difference.png', title=sweep.title,
                                   baseline=sweep.baseline))
    legend = (
        f'On {images} test images. NLL: mean cross-entropy. NLL - baseline: image by image from '
        f'the mean of {draws} draw{"s" * (draws > 1)} of {sweep.baseline}\nat the same budget and '
        f'layers; with the interval that covers images and draws and, by Bonferroni, all '
        f'{len(compared)} comparisons\ntogether at 95 %. Verdict: better or worse than '
        f'{sweep.baseline} where that interval excludes 0; otherwise the data cannot tell.\n'
        f'[ ] behind an accuracy: its own 95 % interval. Other columns of {sweep.baseline} are of '
        'one draw.\n')
    return legend + tables.table(judged, (
        'budget', 'method', score, 'nll', 'nll_difference', 'verdict', 'tokens', 'gmacs_ratio',
        'latency', 'speedup', 'note'))

  def _draw(self, folder: pathlib.Path) -> None:
    """Draws the tokens that the named methods keep, merge and drop on the first test images."""
    config, sweep = self.config, self.config.sweep
    record = folder / 'drawn.json'
    settings = json.dumps({'step': self.step, 'sweep': sweep.to_dict(),
                           'made_of': self._made_of(*sweep.pictured)}, sort_keys=True) + '\n'
    batch, placed = self.batches[0]
    count = min(sweep.pictured_images, len(batch['label']))
    if not (count and sweep.budgets) or (record.exists() and record.read_text() == settings):
      return
    mean, std = (np.asarray(values, np.float32) for values in (config.data.mean, config.data.std))
    images = np.clip(batch['image'][:count] * std + mean, 0, 1)
    cuts_by_method = {}
    for method in sweep.pictured:
      try:
        candidate = self.prepare(method, sweep.budgets[len(sweep.budgets) // 2])
      except ValueError as reason:
        print(f'no picture of {method}: {reason}')
        continue
      logits, cuts = jax.device_get(candidate.run(candidate.params, placed['image']))
      cuts_by_method[method] = cuts
      grid, file = candidate.model.grid, folder / f'{method}.png'
      labels, predicted = batch['label'][:count], logits[:count].argmax(-1)
      if labels.ndim > 1:
        print(overlay.segments(images, labels, predicted, cuts, grid, file, title=method))
      else:
        names = [f'{label}, read as {read}' for label, read in zip(labels, predicted, strict=True)]
        print(overlay.overlay(images, cuts, grid, file, names=names, title=method))
    if cuts_by_method:
      print(overlay.compare(images[0], cuts_by_method, grid, folder / 'compare.png',
                            title=sweep.title))
      record.write_text(settings)


def load(config: ConfigDict, workdir: pathlib.Path, mesh: Mesh) -> tuple[int, Params]:
  """Returns the best checkpoint's step and its averaged parameters, placed on the mesh.

  A workdir without any starts from the weights that the config names, as step 0.

  Raises:
    FileNotFoundError: no checkpoint, and no weights named.
  """
  vit = build(config.model, task=config.get('task'))
  memory.check_batch(config.data.batch_size, slots=vit.host.slots, width=vit.width, mesh=mesh)
  images = jnp.zeros((1, *vit.input_shape))
  abstract = jax.eval_shape(vit.init, jax.random.key(0), images)['params']
  template = sharding.shapes(abstract, sharding.make_shardings(abstract, config.sharding, mesh))
  best = checkpoint.best(workdir, template, metric=metric_of(config).score)
  if best:
    return best
  weights = pretrained({**config.model, 'fresh': ()}, vit)
  if weights:
    return 0, checkpoints.merge_params(template, weights)
  raise FileNotFoundError(f'no checkpoint in {workdir / "checkpoints"}: train first, with '
                          f'python -m train --config=configs/digits.py --workdir={workdir}, or '
                          'name pretrained ones in config.model.weights')


def complete(vit: ViT, trained: Params, *, seed: int) -> Params:
  """Adds fresh parameters of a learned method to trained ones that lack them."""
  events = vit.plan.events if vit.plan else ()
  learned = {event.parameters for event in events if event.reduction.learned}
  if learned <= trained['stack'].keys():
    return trained
  images = jnp.zeros((1, *vit.input_shape))

  def fresh(key: jax.Array) -> dict[str, Any]:
    stack = vit.clone(mesh=None).init(key, images)['params']['stack']
    return {name: stack[name] for name in learned}

  return trained | {'stack': jax.jit(fresh)(jax.random.key(seed)) | trained['stack']}


def compiled(vit: ViT, params: Params,
             images: jax.Array) -> tuple[Callable[[Params, jax.Array], Any], float]:
  """Compiles (params, images) -> (logits, cuts without features); also returns the seconds."""

  def forward(params: Params, images: jax.Array) -> tuple[jax.Array, Mapping[int, Any]]:
    logits, out = vit.apply({'params': params}, images)
    cuts = {layer: cut.replace(x=cut.x[..., :0], stats={}) for layer, cut in out['cuts'].items()}
    return logits, cuts

  program = timing.compile_seconds(jax.jit(forward).lower(params, images))
  return program.run, program.seconds
