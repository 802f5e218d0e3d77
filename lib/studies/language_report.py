"""Tells what a study of a language model has found: tables in Markdown, and a plot.

Rows are those of lib/studies/language.py. All comparisons are paired: a row's values are compared
with another's of the same texts or keys; divergences and NLLs of keys by their ratio, since some
texts are harder for all. A table's marks hold together at 95 % (Bonferroni's): a row is marked
where it differs from chance at its own budget.
"""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lib.report.intervals import Difference, paired, wilson
from lib.report.measuring import measured
from lib.report.plots import COLOURS, GREYS, MARKERS, spread
from lib.report.rows import Row
from lib.report.tables import markdown_lines

# {(name, share): {sample: value}}; a sample is a text, or a key that is asked for.
Values = Mapping[tuple[str, float], Mapping[tuple[Any, ...], float]]
CONFIDENCE = 0.95
FULL, BASE = ('full', 1.0), 'chance'
BEST = 3  # Of each share and place, named in the plot.
INSIDE, BEHIND = ('pass_key', 'two_keys'), ('several',)
BETTER, WORSE = '▼', '▲'
TINY = 1e-6
# Shares that differ by less are taken for the same.
NEAR = 0.03
# The logarithm of the largest ratio that is told.
MOST = 7.0


def report(rows: Sequence[Row]) -> str:
  """Returns tables of all that was measured, in Markdown.

  Args:
    rows: as measured; those that failed are told at the end. `versus` names what a row is compared
      with beside chance.
  """
  failed = [row for row in rows if row.get('failed')]
  rows = measured(rows)
  loss, divergence = _loss(rows), _of_texts(rows, 'kl')
  keys, told = (_recall(rows, name, (*INSIDE, *BEHIND)) for name in ('nll', 'told'))
  kept = _costs(rows, 'kept')
  parts = [
      ('Loss behind a cut prefix', 'NLL above the unreduced model\'s in nats (0.1 is 10 % of '
       'perplexity), with the half-width of its 95 % interval over texts; '
       + _legend('loss'), _table(loss, _mean, _marks(loss, _difference), kept)),
      ('Divergence', 'KL from the unreduced model\'s next-token distributions, in nats; '
       + _legend('divergence'), _table(divergence, _mean, _marks(divergence, _ratio), kept)),
      ('Greedy tokens', 'Share of the tokens that the unreduced model adds greedily which are '
       'still the likeliest in their place.',
       _table(_of_texts(rows, 'agreement'), _mean, {}, kept))]
  for title, kinds in (('Keys told, question in the cut prompt', INSIDE),
                       ('Keys told, question behind the cut cache', BEHIND)):
    parts.append((title, 'Share of keys, with Wilson\'s 95 % interval; marked where the NLL of '
                  'their digits differs from chance.',
                  _table(_recall(rows, 'told', kinds), _share,
                         _marks(_recall(rows, 'nll', kinds), _ratio), kept)))
  for share in sorted({share for _, share in told if share < 1}, reverse=True):
    for part, place in (('length', 0), ('depth', 3)):
      parts.append((f'Keys told by {part}, {share:.0%} kept', 'Both places of the question.',
                    _by(told, place, share)))
  parts += [('One against another', 'Paired ratios, the first over the second, with 95 % '
             'intervals; below 1 is better. * marks an interval without 1, and ** one that is '
             'without it where all of this table hold together.', _pairs(
                 rows, divergence, keys)),
            ('Kept at a capacity from token to token', '', _windows(rows)),
            ('Latency', 'Beside the unreduced model\'s, in turns.', _latency(rows)),
            ('Not measured', '', '\n'.join(dict.fromkeys(
                f'* {row["name"]}, {row["share"]:.0%}: {row["note"]}' for row in failed)))]
  return '\n\n'.join('\n\n'.join(filter(None, (f'## {title}', text, table.strip())))
                     for title, text, table in parts if table) + '\n'


