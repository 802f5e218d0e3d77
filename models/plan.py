"""Plans: a named method and a budget from a config, resolved for one host before anything runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from models import renames
from models.compressors import COMPRESSORS
from ops import choices, values
from ops.budgets import BUDGETS, Cut, Limits, parse_layers, part_of, per_layer, resolve
from ops.reducers import REDUCERS, join
from ops.reducers.cache import CACHE_REDUCERS
from ops.reducers.method import Method
from ops.signals import MLP_SIGNALS, NEXT_LAYER, STATIC
from ops.tokens import KINDS

SITES = ('before', 'inside', 'between', 'after')
MODES = ('gather', 'mask')
# How tokens are numbered after a cut, decoded ones included. 'keep': by their own positions.
# 'compact': by their rank among the tokens that are left. 'restart': the kept tokens become a new
# prompt, numbered from 0, and the model runs again on it.
POSITIONS = ('keep', 'compact', 'restart')
# Layers and budgets are checked beside the host that they are for (ops/budgets.py).
KEYS = values.Keys({
    'method': str, 'args': Mapping[str, Any], 'site': str, 'layers': Any, 'watch': Any,
    'rounding': str, 'ratio_of': str, 'mode': str, 'token_kinds': str | tuple[str, ...],
    'positions': str, **dict.fromkeys(BUDGETS, Any)})
CACHE_BUDGETS = ('keep_ratio', 'keep', 'remove')
CACHE_KEYS = KEYS.without('site', 'watch', 'ratio_of', 'mode', 'token_kinds',
                          *set(BUDGETS) - set(CACHE_BUDGETS))


@dataclasses.dataclass(frozen=True)
class Host:
  """Describes a backbone to a reduction.

  Attributes:
    depth: number of layers.
    slots: tokens at the start, protected ones included.
    protected: tokens at the start of every row that are never touched.
    offers: names of the `Signals` fields that it can measure.
    sites: where in a layer it lets methods act.
    counts: (kind, slots) pairs where there are several kinds, of which `token_kinds` in a
      reduction's config names some. All slots of other kinds are then protected, padding included.
    positions: the position policies that it supports, the default first.
  """

  depth: int
  slots: int
  protected: int
  offers: frozenset[str]
  sites: tuple[str, ...] = SITES
  counts: tuple[tuple[str, int], ...] = ()
  positions: tuple[str, ...] = ('keep',)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A method, where it acts, and how many slots it leaves in which layer.

  Attributes:
    name: the method's name in `methods()`.
    method: the method itself: a frozen dataclass, or a Flax module without parameters yet.
    site: 'before', 'inside', 'between' or 'after'.
    cuts: one Cut a layer that loses tokens.
    mode: 'gather' really removes slots; 'mask' keeps them as padding (to train hard decisions).
    watch: layers that the method measures in addition to those it cuts in.
    of: kinds that it may remove (ops/tokens.py), None for the host's default.
    protected: slots of other kinds, padding included; None for the host's own number.
    positions: one of `POSITIONS`.
  """

  name: str
  method: Method
  site: str
  cuts: tuple[Cut, ...]
  mode: str = 'gather'
  watch: tuple[int, ...] = ()
  of: tuple[int, ...] | None = None
  protected: int | None = None
  positions: str = 'keep'

  def cut(self, layer: int) -> Cut | None:
    """Returns the cut in a layer, or None."""
    return next((cut for cut in self.cuts if cut.layer == layer), None)


def methods(host: Host | None = None) -> dict[str, type[Method]]:
  """Returns every method by name, learned ones included; with a host, those that it can run."""
  every = join(REDUCERS, COMPRESSORS)
  if host is None:
    return every
  instances = {name: method() for name, method in every.items()}
  return {name: every[name] for name, method in instances.items()
          if method.needs | method.watch_needs <= host.offers
          and method.positions in ('', *host.positions)}


