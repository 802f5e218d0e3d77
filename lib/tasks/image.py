"""Classes of images or of pixels as a task: its model, its loss, and its score.

Axes: B batch, D features, S image side, C channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lib.cost import explain
from lib.cost import vit as vit_cost
from lib.data import images as image_data
from lib.data.settings import image_settings
from lib.runtime import memory
from lib.tasks import anneal, distill
from lib.tasks.base import Task
from lib.tasks.image_metrics import Metric, cross_entropy, metric_of
from models.backbones.vit import ViT
from models.build import build, pretrained

Array = jax.Array


def make_task(config: ConfigDict, mesh: Mesh) -> Task:
  """Makes the task of a config for classes of images or pixels.

  Raises:
    ValueError: where the config contradicts itself or its data (models/build.py,
      lib/data/images.py).
  """
  metric = metric_of(config)
  vit = build(config.model, config.reduce.vision, macs=vit_cost.solver, mesh=mesh,
              platform=mesh.devices.flat[0].platform, task=config.get('task'))
  check_images(vit, config.data)
  memory.check_batch(config.data.batch_size, slots=vit.host.slots, width=vit.width, mesh=mesh)
  info = image_data.info(config.data)
  if vit.classes != info.num_classes:
    raise ValueError(f'model.num_classes (task.pixel_classes) is {vit.classes}, but '
                     f'{config.data.name} has {info.num_classes} classes: set it to that')
  phases = anneal.phases(vit, config.get('anneal'))
  return Task(
      model=vit, score=metric.score, phases=phases, init=functools.partial(init, vit),
      pretrained=functools.partial(pretrained, config.model, vit), unreduced=unreduced,
      loss=lambda model: functools.partial(loss, model, config.optimizer),
      count=functools.partial(count, vit, metric),
      scores=lambda counts: {metric.score: metric.total(counts)},
      train_iterator=image_data.train_iterator, eval_batches=image_data.eval_batches,
      macs=lambda model: vit_cost.in_training(model).training_macs, slots=vit.host.slots,
      summary=explain.tower_table(vit) + '\n' + anneal.describe(phases))


def check_images(vit: ViT, data: Mapping[str, Any]) -> None:
  """Raises a ValueError unless the images of a set have the size that the model reads."""
  settings = image_settings(data)
  size = settings.image_size
  height, width = (size, size) if isinstance(size, int) else size
  if (height, width, settings.channels) != vit.input_shape:
    raise ValueError(f'data.image_size={size} with data.channels={settings.channels} is not what '
                     f'the model reads, {vit.input_shape}: set model.image_size and '
                     'model.channels to that of the data')


def init(vit: ViT, key: Array) -> dict[str, Any]:
  """Makes fresh parameters; shapes depend neither on the mesh nor on the batch."""
  # One image is too few to divide over a mesh.
  images = jnp.zeros((1, *vit.input_shape))
  return vit.clone(mesh=None).init(key, images)['params']


def unreduced(params: Mapping[str, Any]) -> dict[str, Any]:
  """Removes the parameters of a learned reduction."""
  return {**params, 'stack': {'blocks': params['stack']['blocks']}}


def loss(vit: ViT, settings: ConfigDict, params: Mapping[str, Any],
         part: Mapping[str, Array], key: Array,
         teacher: Mapping[str, Any] | None) -> tuple[Array, dict[str, Array]]:
  """Returns the scalar to lower, and scalars to watch.

  Args:
    vit: the model that trains.
    settings: `config.optimizer`.
    params: of the model.
    part: image [B, S, S, C] and label int[B] or [B, S, S].
    key: of this step.
    teacher: parameters of the unreduced model to stay close to, or None.
  """
  logits, out = vit.apply({'params': params}, part['image'], rngs={'dropout': key})
  own = cross_entropy(logits, part['label'], label_smoothing=settings.label_smoothing)
  of_method = {name: value.mean() for name, value in out['losses'].items()}
  correct = (logits.argmax(-1) == part['label']).mean()
  # While it learns, a soft decision keeps a dropped token's slot, at size 0.
  kept = (out['tokens'].real & (out['tokens'].sizes > 0)).sum(axis=1).mean()
  # A method's losses are its mean over cuts; the teacher's are one each.
  total = own + sum(of_method.values()) / max(1, len(vit.plan.events) if vit.plan else 0)
  scalars = {'loss': own, 'train_accuracy': correct, 'kept_tokens': kept, **of_method}
  if teacher is not None:
    added = teacher_losses(vit, settings, teacher, part, logits, out)
    scalars, total = scalars | added, total + sum(added.values())
  weaker = anneal.levels(vit, settings.get('consistency'))
  if weaker:
    added = weak_plan_losses(weaker, settings, params, part, key, out['pre_logits'])
    scalars, total = scalars | added, total + sum(added.values())
  return total, scalars


def teacher_losses(vit: ViT, settings: ConfigDict, teacher: Mapping[str, Any],
                   part: Mapping[str, Array], logits: Array,
                   out: Mapping[str, Any]) -> dict[str, Array]:
  """Returns the distances of logits and tokens from the unreduced model's (`distill.distill`).

  Args:
    vit: the model that trains.
    settings: `config.optimizer`.
    teacher: parameters of the model without its plan.
    part: the batch.
    logits, out: of the model that trains, on this batch.

  Returns:
    'distill_logits' and 'distill_tokens', scalars that add to the loss.
  """
  taught, taught_out = vit.clone(plan=None).apply({'params': teacher}, part['image'])
  losses = distill.distill(logits, out['tokens'], taught, taught_out['tokens'],
                           logit_weight=settings.distill.logit_weight,
                           token_weight=settings.distill.token_weight)
  return {name: value.mean() for name, value in losses.items()}


def weak_plan_losses(weaker: Sequence[ViT], settings: ConfigDict,
                     params: Mapping[str, Any], part: Mapping[str, Array], key: Array,
                     features: Array) -> dict[str, Array]:
  """Returns the losses of the same images under a weaker plan, drawn anew in every step.

  Token reduction consistency of MCTF (Lee et al., 2024), Sec. 3.4, arXiv:2403.10030: the weaker
  plan is also trained on the labels, and the main plan's features are pulled towards the weaker
  plan's.

  Args:
    weaker: the models to draw from (`anneal.levels`).
    settings: `config.optimizer`.
    params: of all of them.
    part: the batch.
    key: of this step.
    features: float32[B, D], which the main plan classifies by.

  Returns:
    'weak_plan_loss' and 'consistency', scalars that add to the loss.
  """

  def branch(model: ViT) -> Callable[[Mapping[str, Any], Array], tuple[Array, Array]]:
    def apply(params: Mapping[str, Any], images: Array) -> tuple[Array, Array]:
      logits, out = model.apply({'params': params}, images, rngs={'dropout': key})
      return logits, out['pre_logits']
    return apply

  drawn = jax.random.randint(jax.random.fold_in(key, len(weaker)), (), 0, len(weaker))
  logits, weak_features = jax.lax.switch(drawn, [branch(model) for model in weaker], params,
                                         part['image'])
  distance = distill.consistency_loss(features, weak_features).mean()
  return {'weak_plan_loss': cross_entropy(logits, part['label'],
                                          label_smoothing=settings.label_smoothing),
          'consistency': settings.consistency.weight * distance}


def count(vit: ViT, metric: Metric, params: Mapping[str, Any],
          batch: Mapping[str, Array]) -> Array:
  """Returns a batch's addition to the counts of the score; padding has mask 0."""
  logits, _ = vit.apply({'params': params}, batch['image'])
  return metric.counts(logits, batch['label'], batch['mask'])
