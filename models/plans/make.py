"""Resolves configs into plans: what changes where in a tower, before anything runs."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any, cast

from ml_collections import ConfigDict

from models import renames
from models.plans.events import HOLDS, PARTS, SITES, Plan, make_events
from models.plans.hosts import Host, free_slots, limits_of, position_policy, reducible_kinds
from models.plans.methods import KEYS, MODES, Config, make_method
from models.plans.needs import FREE_OF_ATTENTION, check_layers, check_needs, watched_layers
from models.plans.row_budgets import Pools
from models.reduction import Event, Reduction
from ops import choices, values
from ops.budgets import (
  BUDGETS,
  Cut,
  Step,
  parse_layers,
  part_of,
  share_step,
  solve,
  take,
)
from ops.reducers.method import Method
from ops.signals import MLP_SIGNALS
from ops.tokens import KINDS

# A budget in bytes is a share before it comes here (models/plans/cache_bytes.py).
TOWER_KEYS = KEYS.without('capacity', 'kv_mb')


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
    events = solve(draft.config, host.depth, free_slots(host, draft.kinds),
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
    return solve(self.config, host.depth, free_slots(host, self.kinds), tuple)

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
      self._slots -= free_slots(host, draft.kinds)
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
    if events and events[-1].kind in ('insert', 'expand'):
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
    cut = take(step, self._slots, free_slots(host, draft.kinds), limits)
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
  return Event(layer, draft.site, slots, slots + free_slots(host, draft.kinds), draft.reduction,
               kind='insert')


def _check_before(event: Event, events: Sequence[Event]) -> None:
  """Raises where tokens are numbered anew before others join at their own positions."""
  for earlier in events:
    if earlier.reduction.positions == 'compact':
      raise ValueError(f'{earlier.reduction.name} numbers tokens anew in layer {earlier.layer}, '
                       f'and {event.reduction.name} brings others in at their own positions: set '
                       "positions='keep'")


def _check_behind(step: Step, draft: _Draft, event: Event) -> None:
  """Raises where a method asks for what tokens that have just joined, or come back, cannot tell."""
  reduction, last = draft.reduction, event.reduction.name
  if reduction.positions == 'restart':
    raise ValueError(f'{reduction.name} has the model run anew on what it keeps, where {last} has '
                     "no place: set positions='keep'")
  read = sorted(reduction.method.needs - FREE_OF_ATTENTION)
  begins = draft.site == 'before' or draft.parts in ('both', 'attention')
  if begins and step.layer == event.layer + (event.kind == 'expand') and read:
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
