"""Trains under weaker plans as well: before the final plan, or in turns with it.

Shapes are static, so a keep ratio that falls does so in a few phases, each a model of its own that
is compiled once; all read the same parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models.backbones.vit import ViT
from models.plan import scaled_plan
from models.plans.events import Plan
from ops import budgets


@dataclasses.dataclass(frozen=True)
class Phase:
  """A stretch of training under one plan.

  Attributes:
    start_step: steps done when it begins.
    model: with the plan of this phase.
  """

  start_step: int
  model: Any


def phases(vit: ViT, settings: Mapping[str, Any] | None) -> tuple[Phase, ...]:
  """The phases of a training, in order; one where nothing is annealed.

  EViT (Liang et al., 2022), arXiv:2202.07800, lets the keep ratio fall along a cosine.

  Args:
    vit: the model under the plan to arrive at.
    settings: `config.anneal`: start_step, stop_step and phases, 0 of them for none; or None.

  Raises:
    ValueError: for an unreduced model, impossible steps, or a method whose parameters depend on the
      number of tokens.
  """
  if not settings or not settings['phases']:
    return (Phase(0, vit),)
  _check_reduced(vit, 'anneal.phases')
  steps = budgets.phases(settings['start_step'], settings['stop_step'], settings['phases'])
  stages: list[Phase] = []
  for first, share in steps:
    reduced = _with_share(vit, share)
    if not stages or _plan(reduced).events != _plan(stages[-1].model).events:
      stages.append(Phase(first, reduced))
  _check_parameters(vit, [phase.model for phase in stages])
  return tuple(stages)


def at(phases: tuple[Phase, ...], done: int) -> Phase:
  """The phase that the training step after `done` steps belongs to."""
  return next(phase for phase in reversed(phases) if phase.start_step <= done)


def describe(phases: tuple[Phase, ...]) -> str:
  """A line a phase, nothing where there is only one."""
  if len(phases) == 1:
    return ''
  lines = []
  for phase in phases:
    cuts = phase.model.plan.events
    counts = ', '.join(f'{cut.slots_out} in layer {cut.layer}' for cut in cuts) or 'all'
    lines.append(f'from step {phase.start_step}: tokens left {counts}\n')
  return ''.join(lines)


def levels(vit: ViT, settings: Mapping[str, Any] | None) -> tuple[ViT, ...]:
  """Models whose plans remove 0, 1 / n, ... (n - 1) / n of what a model's own plan removes.

  Args:
    vit: the model.
    settings: `config.optimizer.consistency`, whose `levels` is n; 0 or None for no models.

  Raises:
    ValueError: for an unreduced model, one that does not classify images, or a method whose
      parameters depend on the number of tokens.
  """
  if not settings or not settings['levels']:
    return ()
  count = settings['levels']
  _check_reduced(vit, 'optimizer.consistency.levels')
  models = [_with_share(vit, index / count) for index in range(count)]
  _check_parameters(vit, models)
  return tuple(models)


def _with_share(vit: ViT, share: float) -> ViT:
  return vit.clone(plan=scaled_plan(_plan(vit), vit.host, share))


def _plan(vit: ViT) -> Plan:
  """The plan of a model that `_check_reduced` let pass."""
  assert vit.plan is not None
  return vit.plan


def _check_reduced(vit: ViT, key: str) -> None:
  if vit.plan is None or not vit.plan.events:
    raise ValueError(f'{key} asks for fewer tokens step by step, but nothing is reduced: set '
                     f'reduce.vision.method and a budget, or {key}=0')


def _check_parameters(vit: ViT, others: list[ViT]) -> None:
  """Raises unless all can read the parameters of one."""
  wanted = _reducers(vit)
  for other in others:
    for name, shapes in _reducers(other).items():
      if shapes != wanted[name]:
        raise ValueError(f'the parameters of {_plan(vit).name} depend on how many tokens are left, '
                         'so they cannot serve several plans: set anneal.phases=0 and '
                         'optimizer.consistency.levels=0')


def _reducers(vit: ViT) -> dict[str, Any]:
  """Shapes of the parameters of a learned method, by cut."""
  images = jnp.zeros((1, *vit.input_shape))
  params = jax.eval_shape(vit.clone(mesh=None).init, jax.random.key(0), images)['params']
  return {name: jax.tree.map(jnp.shape, tree) for name, tree in params['stack'].items()
          if name != 'blocks'}
