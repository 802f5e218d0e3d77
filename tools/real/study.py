"""Measures what reductions cost a pretrained model, a row of JSON each.

  python -m tools.real.study --config=configs/real_vision.py

Rows that `config.out` holds are not measured again. A name in `STUDIES` is `config.study`.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from absl import flags

from lib.report.measuring import measure_rows
from lib.report.rows import Row
from lib.runtime import cli, config_flag, timing
from lib.studies import language, sentences, vision
from ops import choices


class Study(Protocol):
  """Holds a model and what it is measured on."""

  def measure(self, row: Row) -> Row:
    """Returns the figures of a row of `config.rows`."""
    ...


STUDIES: Mapping[str, Callable[[Any], Study]] = {
    'language': language.Subject,
    'sentences': sentences.Subject,
    'vision': vision.Subject,
}


def run(config: Any) -> list[dict[str, Any]]:
  """Measures the rows of a config that its file lacks, and returns all of them.

  Raises:
    ValueError: an unknown study, or one whose weights or data are not there.
  """
  choices.check('study ', config.study, STUDIES)
  # Read when the first row is measured: where all are there nothing is.
  subject = functools.cache(lambda: STUDIES[config.study](config))
  return measure_rows(list(config.rows), lambda row: subject().measure(row),
                      path=pathlib.Path(config.out), about=timing.machine())


if __name__ == '__main__':
  given = config_flag.define('What to measure, as configs/real_vision.py.')
  flags.mark_flags_as_required(['config'])
  cli.run(lambda argv: run(given.value))
