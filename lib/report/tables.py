"""Tables of measurements (lib/report/rows.py), for a terminal or in Markdown."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

from lib.report.rows import Row
from ops import choices


@dataclasses.dataclass(frozen=True)
class Column:
  """Describes how a table shows one thing.

  Attributes:
    title: above the column.
    show: all rows -> one cell each, '' where a row has nothing to show.
    right: whether cells end, rather than start, at the same place.
  """

  title: str
  show: Callable[[Sequence[Row]], list[str]]
  right: bool = True


def _text(key: str) -> Callable[[Sequence[Row]], list[str]]:
  return lambda rows: ['' if row.get(key) is None else str(row[key]) for row in rows]


def _fixed(key: str, decimals: int, *, scale: float = 1.0,
           unit: str = '') -> Callable[[Sequence[Row]], list[str]]:
  return lambda rows: ['' if row.get(key) is None else f'{scale * row[key]:.{decimals}f}{unit}'
                       for row in rows]


def _number(key: str) -> Callable[[Sequence[Row]], list[str]]:
  """Shows numbers with as many decimals as give the largest of the column four digits."""
  return lambda rows: _fixed(key, _decimals(rows, key))(rows)


def _decimals(rows: Sequence[Row], key: str) -> int:
  largest = max((abs(row[key]) for row in rows if row.get(key) is not None), default=0)
  return 2 if not largest else min(6, max(0, 3 - math.floor(math.log10(largest))))


def _latency(rows: Sequence[Row]) -> list[str]:
  """Shows 'median [low, high]', or the median alone where quartiles are missing."""
  decimals = _decimals(rows, 'median_ms')
  parts = [_fixed(key, decimals)(rows) for key in ('median_ms', 'low_ms', 'high_ms')]
  return [f'{median} [{low}, {high}]' if median and low and high else median
          for median, low, high in zip(*parts, strict=True)]


def _accuracy(rows: Sequence[Row]) -> list[str]:
  """Shows 'accuracy [low, high]' in percent, or the accuracy alone where there is no interval."""
  parts = [_fixed('accuracy', 2, scale=100)(rows),
           *(_fixed(key, 1, scale=100)(rows) for key in ('accuracy_low', 'accuracy_high'))]
  return [f'{share} [{low}, {high}]' if low and high else share
          for share, low, high in zip(*parts, strict=True)]


def _difference(rows: Sequence[Row]) -> list[str]:
  """Shows '+difference [low, high]' of the NLL, all with their signs."""
  keys = ('nll_difference', 'nll_low', 'nll_high')
  return ['' if row.get('nll_low') is None else '{:+.3f} [{:+.3f}, {:+.3f}]'.format(
      *(row[key] for key in keys)) for row in rows]


def _points(rows: Sequence[Row]) -> list[str]:
  """Shows '+difference [low, high]' of accuracies, in points of a percent."""
  keys = ('difference', 'difference_low', 'difference_high')
  return ['' if row.get('difference') is None else '{:+.1f} [{:+.1f}, {:+.1f}]'.format(
      *(100 * row[key] for key in keys)) for row in rows]


def _tokens(rows: Sequence[Row]) -> list[str]:
  """Shows runs of equal counts, as '65x3 46x3'; of many runs the first two and the last two."""
  cells = []
  for row in rows:
    runs = [(count, len(list(same))) for count, same in itertools.groupby(row.get('tokens') or ())]
    words = [f'{count:.4g}' + (f'x{times}' if times > 1 else '') for count, times in runs]
    cells.append(' '.join(words if len(words) <= 5 else [*words[:2], '...', *words[-2:]]))
  return cells


COLUMNS = {
    'method': Column('method', _text('method'), right=False),
    'budget': Column('budget', _text('budget'), right=False),
    'accuracy': Column('accuracy %', _accuracy),
    'nll': Column('NLL', _fixed('nll', 3)),
    'nll_difference': Column('NLL - baseline', _difference),
    'verdict': Column('verdict', _text('verdict'), right=False),
    'difference': Column('% above the baseline', _points),
    'miou': Column('mIoU %', _fixed('miou', 2, scale=100)),
    'tokens': Column('tokens by layer', _tokens, right=False),
    'kept_mean': Column('mean kept', _number('kept_mean')),
    'gmacs': Column('GMACs', _number('gmacs')),
    'gmacs_ratio': Column('GMACs %', _fixed('gmacs_ratio', 1, scale=100)),
    'kv_mb': Column('KV MB', _number('kv_mb')),
    'median_ms': Column('ms', _number('median_ms')),
    'latency': Column('ms [quartiles]', _latency),
    'speedup': Column('speed-up', _fixed('speedup', 2, unit='x')),
    'compile_s': Column('compile s', _fixed('compile_s', 1)),
    'note': Column('note', _text('note'), right=False),
}
USUAL = ('method', 'budget', 'accuracy', 'tokens', 'gmacs', 'gmacs_ratio', 'latency', 'speedup',
         'compile_s', 'note')


def table(rows: Sequence[Row], columns: Sequence[str] = USUAL, *, missing: str = '-') -> str:
  """Lays out rows as aligned plain text, with a rule under the titles.

  Args:
    rows: in the order to show.
    columns: names in `COLUMNS`, or any other key of a row, shown as it is.
    missing: stands where a row has nothing to show.

  Raises:
    ValueError: a column that is neither known nor in any row.
  """
  titles, cells, right = _layout(rows, columns, missing)
  widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
  rule = ['-' * width for width in widths]
  return '\n'.join(_line(line, widths, right) for line in (titles, rule, *cells))


def markdown(rows: Sequence[Row], columns: Sequence[str] = USUAL, *, missing: str = '') -> str:
  """Lays out rows as Markdown, aligned in the source too; takes what `table` takes."""
  titles, cells, right = _layout(rows, columns, missing)
  cells = [[cell.replace('|', r'\|') for cell in line] for line in cells]
  widths = [max(3, *map(len, column)) for column in zip(titles, *cells, strict=True)]
  rule = ['-' * (width - 1) + ('-', ':')[end] for width, end in zip(widths, right, strict=True)]
  lines = [_line(line, widths, right, gap=' | ', strip=False) for line in (titles, rule, *cells)]
  return '\n'.join(f'| {line} |' for line in lines)


def markdown_lines(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
  """Lays out ready cells as Markdown, unaligned in the source, with a newline at the end.

  Args:
    titles: one a column; several may be equal.
    cells: one list a row, as long as `titles`.

  Raises:
    ValueError: a row of another length.
  """
  for line in cells:
    if len(line) != len(titles):
      raise ValueError(f'a row of {len(line)} cells does not fit {len(titles)} titles: {line}')
  lines = [titles, ['---'] * len(titles), *cells]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def describe_machine(row: Row) -> str:
  """Says in words where a row with the keys of `timing.machine()` was measured, and when."""
  cores = f'{row["cores"]} core{"s" * (row["cores"] > 1)}'
  return f'{cores} of {row["cpu"]}, jax {row["jax"]}, {row["date"]}'


def _layout(rows: Sequence[Row], columns: Sequence[str],
            missing: str) -> tuple[list[str], list[list[str]], list[bool]]:
  """Returns titles, cells by row, and which columns are right-aligned."""
  keys = {key for row in rows for key in row}
  for name in columns:
    choices.check_key('no row has a column ', name, [*COLUMNS, *sorted(keys - set(COLUMNS))])
  chosen = [COLUMNS.get(name) or Column(name, _text(name), right=False) for name in columns]
  shown = [[' '.join(cell.split()) or missing for cell in column.show(rows)] for column in chosen]
  return [c.title for c in chosen], [list(c) for c in zip(*shown, strict=True)], [
      c.right for c in chosen]


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool], *, gap: str = '  ',
          strip: bool = True) -> str:
  padded = [cell.rjust(width) if end else cell.ljust(width)
            for cell, width, end in zip(cells, widths, right, strict=True)]
  return gap.join(padded).rstrip() if strip else gap.join(padded)


