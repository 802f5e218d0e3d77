"""A task: all that the training loop must know of what a model learns.

A score is made of counts that add up over batches and processes, so that it is exact however the
split is divided.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lib.tasks import anneal

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Task:
  """Holds a config's task, ready for the training loop; lib/tasks/registry.py makes it.

  Attributes:
    model: under its plans, as it is evaluated.
    score: the name in `scores` that decides which checkpoint is best.
    phases: models that train the same parameters, in order.
    turn: steps done -> which of the phases the next step trains; None for one after another.
    init: key -> parameters.
    pretrained: () -> parameters to start from, or None; they need not be complete.
    unreduced: parameters -> those of a teacher: what the model has without its plans, or another
      model's, as shapes.
    loss: model -> (parameters, batch, key, teacher) -> (scalar to lower, {name: scalar}). The
      teacher is the parameters of an unreduced model, or None. 'kept_tokens' is among the scalars.
    count: (parameters, batch) -> the batch's addition to the counts; rows of mask 0 add nothing.
    scores: sum of the counts -> {name: between 0 and 1, higher is better}.
    train_iterator, eval_batches: as in lib/data/images.py.
    macs: model -> multiply-accumulates of an example in training, forward and backward.
    slots: tokens of an example, before any reduction.
    summary: text to print before training.
  """

  model: Any
  score: str
  phases: tuple[anneal.Phase, ...]
  init: Callable[[Array], dict[str, Any]]
  pretrained: Callable[[], dict[str, Any] | None]
  unreduced: Callable[[dict[str, Any]], dict[str, Any]]
  loss: Callable[[Any], Callable[..., tuple[Array, dict[str, Array]]]]
  count: Callable[[dict[str, Any], Mapping[str, Array]], Array]
  scores: Callable[[np.ndarray], dict[str, float]]
  train_iterator: Callable[..., Any]
  eval_batches: Callable[..., Any]
  macs: Callable[[Any], float]
  slots: int
  summary: str
  turn: Callable[[int], int] | None = None

  def phase(self, done: int) -> int:
    """Returns which of the phases trains in the step after `done` steps."""
    if self.turn:
      return self.turn(done)
    return self.phases.index(anneal.at(self.phases, done))


def task_name(config: Mapping[str, Any]) -> str:
  """Returns `config.task.name`, 'classify' where there is no `config.task`."""
  return (config.get('task') or {}).get('name', 'classify')


def sum_counts(counts: list[Any]) -> np.ndarray:
  """Returns the sum of the counts of all batches, in float64."""
  return np.sum([np.asarray(count, np.float64) for count in counts], axis=0)
