"""Measures what reductions cost a pretrained model, a row of JSON each, and reports it.

  python -m tools.real.study --config=configs/real_vision.py
  python -m tools.real.study --config=configs/real_vision.py:quick
  python -m tools.real.study --config=configs/real_vision.py --nomeasure

Rows that `config.out` holds are not measured again, unless what they were measured on changes.
Beside it lie tables, .md, and a plot, .png. A name in `STUDIES` is `config.study`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from absl import flags

from lib.report.measuring import identity, measure_rows, newest
from lib.report.rows import Row, replace_file
from lib.runtime import cli, config_flag, timing
from lib.studies import (
  language,
  language_report,
  scenes,
  sentences,
  sentences_report,
  vision,
  vision_report,
)
from lib.tasks.sweep import digest
from ops import choices

# Keys of a config that no row depends on.
NOTHING = ('rows', 'out', 'folder', 'rounds', 'draws')


class Subject(Protocol):
  """Holds a model and what it is measured on."""

  def measure(self, row: Row) -> Row:
    """Returns the figures of a row of `config.rows`."""
    ...


@dataclasses.dataclass(frozen=True)
class Study:
  """Holds what a study is made of.

  Attributes:
    read: config -> its Subject.
    report: rows -> Markdown.
    draw: rows and a path -> a picture there.
  """

  read: Callable[[Any], Subject]
  report: Callable[[Sequence[Row]], str]
  draw: Callable[[Sequence[Row], pathlib.Path], None]


STUDIES: Mapping[str, Study] = {
    'language': Study(language.Subject, language_report.report, language_report.draw),
    'sentences': Study(sentences.Subject, sentences_report.report, sentences_report.draw),
    'vision': Study(vision.Subject, vision_report.report, vision_report.draw),
    'scenes': Study(scenes.Subject, scenes.report, scenes.draw),
}


def run(config: Any) -> pathlib.Path:
  """Measures the rows of a config that its file lacks, and writes tables and plot beside it.

  Returns:
    The path of the tables.

  Raises:
    ValueError: an unknown study, weights or data that are not there, or no row that was measured.
  """
  choices.check('study ', config.study, STUDIES)
  # Read when the first row is measured: where all are there nothing is.
  subject = functools.cache(lambda: STUDIES[config.study].read(config))
  return _written(config, measure_rows(
      heads(config), lambda row: subject().measure(row), path=config.out, about=timing.machine(),
      essential=lambda row: row.get('name') == 'full'))


def report(config: Any) -> pathlib.Path:
  """Writes tables and plot of the rows that a config's file has so far, as `run`."""
  choices.check('study ', config.study, STUDIES)
  wanted = heads(config)
  stored = newest(config.out, tuple(wanted[0]))
  return _written(config, [stored[own] for head in wanted
                           if (own := identity(head, tuple(head))) in stored])


def heads(config: Any) -> list[Row]:
  """Returns the rows of a config, each with a digest of what it is measured on."""
  made_of = digest({key: value for key, value in config.items() if key not in NOTHING})
  return [{**row, 'made_of': made_of} for row in config.rows]


def _written(config: Any, rows: Sequence[Row]) -> pathlib.Path:
  study, tables = STUDIES[config.study], pathlib.Path(config.out).with_suffix('.md')
  replace_file(tables, study.report(rows).encode())
  study.draw(rows, tables.with_suffix('.png'))
  return tables


if __name__ == '__main__':
  given = config_flag.define('What to measure, as configs/real_vision.py.')
  measure = flags.DEFINE_bool('measure', True, 'Whether to measure what is missing, or to report '
                              'what is there.')
  flags.mark_flags_as_required(['config'])
  cli.run(lambda argv: print((run if measure.value else report)(given.value).read_text()))
