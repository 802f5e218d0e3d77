"""A sweep: one trained model measured under many reductions and budgets, a row of results each."""

from __future__ import annotations

import abc
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from lib.report.rows import Row
from lib.runtime import timing


@dataclasses.dataclass(frozen=True)
class Candidate:
  """Holds a model under one reduction, compiled.

  Attributes:
    model: with its plans.
    params: in the storage that runs fastest here.
    run: (params, inputs) -> outputs.
    compile_s: seconds that compiling took.
  """

  model: Any
  params: Any
  run: Callable[[Any, Any], Any]
  compile_s: float


class Sweep(abc.ABC):
  """Measures a trained model under the reductions and budgets of `config.sweep`.

  eval.py asks for `rows`, measures each that its file of results lacks, and shows them all. A row
  without a reduction has method 'none'; the others' costs and latencies are told beside it.

  Args:
    config: the experiment, with `config.sweep`.
    workdir: of the run whose best checkpoint is measured.
    mesh: the devices.

  Attributes:
    config, mesh: the same.
    step: of the checkpoint; subclasses set it.

  Raises:
    FileNotFoundError: the workdir has no checkpoint.
    ValueError: the checkpoint is another model's.
  """

  step: int

  def __init__(self, config: ConfigDict, workdir: pathlib.Path, mesh: Mesh):
    del workdir
    self.config, self.mesh = config, mesh

  @abc.abstractmethod
  def rows(self) -> Iterator[Row]:
    """Yields the rows to measure, the unreduced model first: the keys that identify each."""

  @abc.abstractmethod
  def measure(self, row: Row) -> Row:
    """Returns the other keys of a row: score, tokens, cost, latency, and 'note' ('' if none).

    Args:
      row: of `rows`.

    Raises:
      ValueError: a budget that this method cannot meet.
    """

  @abc.abstractmethod
  def show(self, rows: Sequence[Row], workdir: pathlib.Path) -> None:
    """Prints a table of measured rows, and draws them into the workdir."""

  def latency(self, base: Callable[[], Any], candidate: Callable[[], Any]) -> Row:
    """Times a candidate in turns with the unreduced model, so that drift hits both alike.

    Args:
      base: runs the unreduced model on a batch.
      candidate: runs the reduced model on the same batch.

    Returns:
      median_ms, low_ms, high_ms of the candidate; speedup, speedup_low, speedup_high over the base.
    """
    times = timing.interleave({'base': base, 'candidate': candidate},
                              rounds=self.config.sweep.rounds)
    speedup = timing.speedup(times['base'], times['candidate'])
    own = times['candidate']
    return {'median_ms': own.median_ms, 'low_ms': own.low_ms, 'high_ms': own.high_ms,
            'speedup': speedup.ratio, 'speedup_low': speedup.low, 'speedup_high': speedup.high}
