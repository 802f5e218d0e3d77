"""Resolves configs into plans: what changes where in a tower, before anything runs."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeAlias, cast

import numpy as np
from ml_collections import ConfigDict

from models import renames
from models.compressors import COMPRESSORS, ROUTERS
from models.events import (
  HOLDS,
  PARTS,
  SITES,
  Plan,
  make_events,
)
from models.reduction import DECODED, OF_RECENT, Event, Reduction
from models.row_budgets import Pools
from ops import choices, values
from ops.budgets import (
  BUDGETS,
  Cut,
  Limits,
  Step,
  parse_layers,
  part_of,
  per_layer,
  resolve,
  share_step,
  solve,
  take,
)
from ops.reducers import REDUCERS, join
from ops.reducers.branch import BRANCHES
from ops.reducers.cache import CACHE_REDUCERS
from ops.reducers.insert import INSERTS
from ops.reducers.method import EvictingMethod, Method
from ops.signals import MLP_SIGNALS, NEXT_LAYER, STATIC
from ops.tokens import KINDS

Config: TypeAlias = Mapping[str, Any] | ConfigDict
Settings: TypeAlias = dict[str, Any] | list[dict[str, Any]]

MODES = ('gather', 'mask')
# Layers and budgets are checked beside the host that they are for (ops/budgets.py).
KEYS = values.Keys({
    'method': str, 'args': Mapping[str, Any], 'site': str, 'layers': Any, 'watch': Any,
    'rounding': str, 'ratio_of': str, 'mode': str, 'token_kinds': str | tuple[str, ...],
    'parts': str, 'positions': str, 'holds': str, 'capacity': values.Count, 'expand': int,
    **dict.fromkeys(BUDGETS, Any)})
TOWER_KEYS = KEYS.without('capacity')
# A method that another one holds (ops/reducers/scoring.py).
HELD_KEYS = values.Keys({'method': str, 'args': Mapping[str, Any]}, frozenset({'method'}))
CACHE_BUDGETS = ('keep_ratio', 'keep', 'remove')
CACHE_KEYS = KEYS.without('site', 'parts', 'watch', 'ratio_of', 'mode', 'token_kinds', 'holds',
                          'expand', *set(BUDGETS) - set(CACHE_BUDGETS))


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
    holds: what a reduction holds unless its config says otherwise, one of `HOLDS`.
  """

  depth: int
  slots: int
  protected: int
  offers: frozenset[str]
  sites: tuple[str, ...] = SITES
  counts: tuple[tuple[str, int], ...] = ()
  positions: tuple[str, ...] = ('keep',)
  holds: str = 'none'


