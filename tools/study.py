"""Compares methods over seeds: as they are on a trained model, and after a short training.

  python -m tools.study --config=configs/digits_study.py --workdir=runs/study

Trains the unreduced model once a seed, evaluates every method on it under several budgets, then
trains every method a little from it and evaluates again. Each program is compiled once and run for
all seeds. Writes a JSON line a method, budget and seed (rows that are there are not made again), a
table in Markdown and a plot; where a method stands is told by its distance from a baseline at equal
cost, seed by seed.

Axes: B batch, N slots, C classes.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from ml_collections import ConfigDict

import train
from configs.parts import reduction
from lib.cost import vit as vit_cost
from lib.data import images as image_data
from lib.report import measuring, plots, tables
from lib.report.rows import Row
from lib.runtime import cli, launch, run_identity, screen, sharding, timing
from lib.tasks import image_sweep
from lib.tasks.base import sum_counts
from lib.tasks.image_metrics import Metric, metric_of
from lib.tasks.settings import TRAINING, check_config
from lib.tasks.sweep import digest, fingerprint
from models.backbones.vit import ViT
from models.build import build
from models.compressors import COMPRESSORS
from models.plan import methods
from models.storage import fastest_storage, to_storage
from ops import choices
from ops.budgets import per_layer

UNTRAINED = 'its own parameters are untrained'

Params = Mapping[str, Any]
Curves = dict[tuple[int, bool, str, str], list[Row]]  # By seed, training, layers and method.
Ends = dict[str, tuple[float, float, str]]  # name: x, y and colour.


@dataclasses.dataclass(frozen=True)
class Entry:
  """Holds one method and budget to measure for every seed.

  Attributes:
    name: of the row.
    budget: of the row, as shown.
    config: what is evaluated.
    training: what is trained from the unreduced model first, None for nothing.
    taught: whether the unreduced model is the teacher in that training.
  """

  name: str
  budget: str
  config: ConfigDict
  training: ConfigDict | None = None
  taught: bool = False

  def head(self, seed: int) -> dict[str, Any]:
    """Returns the keys that name a row."""
    reduce = self.config.reduce.vision
    return {'method': self.name, 'budget': self.budget, 'layers': str(reduce.layers),
            'keep': str(reduce.keep),
            'steps': self.training.total_steps if self.training else 0, 'seed': seed}

  def made_of(self, weights: str) -> str:
    """Returns a digest of all that makes a row, beside its seed.

    Args:
      weights: the fingerprint of the unreduced model's parameters.
    """
    return digest([weights, run_identity.settings(self.config), self.taught,
                   self.training and run_identity.settings(self.training)])


def main(argv: Sequence[str]) -> None:
  """Measures what is missing, then reports."""
  del argv
  screen.outlive()
  with launch.start():
    study(launch.CONFIG.value, pathlib.Path(launch.WORKDIR.value))


def study(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Measures the rows of a study that are missing, and writes its report."""
  check_config(config, *TRAINING, 'study')
  for budget in (*config.study.budgets, *config.study.lower):
    per_layer(budget['keep'], budget['layers'], f'config.study, {budget["budget"]}: keep')
  for entry in entries(config):
    if entry.training:
      check_config(entry.training)
  path = pathlib.Path(f'{config.study.results}.jsonl')
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  trained = {seed: unreduced(config, workdir / f'seed_{seed}', seed, mesh)
             for seed in config.study.seeds}
  weights = {seed: fingerprint(params) for seed, params in trained.items()}
  of_head = {(*entry.head(seed).values(), entry.made_of(weights[seed])): entry
             for entry in entries(config) for seed in config.study.seeds}
  measurer = Measurer(trained, mesh)
  rows = measuring.measure_rows(
      [{**entry.head(seed), 'made_of': made_of} for (*_, seed, made_of), entry in of_head.items()],
      lambda head: measurer.measure(of_head[tuple(head.values())], head['seed']),
      path=path, about=timing.machine())
  path.with_suffix('.md').write_text(text(rows, config))
  plot(rows, path.with_suffix('.png'), config)
  print(f'{path.with_suffix(".md")} and {path.with_suffix(".png")} made of {len(rows)} rows')