def draw(rows: Sequence[Row], path: Path) -> None:
  """Draws loss and keys told against what is kept, and loss against latency.

  The best of each share and place are named, and those by chance.

  Raises:
    ValueError: nothing to draw.
  """
  rows = measured(rows)
  loss, told = _loss(rows), _recall(rows, 'told', (*INSIDE, *BEHIND))
  if not loss and not told:
    raise ValueError('nothing to draw: no row has a loss or keys')
  panels = [('loss behind a cut prefix, nats', loss, 'kept', 'share of the cache that is kept'),
            ('keys told', told, 'kept', 'share of the cache that is kept')]
  if any(row['measure'] == 'latency' for row in rows):
    panels.append(('loss behind a cut prefix, nats', loss, 'later_share',
                   'time of a later token, share of the unreduced'))
  figure = Figure(figsize=(7.5 * len(panels), 7), dpi=110, layout='constrained')
  FigureCanvasAgg(figure)
  for axes, (title, values, cost, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0],
                                                panels, strict=True):
    costs = _costs(rows, cost)
    if values is loss:
      axes.set_yscale('symlog', linthresh=0.02)
    _panel(axes, _lines(values, costs), _best(rows, values, worst_first=values is told),
           _by_chance(rows), statistics.fmean(values[FULL].values()) if FULL in values else None)
    axes.set_title(title, loc='left', fontsize=13, fontweight='bold')
    axes.set_xlabel(label)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)


def _by_chance(rows: Sequence[Row]) -> set[str]:
  """Names of rows that no method ranks, and of those that methods in the model compare with."""
  return {row['name'] for row in rows if row['ranking'] != 'own'} | {
      row['versus'] for row in rows if row['where'] == 'model'}


def _best(rows: Sequence[Row], values: Values, *, worst_first: bool) -> list[str]:
  """Names the best of each share and place, in order."""
  ranked = collections.defaultdict(list)
  places = {(row['name'], row['share']): row['where'] for row in rows}
  kept, chance = _costs(rows, 'kept'), _by_chance(rows)
  for key, own in values.items():
    # What keeps more than it was told to is not compared.
    if places[key] and kept.get(key, key[1]) < key[1] + NEAR and key[0] not in chance:
      ranked[key[1], places[key]].append((statistics.fmean(own.values()), key[0]))
  best = [name for _, own in sorted(ranked.items(), reverse=True)
          for _, name in sorted(own, reverse=worst_first)[:BEST]]
  return list(dict.fromkeys(best))


def _of_texts(rows: Sequence[Row], name: str) -> Values:
  return _collected(((row, ('', text), value) for row in rows if row['measure'] == 'perplexity'
                     for text, value in enumerate(row[name])))


def _loss(rows: Sequence[Row]) -> Values:
  """NLL above that of the unreduced model on the same text."""
  nll = _of_texts(rows, 'nll')
  full = nll.get(FULL, {})
  return {key: {sample: value - full[sample] for sample, value in own.items() if sample in full}
          for key, own in nll.items()}


def _recall(rows: Sequence[Row], name: str, kinds: Sequence[str]) -> Values:
  return _collected(((row, (kind, depth), value) for row in rows
                     if row['measure'] == 'recall' for kind in kinds
                     for depth, value in zip(row['depths'], row[name].get(kind, ()), strict=False)))


def _collected(found: Iterable[tuple[Row, tuple[Any, ...], float]]) -> Values:
  values: dict[tuple[str, float], dict[tuple[Any, ...], float]] = collections.defaultdict(dict)
  for row, place, value in found:
    values[row['name'], row['share']][row['length'], row['draw'], *place] = value
  return values


def _difference(one: Mapping[Any, float], other: Mapping[Any, float]) -> Difference | None:
  """The paired difference over samples that both have, None with less than two."""
  both = sorted(one.keys() & other.keys(), key=str)
  if len(both) < 2:
    return None
  return paired(np.array([one[sample] for sample in both]),
                np.array([[other[sample] for sample in both]]))


