"""Tables and a plot of what reductions cost a pretrained vision tower (lib/studies/vision.py)."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lib.report.intervals import Difference, paired, wilson
from lib.report.measuring import measured
from lib.report.plots import COLOURS, GREYS, spread
from lib.report.rows import Row
from lib.report.tables import markdown_lines

# By name: the column's title, and whether its mean is a share.
MEASURES = {'probe': ('probe %', True), 'neighbours': ('5 neighbours %', True),
            'recall': ('emoji R@1 %', True), 'reciprocal': ('MRR', False)}
UP, DOWN = '▲', '▼'


def report(rows: Sequence[Row]) -> str:
  """Returns Markdown: a table for each budget, its methods in the order of their mean rank.

  Args:
    rows: as measured; what is measured in several draws is chance, which others are compared with.
  """
  good, failed = measured(rows), [row for row in rows if row.get('failed')]
  if not good:
    raise ValueError('nothing to report: no row was measured')
  full = [row for row in good if not row['reduce']]
  parts = [f'{UP} above, {DOWN} below chance (the mean of its draws) beyond a 95 % interval that '
           'is paired by picture and Bonferroni\'s over all differences of a table. R@1, MRR: '
           'emoji of one vendor among those of another. Saliency: correlation of the map with the '
           'unreduced one. Speed: over the unreduced tower, in turns with it.\n']
  for budget in dict.fromkeys(row['budget'] for row in good if row['reduce']):
    own = [row for row in good if row['budget'] == budget]
    marks = verdicts(own)
    order = np.mean([np.argsort(np.argsort([-row[name] for row in own])) for name in MEASURES],
                    axis=0)
    lines = [own[number] for number in np.argsort(order, kind='stable')]
    parts += [f'**{budget}**\n', markdown_lines(
        ['method', 'tokens left', 'speed', *(title for title, _ in MEASURES.values()), 'cosine',
         'CKA', 'saliency'], [_cells(row, marks) for row in (*full, *lines)])]
  if failed:
    parts += ['**Not measured**\n', *(f'* `{row["name"]}`, {row["budget"]}: {row["note"]}'
                                      for row in failed), '']
  return '\n'.join(parts)


def verdicts(rows: Sequence[Row], confidence: float = 0.95) -> dict[tuple[str, str], str]:
  """Compares the methods of a budget with chance: {(name, measure): '▲', '▼' or ''}."""
  chance = [row for row in rows if row['name'] in _chances(rows)]
  others = [row for row in rows if row['name'] not in _chances(rows)]
  if not chance:
    return {}
  draws = {name: np.array([values(row)[name] for row in chance]) for name in MEASURES}
  pairs = {(row['name'], name): paired(values(row)[name], draws[name])
           for row in others for name in MEASURES}
  return {key: _verdict(difference, 1 - (1 - confidence) / len(pairs))
          for key, difference in pairs.items()}


def values(row: Row) -> Mapping[str, np.ndarray]:
  """Returns what each measure of a row is the mean of: float[N] by name."""
  ranks = np.array(row['each']['ranks'], np.float64)
  return {'probe': np.array(row['each']['probe'], np.float64),
          'neighbours': np.array(row['each']['neighbours'], np.float64),
          'recall': (ranks == 1).astype(np.float64), 'reciprocal': 1 / ranks}


def draw(rows: Sequence[Row], path: str | pathlib.Path) -> None:
  """Draws what is left of each use against measured speed, a point a method, a panel a budget."""
  good = measured(rows)
  full = next((row for row in good if not row['reduce']), None)
  budgets = list(dict.fromkeys(row['budget'] for row in good if row['reduce']))
  if full is None or not budgets:
    raise ValueError('nothing to draw: the row without a reduction, or every other, is missing')
  drawn = ('recall', 'probe')
  figure = Figure(figsize=(6.2 * len(budgets), 11), dpi=120, layout='constrained')
  FigureCanvasAgg(figure)
  panels = figure.subplots(len(drawn), len(budgets), squeeze=False, sharey='row')
  for line, name in zip(panels, drawn, strict=True):
    for axes, budget in zip(line, budgets, strict=True):
      own = [row for row in good if row['budget'] == budget]
      _panel(axes, own, name, full[name], verdicts(own))
      axes.set_title(f'{MEASURES[name][0]}, {budget}', fontsize=12, loc='left')
      axes.set_xlabel('times as fast as the unreduced tower', fontsize=11)
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)


def _panel(axes: Axes, rows: Sequence[Row], name: str, full: float,
           marks: Mapping[tuple[str, str], str]) -> None:
  axes.axhline(100 * full, color='black', linewidth=1, linestyle=(0, (1, 2)))
  colours = {UP: COLOURS[2], DOWN: COLOURS[1], '': GREYS[1]}
  ends = []
  for row in sorted(rows, key=lambda row: row[name]):
    chance = row['name'] in _chances(rows)
    colour = 'black' if chance else colours[marks.get((row['name'], name), '')]
    axes.plot(row['speedup'], 100 * row[name], 'x' if chance else 'o', color=colour, markersize=7)
    if not chance or not row['draw']:
      ends.append((row['name'], row['speedup'], 100 * row[name], colour))
  right = max(x for _, x, _, _ in ends)
  left = min(1.0, *(x for _, x, _, _ in ends))
  axes.set_xlim(left - 0.02, right + 0.45 * (right - left) + 0.05)
  low, high = axes.get_ylim()
  gap = (high - low) / max(38, len(ends))
  heights = spread([y for _, _, y, _ in ends], gap, low, high)
  for (label, x, y, colour), height in zip(ends, heights, strict=True):
    axes.annotate(label, (x, y), xytext=(right + 0.08 * (right - left) + 0.01, height), fontsize=8,
                  va='center', color=colour, arrowprops={
                      'arrowstyle': '-', 'color': colour, 'linewidth': 0.4, 'alpha': 0.5})
  axes.text(left, 100 * full, 'unreduced', va='bottom', fontsize=9)
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(axis='y', color='#eeeeee')
  axes.set_axisbelow(True)


def _chances(rows: Sequence[Row]) -> set[str]:
  """Names of what is measured in several draws."""
  return {row['name'] for row in rows if row['draw']}


def _verdict(difference: Difference, confidence: float) -> str:
  low, high = difference.interval(confidence)
  return UP if low > 0 else DOWN if high < 0 else ''


def _cells(row: Row, marks: Mapping[tuple[str, str], str]) -> list[str]:
  cells = []
  for name, (_, share) in MEASURES.items():
    own = values(row)[name]
    low, high = wilson(own.sum(), len(own))
    text = (f'{100 * row[name]:.0f} [{100 * low:.0f}, {100 * high:.0f}]' if share
            else f'{row[name]:.3f}')
    cells.append(f'{text} {marks.get((row["name"], name), "")}'.strip())
  name = row['name'] + (f' ({row["draw"] + 1})' if row['draw'] else '')
  return [name, f'{row["kept"]:.0f}', f'{row["speedup"]:.2f}x', *cells, f'{row["cosine"]:.3f}',
          f'{row["cka"]:.2f}', f'{row["saliency"]:.2f}']
