"""Measures what reductions cost a pretrained model, a row of JSON each, and reports it.

  python -m tools.real.study --config=configs/real_vision.py
  python -m tools.real.study --config=configs/real_vision.py:quick

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

from lib.report.measuring import measure_rows
from lib.report.rows import Row, replace_file
from lib.runtime import cli, config_flag, timing
from lib.studies import (
  language,
  language_report,
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
}


def run(config: Any) -> pathlib.Path:
  """Measures the rows of a config that its file lacks, and writes tables and plot beside it.

  Returns:
    The path of the tables.

  Raises:
    ValueError: an unknown study, weights or data that are not there, or no row that was measured.
  """
  choices.check('study ', config.study, STUDIES)
  study, out = STUDIES[config.study], pathlib.Path(config.out)
  # Read when the first row is measured: where all are there nothing is.
  subject = functools.cache(lambda: study.read(config))
  made_of = digest({key: value for key, value in config.items() if key not in NOTHING})
  rows = measure_rows([{**row, 'made_of': made_of} for row in config.rows],
                      lambda row: subject().measure(row), path=out, about=timing.machine(),
                      essential=lambda row: not (row['reduce'] or row.get('pool')))
  replace_file(out.with_suffix('.md'), study.report(rows).encode())
  study.draw(rows, out.with_suffix('.png'))
  return out.with_suffix('.md')


if __name__ == '__main__':
  given = config_flag.define('What to measure, as configs/real_vision.py.')
  flags.mark_flags_as_required(['config'])
  cli.run(lambda argv: print(run(given.value).read_text()))