# -- what to measure -----------------------------------------------------------------------------


def entries(config: ConfigDict) -> Iterator[Entry]:
  """Yields all entries of a study: without training, then with."""
  wanted = config.study
  host = build(config.model).host
  names = wanted.methods or [name for name in methods(host) if name != 'none']
  yield untouched(config, 'none', None)
  for budget in wanted.budgets:
    for name in names:
      yield untouched(config, name, budget)
  for budget in wanted.lower:
    yield untouched(config, wanted.reference, budget)
  for label, side in wanted.resolutions:
    yield Entry('resolution', label, smaller(untouched(config, 'none', None).config, side))

  at = {budget['budget']: budget for budget in (*wanted.budgets, *wanted.lower)} | {'100 %': None}
  tuned = [{'name': 'none', 'method': 'none', 'budget': '100 %'},
           *({'name': name, 'method': name, 'budget': wanted.tuned} for name in names)]
  for recipe in (*tuned, *wanted.recipes):
    yield trained_entry(config, recipe, at)
  for label, side in wanted.resolutions:
    whole = trained_entry(config, tuned[0], at)
    yield Entry('resolution', label, smaller(whole.config, side), smaller(whole.training, side))


def reduced(config: ConfigDict, method: str, budget: Mapping[str, Any] | None) -> ConfigDict:
  """Returns a copy of a config, reduced by a method under a budget (None for no reduction)."""
  copy = ConfigDict(config.to_dict())
  settings: dict[str, Any] = {}
  if budget is not None and method != 'none':
    args = config.study.overrides.get(method, {})
    settings = {'layers': tuple(budget['layers']), 'keep': tuple(budget['keep']),
                'args': dict(args)}
  copy.reduce = {'vision': reduction(method, **settings)}
  return copy


def smaller(config: ConfigDict, side: int) -> ConfigDict:
  """Returns a copy of a config for images of `side` x `side` pixels."""
  copy = ConfigDict(config.to_dict())
  copy.model.image_size = copy.data.image_size = side
  return copy


def untouched(config: ConfigDict, method: str, budget: Mapping[str, Any] | None) -> Entry:
  """Returns the entry of a method on the unreduced model's parameters."""
  label = '100 %' if budget is None else budget['budget']
  return Entry(method, label, reduced(config, method, budget))


def trained_entry(config: ConfigDict, recipe: Mapping[str, Any],
                  budgets: Mapping[str, Mapping[str, Any] | None]) -> Entry:
  """Returns the entry of a method after a short training.

  Args:
    config: the study.
    recipe: as configs/digits_study.py describes.
    budgets: {label: budget}, None for no reduction.
  """
  recipe = dict(recipe)
  choices.check(f'config.study: the budget of {recipe["name"]} ', recipe['budget'], budgets)
  budget = budgets[recipe['budget']]
  training = reduced(config, recipe.get('train_method', recipe['method']), budget)
  tune = dict(config.study.tune)
  training.total_steps = tune.pop('total_steps')
  training.data.batch_size = tune.pop('batch_size')
  training.optimizer.update(tune)
  training.optimizer.update(recipe.get('optimizer', {}))
  training.model.update(recipe.get('model', {}))
  training.anneal.update(recipe.get('anneal', {}))
  return Entry(recipe['name'], recipe['budget'], reduced(config, recipe['method'], budget),
               training, recipe.get('teacher', False))


# -- measuring -----------------------------------------------------------------------------------


def unreduced(config: ConfigDict, workdir: pathlib.Path, seed: int, mesh: Mesh) -> Params:
  """Returns the averaged parameters of a seed's unreduced model, which is trained where need be."""
  config = reduced(config, 'none', None)
  config.seed = seed
  if not train.run(config, workdir, first=True):
    sys.exit('stopped; the same command goes on from there')
  return image_sweep.load(config, workdir, mesh)[1]


