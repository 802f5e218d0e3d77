"""A model with its plans for prompts of any number of slots."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from models import renames
from models.backbones.lm import LM
from models.backbones.vlm import VLM, with_projector_reduction
from models.plan import make_cache_plan, make_plan

Layout = tuple[int, int, int]  # As models.backbones.vlm.Images tells it.


class ModelWithPlans:
  """A model for prompts of any number of slots: its plans count slots, so each needs its own.

  Made by `with_plans`.
  """

  def __init__(self, model: LM | VLM, reduce: Mapping[str, Mapping[str, Any] | None],
               counts: Mapping[str, int]):
    self._model, self._counts = model, counts
    self._reduce = {place: given for place, config in reduce.items() if (given := _given(config))}
    for place in ('vision', 'projector'):
      if place in self._reduce and not isinstance(model, VLM):
        raise ValueError(f'reduce.{place} acts on images, and this model reads text alone: leave '
                         'it out')
    self._fit = functools.cache(self._make)
    self._seeing = functools.cache(self._see)

  def __call__(self, slots: int, layout: Layout | None = None) -> LM | VLM:
    """The model with its plans.

    Args:
      slots: N, of ids.
      layout: of the images (`models.backbones.vlm.Images`), None for text alone: of reductions of
        visual tokens there is then nothing to do.
    """
    return self._fit(slots, layout)

  @property
  def plain(self) -> bool:
    """Whether nothing is reduced."""
    model = self._model
    lm = model.lm if isinstance(model, VLM) else model
    plans = [lm.plan, lm.cache_plan]
    if isinstance(model, VLM):
      plans += [model.tower.plan, model.door]
    return not self._reduce and not any(plans)

  def visual(self, layout: Layout | None) -> int:
    """Slots that images take beside those of ids."""
    if layout is None or not isinstance(self._model, VLM):
      return 0
    return self._seeing(layout).visual_slots(layout)

  def _see(self, layout: Layout) -> VLM:
    """With what is reduced before the language model."""
    model, place = self._model, self._reduce
    if 'vision' in place:
      plan = make_plan(place['vision'], model.tower.host)
      model = model.clone(tower=model.tower.clone(plan=plan))
    if 'projector' in place:
      together = layout[1] if place['projector'].get('across') == 'prompt' else 1
      model = with_projector_reduction(model, place['projector'],
                                       slots=together * model.each_image(layout))
    return model

  def _make(self, slots: int, layout: Layout | None) -> LM | VLM:
    if not self._reduce:
      return self._model
    model = self._model
    if layout is not None and isinstance(model, VLM):
      model = self._seeing(layout)
    lm = model.lm if isinstance(model, VLM) else model
    language, cache = (self._reduce.get(place) for place in ('language', 'cache'))
    if language or cache:
      counts, visual = self._counts, self.visual(layout)
      if isinstance(model, VLM):
        counts = {'visual': visual} if visual else {}
        language = language if visual or not _visual_alone(language) else None
      host = lm.host(slots + visual, **counts)
      plan = make_plan(language, host) if language else None
      kept = make_cache_plan(cache, host, plan=plan) if cache else None
      lm = lm.clone(plan=plan, cache_plan=kept)
    return model.clone(lm=lm) if isinstance(model, VLM) else lm


def with_plans(model: LM | VLM, *, vision: Mapping[str, Any] | None = None,
           projector: Mapping[str, Any] | None = None, language: Mapping[str, Any] | None = None,
               cache: Mapping[str, Any] | None = None, **counts: int) -> ModelWithPlans:
  """What makes a model with reductions for prompts of any number of slots.

  Args:
    model: without plans, but where there is nothing to reduce beside them.
    vision, projector, language, cache: `config.reduce.vision` and so on; None, or method='none',
      for no reduction. Keys that are None are unset.
    **counts: of an LM, slots by kind, as visual=576; the others are text. A VLM knows its own.

  Raises:
    ValueError: reductions of images in a model that sees none; and, once called, as
      `models.plan.make_plan` and `models.backbones.vlm.with_projector_reduction` do.
  """
  reduce = {'vision': vision, 'projector': projector, 'language': language, 'cache': cache}
  return ModelWithPlans(model, reduce, counts)


def _given(config: Mapping[str, Any] | None) -> dict[str, Any]:
  """What a config of a reduction sets, nothing where it is none."""
  given = {name: value for name, value in (config or {}).items() if value is not None}
  return given if given.get('method', 'none') != 'none' else {}


def _visual_alone(config: Mapping[str, Any] | None) -> bool:
  kinds = renames.current('reduce', config or {}).get('token_kinds')
  return kinds == 'visual' or (isinstance(kinds, Sequence) and tuple(kinds) == ('visual',))
