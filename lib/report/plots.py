"""Draws measurements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from lib.report.rows import Row
from ops import choices

# Okabe and Ito's palette without black and yellow; with the markers, 42 pairs that differ for
# every kind of sight.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00')
MARKERS = {'o': 7, 's': 7, '^': 8, 'D': 6.5, 'v': 8, 'P': 9, 'X': 9}  # marker: size in points
STYLES = len(COLOURS) * len(MARKERS)
GREYS = ('#555555', '#777777', '#909090')
COSTS = {'gmacs': 'GMACs per image', 'median_ms': 'latency, ms (bars: quartiles)',
         'kept_mean': 'tokens that a layer keeps, on average'}
SCORES = {'accuracy': 'accuracy', 'miou': 'mIoU'}
ROUND = MaxNLocator(8, steps=[1, 2, 2.5, 5, 10])
STARS = ('*', '†', '‡', '§')


def plot_accuracy_cost(rows: Sequence[Row], path: str | Path, *, title: str = '',
                       cost: str = 'gmacs', score: str = 'accuracy',
                       baselines: Sequence[str] = (), reference: str | None = None) -> Path:
  """Draws a score against cost, a line a method, and writes a picture.

  Each line is named at its cheapest point, and equal costs are read along the vertical lines:
  shares of the reference's cost, on the upper axis. Rows without score or cost are left out.
  Methods with a note are marked and the note stands below.

  Args:
    rows: as above.
    path: where to write; the ending picks the format, such as .png.
    title: above the plot.
    cost: a name in `COSTS`, the horizontal axis.
    score: a name in `SCORES`, the vertical axis.
    baselines: methods to draw in grey dashes.
    reference: the method whose dearest row is the unreduced model, drawn as a star.

  Raises:
    ValueError: an unknown cost or score, nothing to draw, or a reference that no row has.
  """
  choices.check('cost=', cost, COSTS)
  choices.check('score=', score, SCORES)
  lines: dict[str, list[Row]] = {}
  for row in rows:
    if row.get(score) is not None and row.get(cost) is not None:
      lines.setdefault(row['method'], []).append({**row, 'height': row[score]})
  if not lines:
    raise ValueError(f'nothing to draw: no row has both {score} and {cost}')
  if reference is not None and reference not in lines:
    raise ValueError(f'reference={reference!r} has no row with {score} and {cost}: choose one of '
                     f'{", ".join(lines)}')
  full = max(lines.pop(reference), key=lambda row: row[cost]) if reference else None
  lines = {name: sorted(line, key=lambda row: row[cost]) for name, line in lines.items()}

  figure = Figure(figsize=(10, max(5.6, 0.27 * len(lines) + 1.6)), dpi=200,
                  layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  if title:
    axes.set_title(title, fontsize=15, fontweight='bold', loc='left', pad=12)
  footnotes = [f'{star} {note}' for note, star in _stars(lines).items()]
  if footnotes:
    figure.supxlabel('\n'.join(footnotes), x=0.015, ha='left', fontsize=9, color='#444444')
  _frame(axes, lines, full, cost)
  axes.set_ylabel(SCORES[score], fontsize=13)
  styles = _styles(lines, baselines)
  for name, line in lines.items():
    _draw(axes, line, cost, styles[name])
  if full is not None:
    _draw_reference(axes, full, cost)
  if lines:
    _name_lines(figure, axes, lines, cost, styles)
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)
  return path


def plot_differences(rows: Sequence[Row], path: str | Path, *, title: str = '',
                     baseline: str = '') -> Path:
  """Draws differences of the NLL with their intervals, a panel a budget, and writes a picture.

  Methods are in the order of their mean over budgets. What the interval separates from 0 is in
  colour, the rest in grey. The axis is linear near 0 and logarithmic beyond.

  Args:
    rows: with nll_difference, nll_low, nll_high and verdict.
    path: where to write; the ending picks the format.
    title: above all panels.
    baseline: the name of what the differences are from.

  Raises:
    ValueError: nothing to draw.
  """
  if not rows:
    raise ValueError('nothing to draw: no row is compared')
  budgets = list(dict.fromkeys(row['budget'] for row in rows))
  by_method: dict[str, list[float]] = {}
  for row in rows:
    by_method.setdefault(row['method'], []).append(row['nll_difference'])
  order = sorted(by_method, key=lambda name: np.mean(by_method[name]))
  heights = {name: i for i, name in enumerate(order)}
  figure = Figure(figsize=(1.5 + 3.6 * len(budgets), 0.32 * len(heights) + 1.9), dpi=160,
                  layout='constrained')
  FigureCanvasAgg(figure)
  panels = figure.subplots(1, len(budgets), sharex=True, sharey=True, squeeze=False)[0]
  figure.suptitle(title, fontsize=14, fontweight='bold', x=0.01, ha='left')
  figure.supxlabel(f'NLL above that of {baseline}, paired by image; left is better '
                   '(bars: 95 %, all together)', fontsize=11)
  colours = {'better': COLOURS[2], 'worse': COLOURS[1], '': GREYS[2]}
  for axes, budget in zip(panels, budgets, strict=True):
    axes.axvline(0, color='black', linewidth=1.0)
    for row in (row for row in rows if row['budget'] == budget):
      height, colour = heights[row['method']], colours[row['verdict']]
      axes.hlines(height, row['nll_low'], row['nll_high'], color=colour, linewidth=2)
      axes.plot(row['nll_difference'], height, 'o', color=colour, markersize=7,
                markeredgecolor='white')
    axes.set_xscale('symlog', linthresh=0.1)
    axes.xaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
    axes.set_title(f'budget {budget}', fontsize=11, loc='left')
    axes.grid(axis='x', color='#e6e6e6', linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
  panels[0].set_yticks(list(heights.values()), list(heights), fontsize=11)
  panels[0].invert_yaxis()
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)
  return path


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
  """Moves numbers as little as need be, in their order, to lie `gap` apart within [low, high].

  Least squares, by joining neighbours that are too close into blocks around their common centre.
  Where they cannot fit they start at `low` and run over `high`.
  """
  order = sorted(range(len(wanted)), key=lambda i: wanted[i])
  blocks: list[list[float]] = []  # [sum of places with the gaps taken out, members]
  for rank, i in enumerate(order):
    blocks.append([wanted[i] - rank * gap, 1])
    while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
      total, members = blocks.pop()
      blocks[-1][0] += total
      blocks[-1][1] += members
  centres = [total / members for total, members in blocks for _ in range(int(members))]
  ceiling = high - (len(order) - 1) * gap
  places = [0.0] * len(order)
  for rank, (i, centre) in enumerate(zip(order, centres, strict=True)):
    places[i] = max(min(centre, ceiling), low) + rank * gap
  return places


def _stars(lines: Mapping[str, Sequence[Row]]) -> dict[str, str]:
  """Returns each note that a drawn row has, and its mark."""
  notes = dict.fromkeys(row['note'] for line in lines.values() for row in line if row.get('note'))
  return {note: STARS[i % len(STARS)] * (1 + i // len(STARS)) for i, note in enumerate(notes)}


def _marked(lines: Mapping[str, Sequence[Row]]) -> dict[str, str]:
  """Returns methods' names with the marks of their notes."""
  stars = _stars(lines)
  return {name: name + ''.join(stars[note] for note in dict.fromkeys(
      row['note'] for row in line if row.get('note'))) for name, line in lines.items()}