def _ratio(one: Mapping[Any, float], other: Mapping[Any, float]) -> Difference | None:
  """The same of logarithms, of positive values."""
  return _difference(*({sample: math.log(max(value, TINY)) for sample, value in own.items()}
                       for own in (one, other)))


def _marks(values: Values, compare: Callable[..., Difference | None],
           ) -> dict[tuple[str, float], str]:
  """Says which rows differ from chance at their share."""
  found = {key: difference for key, own in values.items() if key != FULL and key[0] != BASE
           and (difference := compare(own, values.get((BASE, key[1]), {})))}
  marks = {}
  for key, difference in found.items():
    low, high = difference.interval(1 - (1 - CONFIDENCE) / len(found))
    marks[key] = BETTER if high < 0 else WORSE if low > 0 else ''
  return marks


def _legend(what: str) -> str:
  return f'{BETTER} {what} below chance at the same budget, {WORSE} above.'


def _mean(values: Sequence[float]) -> str:
  if len(values) < 2:
    return f'{values[0]:.3f}'
  low, high = paired(np.array(values), np.zeros((1, len(values)))).interval(CONFIDENCE)
  return f'{statistics.fmean(values):.3f} ± {(high - low) / 2:.3f}'


def _share(values: Sequence[float]) -> str:
  low, high = wilson(sum(values), len(values), CONFIDENCE)
  return f'{statistics.fmean(values):.2f} ({low:.2f}–{high:.2f})'


def _table(values: Values, show: Callable[[Sequence[float]], str],
           marks: Mapping[tuple[str, float], str],
           kept: Mapping[tuple[str, float], float]) -> str:
  """A line a name, by its mean, and a column a share; a cell tells of another share kept."""
  shares = sorted({share for _, share in values if share < 1}, reverse=True)

  def cell(key: tuple[str, float]) -> str:
    if key not in values:
      return ''
    other = abs(kept.get(key, key[1]) - key[1]) > NEAR
    return ' '.join(filter(None, (show(list(values[key].values())), marks.get(key, ''),
                                  f'(keeps {kept[key]:.0%})' if other else '')))

  if not shares:
    return ''
  # By the share that most rows have, the smallest of several.
  common = max(reversed(shares), key=[share for _, share in values].count)
  names = sorted(dict.fromkeys(name for name, _ in values), key=lambda name: (
      name != FULL[0], statistics.fmean(values.get((name, common), {None: math.inf}).values())))
  return _markdown(['', *(f'{share:.0%}' for share in shares)], [
      [name, *(cell(FULL if name == FULL[0] else (name, share)) for share in shares)]
      for name in names])


def _by(values: Values, place: int, share: float) -> str:
  """A line a name at one share, and a column for each value of a part of the samples."""
  columns = sorted({sample[place] for own in values.values() for sample in own})
  if len(columns) < 2:
    return ''
  return _markdown(['', *map(str, columns)], [
      [name, *(f'{statistics.fmean(those):.2f} of {len(those)}' if (those := [
          value for sample, value in own.items() if sample[place] == column]) else ''
               for column in columns)]
      for (name, own_share), own in values.items() if own_share in (share, 1.0)])


def _pairs(rows: Sequence[Row], divergence: Values, keys: Values) -> str:
  """Paired ratios of rows to those that they name."""
  asked = dict.fromkeys((row['name'], row['versus'], row['share']) for row in rows
                        if row['versus'] not in ('', row['name']))
  confidence = 1 - (1 - CONFIDENCE) / max(2 * len(asked), 1)
  lines = []
  for one, other, share in asked:
    found = [_ratio(values.get((one, share), {}), values.get((other, share), {}))
             for values in (divergence, keys)]
    if any(found):
      lines.append([one, other, f'{share:.0%}', *(
          _ends(difference, confidence) if difference else '' for difference in found)])
  return _markdown(['', 'against', 'kept', 'KL', 'NLL of keys'], lines)