def make_method(name: str, args: Mapping[str, Any],
                registry: Mapping[str, type] | None = None) -> Method:
  """Builds a method from its name and arguments.

  Args:
    name: a name in the registry.
    args: fields of the method; lists become tuples.
    registry: methods by name, all of `methods()` by default.

  Raises:
    ValueError: for an unknown name or argument; it lists what there is.
  """
  registry = methods() if registry is None else registry
  choices.check('method ', name, sorted(registry))
  values.check('args', args, Mapping[str, Any])
  kinds = values.keys_of(registry[name]).kinds
  for key, value in args.items():
    if key not in kinds:
      raise ValueError(f'{name} has no argument {key!r}{choices.near(key, kinds)}: it takes '
                       f'{", ".join(kinds) or "none"}')
    values.check(f'{name}: args.{key}', value, kinds[key])
  frozen = {key: tuple(v) if isinstance(v, list) else v for key, v in args.items()}
  return registry[name](**frozen)


def reduction_settings(config: Mapping[str, Any] | None) -> dict[str, Any]:
  """Returns the keys that a reduction's config sets; {} for None, or method='none'.

  Args:
    config: `config.reduce.<component>`; keys that are None are unset.

  Raises:
    ValueError: no dict, or one that sets something and names no method.
  """
  if config is not None and not hasattr(config, 'keys'):
    raise ValueError(f'the reduction {config!r} must be a dict of keys, as '
                     "{'method': 'tome', 'remove': 8}")
  settings = {key: value for key, value in (config or {}).items() if value is not None}
  if settings and 'method' not in settings:
    raise ValueError(f'the reduction {settings} names no method: add one, or set nothing')
  return settings if settings.get('method', 'none') != 'none' else {}


def make_plan(config: Mapping[str, Any], host: Host, *,
              macs: Callable[[tuple[Cut, ...]], float] | None = None) -> Plan:
  """Resolves `config.reduce.<tower>` for a host.

  Args:
    config: method, args, site, layers, watch, mode and one budget (ops/budgets.py lists the
      forms). `watch` names layers as `layers` does, or none: (); by default the method chooses.
      Where the host has several kinds of tokens, `token_kinds` names one or more ('visual',
      'text'), all by default; `positions` is one of `POSITIONS`, by default the method's own.
    host: the backbone's depth, tokens and signals.
    macs: the backbone's MACs under given cuts, for budgets in FLOPs.

  Raises:
    ValueError: for an unknown key, method, argument, site or layer, an impossible budget, a watch
      that no cut can use, or a method that needs what the host does not offer; each names the value
      and the choices.
  """
  config = renames.current('reduce', config)
  values.check_keys('reduce', config, KEYS, unknown='a reduction has no key ')
  name = cast(str, config.get('method'))  # `make_method` rejects None.
  method = make_method(name, config.get('args') or {})
  site, mode = config.get('site') or method.site, config.get('mode') or 'gather'
  choices.check('site ', site, host.sites)
  choices.check('mode ', mode, MODES)
  if (mode, site) == ('mask', 'inside'):
    raise ValueError("mode 'mask' keeps all slots, but inside attention the map shrinks with them: "
                     f"use mode='gather', or {name} at another site")
  check_needs(name, method, host, site)
  of, protected = reducible_kinds(config.get('token_kinds'), host)
  cuts = resolve(config, limits_of(method, host, protected), macs=macs)
  check_layers(name, method, host, cuts, site)
  return Plan(name, method, site, cuts, mode,
              watched_layers(name, method, host, cuts, site, config.get('watch')), of,
              protected if host.counts else None,
              position_policy(config.get('positions'), method, host))


