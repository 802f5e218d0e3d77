"""Compares methods over seeds: as they are on a trained model, and after a short training.

  python -m tools.study --config=configs/digits_study.py --workdir=runs/study

Trains the unreduced model once a seed, evaluates every method on it under several budgets, then
trains every method a little from it and evaluates again. Each program is compiled once and run for
all seeds. Writes a JSON line a method, budget and seed (rows that are there are not made again), a
table in Markdown and a plot; where a method stands is told by its distance from a baseline at equal
cost, seed by seed.

Axes: B batch, N slots, C classes.
"""

import dataclasses
import functools
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from ml_collections import ConfigDict
from tqdm import tqdm

import train
from configs.common import reduction
from lib.cost import vit as vit_cost
from lib.data import images as image_data
from lib.report import plots, tables
from lib.report.rows import append_jsonl, read_jsonl
from lib.runtime import cli, launch, sharding, timing
from lib.tasks import image_sweep
from lib.tasks.base import sum_counts
from lib.tasks.image_metrics import metric_of
from models.build import build
from models.compressors import COMPRESSORS
from models.plan import methods
from models.storage import fastest_storage, to_storage

UNTRAINED = 'its own parameters are untrained'


@dataclasses.dataclass(frozen=True)
class Entry:
  """One thing to measure for every seed.

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

  def key(self, seed):
    """What makes a row the same measurement."""
    reduce = self.config.reduce.vision
    return (self.name, self.budget, seed, str(reduce.layers), str(reduce.keep),
            self.training.total_steps if self.training else 0)


def main(argv):
  """Measures what is missing, then reports."""
  del argv
  launch.start()
  study(launch.CONFIG.value, pathlib.Path(launch.WORKDIR.value))


def study(config, workdir):
  """All rows of a study, made or read, and its report."""
  path = pathlib.Path(f'{config.study.results}.jsonl')
  rows = read_jsonl(path) if path.exists() else []
  known = {row_key(row) for row in rows}
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  trained = {seed: unreduced(config, workdir / f'seed_{seed}', seed, mesh)
             for seed in config.study.seeds}
  for entry in tqdm(list(entries(config)), disable=not sys.stderr.isatty(), unit='entry'):
    missing = [seed for seed in config.study.seeds if entry.key(seed) not in known]
    if missing:
      for row in measured(entry, {seed: trained[seed] for seed in missing}, mesh):
        append_jsonl(path, row)
        rows.append(row)
  wanted = {entry.key(seed) for entry in entries(config) for seed in config.study.seeds}
  rows = [row for row in rows if row_key(row) in wanted]
  path.with_suffix('.md').write_text(text(rows, config))
  plot(rows, path.with_suffix('.png'), config)
  print(f'{path.with_suffix(".md")} and {path.with_suffix(".png")} made of {len(rows)} rows')


def row_key(row):
  """`Entry.key` of a row that is there."""
  return (row['method'], row['budget'], row['seed'], row['layers'], row['keep'], row['steps'])


# -- what to measure -----------------------------------------------------------------------------


def entries(config):
  """All entries of a study: without training, then with."""
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


def reduced(config, method, budget):
  """A copy of a config, reduced by a method under a budget (None for no reduction)."""
  made = ConfigDict(config.to_dict())
  given = {}
  if budget is not None and method != 'none':
    args = config.study.overrides.get(method, {})
    given = {'layers': tuple(budget['layers']), 'keep': tuple(budget['keep']), 'args': dict(args)}
  made.reduce = {'vision': reduction(method, **given)}
  return made


def smaller(config, side):
  """A copy of a config for images of another size."""
  made = ConfigDict(config.to_dict())
  made.model.image_size = made.data.image_size = side
  return made


def untouched(config, method, budget):
  """A method on the unreduced model's parameters."""
  label = '100 %' if budget is None else budget['budget']
  return Entry(method, label, reduced(config, method, budget))


def trained_entry(config, recipe, budgets):
  """A method after a short training; `recipe` as configs/digits_study.py describes."""
  recipe = dict(recipe)
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


def unreduced(config, workdir, seed, mesh):
  """The averaged parameters of the unreduced model of a seed, trained where need be."""
  config = reduced(config, 'none', None)
  config.seed = seed
  if not train.run(config, workdir, first=True):
    sys.exit('stopped; the same command goes on from there')
  return image_sweep.load(config, workdir, mesh)[1]