def _ends(difference: Difference, together: float) -> str:
  ends, wide = (difference.interval(confidence) for confidence in (CONFIDENCE, together))
  low, high = (math.exp(max(min(end, MOST), -MOST)) for end in ends)
  stars = '*' * sum(below > 0 or above < 0 for below, above in (ends, wide))
  return f'{math.exp(difference.mean):.2f} ({low:.2f} to {high:.2f}) {stars}'.rstrip()


def _windows(rows: Sequence[Row]) -> str:
  lines = [[row['name'], f'{math.exp(statistics.fmean(row["nll"])):.1f}']
           for row in rows if row['measure'] == 'windows']
  return _markdown(['', 'perplexity'], lines)


def _latency(rows: Sequence[Row]) -> str:
  lines = [[row['name'], f'{row["share"]:.0%}', f'{row["kept"]:.2f}', f'{row["first_ms"]:.0f}',
            f'{row["first_share"]:.2f}', f'{row["later_ms"]:.1f}', f'{row["later_share"]:.2f}']
           for row in rows if row['measure'] == 'latency']
  return _markdown(['', 'kept', 'kept', 'ms to the first token', 'share',
                              'ms a later token', 'share'], lines)


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  """A table; nothing without lines."""
  return markdown_lines(head, lines) if lines else ''


def _costs(rows: Sequence[Row], name: str) -> dict[tuple[str, float], float]:
  """Averages a cost of each name and share over all rows that say it."""
  found = collections.defaultdict(list)
  for row in rows:
    if name in row and (row['measure'] == 'latency') == (name == 'later_share'):
      found[row['name'], row['share']].append(row[name])
  return {key: statistics.fmean(costs) for key, costs in found.items()}


def _lines(values: Values, costs: Mapping[tuple[str, float], float],
           ) -> dict[str, list[tuple[float, float]]]:
  """Points of a line a name, by cost."""
  lines = collections.defaultdict(list)
  for key, own in values.items():
    if key in costs and own:
      lines[key[0]].append((costs[key], statistics.fmean(own.values())))
  return {name: sorted(points) for name, points in lines.items()}


def _panel(axes: Axes, lines: Mapping[str, Sequence[tuple[float, float]]],
           best: Sequence[str], chance: set[str], full: float | None) -> None:
  """Draws a line a name; the best and those by chance are named at their cheapest points."""
  styles = {name: (COLOURS[i % len(COLOURS)], list(MARKERS)[i // len(COLOURS) % len(MARKERS)])
            for i, name in enumerate(best)}
  named = []
  for name, points in lines.items():
    by_chance = name in chance
    if name == FULL[0]:
      continue
    if not by_chance and name not in styles:
      axes.plot(*zip(*points, strict=True), color=GREYS[1], marker='.', markersize=3,
                linewidth=0.5, alpha=0.6)
      continue
    colour, marker = ('black', 'x') if by_chance else styles[name]
    axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=6,
              linestyle='--' if by_chance else '-', linewidth=1.3)
    named.append((name, points[0], colour))
  if full is not None:
    axes.axhline(full, color='black', linewidth=1, linestyle=(0, (1, 2)))
    axes.annotate('unreduced', (1, full), xycoords=('axes fraction', 'data'), ha='right',
                  va='bottom', fontsize=9)
  lowest = min((y for points in lines.values() for _, y in points), default=0.0)
  axes.set_ylim(bottom=min(lowest, 0.0) - 0.001)
  named.sort(key=lambda each: each[1][1])
  inside = axes.transData + axes.transAxes.inverted()
  heights = spread([inside.transform(point)[1] for _, point, _ in named], 1 / 28, 0.0, 1.0)
  for (name, point, colour), height in zip(named, heights, strict=True):
    axes.annotate(name, point, xytext=(-0.04, height), textcoords='axes fraction',
                  ha='right', va='center', fontsize=9, color=colour, annotation_clip=False,
                  arrowprops={'arrowstyle': '-', 'color': colour, 'linewidth': 0.5, 'alpha': 0.5})
  axes.grid(color='#e6e6e6', linewidth=0.8)
  axes.yaxis.tick_right()
  axes.spines[['top', 'left']].set_visible(False)