def _styles(names: Iterable[str], baselines: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Returns colour, marker and dashes of each line; colours run before markers do."""
  styles: dict[str, dict[str, Any]] = {}
  plain, coloured, markers = 0, 0, list(MARKERS)
  for name in names:
    if name in baselines:
      marker = markers[plain % len(markers)]
      styles[name] = {'color': GREYS[plain % len(GREYS)], 'linestyle': (0, (4, 2.5)),
                      'linewidth': 1.5, 'marker': marker, 'markersize': 0.75 * MARKERS[marker],
                      'zorder': 3}
      plain += 1
    else:
      marker = markers[(coloured % len(COLOURS) + coloured // len(COLOURS)) % len(markers)]
      styles[name] = {'color': COLOURS[coloured % len(COLOURS)], 'linestyle': '-',
                      'linewidth': 2.2, 'marker': marker, 'markersize': MARKERS[marker],
                      'zorder': 4}
      coloured += 1
  return styles


def _low(row: Row, cost: str) -> float:
  """Returns where a row's drawing begins: at its bar, if it has one."""
  return row['low_ms'] if cost == 'median_ms' and row.get('low_ms') is not None else row[cost]


def _frame(axes: Axes, lines: Mapping[str, Sequence[Row]], full: Row | None, cost: str) -> None:
  """Sets limits, grids, and the upper axis of shares."""
  drawn = [row for line in lines.values() for row in line] + ([full] if full else [])
  costs, scores = (np.array([row[key] for row in drawn], float) for key in (cost, 'height'))
  left, right = min(_low(row, cost) for row in drawn), costs.max()
  wide, tall = right - left or abs(right) or 1.0, np.ptp(scores) or 0.1
  axes.set_xlim(left - 0.04 * wide, right + 0.05 * wide)
  axes.set_ylim(scores.min() - 0.07 * tall, scores.max() + 0.1 * tall)
  axes.set_xlabel(COSTS[cost], fontsize=13)
  low, high = axes.get_ylim()
  axes.set_yticks([tick for tick in ROUND.tick_values(low, high)
                   if max(low, 0) <= tick <= min(high, 1 + 1e-9)])
  axes.yaxis.set_major_formatter(PercentFormatter(1.0))
  axes.tick_params(labelsize=11)
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(axis='y', color='#e6e6e6', linewidth=0.8)
  axes.set_axisbelow(True)
  # Names come to stand left of the data; a cost there would be one that nothing has.
  axes.set_xticks([tick for tick in ROUND.tick_values(*axes.get_xlim())
                   if left - 0.1 * wide <= tick <= right + 0.04 * wide])
  if full is None:
    axes.grid(axis='x', color='#d0d0d0', linewidth=0.8)
    return
  _shares_axis(axes, full[cost], left, right, 0.1 if wide > 0.25 * full[cost] else 0.05)


def _shares_axis(axes: Axes, whole: float, left: float, right: float, step: float) -> None:
  """Draws lines at multiples of a share of the unreduced cost `whole`, and an upper axis."""
  first, last = math.ceil(left / whole / step - 0.2), math.floor(right / whole / step + 1e-9)
  shares = [step * i for i in range(first, last + 1)]
  upper = axes.secondary_xaxis('top', functions=(
      lambda costs: np.asarray(costs) / whole, lambda parts: np.asarray(parts) * whole))
  upper.set_xticks(shares)
  upper.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
  upper.tick_params(labelsize=10, colors='#666666')
  upper.spines['top'].set_visible(False)
  upper.set_xlabel('of the unreduced model', fontsize=10, color='#666666', loc='right')
  for share in shares:
    axes.axvline(share * whole, color='#d0d0d0', linewidth=0.8, zorder=1)


def _draw(axes: Axes, line: Sequence[Row], cost: str, style: dict[str, Any]) -> None:
  x, y = [row[cost] for row in line], [row['height'] for row in line]
  axes.plot(x, y, markeredgecolor='white', markeredgewidth=0.9, **style)
  spans = [row for row in line if row.get('low_ms') is not None and row.get('high_ms') is not None]
  if cost == 'median_ms' and spans:
    axes.hlines([row['height'] for row in spans], [row['low_ms'] for row in spans],
                [row['high_ms'] for row in spans], color=style['color'], linewidth=1.2, zorder=2)


def _draw_reference(axes: Axes, full: Row, cost: str) -> None:
  """Draws the unreduced model: a star, and its score as a level to measure losses from."""
  axes.axhline(full['height'], color='black', linewidth=1.0, linestyle=(0, (1, 2)), zorder=2)
  axes.plot([full[cost]], [full['height']], marker='*', markersize=17, color='black',
            markeredgecolor='white', linestyle='none', zorder=6)
  axes.annotate(f'unreduced  {full["height"]:.1%}', (full[cost], full['height']),
                xytext=(8, 11), textcoords='offset points', ha='right', fontsize=11, zorder=7,
                fontweight='bold', path_effects=[withStroke(linewidth=3, foreground='white')])


def _name_lines(figure: Figure, axes: Axes, lines: Mapping[str, Sequence[Row]], cost: str,
                styles: Mapping[str, Any]) -> None:
  """Makes room left of the data for names, each joined to its line's cheapest point."""
  size, names = 11, _marked(lines)
  labels = {name: axes.text(0, 0, names[name], ha='right', va='center_baseline', fontsize=size,
                            color=styles[name]['color'], in_layout=False,
                            fontweight='bold' if styles[name]['linestyle'] == '-' else 'normal')
            for name in lines}
  figure.draw_without_rendering()
  points = figure.dpi / 72
  widest = max(label.get_window_extent().width for label in labels.values())
  share = min(0.6, (widest + 44 * points) / axes.bbox.width)
  left, right = axes.get_xlim()
  axes.set_xlim(right - (right - left) / (1 - share), right)
  start = axes.transData.inverted().transform((axes.bbox.x0 + widest + 10 * points, 0))[0]
  gap = axes.transData.inverted().transform((0, axes.bbox.y0 + 1.32 * size * points))[1]
  bottom, top = axes.get_ylim()
  gap -= bottom
  heights = spread([line[0]['height'] for line in lines.values()], gap, bottom + gap / 2,
                   top - gap / 2)
  leader = axes.transData.inverted().transform((axes.bbox.x0 + widest + 13 * points, 0))[0]
  for (name, line), height in zip(lines.items(), heights, strict=True):
    labels[name].set_position((start, height))
    axes.plot([leader, _low(line[0], cost)], [height, line[0]['height']], zorder=2.5,
              color=styles[name]['color'], linewidth=0.8, alpha=0.6)


def heat_maps(values: Mapping[str, tuple[Sequence[str], Sequence[str], np.ndarray]],
              path: str | Path, *, title: str = '', rows: str = 'depth',
              columns: str = 'length') -> Path:
  """Draws shares as coloured, numbered cells, one map a name, and writes a picture.

  Args:
    values: name -> (names of rows, names of columns, shares float[rows, columns], 0 to 1; NaN where
      there is none).
    path: where to write; the ending picks the format.
    title: above all maps.
    rows, columns: what the two axes are.

  Raises:
    ValueError: nothing to draw.
  """
  if not values:
    raise ValueError('nothing to draw: give at least one map')
  across = min(len(values), 6)
  down = math.ceil(len(values) / across)
  widest = max(len(names) for _, names, _ in values.values())
  tallest = max(len(names) for names, _, _ in values.values())
  figure = Figure(figsize=((1.2 + 0.62 * widest) * across + 0.8,
                           max(3.4, 1 + 0.2 * tallest) * down + 0.7), dpi=160,
                  layout='constrained')
  FigureCanvasAgg(figure)
  grid = figure.subplots(down, across, squeeze=False)
  if title:
    figure.suptitle(title, fontsize=14, fontweight='bold', x=0.01, ha='left')
  for axes in grid.flat[len(values):]:
    axes.set_axis_off()
  for place, (axes, (name, (down_names, across_names, shares))) in enumerate(
      zip(grid.flat, values.items(), strict=False)):
    axes.imshow(shares, cmap='cividis', vmin=0, vmax=1, aspect='auto')
    for row, column in np.argwhere(~np.isnan(shares)).tolist():
      share = shares[row, column]
      axes.text(column, row, f'{100 * share:.0f}', ha='center', va='center', fontsize=8,
                color='black' if share > 0.55 else 'white')
    axes.set_xticks(range(len(across_names)), across_names, fontsize=9)
    axes.set_yticks(range(len(down_names)), down_names if place % across == 0 else [], fontsize=9)
    axes.set_title(name, fontsize=10)
    axes.set_xlabel(columns, fontsize=9)
    if place % across == 0:
      axes.set_ylabel(rows, fontsize=9)
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)
  return path