class Measurer:
  """Measures rows; programs of one entry are compiled once and run for all its seeds.

  Args:
    trained: {seed: parameters of the unreduced model}.
    mesh: of one device.
  """

  def __init__(self, trained: Mapping[int, Params], mesh: Mesh) -> None:
    self._trained, self._mesh = trained, mesh
    self._entry: Entry | None = None
    self._setup: Any = None
    self._run: Any = None

  def measure(self, entry: Entry, seed: int) -> Row:
    """Returns the other keys of a row.

    Raises:
      ValueError, FloatingPointError: what this entry asks for is impossible.
    """
    if entry is not self._entry:
      self._entry, self._setup, self._run = entry, None, None
    start, config = time.perf_counter(), entry.config
    vit = build(config.model, config.reduce.vision, macs=vit_cost.solver, task=config.get('task'))
    params = self._trained[seed]
    if entry.training:
      self._setup = self._setup or train.make_setup(entry.training, self._mesh)
      params = tuned(self._setup, entry, params, seed, self._mesh)
    params = image_sweep.complete(vit, params, seed=seed)
    platform = self._mesh.devices.flat[0].platform
    params = to_storage(params, fastest_storage(vit.plan, platform=platform))
    batches = test_batches(config)
    self._run = self._run or image_sweep.compiled(vit, params, jnp.asarray(batches[0]['image']))[0]
    scores = judged(functools.partial(self._run, params), vit, batches, metric_of(config))
    learned = config.reduce.vision.method in COMPRESSORS and not entry.training
    return {**scores, 'note': UNTRAINED if learned else '',
            'seconds': round(time.perf_counter() - start, 1)}


def tuned(setup: Any, entry: Entry, params: Params, seed: int, mesh: Mesh) -> Params:
  """Returns the averaged parameters after the entry's training.

  Args:
    setup: `train.make_setup` of the entry's training.
    entry: with a training.
    params: of the unreduced model, where it starts.
    seed: of the order of the data, and of everything random.
    mesh: that of the setup.
  """
  config, key = entry.training, jax.random.key(seed)
  assert config is not None
  start = image_sweep.complete(setup.task.model, params, seed=seed)
  zero = jnp.zeros((), jnp.int32)
  # Copied: each step takes the state's memory, and the unreduced model is needed again.
  state = jax.tree.map(jnp.copy, train.TrainState(zero, start, setup.optimizer.init(start), start))
  state = setup.lay_out(jax.device_put(state, setup.shardings))
  iterator = image_data.train_iterator(config.data, seed=seed)
  teacher = params if entry.taught else None
  for step in range(1, config.total_steps + 1):
    batch = sharding.put(next(iterator), mesh)
    state, scalars = setup.train_step(step - 1)(state, batch, key, teacher, {})
  iterator.close()
  train.check_finite({name: float(value) for name, value in scalars.items()},
                     config.total_steps, config, pathlib.Path())
  return setup.stack(state).ema


def test_batches(config: ConfigDict) -> list[dict[str, np.ndarray]]:
  """Returns the test split of a config, in the study's batches."""
  settings = ConfigDict(config.data.to_dict())
  settings.batch_size = config.study.eval_batch_size
  return list(image_data.eval_batches(settings))


def judged(run: Callable[[Any], Any], vit: ViT, batches: Sequence[Mapping[str, np.ndarray]],
           task: Metric) -> dict[str, float]:
  """Returns keys of a row: the task's score, mean cross-entropy, tokens and cost.

  Args:
    run: images -> (logits, cuts).
    vit: the model that it runs.
    batches: as of `test_batches`.
    task: what it is judged by.
  """
  counts, logits, labels, left = [], [], [], []
  for batch in batches:
    real = batch['mask'] > 0
    answer, cuts = jax.device_get(run(batch['image']))
    counts.append(task.counts(jnp.asarray(answer), batch['label'], batch['mask']))
    logits.append(answer[real])
    labels.append(batch['label'][real])
    if cuts:
      left.append(cuts[max(cuts)].real.sum(1)[real])
  tokens = np.concatenate(left).mean() if left else vit.host.slots
  return {task.score: task.total(sum_counts(counts)),
          'nll': nll(np.concatenate(logits), np.concatenate(labels)),
          'tokens_left': float(tokens), 'gmacs': vit_cost.of(vit).macs / 1e9}


