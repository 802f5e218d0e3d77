"""Methods by name, and the configs that name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

from ml_collections import ConfigDict

from models.compressors import COMPRESSORS, ROUTERS
from models.plans.hosts import Host
from ops import choices, values
from ops.budgets import (
  BUDGETS,
)
from ops.reducers import REDUCERS, join
from ops.reducers.branch import BRANCHES
from ops.reducers.insert import INSERTS
from ops.reducers.method import Method

Config: TypeAlias = Mapping[str, Any] | ConfigDict
Settings: TypeAlias = dict[str, Any] | list[dict[str, Any]]
MODES = ('gather', 'mask')
# Layers and budgets are checked beside the host that they are for (ops/budgets.py).
KEYS = values.Keys({
    'method': str, 'args': Mapping[str, Any], 'site': str, 'layers': Any, 'watch': Any,
    'rounding': str, 'ratio_of': str, 'mode': str, 'token_kinds': str | tuple[str, ...],
    'parts': str, 'positions': str, 'holds': str, 'capacity': values.Count, 'expand': int,
    'kv_mb': values.Positive, **dict.fromkeys(BUDGETS, Any)})
# A method that another one holds (ops/reducers/scoring.py).
HELD_KEYS = values.Keys({'method': str, 'args': Mapping[str, Any]}, frozenset({'method'}))


def methods(host: Host | None = None) -> dict[str, type[Method]]:
  """Returns every method by name, learned ones included; with a host, those that it can run."""
  every = join(REDUCERS, COMPRESSORS)
  if host is None:
    return every
  instances = {name: method() for name, method in every.items()}
  return {name: every[name] for name, method in instances.items()
          if method.needs | (method.watch_needs - host.watches) <= host.offers
          and method.positions in ('', *host.positions)}


def branch_methods() -> dict[str, type[Method]]:
  """Returns every method made for a branch by name, learned ones included."""
  return join(BRANCHES, ROUTERS)


def make_method(name: str, args: Mapping[str, Any],
                registry: Mapping[str, type] | None = None) -> Method:
  """Builds a method from its name and arguments.

  Args:
    name: a name in the registry.
    args: fields of the method; lists become tuples. A method that it holds is a dict of `method`
      and `args`.
    registry: methods by name; by default all of `methods()` and `branch_methods()`, and those that
      insert.

  Raises:
    ValueError: for an unknown name or argument; it lists what there is.
  """
  registry = join(methods(), branch_methods(), INSERTS) if registry is None else registry
  choices.check('method ', name, sorted(registry))
  values.check('args', args, Mapping[str, Any])
  kinds = values.keys_of(registry[name]).kinds
  for key, value in args.items():
    if key not in kinds:
      raise ValueError(f'{name} has no argument {key!r}{choices.near(key, kinds)}: it takes '
                       f'{", ".join(kinds) or "none"}')
    values.check(f'{name}: args.{key}', value, kinds[key])
  frozen = {key: tuple(v) if isinstance(v, list) else v for key, v in args.items()}
  for field, default in getattr(registry[name], 'default', {}).items():
    config = frozen.get(field) or ({'method': default} if default else None)
    if config is not None:
      frozen[field] = _held_method(f'{name}: args.{field}', config, registry)
  return registry[name](**frozen)


def _held_method(name: str, config: Any, registry: Mapping[str, type]) -> Method:
  """Builds the method that another one holds."""
  values.check(name, config, HELD_KEYS)
  return make_method(config['method'], config.get('args') or {}, registry)


def reduction_settings(config: Config | Sequence[Config] | None) -> Settings:
  """Returns the keys that a reduction's config sets; {} for None, or method='none'.

  Args:
    config: `config.reduce.<component>`, one reduction or several; keys that are None are unset.

  Returns:
    A dict; of several reductions a list of those that reduce something, {} if none does.

  Raises:
    ValueError: no dict, or one that sets something and names no method.
  """
  if isinstance(config, list | tuple):
    several = [settings for each in config if (settings := _settings(each))]
    return several[0] if len(several) == 1 else several or {}
  return _settings(cast(Config | None, config))


def _settings(config: Config | None) -> dict[str, Any]:
  if config is not None and not hasattr(config, 'keys'):
    raise ValueError(f'the reduction {config!r} must be a dict of keys, as '
                     "{'method': 'tome', 'remove': 8}, or a list of such")
  settings = {key: value for key, value in (config or {}).items() if value is not None}
  if settings and 'method' not in settings:
    raise ValueError(f'the reduction {settings} names no method: add one, or set nothing')
  return settings if settings.get('method', 'none') != 'none' else {}


def one_reduction(component: str, config: Config | Sequence[Config] | None) -> dict[str, Any]:
  """Returns `reduction_settings` of a component that takes one reduction.

  Raises:
    ValueError: as `reduction_settings`; several.
  """
  settings = reduction_settings(config)
  if isinstance(settings, list):
    names = ', '.join(str(each.get('method')) for each in settings)
    raise ValueError(f'reduce.{component} takes one reduction, and these are {len(settings)} '
                     f'({names}): leave one')
  return settings
