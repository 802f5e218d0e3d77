"""What a model is trained for: what the training loop must know of it, and the scores of images.

Axes: B batch, S image side, C classes. Labels are int32[B], logits float32[B, C]; for every pixel
int32[B, S, S] and float32[B, S, S, C].

A score is made of counts that add up over batches and processes, so that it is exact however the
split is divided.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lib.tasks import anneal

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Task:
  """A config's task, made ready for the training loop; lib/tasks/image.py and lib/tasks/qa.py make
  them.

  Attributes:
    model: under its plans, as it is evaluated.
    score: which of `scores` says how good a checkpoint is.
    phases: what trains when.
    init: key -> parameters.
    loaded: parameters to start from where the config names some; they need not be complete.
    unreduced: parameters -> those that the model has without its plans, to hold it to.
    loss: model -> (parameters, batch, key, teacher) -> (what to lower, {name: scalar}). The teacher
      is the parameters of an unreduced model, or None. 'kept_tokens' is among the scalars.
    count: (parameters, batch) -> what the batch adds to the scores; rows of mask 0 add nothing.
    scores: sum of the counts -> {name: between 0 and 1, higher is better}.
    train_iterator, eval_batches: as in lib/data/images.py.
    macs: model -> multiply-accumulates of an example in training, forward and backward.
    slots: tokens of an example, before any reduction.
    about: what to print before training.
  """

  model: Any
  score: str
  phases: tuple[anneal.Phase, ...]
  init: Callable[[Array], dict[str, Any]]
  loaded: Callable[[], dict[str, Any] | None]
  unreduced: Callable[[dict[str, Any]], dict[str, Any]]
  loss: Callable[[Any], Callable[..., tuple[Array, dict[str, Array]]]]
  count: Callable[[dict[str, Any], Mapping[str, Array]], Array]
  scores: Callable[[np.ndarray], dict[str, float]]
  train_iterator: Callable[..., Any]
  eval_batches: Callable[..., Any]
  macs: Callable[[Any], float]
  slots: int
  about: str


@dataclasses.dataclass(frozen=True)
class Metric:
  """A task by its name in `TASKS`.

  Attributes:
    score: what the score is called, in rows and on screen; between 0 and 1, higher is better.
    counts: (logits, labels, mask float32[B], 0 for rows that do not count) -> what adds up.
    total: sum of the counts -> the score.
  """

  score: str
  counts: Callable[[Array, Array, Array], Array]
  total: Callable[[np.ndarray], float]


def cross_entropy(logits: Array, labels: Array, *, label_smoothing: float = 0.0) -> Array:
  """Mean cross-entropy over images, or over pixels: float32."""
  wanted = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
  return optax.softmax_cross_entropy(logits, wanted).mean()


def correct_and_total(logits: Array, labels: Array, mask: Array) -> Array:
  """How many images of a batch are right, and how many there are: float32[2]."""
  right = (logits.argmax(-1) == labels) * mask
  return jnp.stack([right.sum(), mask.sum()])


def accuracy(counts: np.ndarray) -> float:
  """The share of images that are right."""
  return float(counts[0] / counts[1])


def confusion(logits: Array, labels: Array, mask: Array) -> Array:
  """Pixels of a batch by true class (rows) and predicted class (columns): float32[C, C].

  float32 counts are exact to 2^24 pixels a batch.
  """
  classes = logits.shape[-1]
  pairs = (labels * classes + logits.argmax(-1)).reshape(-1)
  weights = jnp.broadcast_to(mask[:, None, None], labels.shape).reshape(-1)
  return jnp.bincount(pairs, weights=weights, length=classes ** 2).reshape(classes, classes)


def mean_iou(counts: np.ndarray) -> float:
  """Mean over classes of intersection over union of true and predicted pixels.

  Counts are of the whole split, not of single images; a class that is neither true nor predicted
  anywhere does not enter. The Pascal Visual Object Classes Challenge (Everingham et al., 2010),
  Sec. 4.4, doi:10.1007/s11263-009-0275-4.
  """
  both = np.diag(counts)
  either = counts.sum(axis=0) + counts.sum(axis=1) - both
  there = either > 0
  return float((both[there] / either[there]).mean())


TASKS: dict[str, Metric] = {
    'classify': Metric('accuracy', correct_and_total, accuracy),
    'segment': Metric('miou', confusion, mean_iou),
}


def of(config: Mapping[str, Any]) -> Metric:
  """The task of an experiment: `config.task.name`, or 'classify' where there is no `config.task`.

  Raises:
    ValueError: an unknown name.
  """
  name = config.get('task', {'name': 'classify'})['name']
  if name not in TASKS:
    raise ValueError(f'task {name!r} is unknown: choose one of {", ".join(TASKS)}')
  return TASKS[name]


def sum_counts(counts: list[Any]) -> np.ndarray:
  """The sum of the counts of all batches, in float64."""
  return np.sum([np.asarray(count, np.float64) for count in counts], axis=0)
