"""Tables and a plot of what reductions cost an encoder of texts (lib/studies/sentences.py)."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lib.report.measuring import measured
from lib.report.plots import COLOURS, GREYS, MARKERS, spread
from lib.report.rows import Row
from lib.report.tables import markdown_lines

KINDS = {'maxsim': 'MaxSim over all vectors', 'mean': 'one mean vector'}
_Cell = Callable[[Row], str]


def report(rows: Sequence[Row]) -> str:
  """Returns Markdown: a table of each way to find a document, and one of costs and likeness."""
  rows = measured(rows)
  head: dict[str, _Cell] = {'method': lambda row: row['name'], 'budget': lambda row: row['budget'],
                            'vectors kept': _share('kept')}
  parts = ['Intervals are of 95 %, each by itself, paired by query; a difference is bold where its '
           'interval excludes 0. "Random" is the mean over its seeds.\n']
  for kind, title in KINDS.items():
    found = [{**row, **row[kind]} for row in rows if kind in row]
    parts += [f'**Docstrings by {title}**\n', _table(found, head | {
        'R@1': _decimals('recall'), 'interval': _interval('interval'),
        'R@10': _decimals('recall_10'), 'MRR': _decimals('reciprocal'),
        'R@1 - unreduced': _difference('from_full'), 'R@1 - random': _difference('from_chance')})]
  parts += ['**Costs, likeness to the unreduced vectors, and agreement with people on news**\n',
            _table([row for row in rows if 'cosine' in row], head | {
                'GMACs': _decimals('gmacs'), 'of the unreduced': _share('gmacs_ratio'),
                'texts a second': lambda row: f'{row["speedup"]:.2f}x',
                'cosine': _decimals('cosine'), 'CKA': _decimals('cka'),
                'news, Spearman': _decimals('lee')})]
  return '\n'.join(parts)


def _table(rows: Sequence[Row], columns: dict[str, _Cell]) -> str:
  return markdown_lines(list(columns), [[show(row) for show in columns.values()] for row in rows])


def _decimals(key: str) -> _Cell:
  return lambda row: f'{row[key]:.3f}'


def _share(key: str) -> _Cell:
  return lambda row: f'{100 * row[key]:.0f} %'


def _interval(key: str) -> _Cell:
  return lambda row: '[{:.3f}, {:.3f}]'.format(*row[key])


def _difference(key: str) -> _Cell:
  def show(row: Row) -> str:
    if key not in row:
      return ''
    mean, low, high = row[key]
    text = f'{mean:+.3f} [{low:+.3f}, {high:+.3f}]'
    return f'**{text}**' if _separate(row[key]) else text
  return show


def _separate(difference: Sequence[float]) -> bool:
  """Returns whether the interval of a difference, [mean, low, high], excludes 0."""
  return difference[1] > 0 or difference[2] < 0


def draw(rows: Sequence[Row], path: str | pathlib.Path) -> None:
  """Draws R@1 against the share of vectors kept, a line a method, and writes a picture.

  The band, a bar where there is one budget, is random's difference from the unreduced model with
  its interval. What nowhere separates from random is grey.

  Raises:
    ValueError: there is no row without a reduction.
  """
  rows = measured(rows)
  full = next((row for row in rows if not row['reduce'] and not row['pool']), None)
  if full is None:
    raise ValueError('nothing to draw: the row without a reduction is missing')
  panels = (('maxsim', 'pool', 'MaxSim, final vectors pooled'),
            ('maxsim', 'reduce', 'MaxSim, tokens reduced inside the encoder'),
            ('mean', 'reduce', 'one mean vector, tokens reduced inside the encoder'))
  figure = Figure(figsize=(19, 7.5), dpi=130, layout='constrained')
  FigureCanvasAgg(figure)
  every = figure.subplots(1, len(panels))
  for axes, (kind, part, title) in zip(every, panels, strict=True):
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
      if row[part]:
        lines.setdefault((row['name'], row['budget'].partition(', ')[2]), []).append(row)
    # Where budgets are met in several ways, the first of each method has its name alone.
    first = dict(reversed(list(lines)))
    named = {name if first[name] == way else f'{name}, {way}':
             sorted(line, key=lambda row: row['kept']) for (name, way), line in lines.items()}
    if named:
      _panel(axes, named, kind, full[kind]['recall'])
    axes.set_title(title, fontsize=12, loc='left')
    axes.set_xlabel('share of token vectors kept', fontsize=11)
  every[0].set_ylabel('R@1 (band: random, 95 %, paired with the unreduced model)', fontsize=11)
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)


def _panel(axes: Axes, lines: dict[str, list[Row]], kind: str, full: float) -> None:
  axes.axhline(full, color='black', linewidth=1, linestyle=(0, (1, 2)))
  styles = [(colour, marker) for marker in MARKERS for colour in COLOURS]
  drawn: dict[str, tuple[float, float, str]] = {}
  coloured = 0
  for name, line in lines.items():
    kept, recall = ([row['kept'] for row in line], [row[kind]['recall'] for row in line])
    if 'from_chance' not in line[0][kind]:
      ends = np.array([row[kind]['from_full'][1:] for row in line]) + full
      axes.fill_between(kept, *ends.T, color='#dddddd', zorder=0)
      if len(line) == 1:
        axes.vlines(kept, *ends.T, color='#dddddd', linewidth=6, zorder=0)
      axes.plot(kept, recall, color=GREYS[0], linestyle='--', marker='_', zorder=1)
      colour = GREYS[0]
    elif any(_separate(row[kind]['from_chance']) for row in line):
      colour, marker = styles[coloured % len(styles)]
      coloured += 1
      axes.plot(kept, recall, color=colour, marker=marker, markersize=5, linewidth=1.4)
    else:
      colour = GREYS[2]
      axes.plot(kept, recall, color=colour, marker='.', linewidth=0.9)
    drawn[name] = (kept[0], recall[0], colour)
  low, high = axes.get_ylim()
  left, right = min(x for x, _, _ in drawn.values()), max(
      row['kept'] for line in lines.values() for row in line)
  wide = max(right - left, 0.05)
  start = left - 0.12 * wide
  axes.set_xlim(left - 0.6 * wide, right + 0.05 * wide)
  axes.text(right, full, 'unreduced', va='bottom', ha='right', fontsize=9)
  heights = spread([y for _, y, _ in drawn.values()], (high - low) / 38, low, high)
  for (name, (x, y, colour)), height in zip(drawn.items(), heights, strict=True):
    axes.annotate(name, (x, y), xytext=(start, height), ha='right', va='center', fontsize=8,
                  color=colour, arrowprops={'arrowstyle': '-', 'color': colour, 'linewidth': 0.5,
                                            'alpha': 0.6})
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(axis='y', color='#eeeeee')
  axes.set_axisbelow(True)