def nll(logits: np.ndarray, labels: np.ndarray) -> float:
  """Computes the mean negative log-likelihood of int[...] labels under float[..., C] logits."""
  logits, labels = logits.reshape(-1, logits.shape[-1]).astype(np.float64), labels.reshape(-1)
  shifted = logits - logits.max(-1, keepdims=True)
  logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  return float(-logs[np.arange(len(labels)), labels].mean())


# -- reporting -----------------------------------------------------------------------------------


def summaries(rows: Sequence[Row], *, reference: str, score: str) -> Iterator[dict[str, Any]]:
  """Yields one row a method and budget, made of those of all seeds.

  Each seed is compared with the reference's own rows of that seed, of equal training and the same
  layers, at equal cost: linearly between its neighbours in MACs, the unreduced model included.
  Outside of what the reference was measured at there is no difference to tell.

  Args:
    rows: as measured.
    reference: the method to compare with.
    score: name of the task's score.
  """
  curves: Curves = {}
  for row in rows:
    if row.get('nll') is not None and row['method'] in (reference, 'none'):
      curves.setdefault((row['seed'], row['steps'] > 0, row['layers'], row['method']),
                        []).append(row)
  layers = {row['budget']: row['layers'] for row in reversed(rows) if row['method'] == reference}
  groups: dict[tuple[str, str, int], list[Row]] = {}
  for row in rows:
    groups.setdefault((row['method'], row['budget'], row['steps']), []).append(row)
  for (method, budget, steps), group in groups.items():
    first = group[0]
    summary = {'method': method, 'budget': budget, 'steps': steps, 'layers': first['layers'],
               'note': first['note'], 'seconds': sum(row.get('seconds', 0.0) for row in group)}
    good = [row for row in group if row.get('nll') is not None]
    if good:
      summary |= {name: statistics.mean(row[name] for row in good)
                  for name in (score, 'nll', 'gmacs', 'tokens_left')}
      summary |= {f'{name}_sd': deviation([row[name] for row in good]) for name in (score, 'nll')}
      where = layers.get(budget, first['layers'])
      summary |= {f'{name}_apart': [
          row[name] - at_equal_cost(curves, row, where, reference, name) for row in good]
          for name in (score, 'nll')}
    yield summary


def deviation(values: Sequence[float]) -> float:
  """Computes the standard deviation of a sample, 0 of a single value."""
  return statistics.stdev(values) if len(values) > 1 else 0.0


def at_equal_cost(curves: Curves, row: Row, layers: str, reference: str, name: str) -> float:
  """Interpolates the reference's value of a key at a row's cost; NaN outside of its curve."""
  own = [point for (seed, tuned, where, method), points in curves.items()
         for point in points if seed == row['seed'] and tuned == (row['steps'] > 0)
         and (method == 'none' or (method == reference and where == layers))]
  points = {point['gmacs']: point[name] for point in own}
  costs = sorted(points)
  if not costs or not costs[0] <= row['gmacs'] <= costs[-1]:
    return float('nan')
  return float(np.interp(row['gmacs'], costs, [points[each] for each in costs]))


def verdict(row: Row, reference: str) -> str:
  """Says in words how a summary stands to the reference by cross-entropy."""
  apart = row.get('nll_apart', [])
  if row['method'] in ('none', reference):
    return ''
  if not apart or any(np.isnan(apart)):
    return f'outside {reference}\'s costs' if apart else ''
  better = sum(value < 0 for value in apart)
  if better in (0, len(apart)):
    return 'better in every seed' if better else 'worse in every seed'
  return f'better in {better} of {len(apart)} seeds'