def measured(entry, trained, mesh):
  """Yields a row a seed: {seed: parameters of the unreduced model} -> rows."""
  about = {'method': entry.name, 'budget': entry.budget,
           'layers': str(entry.config.reduce.vision.layers),
           'keep': str(entry.config.reduce.vision.keep),
           'steps': entry.training.total_steps if entry.training else 0}
  run, made = None, None
  for seed, params in trained.items():
    row = {**about, 'seed': seed}
    start = time.perf_counter()
    try:
      vit = build(entry.config.model, entry.config.reduce.vision, macs=vit_cost.solver,
                  task=entry.config.get('task'))
      if entry.training:
        made = made or train.setup(entry.training, mesh)
        params = tuned(made, entry, params, seed, mesh)
      params = image_sweep.complete(vit, params, seed=seed)
      params = to_storage(params, fastest_storage(vit.plan, platform=mesh.devices.flat[0].platform))
      batches = test_batches(entry.config)
      run = run or image_sweep.compiled(vit, params, jnp.asarray(batches[0]['image']))[0]
      row |= judged(functools.partial(run, params), vit, batches, metric_of(entry.config))
      learned = entry.config.reduce.vision.method in COMPRESSORS and not entry.training
      row['note'] = UNTRAINED if learned else ''
    except (ValueError, FloatingPointError) as reason:  # Ends only the rows of this entry.
      row['note'] = ' '.join(str(reason).split())
    yield row | {'seconds': round(time.perf_counter() - start, 1), **timing.machine()}


def tuned(made, entry, params, seed, mesh):
  """The averaged parameters after the entry's training, from those of the unreduced model."""
  config, key = entry.training, jax.random.key(seed)
  start = image_sweep.complete(made.learner.model, params, seed=seed)
  zero = jnp.zeros((), jnp.int32)
  # Copied: each step takes the state's memory, and the unreduced model is needed again.
  state = jax.tree.map(jnp.copy, train.TrainState(zero, start, made.optimizer.init(start), start))
  state = jax.device_put(state, made.places)
  iterator = image_data.train_iterator(config.data, seed=seed)
  teacher = params if entry.taught else None
  for step in range(1, config.total_steps + 1):
    batch = sharding.put(next(iterator), mesh)
    state, scalars = made.train_step(step - 1)(state, batch, key, teacher)
  iterator.close()
  train.check_finite({name: float(value) for name, value in scalars.items()},
                     config.total_steps, config, pathlib.Path())
  return state.ema


def test_batches(config):
  """The test split of a config, in the study's batches."""
  settings = ConfigDict(config.data.to_dict())
  settings.batch_size = config.study.eval_batch_size
  return list(image_data.eval_batches(settings))


def judged(run, vit, batches, task):
  """The task's score, mean cross-entropy, tokens and cost: fields of a row."""
  counts, logits, labels, left = [], [], [], []
  for batch in batches:
    there = batch['mask'] > 0
    answer, cuts = jax.device_get(run(batch['image']))
    counts.append(task.counts(jnp.asarray(answer), batch['label'], batch['mask']))
    logits.append(answer[there])
    labels.append(batch['label'][there])
    if cuts:
      left.append(cuts[max(cuts)].real.sum(1)[there])
  logits, labels = np.concatenate(logits), np.concatenate(labels)
  tokens = np.concatenate(left).mean() if left else vit.host.slots
  return {task.score: task.total(sum_counts(counts)), 'nll': nll(logits, labels),
          'tokens_left': float(tokens), 'gmacs': vit_cost.of(vit).macs / 1e9}


def nll(logits, labels):
  """Mean negative log-likelihood of int[...] labels under float[..., C] logits."""
  logits, labels = logits.reshape(-1, logits.shape[-1]).astype(np.float64), labels.reshape(-1)
  shifted = logits - logits.max(-1, keepdims=True)
  logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  return float(-logs[np.arange(len(labels)), labels].mean())


# -- reporting -----------------------------------------------------------------------------------