def methods(host: Host | None = None) -> dict[str, type[Method]]:
  """Returns every method by name, learned ones included; with a host, those that it can run."""
  every = join(REDUCERS, COMPRESSORS)
  if host is None:
    return every
  instances = {name: method() for name, method in every.items()}
  return {name: every[name] for name, method in instances.items()
          if method.needs | method.watch_needs <= host.offers
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


def make_plan(config: Config | Sequence[Config], host: Host, *,
              macs: Callable[[Sequence[Event]], float] | None = None) -> Plan:
  """Resolves `config.reduce.<tower>` for a host.

  Args:
    config: method, args, site, layers, watch, mode and one budget (ops/budgets.py lists the
      forms); at site 'branch' `parts`, one of `PARTS`, by default the method's own. `watch` names
      layers as `layers` does, or none: (); by default the method chooses.
      Where the host has several kinds of tokens, `token_kinds` names one or more ('visual',
      'text'), by default the visual ones where there are any, else all; `positions` is one of
      `POSITIONS`, by default the method's own; `holds` one of `HOLDS`, by default the host's;
      `expand` a layer, after which the tokens of before its first cut are back. Or several such,
      whose events happen in the order of layers and sites, those of one place in the order in which
      they are given; one of them may have a budget in FLOPs, which counts all.
    host: the backbone's depth, tokens and signals.
    macs: the backbone's MACs under given events, for budgets in FLOPs.

  Raises:
    ValueError: for an unknown key, method, argument, site or layer, an impossible budget, a watch
      that no cut can use, or a method that needs what the host does not offer; each names the value
      and the choices.
  """
  configs = [config] if isinstance(config, Mapping | ConfigDict) else list(config)
  drafts = [_draft(each, host) for each in configs]
  # From a branch no token goes, so that it holds what others hold.
  holds = {draft.reduction.holds for draft in drafts
           if not draft.parts or draft.config.get('holds')}
  if len(holds) > 1:
    raise ValueError("the reductions of a tower must agree on what they hold: give all of them "
                     "holds='last', or all holds='none'")
  flops = [draft for draft in drafts if draft.in_flops]
  if len(flops) > 1:
    raise ValueError(f'{" and ".join(draft.reduction.name for draft in flops)} both have a budget '
                     'in FLOPs, which counts the whole model: give one of them another')
  steps = {draft: draft.steps(host) for draft in drafts if not draft.in_flops}
  events: tuple[Event, ...] = ()
  if flops:
    draft, = flops
    events = solve(draft.config, host.depth, _free(host, draft.kinds),
                   lambda own: _events({**steps, draft: own}, drafts, host), macs, events)
    # It is solved for the longest row; shorter ones lose the same share in each layer.
    events = tuple(_by_share(event, host) if event.reduction is draft.reduction else event
                   for event in events)
  else:
    events = _events(steps, drafts, host)
  return _watched(events, drafts, host)


@dataclasses.dataclass(frozen=True, eq=False)
class _Draft:
  """Holds one reduction before its budget is resolved."""

  config: Mapping[str, Any]
  reduction: Reduction
  site: str
  kinds: tuple[str, ...]
  parts: str = ''
  expand: int | None = None

  @property
  def in_flops(self) -> bool:
    """Returns whether the budget counts what the model computes."""
    return any(self.config.get(form) is not None for form in ('flops_ratio', 'gmacs'))

  def steps(self, host: Host) -> tuple[Step, ...]:
    """Returns what the budget asks of each layer."""
    if self.inserts:
      layers = parse_layers(self.config.get('layers'), host.depth)
      budgets = [form for form in BUDGETS if self.config.get(form) is not None]
      if len(layers) != 1 or budgets:
        raise ValueError(f'{self.reduction.name} brings all tokens of a kind in before one layer: '
                         f'give layers as one index, and no {budgets[0] if budgets else "other"}')
      # A host without such tokens, a prompt without images, has nothing to wait for.
      return tuple(Step(layer, lambda now, start: now) for layer in layers if self.kinds)
    return solve(self.config, host.depth, _free(host, self.kinds), tuple)

  @property
  def inserts(self) -> bool:
    """Returns whether tokens join, rather than leave."""
    return self.reduction.method.kind == 'insert'


def _draft(config: Config, host: Host) -> _Draft:
  config = renames.current('reduce', config)
  values.check_keys('reduce', config, TOWER_KEYS, unknown='a reduction has no key ')
  name = cast(str, config.get('method'))  # `make_method` rejects None.
  method = make_method(name, config.get('args') or {})
  site, mode = config.get('site') or method.site, config.get('mode') or method.mode or 'gather'
  choices.check('site ', site, host.sites)
  choices.check('mode ', mode, MODES)
  if method.mode not in ('', mode):
    raise ValueError(f'{name} with these args takes slots that stay as padding: set '
                     f'mode={method.mode!r} (got {mode!r})')
  if (mode, site) == ('mask', 'inside'):
    raise ValueError("mode 'mask' keeps all slots, but inside attention the map shrinks with them: "
                     f"use mode='gather', or {name} at another site")
  parts = _parts(name, method, site, config)
  check_needs(name, method, host, site, parts)
  named = config.get('token_kinds')
  if method.kind == 'insert' and not dict(host.counts).get('visual'):
    kinds = reducible_kinds(named, host) if named not in (None, 'visual') else ()
  else:
    kinds = reducible_kinds(named, host)
  holds = config.get('holds') or ('none' if parts else host.holds)
  choices.check('holds ', holds, HOLDS)
  # Where a host numbers tokens in one way alone, a branch does not number them anew.
  renumbers = not parts or method.positions in host.positions
  positions = position_policy(config.get('positions') or ('' if renumbers else host.positions[0]),
                              method, host)
  reduction = Reduction(name, method, mode, (), tuple(KINDS[kind] for kind in kinds) or None,
                        positions, holds)
  if site == 'branch' and (mode, positions) != ('gather', positions.replace('restart', '')):
    raise ValueError(f'{name} in a branch lets all tokens stay, so mode={mode!r} and '
                     f"positions={positions!r} do not fit: leave mode out, and choose positions "
                     "'keep' or 'compact'")
  if not any(config.get(form) is not None for form in BUDGETS):
    config = _with_shares(config, method.default_shares(host.depth), host)
  expand = config.get('expand')
  if expand is not None:
    expand, = parse_layers(expand, host.depth)
    if parts or method.kind != 'cut' or positions != 'keep':
      why = ('lets no token go' if parts or method.kind != 'cut'
             else f'numbers what is left anew (positions={positions!r})')
      raise ValueError(f'{name} {why}, so expand={expand} does not fit: leave it out')
  return _Draft(config, reduction, site, kinds, parts, expand)


def _with_shares(config: Mapping[str, Any], shares: Mapping[int, float],
                 host: Host) -> Mapping[str, Any]:
  """Returns a config without a budget with the shares that its method has by default."""
  if not shares:
    return config
  named = config.get('layers')
  layers = tuple(shares) if named is None else parse_layers(named, host.depth)
  ratios = tuple(shares.get(layer, 1.0) for layer in layers)
  return {'rounding': 'floor', **{key: value for key, value in config.items() if value is not None},
          'layers': layers, 'keep_ratio': ratios}


def _parts(name: str, method: Method, site: str, config: Mapping[str, Any]) -> str:
  """Returns the part of a layer that a reduction is a branch of, '' where it is none."""
  parts = config.get('parts')
  if site != 'branch':
    if method.site == 'branch':
      raise ValueError(f'{name} is a branch of a layer, from which no token leaves, so it cannot '
                       f"act at site={site!r}: choose another method, or site='branch'")
    if parts is not None:
      raise ValueError(f'parts={parts!r} is of a branch, and {name} acts {site}: leave it out, or '
                       "set site='branch'")
    return ''
  parts = parts or method.parts
  choices.check('parts=', parts, PARTS)
  if (parts == 'core') != (method.parts == 'core'):
    raise ValueError(f'{name} is a branch of {method.parts!r}, so parts={parts!r} does not fit: '
                     'leave it out')
  return parts


def _events(steps: Mapping[_Draft, Sequence[Step]], drafts: Sequence[_Draft],
            host: Host) -> tuple[Event, ...]:
  """Returns the events of all reductions, each from what the one before it left."""
  turns: list[tuple[tuple[int, int, int], Step | None, _Draft]] = []
  for draft, own in steps.items():
    turns += [((step.layer, SITES.index(draft.site), drafts.index(draft)), step, draft)
              for step in own]
    if draft.expand is not None and own:
      first = min(step.layer for step in own)
      if draft.expand < first:
        raise ValueError(f'expand={draft.expand} of {draft.reduction.name} comes before its first '
                         f'cut, in layer {first}: name a later layer')
      # Tokens come back after all that happens in a layer, those of the latest cut first.
      turns.append(((draft.expand, len(SITES), -first), None, draft))
  course = _Course(host, [draft for _, _, draft in turns if draft.inserts])
  for (layer, *_), step, draft in sorted(turns, key=lambda turn: turn[0]):
    if step is None:
      course.expand(layer, draft)
    elif draft.inserts:
      course.insert(step, draft)
    else:
      course.cut(step, draft)
  return tuple(course.events)


class _Course:
  """Follows how many tokens of which kinds are there, event by event.

  Attributes:
    events: so far.
  """

  def __init__(self, host: Host, waiting: Sequence[_Draft]) -> None:
    self.events: list[Event] = []
    self._host, self._slots = host, host.slots
    self._pools: Pools[str, int] = Pools(
        host.counts or (('', host.slots - host.protected),))
    # What was there before the first cut of a layer, by layer: what tokens may come back to.
    self._before: dict[int, tuple[int, Pools[str, int]]] = {}
    for draft in waiting:
      self._slots -= _free(host, draft.kinds)
      self._pools.left(draft.kinds, 0)

  def _there(self, draft: _Draft) -> int:
    """Returns how many tokens a reduction may touch."""
    return self._pools.of(draft.kinds or ('',), functools.partial(_unknown_share, draft))

  def insert(self, step: Step, draft: _Draft) -> None:
    """Lets tokens join."""
    event = _inserted(step, draft, self._host, self._slots, self._there(draft))
    _check_before(event, self.events)
    self.events.append(event)
    self._slots = event.slots_out
    self._pools.left(draft.kinds, event.slots_out - event.slots_in)

  def expand(self, layer: int, draft: _Draft) -> None:
    """Brings the tokens of before a reduction's first cut back."""
    name = draft.reduction.name
    own = [event.layer for event in self.events if event.reduction is draft.reduction]
    if not own:
      return  # It had nothing to cut, or not yet.
    since = own[0]
    if since not in self._before:
      raise ValueError(f'expand={layer} of {name} brings the tokens of layer {since} back, which '
                       'another reduction has brought back before: leave one of the two out')
    for event in self.events:
      if (event.layer, event.kind) == (since, 'cut') and event.reduction is not draft.reduction:
        raise ValueError(f'expand={layer} of {name} needs layer {since} for itself, and '
                         f'{event.reduction.name} cuts there too: give it another layer')
      if event.kind == 'insert' and event.layer > since:
        raise ValueError(f'expand={layer} of {name} brings back the tokens of layer {since}, but '
                         f'others joined in layer {event.layer}: let them join earlier, or later')
    slots, self._pools = self._before[since]
    self._before = {cut: there for cut, there in self._before.items() if cut < since}
    self.events.append(Event(layer, 'after', self._slots, slots, draft.reduction, kind='expand',
                             since=since))
    self._slots = slots

  def cut(self, step: Step, draft: _Draft) -> None:
    """Lets a reduction leave fewer tokens, or run a branch on fewer."""
    host, reduction, events = self._host, draft.reduction, self.events
    free = self._there(draft)
    if events and events[-1].kind == 'insert':
      _check_behind(step, draft, events[-1])
    if not free:
      raise ValueError(f'{reduction.name} cuts in layer {step.layer}, where no '
                       f'{" or ".join(draft.kinds) or "other"} token is (any more, or yet): cut in '
                       'other layers')
    if step.empties and reduction.held:
      raise ValueError(f'{step.said} leaves no token in layer {step.layer}, but the last one of a '
                       "prompt must stay: keep 1, or set token_kinds to other kinds than 'text'")
    limits = limits_of(reduction.method, dataclasses.replace(host, slots=self._slots),
                       self._slots - free, reduction.held)
    cut = take(step, self._slots, _free(host, draft.kinds), limits)
    if cut is None and not draft.parts:
      return
    cut = cut or Cut(step.layer, self._slots, self._slots)
    event, = make_events(reduction, draft.site, [cut], parts=draft.parts,
                         protected=self._slots - free if host.counts else None)
    if event.site == 'inside' and events and (events[-1].layer, events[-1].site) == (
        event.layer, 'inside'):
      raise ValueError(f'{events[-1].reduction.name} and {reduction.name} both cut inside '
                       f'the attention of layer {event.layer}: give one of them another site')
    if event.kind == 'cut':
      self._before.setdefault(event.layer, (self._slots, self._pools.copy()))
    events.append(event)
    if reduction.mode == 'gather' and event.kind == 'cut':
      self._pools.left(draft.kinds or ('',), free - (cut.slots_in - cut.slots_out))
      self._slots = cut.slots_out


def _inserted(step: Step, draft: _Draft, host: Host, slots: int, there: int) -> Event:
  """Returns the event at which the tokens of a kind join, of which `there` are there already."""
  kinds, layer = ' and '.join(draft.kinds), step.layer
  if not layer or there:
    since = 'all tokens start' if not layer else 'they have joined before'
    raise ValueError(f'{draft.reduction.name} brings {kinds} tokens in before layer {layer}, where '
                     f'they are already: {since}; name one later layer, once')
  return Event(layer, draft.site, slots, slots + _free(host, draft.kinds), draft.reduction,
               kind='insert')


def _check_before(event: Event, events: Sequence[Event]) -> None:
  """Raises where tokens are numbered anew before others join at their own positions."""
  for earlier in events:
    if earlier.reduction.positions == 'compact':
      raise ValueError(f'{earlier.reduction.name} numbers tokens anew in layer {earlier.layer}, '
                       f'and {event.reduction.name} brings others in at their own positions: set '
                       "positions='keep'")


def _check_behind(step: Step, draft: _Draft, event: Event) -> None:
  """Raises where a method asks for what tokens that have just joined cannot tell."""
  reduction, last = draft.reduction, event.reduction.name
  if reduction.positions == 'restart':
    raise ValueError(f'{reduction.name} has the model run anew on what it keeps, where {last} has '
                     "no place: set positions='keep'")
  read = sorted(reduction.method.needs - FREE_OF_ATTENTION)
  if (step.layer, draft.site) == (event.layer, event.site) and read:
    raise ValueError(f'{reduction.name} before layer {step.layer} reads {", ".join(read)} of the '
                     f'layer above, which the tokens of {last} have not run: cut from layer '
                     f'{step.layer + 1} on')


def _by_share(event: Event, host: Host) -> Event:
  """Returns an event of which every row keeps the share that the longest one keeps."""
  fixed = host.protected if event.protected is None else event.protected
  share = Fraction(event.slots_out - fixed, event.slots_in - fixed)
  return dataclasses.replace(event, step=share_step(event.layer, share))


def _unknown_share(draft: _Draft, pool: tuple[str, ...]) -> ValueError:
  """Makes the error for kinds that an earlier reduction left together."""
  return ValueError(f'{draft.reduction.name} of {" and ".join(draft.kinds)} tokens comes after a '
                    f'reduction of {" and ".join(pool)} tokens together, which does not tell how '
                    'many of each are left: set token_kinds of the earlier one')


def _watched(events: Sequence[Event], drafts: Sequence[_Draft], host: Host) -> Plan:
  """Returns the plan of events, with the layers that their methods watch."""
  renewed = {}
  for draft in drafts:
    reduction = draft.reduction
    own = [event for event in events if event.reduction is reduction and event.since is None]
    check_layers(reduction.name, reduction.method, host, own, draft.site)
    watch = watched_layers(reduction.name, reduction.method, host, own, draft.site,
                           draft.config.get('watch'))
    renewed[id(reduction)] = dataclasses.replace(reduction, watch=watch)
  made = tuple(dataclasses.replace(event, reduction=renewed[id(event.reduction)],
                                   several=len(drafts) > 1) for event in events)
  _check_branches(made, renewed.values())
  learned = collections.Counter(event.parameters for event in made
                                if event.reduction.learned and not event.method.tied)
  for name, count in learned.items():
    if count > 1:
      raise ValueError(f'two learned methods would both have the parameters {name!r}: let them '
                       'act in different layers')
  return Plan(made, tuple(renewed.values()))


def _check_branches(events: Sequence[Event], reductions: Collection[Reduction]) -> None:
  """Raises if something else acts in a part of a layer that a branch runs, or reads it."""
  for branch in events:
    if branch.kind != 'branch':
      continue
    again = next((each.name for each in reductions if each.positions == 'restart'), '')
    if again:
      raise ValueError(f'{again} runs the model again on what it leaves, without the branch of '
                       f'{branch.reduction.name}: leave one of them out')
    name, layer, parts = branch.reduction.name, branch.layer, branch.parts
    where = f'the branch of {name} in layer {layer}'
    for other in events:
      if other is branch or other.layer != layer or other.site in ('before', 'after'):
        continue
      meets = other.site == 'inside' or (
          parts in ('both', 'mlp') if other.site == 'between'
          else 'both' in (parts, other.parts) or (parts == 'mlp') == (other.parts == 'mlp'))
      if meets:
        raise ValueError(f'{other.reduction.name} ({other.site}) acts where {where} already runs '
                         f'on other tokens (parts={parts!r}): give it another layer')
    for other in events:
      needs = other.method.needs - FREE_OF_ATTENTION
      read = needs & MLP_SIGNALS if parts == 'mlp' else needs
      if other is not branch and other.reads == layer and read:
        raise ValueError(f'{other.reduction.name} in layer {other.layer} reads '
                         f'{", ".join(sorted(read))}, which {where} measures of some tokens alone: '
                         'leave a layer between them')
    for reduction in reductions:
      if layer in reduction.watch:
        raise ValueError(f'{reduction.name} watches layer {layer}, where {where} runs some tokens '
                         'alone: watch other layers')


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
  layers = parse_layers(config.get('layers'), host.depth)
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


def reducible_kinds(of: str | Sequence[str] | None, host: Host) -> tuple[str, ...]:
  """Returns the names of the kinds that a reduction may remove; () where the host has one alone.

  Args:
    of: a name in `host.counts`, several, or None for visual tokens where there are any, else all.
    host: of the reduction.

  Raises:
    ValueError: for a kind of which the host has no tokens, or any kind where it has one alone.
  """
  counts = dict(host.counts)
  if of is None:
    return ('visual',) if counts.get('visual') else tuple(counts)
  names = (of,) if isinstance(of, str) else tuple(of)
  for name in names:
    if not counts.get(name):
      present = [f'{kind} ({count})' for kind, count in counts.items() if count]
      raise ValueError(f'token_kinds={name!r} names no tokens of this host: it has '
                       f'{", ".join(present) or "one kind alone, so leave it out"}')
  return names


def _free(host: Host, kinds: tuple[str, ...]) -> int:
  """Counts the tokens of some kinds that a host starts with."""
  counts = dict(host.counts)
  return sum(counts[kind] for kind in kinds) if kinds else host.slots - host.protected


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


def limits_of(method: Method, host: Host, protected: int, held: int = 0) -> Limits:
  """Returns the limits that a host and a method set to budgets.

  Args:
    method, host: these.
    protected: slots that are fixed, and that budgets do not count.
    held: tokens that are fixed, and that budgets count.
  """
  return Limits(host.depth, host.slots, protected, method.extra_slots,
                functools.partial(method.min_slots, protected=protected + held),
                'keep' if host.counts else 'refuse', method.can_empty)


def scaled_plan(plan: Plan, host: Host, fraction: float) -> Plan:
  """Returns a plan that removes a fraction of the tokens that another removes in each layer.

  Args:
    plan: the other plan.
    host: the host that it was made for.
    fraction: 0 removes nothing, 1 as much as `plan`.
  """
  if fraction == 1:
    return plan
  reduction = plan.only
  protected = next((event.protected for event in plan.events if event.protected is not None),
                   host.protected)
  if any(event.since is not None for event in plan.events):
    raise ValueError(f'{reduction.name} brings tokens back (expand), so that removing a part of '
                     'what it removes is not defined: leave expand out')
  before = [Cut(event.layer, event.slots_in, event.slots_out) for event in plan.events]
  limits = limits_of(reduction.method, host, protected, reduction.held)
  branch = bool(plan.events) and plan.events[0].kind == 'branch'
  # Tokens are back after a branch, so that each is for itself.
  groups = [[cut] for cut in before] if branch else [before]
  cuts = [cut for group in groups for cut in part_of(group, fraction, limits)]
  last = cuts[-1].layer if cuts else -1
  weaker = dataclasses.replace(
      reduction, watch=tuple(layer for layer in reduction.watch if layer <= last))
  if not cuts:
    return Plan((), (weaker,))
  first = plan.events[0]
  return Plan(make_events(weaker, first.site, cuts, protected=first.protected, parts=first.parts),
              (weaker,))


# Signals that a method can read before the first attention has run.
FREE_OF_ATTENTION = STATIC | NEXT_LAYER
# Signals that are measured for a cut alone, never for a layer that is only watched.
ONLY_CUTS = NEXT_LAYER | {'attention'}


def check_needs(name: str, method: Method, host: Host, site: str, parts: str = '') -> None:
  """Raises if a method asks for a signal that its host, or its site, cannot give."""
  missing = sorted((method.needs | method.watch_needs) - host.offers)
  if missing:
    hint = '; choose a method that reads one of these'
    if getattr(method, 'by', None) in missing and 'received_attention' in host.offers:
      hint = "; set args.by='received_attention'"
    raise ValueError(f'{name} needs {", ".join(missing)}, which this host does not offer: it '
                     f'offers {", ".join(sorted(host.offers)) or "nothing"}{hint}')
  if method.positions not in ('', *host.positions) and not parts:
    raise ValueError(f'{name} numbers positions by {method.positions!r}, which this host does not: '
                     f'it knows {", ".join(host.positions)}; choose another method')
  if 'attention' in method.needs and site != 'inside':
    raise ValueError(f'{name} needs the whole attention map, which exists only inside attention: '
                     f"set site='inside' (got {site!r})")
  begins = parts in ('both', 'attention')  # A branch that does reads what a cut before it reads.
  if MLP_SIGNALS & method.needs and site not in ('before', 'after') and not begins:
    raise ValueError(f"{name} looks at the MLP of a layer, which needs site='before' or 'after' "
                     f'(got {site!r})')
  if NEXT_LAYER & method.needs and site not in ('before', 'after') and not begins:
    raise ValueError(f"{name} looks ahead to the next layer's attention, which needs "
                     f"site='before' or 'after' (got {site!r})")


def watched_layers(name: str, method: Method, host: Host, cuts: Sequence[Cut | Event], site: str,
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
  last = cuts[-1].layer - (site in ('before', 'branch')) if cuts else -1
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


def check_layers(name: str, method: Method, host: Host, events: Sequence[Event],
                 site: str) -> None:
  """Raises if an event asks for a layer before the first or after the last."""
  if events and events[0].reads == -1 and method.needs - FREE_OF_ATTENTION:
    where = 'in a branch of' if site == 'branch' else site
    raise ValueError(f'{name} {where} layer 0 has no earlier layer to read '
                     f'{", ".join(sorted(method.needs))} from: start at layer 1')
  ahead = site == 'after' and NEXT_LAYER & method.needs
  if ahead and events and events[-1].layer == host.depth - 1:
    raise ValueError(f'{name} after layer {host.depth - 1} has no next layer to look at: end at '
                     f'layer {host.depth - 2}')