def text(rows: Sequence[Row], config: ConfigDict) -> str:
  """Returns the report: a table for each budget without training, one for the trained ones."""
  wanted, score = config.study, metric_of(config).score
  means = list(summaries(rows, reference=wanted.reference, score=score))
  lines = introduction(rows, wanted)
  plain = [row for row in means if not row['steps']]
  whole = [row for row in plain if row['method'] == 'none']
  for budget in ('100 %', *dict.fromkeys(
      row['budget'] for row in plain if row['budget'] != '100 %')):
    part = [row for row in plain if row['budget'] == budget]
    lines += [f'## Without training: {budget}', '', place(wanted, budget), '',
              *table(part + [row for row in whole if row not in part], wanted, score), '']
  tuned = [row for row in means if row['steps']]
  if tuned:
    lines += [f'## After {tuned[0]["steps"]} steps of training from the unreduced model', '',
              *table(tuned, wanted, score), '']
  failed = [row for row in means if row.get('nll') is None]
  if failed:
    lines += ['## What could not be measured', '',
              *(f'- `{row["method"]}`, {row["budget"]}'
                f'{", trained" if row["steps"] else ""}: {row["note"]}' for row in failed), '']
  return '\n'.join(lines)


def introduction(rows: Sequence[Row], wanted: ConfigDict) -> list[str]:
  """Returns the lines above the tables: how the study was made, where, and in what time."""
  seconds = sum(row.get('seconds', 0.0) for row in rows)
  machine = rows[0]
  return [
      f'# {wanted.title}', '',
      f'Seeds {", ".join(map(str, wanted.seeds))}, each another initialisation and another order '
      'of the data. Mean ± standard deviation over seeds. NLL is the mean cross-entropy on the '
      f'test images. The last columns compare with `{wanted.reference}` at equal MACs, seed by '
      'seed: interpolated linearly between what was measured of it in the same layers (and the '
      'unreduced model). Negative NLL differences are better. Sorted by NLL; baselines are in '
      'italics.', '',
      f'{machine["cpu"]}, {machine["cores"]} core{"s" * (machine["cores"] > 1)}, '
      f'jax {machine["jax"]}, float32, {machine["date"]}; {seconds / 60:.0f} minutes of '
      'measuring beside training the unreduced models. MACs are those of the model '
      'alone, at the capacity of methods whose count of tokens depends on the image.', '']


def place(wanted: ConfigDict, budget: str) -> str:
  """Says where the patches of a budget are cut."""
  for cut in (*wanted.budgets, *wanted.lower):
    if cut['budget'] == budget:
      return (f'{", ".join(map(str, cut["keep"]))} patches left in '
              f'layer{"s" * (len(cut["layers"]) > 1)} {", ".join(map(str, cut["layers"]))}.')
  return 'Nothing is reduced.'


def table(rows: Sequence[Row], wanted: ConfigDict, score: str) -> list[str]:
  """Lays out summaries as a Markdown table, best NLL first."""
  shown = []
  for row in sorted((row for row in rows if row.get('nll') is not None),
                    key=lambda row: row['nll']):
    name = f'*{row["method"]}*' if row['method'] in wanted.baselines else row['method']
    shown.append({
        'method': name + (' (untrained)' if row['note'] == UNTRAINED else ''),
        'budget': row['budget'], 'tokens left': f'{row["tokens_left"]:.1f}',
        'MMACs': f'{1e3 * row["gmacs"]:.1f}',
        f'{score} %': f'{100 * row[score]:.2f} ± {100 * row[f"{score}_sd"]:.2f}',
        'NLL': f'{row["nll"]:.3f} ± {row["nll_sd"]:.3f}',
        f'{score} apart': signed(row[f'{score}_apart'], 100, 2),
        'NLL apart': signed(row['nll_apart'], 1, 3),
        f'against {wanted.reference}': verdict(row, wanted.reference)})
  return [tables.markdown(shown, list(shown[0]))] if shown else ['Nothing was measured.']


def signed(values: Sequence[float], scale: float, decimals: int) -> str:
  """Shows mean and spread of differences with their sign, '' where there are none."""
  if not values or any(np.isnan(values)):
    return ''
  mean, spread = scale * statistics.mean(values), scale * deviation(values)
  return f'{mean:+.{decimals}f} ± {spread:.{decimals}f}'


