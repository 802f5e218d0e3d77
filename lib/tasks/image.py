"""Classes of images or of pixels: what a model learns them from, and how it scores.

Axes: B batch, S image side, C channels.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lib.cost import vit as vit_cost
from lib.data import images as image_data
from lib.tasks import anneal, distill
from lib.tasks import base as tasks
from lib.tasks.base import Task
from models.backbones.vit import ViT
from models.build import build, pretrained

Array = jax.Array


def learner(config: ConfigDict, mesh: Mesh) -> Task:
  """A config for classes of images or pixels, made ready.

  Raises:
    ValueError: where the config contradicts itself or its data (models/build.py,
      lib/data/images.py).
  """
  task = tasks.of(config)
  vit = build(config.model, config.reduce.vision, macs=vit_cost.solver, mesh=mesh,
              platform=mesh.devices.flat[0].platform, task=config.get('task'))
  found = image_data.info(config.data)
  if vit.classes != found.num_classes:
    raise ValueError(f'model.num_classes (task.pixel_classes) is {vit.classes}, but '
                     f'{config.data.name} has {found.num_classes} classes: set it to that')
  phases = anneal.phases(vit, config.get('anneal'))
  return Task(
      model=vit, score=task.score, phases=phases, init=functools.partial(init, vit),
      loaded=functools.partial(pretrained, config.model, vit), unreduced=unreduced,
      loss=lambda model: functools.partial(loss, model, config.optimizer),
      count=functools.partial(count, vit, task),
      scores=lambda counts: {task.score: task.total(counts)},
      train_iterator=image_data.train_iterator, eval_batches=image_data.eval_batches,
      macs=lambda model: vit_cost.in_training(model).training_macs, slots=vit.host.slots,
      about=vit_cost.table(vit) + '\n' + anneal.describe(phases))


def init(vit: ViT, key: Array) -> dict[str, Any]:
  """Fresh parameters; shapes depend neither on the mesh nor on the batch."""
  # One image is too few to divide over a mesh.
  images = jnp.zeros((1, *vit.input_shape))
  return vit.clone(mesh=None).init(key, images)['params']


def unreduced(params: Mapping[str, Any]) -> dict[str, Any]:
  """Without the parameters of a learned reduction."""
  return {**params, 'stack': {'blocks': params['stack']['blocks']}}


def loss(vit: ViT, settings: Mapping[str, Any], params: Mapping[str, Any],
         part: Mapping[str, Array], key: Array,
         teacher: Mapping[str, Any] | None) -> tuple[Array, dict[str, Array]]:
  """What to lower, and scalars to watch.

  Args:
    vit: the model that trains.
    settings: `config.optimizer`.
    params: of the model.
    part: image [B, S, S, C] and label int[B] or [B, S, S].
    key: of this step.
    teacher: parameters of the unreduced model to hold on to, or None.
  """
  logits, out = vit.apply({'params': params}, part['image'], rngs={'dropout': key})
  own = tasks.cross_entropy(logits, part['label'], label_smoothing=settings.label_smoothing)
  extra = {name: value.mean() for name, value in out['losses'].items()}
  right = (logits.argmax(-1) == part['label']).mean()
  # While it learns, a soft decision keeps a dropped token's slot, at size 0.
  kept = (out['tokens'].real & (out['tokens'].sizes > 0)).sum(axis=1).mean()
  scalars = {'loss': own, 'train_accuracy': right, 'kept_tokens': kept, **extra}
  # A method's losses are its mean over cuts; the teacher's are one each.
  total = own + sum(extra.values()) / max(1, len(vit.plan.cuts) if vit.plan else 0)
  if teacher is not None:
    whole = vit.clone(plan=None)
    taught, its = whole.apply({'params': teacher}, part['image'])
    held = distill.distill(logits, out['tokens'], taught, its['tokens'],
                           logit_weight=settings.distill.logit_weight,
                           token_weight=settings.distill.token_weight)
    held = {name: value.mean() for name, value in held.items()}
    scalars, total = scalars | held, total + sum(held.values())
  gentler = anneal.levels(vit, settings.get('consistency'))
  if gentler:
    held = weak_plan_losses(gentler, settings, params, part, key, out['pre_logits'])
    scalars, total = scalars | held, total + sum(held.values())
  return total, scalars


def weak_plan_losses(gentler: tuple[ViT, ...], settings: Mapping[str, Any],
                     params: Mapping[str, Any], part: Mapping[str, Array], key: Array,
                     features: Array) -> dict[str, Array]:
  """The losses of the same images under a plan that removes less, drawn anew in every step.

  Token reduction consistency of MCTF (Lee et al., 2024), Sec. 3.4, arXiv:2403.10030: that plan
  learns the labels too, and the features of the plan proper are drawn to its own.

  Args:
    gentler: the models to draw from (`anneal.levels`).
    settings: `config.optimizer`.
    params: of all of them.
    part: the batch.
    key: of this step.
    features: float32[B, D], what the plan proper classifies by.

  Returns:
    'weak_plan_loss' and 'consistency', scalars that add to the loss.
  """

  def branch(model):
    def apply(params, images):
      logits, out = model.apply({'params': params}, images, rngs={'dropout': key})
      return logits, out['pre_logits']
    return apply

  which = jax.random.randint(jax.random.fold_in(key, len(gentler)), (), 0, len(gentler))
  logits, whole = jax.lax.switch(which, [branch(model) for model in gentler], params,
                                 part['image'])
  apart = distill.consistency_loss(features, whole).mean()
  return {'weak_plan_loss': tasks.cross_entropy(logits, part['label'],
                                                label_smoothing=settings.label_smoothing),
          'consistency': settings.consistency.weight * apart}


def count(vit: ViT, task: tasks.Metric, params: Mapping[str, Any],
          batch: Mapping[str, Array]) -> Array:
  """What a batch adds to the task's score; padding has mask 0."""
  logits, _ = vit.apply({'params': params}, batch['image'])
  return task.counts(logits, batch['label'], batch['mask'])