def make_cache_plan(config: Mapping[str, Any], host: Host, *, plan: Plan | None = None) -> Plan:
  """Resolves `config.reduce.cache`: how many cache entries each layer keeps after the prompt.

  Each layer is cut by itself, from the slots that its own attention saw.

  Args:
    config: method (one of ops/reducers/cache), args, layers, rounding, positions and one of the
      budgets keep_ratio (a share of what a layer has, one for all or one a listed layer), keep or
      remove.
    host: of the model.
    plan: the plan that reduces tokens between layers, or None.

  Raises:
    ValueError: as `make_plan` does.
  """
  values.check_keys('reduce.cache', config, CACHE_KEYS,
                    unknown='a reduction of the cache has no key ')
  name = cast(str, config.get('method'))  # `make_method` rejects None.
  method = make_method(name, config.get('args') or {}, CACHE_REDUCERS)
  offers = host.offers - NEXT_LAYER - {'attention'}
  check_needs(name, method, dataclasses.replace(host, offers=offers), 'cache')
  layers = parse_layers(config.get('layers'), host.depth)
  budgets = [key for key in BUDGETS if config.get(key) is not None]
  if len(budgets) != 1 or budgets[0] not in CACHE_BUDGETS:
    raise ValueError(f'a reduction of the cache needs one budget, got {budgets or "none"}: choose '
                     f'one of {", ".join(CACHE_BUDGETS)}')
  counts = slots_seen(host, plan)
  amounts = per_layer(config[budgets[0]], layers, budgets[0])
  cuts: list[Cut] = []
  for layer, value in zip(layers, amounts, strict=True):
    limits = Limits(host.depth, counts[layer], 0, method.extra_slots,
                    functools.partial(method.min_slots, protected=0))
    if budgets[0] == 'keep' and isinstance(value, int):
      value = min(value, counts[layer])  # A capacity: a shorter prompt keeps all that it has.
    budget = {budgets[0]: value, 'layers': layer, 'rounding': config.get('rounding') or 'floor'}
    cuts += resolve(budget, limits)
  policies = dataclasses.replace(host, positions=('keep', 'compact'))
  return Plan(name, method, 'cache', tuple(cuts),
              positions=position_policy(config.get('positions'), method, policies))


def slots_seen(host: Host, plan: Plan | None) -> tuple[int, ...]:
  """Returns the slots that each layer's attention sees under a plan, which its cache then holds."""
  if plan and plan.cuts and plan.positions == 'restart':
    return (plan.cuts[-1].slots_out,) * host.depth
  slots, counts = host.slots, []
  for layer in range(host.depth):
    cut = plan.cut(layer) if plan and plan.mode == 'gather' else None
    after = cut.slots_out if cut else slots
    counts.append(after if plan and cut and plan.site == 'before' else slots)
    slots = after
  return tuple(counts)


def reducible_kinds(of: str | Sequence[str] | None,
                    host: Host) -> tuple[tuple[int, ...] | None, int]:
  """Returns the kinds that a reduction may remove, and how many slots it must leave alone.

  Args:
    of: a name in `host.counts`, several, or None for all.
    host: of the reduction.

  Returns:
    Numbers of kinds (ops/tokens.py), None where the host has one kind; and the protected slots.

  Raises:
    ValueError: for a kind of which the host has no tokens, or any kind where it has one alone.
  """
  counts = dict(host.counts)
  if of is None:
    return (tuple(KINDS[kind] for kind in counts) or None), host.protected
  names = (of,) if isinstance(of, str) else tuple(of)
  for name in names:
    if not counts.get(name):
      present = [f'{kind} ({count})' for kind, count in counts.items() if count]
      raise ValueError(f'token_kinds={name!r} names no tokens of this host: it has '
                       f'{", ".join(present) or "one kind alone, so leave it out"}')
  others = sum(count for kind, count in counts.items() if kind not in names)
  return tuple(KINDS[name] for name in names), host.protected + others


def position_policy(positions: str | None, method: Method, host: Host) -> str:
  """Returns the position policy of a reduction: the config's, else the method's, else the host's.

  Raises:
    ValueError: for one that the host does not support.
  """
  chosen = positions or getattr(method, 'positions', '') or host.positions[0]
  if chosen not in host.positions:
    raise ValueError(f'positions={chosen!r} is unknown here{choices.near(chosen, host.positions)}: '
                     f'choose one of {", ".join(host.positions)}')
  return chosen


def limits_of(method: Method, host: Host, protected: int) -> Limits:
  """Returns the limits that a host and a method set to budgets, with `protected` slots fixed."""
  return Limits(host.depth, host.slots, protected, method.extra_slots,
                functools.partial(method.min_slots, protected=protected))


