"""Resolves `config.reduce` into a model with its plans; no other module does.

  vit = with_vision_plan(vit, config.reduce.vision)
  plans = with_plans(vlm, **config.reduce)
  vlm = plans(slots, images.layout)

Plans count slots, so prompts of another length need other plans: `with_plans` resolves them as they
come.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast

from ml_collections import ConfigDict

from models import renames
from models.backbones.images import Layout
from models.backbones.lm import LM
from models.backbones.qwen_vision import QwenVision
from models.backbones.vit import ViT
from models.backbones.vlm import VLM
from models.plans import cache_bytes
from models.plans.caches import make_cache_plan
from models.plans.events import Plan, make_events, plan_of
from models.plans.make import make_plan
from models.plans.methods import Config, Settings, one_reduction, reduction_settings
from models.plans.needs import watched_layers
from models.projector import ACROSS, FROM_TOWER, ORDERS, ProjectorReduction, RecordSignals
from models.reduction import Event, Reduction
from ops import choices

# Parts of a model that `config.reduce` has a reduction for.
COMPONENTS = ('vision', 'projector', 'language', 'cache')
Macs = Callable[[Sequence[Event]], float]
# A model with its plans, ids of a prompt and the layout of its images -> MACs of reading them.
TotalMacs = Callable[[LM | VLM, int, Layout | None], float]
# The same -> bytes that the cache of a row holds behind them.
KVBytes = Callable[[LM | VLM, int, Layout | None], float]
# A reduction, or several in one component.
Reductions: TypeAlias = Config | Sequence[Config]
Tower = TypeVar('Tower', bound=ViT | QwenVision)


def check_components(names: Iterable[str]) -> None:
  """Raises a ValueError for a name that is none of `COMPONENTS`."""
  for name in names:
    choices.check_key('config.reduce has no component ', name, COMPONENTS)


def with_vision_plan(tower: Tower, config: Reductions | None, *,
                     macs: Callable[[Tower], Macs] | None = None) -> Tower:
  """Returns a tower with the plan of `config.reduce.vision`, the tower itself where it is none.

  Args:
    tower: without a plan.
    config: as `models.plan.make_plan` reads it; None, or method='none', for no reduction.
      Keys that are None are unset.
    macs: tower -> MACs as a function of events, for budgets in FLOPs (lib/cost/vit.py).

  Raises:
    ValueError: as `make_plan`.
  """
  settings = reduction_settings(config)
  if not settings:
    return tower
  plan = make_plan(settings, tower.host, macs=macs and macs(tower))
  return cast(Tower, tower.clone(plan=plan))


def with_language_plans(lm: LM, *, language: Reductions | None, cache: Reductions | None,
                        slots: int, macs: Callable[[LM], float] | None = None,
                        unreduced: float = 0.0, kv_bytes: Callable[[LM], float] | None = None,
                        **counts: int) -> LM:
  """Returns a language model with the plans of `config.reduce.language` and `config.reduce.cache`.

  Args:
    lm: without plans.
    language, cache: as `make_plan` and `make_cache_plan` read them; None, or method='none', for no
      reduction. Keys that are None are unset.
    slots: N of the prompt, visual tokens included.
    macs: a language model with its plan -> MACs of the whole model, for budgets in FLOPs.
    unreduced: those of the whole model without any reduction, of which flops_ratio is a share.
    kv_bytes: a language model with its plans -> what its cache holds behind the prompt, for budgets
      in bytes, `kv_mb`.
    **counts: slots by kind, as visual=576; the others are text.

  Raises:
    ValueError: as `make_plan`, `make_cache_plan` and `cache_bytes.resolve`.
  """
  language, cache = reduction_settings(language), one_reduction('cache', cache)
  if not language and not cache:
    return lm
  host = lm.host(slots, **counts)

  def make(language: Settings, cache: dict[str, Any]) -> LM:
    plan = None
    if language and macs:
      joint = _in_gmacs(language, unreduced)
      plan = make_plan(joint, host, macs=lambda events: macs(lm.clone(plan=plan_of(events))))
    elif language:
      plan = make_plan(language, host)
    return lm.clone(plan=plan,
                    cache_plan=make_cache_plan(cache, host, plan=plan) if cache else None)

  return cache_bytes.resolve(language, cache, make, kv_bytes)


def with_projector_reduction(vlm: VLM, config: Mapping[str, Any], *, slots: int) -> VLM:
  """Returns a model that reduces its visual tokens between projector and language model.

  Args:
    vlm: the model.
    config: `config.reduce.projector`: as `models.plan.make_plan` reads it, without site and
      layers (`watch` names layers of the tower); and `across` and `order` of `ProjectorReduction`.
    slots: V, tokens of an image (of all images of a row under across='prompt').

  Raises:
    ValueError: as `make_plan`; a method that needs what a tower does not offer, or cannot offer
      under a reduction of its own.
  """
  settings = {name: value for name, value in config.items() if value is not None}
  across, order = settings.pop('across', 'image'), settings.pop('order', 'raster')
  choices.check('reduce.projector.across=', across, ACROSS)
  choices.check('reduce.projector.order=', order, ORDERS)
  settings = one_reduction('projector', settings)
  if not settings:
    return vlm.clone(projector_reduction=None)
  if settings.get('site') or settings.get('layers', 'all') not in ('all', (0,)) or (
      'expand' in settings):
    raise ValueError('the projector has no layers and no sites: leave site, layers and expand out '
                     'of reduce.projector')
  if settings.get('mode', 'gather') != 'gather':
    raise ValueError(f'mode={settings["mode"]!r} keeps all slots, which nothing behind the '
                     "projector hides: leave mode out of reduce.projector")
  watch, host = settings.pop('watch', None), vlm.projector_host(slots)
  if across == 'prompt':
    host = dataclasses.replace(host, offers=host.offers - {'grids'})
  made = make_plan(settings | {'site': 'after', 'layers': (0,)}, host)
  # Signals are those of the tower's last layer that runs: as if the cut were there.
  tower, chosen = vlm.tower, made.only
  cuts = tuple(dataclasses.replace(event, layer=vlm.tower_depth - 1) for event in made.events)
  watched = watched_layers(chosen.name, chosen.method,
                           dataclasses.replace(host, depth=tower.depth), cuts, 'after', watch)
  chosen = dataclasses.replace(chosen, watch=watched)
  plan = Plan(make_events(chosen, 'after', cuts), (chosen,))
  record, grid = RecordSignals(plan), vlm.projector_grid(slots)
  if record.layers:
    if tower.plan is not None and tower.plan.events:
      reads = ', '.join(sorted(record.watch_needs & set(FROM_TOWER)))
      raise ValueError(f'{plan.name} at the projector reads {reads} of the tower, which '
                       f'{tower.plan.name} reduces: reduce at one of the two places')
    # It watches alone: without events nothing calls it.
    recorder = Reduction('record_signals', record, watch=record.layers)  # type: ignore[arg-type]
    tower = tower.clone(plan=Plan((), (recorder,)))
  special = vlm.special if record.layers and grid else 0
  if plan.events and chosen.method.hands_on and not (special and 'cls_attention' in host.offers):
    raise ValueError(f'{chosen.name} hands on a [CLS] that these tokens do not have: give it one '
                     "crop an image, of a tower with [CLS], or set args.cls='dropped'")
  reduction = ProjectorReduction(plan, across, order, grid, vlm.crop_grid, tower.depth,
                                 special)
  parts, rope = chosen.method.member_positions, vlm.lm.rope
  lm = vlm.lm.clone(rope=rope.split(parts)) if parts and rope.sections else vlm.lm
  return vlm.clone(tower=tower, lm=lm, projector_reduction=reduction)


class ModelWithPlans:
  """A model for prompts of any number of slots, each with the plans that it needs.

  `with_plans` makes it.
  """

  def __init__(self, model: LM | VLM, reduce: Mapping[str, Reductions | None],
               counts: Mapping[str, int], macs: TotalMacs | None = None,
               kv_bytes: KVBytes | None = None):
    self._model, self._macs, self._kv_bytes = model, macs, kv_bytes
    self._counts: Mapping[str, Any] = counts
    self._reduce = {name: settings for name, config in reduce.items()
                    if (settings := reduction_settings(config))}
    self._projector = one_reduction('projector', reduce.get('projector'))
    for name in ('vision', 'projector'):
      if name in self._reduce and not isinstance(model, VLM):
        raise ValueError(f'reduce.{name} acts on images, and this model reads text alone: leave '
                         'it out')
      cache_bytes.refuse(name, self._reduce.get(name, {}))
    self._cached = functools.cache(self._with_all_plans)
    self._cached_visual = functools.cache(self._with_visual_plans)

  def __call__(self, slots: int, layout: Layout | None = None) -> LM | VLM:
    """Returns the model with its plans.

    Args:
      slots: N, of ids.
      layout: of the images (`models.backbones.images.Images`), None for text alone: reductions of
        visual tokens then do nothing.

    Raises:
      ValueError: as `make_plan`, `make_cache_plan` and `with_projector_reduction`.
    """
    return self._cached(slots, layout)

  @property
  def plain(self) -> bool:
    """Returns whether nothing is reduced."""
    model = self._model
    lm = model.lm if isinstance(model, VLM) else model
    plans: list[object] = [lm.plan, lm.cache_plan]
    if isinstance(model, VLM):
      plans += [model.tower.plan, model.projector_reduction]
    return not self._reduce and not any(plans)

  def visual_slots(self, layout: Layout | None) -> int:
    """Returns the slots that images take in addition to those of ids."""
    if layout is None or not isinstance(self._model, VLM):
      return 0
    return self._cached_visual(layout).visual_slots(layout)

  def _with_visual_plans(self, layout: Layout) -> VLM:
    """The model with the reductions of its tower and at its projector."""
    model = self._model
    assert isinstance(model, VLM)
    if 'vision' in self._reduce:
      model = model.clone(tower=with_vision_plan(model.tower, self._reduce['vision']))
    config = self._projector
    if config:
      together = layout[1] if config.get('across') == 'prompt' else 1
      model = with_projector_reduction(model, config, slots=together * model.each_image(layout))
    return model

  def _with_all_plans(self, slots: int, layout: Layout | None) -> LM | VLM:
    model, language, cache = self._model, self._reduce.get('language'), self._reduce.get('cache')
    if not isinstance(model, VLM):
      return with_language_plans(model, language=language, cache=cache, slots=slots,
                                 **self._joint(model, slots, None), **self._counts)
    if not self._reduce:
      return model
    visual = self.visual_slots(layout)
    if layout is not None:
      model = self._cached_visual(layout)
    if not visual:
      several = language if isinstance(language, list) else [language] if language else []
      language = [config for config in several if not _of_visual_alone(config)]
    counts: dict[str, Any] = {'visual': visual} if visual else {}
    lm = with_language_plans(model.lm, language=language, cache=cache, slots=slots + visual,
                             **self._joint(model, slots, layout), **counts)
    return model.clone(lm=lm)

  def _joint(self, model: LM | VLM, slots: int, layout: Layout | None) -> dict[str, Any]:
    """Returns what budgets in FLOPs count: the whole model, with all that is reduced before."""
    def whole(lm: LM) -> LM | VLM:
      return model.clone(lm=lm) if isinstance(model, VLM) else lm

    total, kv_bytes = self._macs, self._kv_bytes
    joint: dict[str, Any] = {}
    if kv_bytes is not None:
      joint['kv_bytes'] = lambda lm: kv_bytes(whole(lm), slots, layout)
    if total is not None:
      joint |= {'macs': lambda lm: total(whole(lm), slots, layout),
                'unreduced': total(self._model, slots, layout)}
    return joint


def with_plans(model: LM | VLM, *, vision: Reductions | None = None,
               projector: Reductions | None = None, language: Reductions | None = None,
               cache: Reductions | None = None, macs: TotalMacs | None = None,
               kv_bytes: KVBytes | None = None, **counts: int) -> ModelWithPlans:
  """Returns a model with reductions, for prompts of any number of slots.

  Args:
    model: without plans; only where no reduction is given may it have some, which stay.
    vision, projector, language, cache: `config.reduce.vision` and so on; None, or method='none',
      for no reduction. Keys that are None are unset. Tower and language model take several.
    macs: of a whole model (`lib.cost.vlm.macs_of`), for budgets in FLOPs of the language model:
      flops_ratio is then of the model without any reduction, whatever stands before.
    kv_bytes: of a whole model (`lib.cost.vlm.kv_bytes_of`), for budgets in bytes of its cache.
    **counts: of an LM, slots by kind, as visual=576; the others are text. A VLM counts its own.

  Raises:
    ValueError: reductions of images in a model that reads none; and, once called, as
      `ModelWithPlans.__call__`.
  """
  reduce = {'vision': vision, 'projector': projector, 'language': language, 'cache': cache}
  return ModelWithPlans(model, reduce, counts, macs, kv_bytes)


def without_plans(model: LM | VLM) -> LM | VLM:
  """Returns a model with all its reductions taken out."""
  if not isinstance(model, VLM):
    return model.clone(plan=None, cache_plan=None)
  return model.clone(tower=model.tower.clone(plan=None), projector_reduction=None,
                     lm=model.lm.clone(plan=None, cache_plan=None))


def _in_gmacs(language: Reductions, unreduced: float) -> list[Mapping[str, Any]]:
  """Reductions with shares of FLOPs as so many of the unreduced model's."""
  several = [language] if isinstance(language, Mapping | ConfigDict) else list(language)
  return [{**config, 'flops_ratio': None, 'gmacs': config['flops_ratio'] * unreduced / 1e9}
          if isinstance(config.get('flops_ratio'), float) else dict(config) for config in several]


def _of_visual_alone(config: Mapping[str, Any]) -> bool:
  """Returns whether a reduction touches visual tokens alone, as it does where it does not say."""
  kinds = renames.current('reduce', config).get('token_kinds')
  return kinds in (None, 'visual') or tuple(kinds) == ('visual',)
