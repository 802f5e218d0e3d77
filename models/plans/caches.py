"""Resolves configs of the cache into plans: how many entries each layer keeps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, cast

import numpy as np

from models.plans.events import Plan, make_events
from models.plans.hosts import Host, position_policy
from models.plans.methods import KEYS, make_method
from models.plans.needs import check_needs
from models.reduction import DECODED, OF_RECENT, Reduction
from ops import values
from ops.budgets import (
  BUDGETS,
  Cut,
  Limits,
  Step,
  parse_layers,
  per_layer,
  resolve,
  take,
)
from ops.reducers.cache import CACHE_REDUCERS
from ops.reducers.method import EvictingMethod, Method
from ops.signals import NEXT_LAYER, STATIC

CACHE_BUDGETS = ('keep_ratio', 'keep', 'remove')
CACHE_KEYS = KEYS.without('site', 'parts', 'watch', 'ratio_of', 'mode', 'token_kinds', 'holds',
                          'expand', 'kv_mb', *set(BUDGETS) - set(CACHE_BUDGETS))


def make_cache_plan(config: Mapping[str, Any], host: Host, *, plan: Plan | None = None) -> Plan:
  """Resolves `config.reduce.cache`: how many cache entries each layer keeps after the prompt.

  Each layer is cut by itself, from the slots that its own attention saw.

  Args:
    config: method (one of ops/reducers/cache), args, layers, rounding, positions and one of the
      budgets keep_ratio (a share of what a layer has, one for all or one a listed layer), keep or
      remove. `capacity` is how many entries a head may hold while a model decodes: the method then
      makes room for new ones, and without a budget it is that, too.
    host: of the model.
    plan: the plan that reduces tokens between layers, or None.

  Raises:
    ValueError: as `make_plan` does.
  """
  values.check_keys('reduce.cache', config, CACHE_KEYS,
                    unknown='a reduction of the cache has no key ')
  name = cast(str, config.get('method'))  # `make_method` rejects None.
  method: Any = make_method(name, config.get('args') or {}, CACHE_REDUCERS)  # A `CacheReducer`.
  offers = host.offers - NEXT_LAYER - {'attention'}
  check_needs(name, method, dataclasses.replace(host, offers=offers), 'cache')
  named = config.get('layers')
  default = tuple(method.default_shares(host.depth)) or None  # It may leave layers alone.
  layers = parse_layers(default if named is None else named, host.depth)
  capacity = config.get('capacity') or 0
  if capacity:
    method = _evicting(name, method, capacity)
    if not any(config.get(key) is not None for key in BUDGETS):
      config = {**config, 'keep': capacity}
  budgets = [key for key in BUDGETS if config.get(key) is not None]
  if len(budgets) > 1 or (not budgets and not method.allocates) or (
      not set(budgets) <= set(CACHE_BUDGETS)):
    raise ValueError(f'a reduction of the cache needs one budget, got {budgets or "none"}: choose '
                     f'one of {", ".join(CACHE_BUDGETS)}')
  form = budgets[0] if budgets else ''
  counts = slots_seen(host, plan)
  amounts = per_layer(config.get(form), layers, form)
  cuts: list[Cut] = []
  for layer, value in zip(layers, amounts, strict=True):
    slots = counts[layer]
    limits = Limits(host.depth, slots, 0, method.extra_slots,
                    functools.partial(method.min_slots, protected=0), 'keep')
    if method.allocates:
      # A method may leave the count to what it reads: then a layer is asked though nothing goes.
      own = Allocated(method, layer, host.depth, form, value)
      step = Step(layer, own, f'{form}={value}')
      cuts.append(take(step, slots, slots, limits) or Cut(layer, slots, slots))
      continue
    budget = {form: value, 'layers': layer, 'rounding': config.get('rounding') or 'floor'}
    # While the model decodes, entries go though of the prompt none does.
    cut = resolve(budget, limits) or (Cut(layer, slots, slots),) * bool(capacity)
    if capacity and cut[0].slots_out > capacity and cast(EvictingMethod, method).every == 1:
      raise ValueError(f'{name} leaves {cut[0].slots_out} entries of a prompt in layer {layer}, '
                       f'more than capacity={capacity}, and then lets one go for every token: set '
                       f'keep={capacity} or less')
    cuts += cut
  if form == 'keep_ratio' and len(set(amounts)) == 1:
    method = method.with_ratio(_exact(form, amounts[0], 1))
  policies = dataclasses.replace(host, positions=('keep', 'compact'))
  positions = position_policy(config.get('positions'), method, policies)
  if capacity and positions == 'compact' and cast(EvictingMethod, method).evict_needs & OF_RECENT:
    raise ValueError(f"{name} compares the latest queries with keys, which positions='compact' "
                     "turns while the model decodes: choose 'keep', or leave capacity out")
  reduction = Reduction(name, method, positions=positions, capacity=capacity)
  return Plan(make_events(reduction, 'cache', cuts), (reduction,))


def _evicting(name: str, method: Method, capacity: int) -> EvictingMethod:
  """Returns a method that can keep a cache at a capacity while a model decodes, else raises."""
  if not hasattr(method, 'evict'):
    able = sorted(key for key, made in CACHE_REDUCERS.items() if hasattr(made, 'evict'))
    raise ValueError(f'{name} lets no entries go while a model decodes: choose one of '
                     f'{", ".join(able)}, or leave capacity out')
  method = cast(EvictingMethod, method)
  missing = sorted(method.evict_needs - STATIC - DECODED)
  if missing:
    raise ValueError(f'{name} needs {", ".join(missing)}, which a decoded token does not tell of '
                     f'all entries: choose another method, or leave capacity={capacity} out')
  if capacity < method.min_capacity:
    raise ValueError(f'capacity={capacity} is too small for {name}, which keeps '
                     f'{method.min_capacity} entries at least, its sinks and window among them: '
                     f'set capacity={method.min_capacity} or more, or fewer of these')
  return method


@dataclasses.dataclass(frozen=True)
class Allocated:
  """Leaves what a method says itself of a layer (`CacheReducer.allocate`)."""

  method: Any
  layer: int
  depth: int
  form: str
  value: Any

  def __call__(self, now: Any, start: Any) -> Any:
    """Returns how many stay."""
    if isinstance(now, np.ndarray):
      return np.array([self(int(count), None) for count in now])
    asked = _exact(self.form, self.value, now) if self.form else None
    return self.method.allocate(self.layer, self.depth, now, asked)


def _exact(form: str, value: Any, slots: int) -> Fraction:
  """Returns the entries that a budget asks for of so many, not rounded.

  Raises:
    ValueError: a budget that is no number.
  """
  values.check(form, value, float)
  number = Fraction(str(value))
  return {'keep_ratio': number * slots, 'keep': min(number, Fraction(slots)),
          'remove': max(slots - number, Fraction(1))}[form]


def slots_seen(host: Host, plan: Plan | None) -> tuple[int, ...]:
  """Returns the slots that each layer's attention sees under a plan, which its cache then holds."""
  if plan is None:
    return (host.slots,) * host.depth
  if plan.events and plan.positions == 'restart':
    return (plan.events[-1].slots_out,) * host.depth
  return tuple(tokens.queries for tokens in plan.profile(host.depth, host.slots))