def summaries(rows, *, reference, score):
  """Rows of all seeds as one row a method and budget.

  Each seed is compared with the reference's own rows of that seed, of equal training and the same
  layers, at equal cost: linearly between its neighbours in MACs, the unreduced model included.
  Outside of what the reference was measured at there is no difference to tell. `score` is what the
  task's is called.
  """
  curves = {}
  for row in rows:
    if row.get('nll') is not None and row['method'] in (reference, 'none'):
      curves.setdefault((row['seed'], row['steps'] > 0, row['layers'], row['method']),
                        []).append(row)
  groups = {}
  for row in rows:
    groups.setdefault((row['method'], row['budget'], row['steps']), []).append(row)
  for (method, budget, steps), group in groups.items():
    first = group[0]
    made = {'method': method, 'budget': budget, 'steps': steps, 'layers': first['layers'],
            'note': first['note'], 'seconds': sum(row['seconds'] for row in group)}
    good = [row for row in group if row.get('nll') is not None]
    if good:
      made |= {name: statistics.mean(row[name] for row in good)
               for name in (score, 'nll', 'gmacs', 'tokens_left')}
      made |= {f'{name}_sd': statistics.stdev(row[name] for row in good) if len(good) > 1 else 0.0
               for name in (score, 'nll')}
      layers = next((row['layers'] for row in rows if row['budget'] == budget
                     and row['method'] == reference), first['layers'])
      for name in (score, 'nll'):
        apart = [row[name] - at_equal_cost(curves, row, layers, reference, name) for row in good]
        made[f'{name}_apart'] = apart
    yield made


def at_equal_cost(curves, row, layers, reference, name):
  """The reference's value at a row's cost, NaN outside of its curve."""
  found = [point for (seed, tuned, where, method), points in curves.items()
           for point in points if seed == row['seed'] and tuned == (row['steps'] > 0)
           and (method == 'none' or where == layers)]
  points = {point['gmacs']: point[name] for point in found}
  costs = sorted(points)
  if not costs or not costs[0] <= row['gmacs'] <= costs[-1]:
    return float('nan')
  return float(np.interp(row['gmacs'], costs, [points[each] for each in costs]))


def verdict(row, reference):
  """How a summary stands to the reference by cross-entropy, in words."""
  apart = row.get('nll_apart', [])
  if row['method'] in ('none', reference):
    return ''
  if not apart or any(np.isnan(apart)):
    return f'outside {reference}\'s costs' if apart else ''
  better = sum(value < 0 for value in apart)
  if better in (0, len(apart)):
    return 'better in every seed' if better else 'worse in every seed'
  return f'better in {better} of {len(apart)} seeds'