def scaled_plan(plan: Plan, host: Host, fraction: float) -> Plan:
  """Returns a plan that removes a fraction of the tokens that another removes in each layer.

  Args:
    plan: the other plan.
    host: the host that it was made for.
    fraction: 0 removes nothing, 1 as much as `plan`.
  """
  protected = host.protected if plan.protected is None else plan.protected
  cuts = part_of(plan.cuts, fraction, limits_of(plan.method, host, protected))
  last = cuts[-1].layer if cuts else -1
  return dataclasses.replace(plan, cuts=cuts,
                             watch=tuple(layer for layer in plan.watch if layer <= last))


# Signals that a method can read before the first attention has run.
FREE_OF_ATTENTION = STATIC | NEXT_LAYER
# Signals that are measured for a cut alone, never for a layer that is only watched.
ONLY_CUTS = NEXT_LAYER | {'attention'}


def check_needs(name: str, method: Method, host: Host, site: str) -> None:
  """Raises if a method asks for a signal that its host, or its site, cannot give."""
  missing = sorted((method.needs | method.watch_needs) - host.offers)
  if missing:
    hint = '; choose a method that reads one of these'
    if getattr(method, 'by', None) in missing and 'received_attention' in host.offers:
      hint = "; set args.by='received_attention'"
    raise ValueError(f'{name} needs {", ".join(missing)}, which this host does not offer: it '
                     f'offers {", ".join(sorted(host.offers)) or "nothing"}{hint}')
  if method.positions not in ('', *host.positions):
    raise ValueError(f'{name} numbers positions by {method.positions!r}, which this host does not: '
                     f'it knows {", ".join(host.positions)}; choose another method')
  if 'attention' in method.needs and site != 'inside':
    raise ValueError(f'{name} needs the whole attention map, which exists only inside attention: '
                     f"set site='inside' (got {site!r})")
  if MLP_SIGNALS & method.needs and site not in ('before', 'after'):
    raise ValueError(f"{name} looks at the MLP of a layer, which needs site='before' or 'after' "
                     f'(got {site!r})')
  if NEXT_LAYER & method.needs and site not in ('before', 'after'):
    raise ValueError(f"{name} looks ahead to the next layer's attention, which needs "
                     f"site='before' or 'after' (got {site!r})")


def watched_layers(name: str, method: Method, host: Host, cuts: tuple[Cut, ...], site: str,
                   watch: str | int | Sequence[int] | None) -> tuple[int, ...]:
  """Returns the layers that a method watches, from `config.watch` or the method's own choice.

  Raises:
    ValueError: for layers that are not there, or that no cut comes after; a method that watches
      none; or one whose `watch` reads signals that are measured for a cut alone.
  """
  if not hasattr(method, 'watch'):
    if watch:
      raise ValueError(f'{name} watches no layers, so watch={watch!r} is of no use: leave it out')
    return ()
  beyond = sorted(method.watch_needs & ONLY_CUTS)
  if beyond:
    raise ValueError(f'{name} cannot watch {", ".join(beyond)}: a watched layer tells '
                     f'{", ".join(sorted(host.offers - ONLY_CUTS))}')
  last = cuts[-1].layer - (site == 'before') if cuts else -1
  if watch is None:
    watch = tuple(layer for layer in method.watched(tuple(cut.layer for cut in cuts))
                  if layer <= last)
  elif watch == 'all':
    watch = tuple(range(last + 1))
  layers = () if watch in ((), []) else parse_layers(watch, host.depth)
  if layers and layers[-1] > last:
    raise ValueError(f'layer {layers[-1]} is watched in vain, as {name} cuts nothing after it: '
                     f'watch layers below {last + 1}')
  return layers


def check_layers(name: str, method: Method, host: Host, cuts: tuple[Cut, ...], site: str) -> None:
  """Raises if a cut asks for a layer before the first or after the last."""
  if site == 'before' and cuts and cuts[0].layer == 0 and method.needs - FREE_OF_ATTENTION:
    raise ValueError(f'{name} before layer 0 has no earlier layer to read '
                     f'{", ".join(sorted(method.needs))} from: start at layer 1')
  ahead = site == 'after' and NEXT_LAYER & method.needs
  if ahead and cuts and cuts[-1].layer == host.depth - 1:
    raise ValueError(f'{name} after layer {host.depth - 1} has no next layer to look at: end at '
                     f'layer {host.depth - 2}')