def plot(rows: Sequence[Row], path: pathlib.Path, config: ConfigDict) -> None:
  """Draws score and cross-entropy over MACs: curves without training, points after it."""
  wanted, own = config.study, metric_of(config).score
  drawn = [row for row in summaries(rows, reference=wanted.reference, score=own)
           if row.get('nll') is not None]
  figure = Figure(figsize=(15, 12), dpi=130, layout='constrained')
  FigureCanvasAgg(figure)
  figure.suptitle(wanted.title, fontsize=15, fontweight='bold', x=0.02, ha='left')
  panels = figure.subplots(2, 2)
  tuned = [row for row in drawn if row['steps']]
  # One curve a method: the budgets that cut where the first one does, and what is not cut at all.
  where = (str(tuple(wanted.budgets[0]['layers'])), 'all')
  plain = [row for row in drawn if not row['steps'] and row['note'] != UNTRAINED
           and row['layers'] in where]
  for line, score in zip(panels, (own, 'nll'), strict=True):
    for axes, part, when in zip(line, (plain, tuned), ('without training', 'after training'),
                                strict=True):
      draw(axes, part, score, wanted)
      axes.set_title(f'{"cross-entropy" if score == "nll" else score}, {when}', loc='left',
                     fontsize=12)
  figure.savefig(path)


def ordinate(row: Row, score: str) -> float:
  """Returns a summary's height: a score as its error, whose logarithm spreads what is near 1."""
  return row['nll'] if score == 'nll' else max(1 - row[score], 1e-4)


def draw(axes: Axes, rows: Sequence[Row], score: str, wanted: ConfigDict) -> None:
  """Draws one panel: a line or point a method, each named at its cheapest."""
  lines: dict[str, list[Row]] = {}
  for row in rows:
    lines.setdefault(row['method'], []).append(row)
  whole = lines.pop('none', [])
  ends: Ends = {}
  for number, (name, line) in enumerate(lines.items()):
    line = sorted(line + (whole if len(line) > 1 else []), key=lambda row: row['gmacs'])
    base = name in wanted.baselines
    colour = 'black' if base else plots.COLOURS[number % len(plots.COLOURS)]
    x, y = [1e3 * row['gmacs'] for row in line], [ordinate(row, score) for row in line]
    axes.plot(x, y, color=colour, linestyle='--' if base else '-', linewidth=1.6 if base else 1.1,
              marker=list(plots.MARKERS)[number % len(plots.MARKERS)], markersize=4)
    ends[name] = x[0], y[0], colour
  for row in whole:
    axes.plot([1e3 * row['gmacs']], [ordinate(row, score)], '*', color='black', markersize=14)
  axes.set_yscale('log')
  if score != 'nll':
    axes.invert_yaxis()
  for show in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
    show(FuncFormatter(lambda value, _: f'{value:.3g}' if score == 'nll'
                       else f'{100 * (1 - value):.4g} %'))
  if ends:
    axes.set_xlabel('MMACs an image')
    name_ends(axes, ends)


def name_ends(axes: Axes, ends: Ends) -> None:
  """Writes names left of the data, each joined to its end, and makes room for them."""
  left, right = axes.get_xlim()
  axes.set_xticks([tick for tick in axes.get_xticks() if left <= tick <= right])
  axes.set_xlim(left - 0.45 * (right - left), right)
  axes.figure.draw_without_rendering()
  to_screen, from_screen = axes.transData, axes.transData.inverted()
  low, high = axes.bbox.y0, axes.bbox.y1
  gap = min(11 * axes.figure.dpi / 72, (high - low) / (len(ends) + 1))
  heights = plots.spread([to_screen.transform(end[:2])[1] for end in ends.values()], gap,
                         low + gap / 2, high - gap / 2)
  start = axes.bbox.x0 + 6
  for (name, (x, y, colour)), height in zip(ends.items(), heights, strict=True):
    axes.annotate(name, (x, y), xytext=from_screen.transform((start, height)), fontsize=8,
                  color=colour, va='center', arrowprops={
                      'arrowstyle': '-', 'color': colour, 'linewidth': 0.4, 'alpha': 0.6})


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