def text(rows, config):
  """The report: one table for each budget without training, one for the trained ones."""
  wanted, score = config.study, metric_of(config).score
  made = list(summaries(rows, reference=wanted.reference, score=score))
  machine = rows[0]
  seconds = sum(row['seconds'] for row in rows)
  lines = [
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
  whole = [row for row in made if row['method'] == 'none']
  for budget in ('100 %', *dict.fromkeys(
      row['budget'] for row in made if row['budget'] != '100 %' and not row['steps'])):
    part = [row for row in made if row['budget'] == budget and not row['steps']]
    lines += [f'## Without training: {budget}', '', place(wanted, budget), '',
              *table(part + [row for row in whole if not row['steps'] and row not in part],
                     wanted, score), '']
  tuned = [row for row in made if row['steps']]
  if tuned:
    lines += [f'## After {tuned[0]["steps"]} steps of training from the unreduced model', '',
              *table(tuned, wanted, score), '']
  failed = [row for row in made if row.get('nll') is None]
  if failed:
    lines += ['## What could not be measured', '',
              *(f'- `{row["method"]}`, {row["budget"]}'
                f'{", trained" if row["steps"] else ""}: {row["note"]}' for row in failed), '']
  return '\n'.join(lines)


def place(wanted, budget):
  """Where the patches of a budget are cut."""
  for known in (*wanted.budgets, *wanted.lower):
    if known['budget'] == budget:
      return (f'{", ".join(map(str, known["keep"]))} patches left in '
              f'layer{"s" * (len(known["layers"]) > 1)} {", ".join(map(str, known["layers"]))}.')
  return 'Nothing is reduced.'


def table(rows, wanted, score):
  """A Markdown table of summaries, best NLL first."""
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


def signed(values, scale, decimals):
  """Mean and spread of differences with their sign, '' where there are none."""
  if not values or any(np.isnan(values)):
    return ''
  spread = statistics.stdev(values) if len(values) > 1 else 0.0
  return f'{scale * statistics.mean(values):+.{decimals}f} ± {scale * spread:.{decimals}f}'


def plot(rows, path, config):
  """Score and cross-entropy over MACs: curves without training, points after it."""
  wanted, own = config.study, metric_of(config).score
  made = [row for row in summaries(rows, reference=wanted.reference, score=own)
          if row.get('nll') is not None]
  figure = Figure(figsize=(15, 12), dpi=130, layout='constrained')
  FigureCanvasAgg(figure)
  figure.suptitle(wanted.title, fontsize=15, fontweight='bold', x=0.02, ha='left')
  panels = figure.subplots(2, 2)
  tuned = [row for row in made if row['steps']]
  # One curve a method: the budgets that cut where the first one does, and what is not cut at all.
  where = (str(tuple(wanted.budgets[0]['layers'])), 'all')
  plain = [row for row in made if not row['steps'] and row['note'] != UNTRAINED
           and row['layers'] in where]
  for line, score in zip(panels, (own, 'nll'), strict=True):
    for axes, part, what in zip(line, (plain, tuned), ('without training', 'after training'),
                                strict=True):
      draw(axes, part, score, wanted)
      axes.set_title(f'{"cross-entropy" if score == "nll" else score}, {what}', loc='left',
                     fontsize=12)
  figure.savefig(path)


def ordinate(row, score):
  """Where a summary is drawn: a score as its error, whose logarithm spreads what is near 1."""
  return row['nll'] if score == 'nll' else max(1 - row[score], 1e-4)


def draw(axes, rows, score, wanted):
  """One panel: a line or point a method, each named at its cheapest."""
  lines = {}
  for row in rows:
    lines.setdefault(row['method'], []).append(row)
  whole = lines.pop('none', [])
  colours = plots.COLOURS
  ends = {}
  for number, (name, line) in enumerate(lines.items()):
    line = sorted(line + (whole if len(line) > 1 else []), key=lambda row: row['gmacs'])
    base = name in wanted.baselines
    style = {'color': 'black' if base else colours[number % len(colours)],
             'linestyle': '--' if base else '-', 'linewidth': 1.6 if base else 1.1,
             'marker': list(plots.MARKERS)[number % len(plots.MARKERS)], 'markersize': 4}
    x, y = [1e3 * row['gmacs'] for row in line], [ordinate(row, score) for row in line]
    axes.plot(x, y, **style)
    ends[name] = x[0], y[0], style['color']
  for row in whole:
    axes.plot([1e3 * row['gmacs']], [ordinate(row, score)], '*', color='black', markersize=14)
  axes.set_yscale('log')
  if score != 'nll':
    axes.invert_yaxis()
  for show in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
    show(FuncFormatter(lambda value, _: f'{value:.3g}' if score == 'nll'
                       else f'{100 * (1 - value):.4g} %'))
  if not ends:
    return
  axes.set_xlabel('MMACs an image')
  left, right = axes.get_xlim()
  axes.set_xticks([tick for tick in axes.get_xticks() if left <= tick <= right])
  axes.set_xlim(left - 0.45 * (right - left), right)
  axes.figure.draw_without_rendering()
  to_screen, from_screen = axes.transData, axes.transData.inverted()
  low, high = axes.bbox.y0, axes.bbox.y1
  names = list(ends)
  gap = min(11 * axes.figure.dpi / 72, (high - low) / (len(names) + 1))
  wanted_heights = [to_screen.transform(ends[name][:2])[1] for name in names]
  heights = plots.spread(wanted_heights, gap, low + gap / 2, high - gap / 2)
  start = axes.bbox.x0 + 6
  for name, height in zip(names, heights, strict=True):
    x, y, colour = ends[name]
    place = from_screen.transform((start, height))
    axes.annotate(name, (x, y), xytext=place, fontsize=8, color=colour, va='center',
                  arrowprops={'arrowstyle': '-', 'color': colour, 'linewidth': 0.4, 'alpha': 0.6})


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
