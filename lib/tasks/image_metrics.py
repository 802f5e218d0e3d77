"""Losses and scores of classes of images, or of every pixel.

Axes: B batch, S image side, C classes. Labels are int32[B], logits float32[B, C]; for every pixel
int32[B, S, S] and float32[B, S, S, C].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lib.report import intervals
from lib.report.rows import Row
from lib.tasks.base import task_name
from ops import choices

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Metric:
  """Holds the score of a task, as counts that add up and their total.

  Attributes:
    score: its name in rows and on screen; the score is between 0 and 1, higher is better.
    counts: (logits, labels, mask float32[B], 0 for rows that do not count) -> counts that add up.
    total: sum of the counts -> the score.
    interval: sum of the counts -> the score's 95 % interval as keys of a row, none where examples
      do not count one by one.
  """

  score: str
  counts: Callable[[Array, Array, Array], Array]
  total: Callable[[np.ndarray], float]
  interval: Callable[[np.ndarray], Row]


def cross_entropy(logits: Array, labels: Array, *, label_smoothing: float = 0.0) -> Array:
  """Returns the mean cross-entropy over images, or over pixels: float32."""
  targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
  return optax.softmax_cross_entropy(logits, targets).mean()


def cross_entropies(logits: Array, labels: Array) -> Array:
  """Returns the cross-entropy of each image, the mean over its pixels: float32[B]."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses.reshape(len(losses), -1).mean(axis=1)


def correct_and_total(logits: Array, labels: Array, mask: Array) -> Array:
  """Counts the images of a batch that are right, and all of them: float32[2]."""
  correct = (logits.argmax(-1) == labels) * mask
  return jnp.stack([correct.sum(), mask.sum()])


def accuracy(counts: np.ndarray) -> float:
  """Returns the fraction of images that are right."""
  return float(counts[0] / counts[1])


def accuracy_interval(counts: np.ndarray) -> Row:
  """Returns the ends of the accuracy's 95 % interval as keys of a row."""
  low, high = intervals.wilson(*counts)
  return {'accuracy_low': low, 'accuracy_high': high}


def confusion(logits: Array, labels: Array, mask: Array) -> Array:
  """Counts pixels of a batch by true class (rows) and predicted class (columns): float32[C, C].

  float32 counts are exact to 2^24 pixels a batch.
  """
  classes = logits.shape[-1]
  pairs = (labels * classes + logits.argmax(-1)).reshape(-1)
  weights = jnp.broadcast_to(mask[:, None, None], labels.shape).reshape(-1)
  return jnp.bincount(pairs, weights=weights, length=classes ** 2).reshape(classes, classes)


def mean_iou(counts: np.ndarray) -> float:
  """Returns the mean over classes of intersection over union of true and predicted pixels.

  Counts are of the whole split, not of single images; a class that is neither true nor predicted
  anywhere does not enter. The Pascal Visual Object Classes Challenge (Everingham et al., 2010),
  Sec. 4.4, doi:10.1007/s11263-009-0275-4.
  """
  intersection = np.diag(counts)
  union = counts.sum(axis=0) + counts.sum(axis=1) - intersection
  present = union > 0
  return float((intersection[present] / union[present]).mean())


METRICS: dict[str, Metric] = {
    'classify': Metric('accuracy', correct_and_total, accuracy, accuracy_interval),
    'segment': Metric('miou', confusion, mean_iou, lambda counts: {}),
}


def metric_of(config: Mapping[str, Any]) -> Metric:
  """Returns the metric of an experiment on images, by its task's name.

  Raises:
    ValueError: an unknown name.
  """
  name = task_name(config)
  choices.check('task ', name, METRICS)
  return METRICS[name]
