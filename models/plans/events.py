"""Plans as sequences of events: what they leave, layer by layer.

Axes: B batch, N slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from models.reduction import Event, Reduction
from ops import choices
from ops.budgets import Cut
from ops.reducers.method import Method

SITES = ('before', 'branch', 'inside', 'between', 'after')
# What may run on fewer tokens as a branch: a layer, its attention, its MLP; or attention alone
# between queries, keys and values that all tokens make.
PARTS = ('both', 'attention', 'mlp', 'core')
# How tokens are numbered after a cut, decoded ones included. 'keep': by their own positions, one
# that stands for several by the latest. 'anchor': that one by its anchor's, as far as causal order
# lets it: behind all tokens before the latest that it stands for. 'compact': by their rank among
# the tokens that are left. 'restart': the kept tokens become a new prompt, numbered from 0, and the
# model runs again on it.
POSITIONS = ('keep', 'anchor', 'compact', 'restart')
# Whether the last real token of a causal prompt, which predicts the next one, may go.
HOLDS = ('last', 'none')


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Counts the tokens of one layer under a plan, special ones and padding slots included.

  Attributes:
    queries: tokens whose queries and keys are made.
    values: tokens whose values are made, and over which the rows of the map sum.
    attended: tokens that attention returns.
    mlp: tokens that enter the MLP.
    left: tokens after the layer.
    map_seen: whether a method sees the attention map.
    pairs: of query and key in a head, where not all that have queries attend to each other; else
      None.
  """

  queries: int
  values: int
  attended: int
  mlp: int
  left: int
  map_seen: bool = False
  pairs: int | None = None

  @property
  def logits(self) -> int:
    """Entries of the attention map of one head."""
    return self.queries ** 2 if self.pairs is None else self.pairs

  @property
  def weights(self) -> int:
    """Entries of the map of one head that values are multiplied with."""
    return self.attended * self.values if self.pairs is None else self.pairs

  def map_counts(self, change: Callable[[int], int]) -> Tokens:
    """Returns the same with other counts."""
    return Tokens(change(self.queries), change(self.values), change(self.attended),
                  change(self.mlp), change(self.left), self.map_seen)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Says what changes where in a tower: events, in the order in which they happen.

  Attributes:
    events: by layer, and in a layer by site.
    reductions: the methods of the events, and those that only watch.
  """

  events: tuple[Event, ...]
  reductions: tuple[Reduction, ...]

  @property
  def only(self) -> Reduction:
    """Returns the one reduction of a plan that has one.

    Raises:
      ValueError: a plan of several.
    """
    if len(self.reductions) != 1:
      raise ValueError(f'a plan of {self.name} has no single method: take them one by one')
    return self.reductions[0]

  def with_method(self, method: Method, *, site: str | None = None) -> Plan:
    """Returns the plan of one method with another in its place, by the same counts.

    Args:
      method: which watches the same layers, if it watches.
      site: of its events, None for the same.
    """
    watch = self.only.watch if hasattr(method, 'watch') else ()
    reduction = dataclasses.replace(self.only, method=method, watch=watch)
    return Plan(tuple(dataclasses.replace(
        event, reduction=reduction, site=(site if event.kind != 'expand' else '') or event.site)
                      for event in self.events), (reduction,))

  @property
  def name(self) -> str:
    """Returns the methods' names, as '+' joins them."""
    return '+'.join(reduction.name for reduction in self.reductions)

  @property
  def proportional(self) -> bool:
    """Returns whether a slot counts as often in attention as it has tokens."""
    return any(reduction.method.proportional for reduction in self.reductions)

  @property
  def masked(self) -> bool:
    """Returns whether removed tokens stay as padding."""
    return any(reduction.mode == 'mask' for reduction in self.reductions)

  @property
  def holds(self) -> str:
    """Returns what no reduction touches, one of `HOLDS`."""
    return 'last' if any(event.reduction.holds == 'last' for event in self.events) else 'none'

  @property
  def positions(self) -> str:
    """Returns how tokens are numbered behind the events, one of `POSITIONS`."""
    named = {reduction.positions for reduction in self.reductions}
    return next(policy for policy in reversed(POSITIONS) if policy in named)

  @property
  def slots(self) -> int | None:
    """Returns the tokens that a host must have for this plan, None where nothing changes."""
    return self.events[0].slots_in + inserted(self.events) if self.events else None

  @property
  def inserts(self) -> tuple[Event, ...]:
    """Returns the events at which tokens join."""
    return tuple(event for event in self.events if event.kind == 'insert')

  def at(self, layer: int, *sites: str) -> tuple[Event, ...]:
    """Returns the events of a layer, of some sites or all."""
    return tuple(event for event in self.events
                 if event.layer == layer and (not sites or event.site in sites))

  def watching(self, layer: int) -> tuple[Reduction, ...]:
    """Returns the reductions that watch a layer."""
    return tuple(reduction for reduction in self.reductions if layer in reduction.watch)

  def profile(self, depth: int, slots: int) -> tuple[Tokens, ...]:
    """Returns the tokens of every layer as they are allocated; padding that a mask leaves counts.

    Args:
      depth: number of layers.
      slots: tokens that enter the first layer.

    Raises:
      ValueError: events that do not fit these layers and tokens.
    """
    return profile(self.events, depth, slots)


def plan_of(events: Sequence[Event]) -> Plan:
  """Returns the plan of events, whose reductions watch what they say."""
  return Plan(tuple(events), tuple(dict.fromkeys(event.reduction for event in events)))


def profile(events: Sequence[Event], depth: int, slots: int) -> tuple[Tokens, ...]:
  """Returns the tokens of every layer under events, as `Plan.profile`."""
  for event in events:
    choices.check('site ', event.site, SITES)
  outside = sorted({event.layer for event in events} - set(range(depth)))
  if outside:
    raise ValueError(f'an event in layer {outside[0]} does not fit: the layers are 0 to '
                     f'{depth - 1}')
  layers, now = [], slots - inserted(events)
  for layer in range(depth):
    at = {site: [event for event in events if event.layer == layer and event.site == site]
          for site in SITES}
    counts = {}
    for site in SITES:
      for event in at[site]:
        now = _after(event, now)
      counts[site] = now
    values = counts['inside'] if any(e.method.merges for e in at['inside']) else counts['before']
    tokens = Tokens(counts['before'], values, counts['inside'], counts['between'],
                    counts['after'], bool(at['inside']))
    for event in at['branch']:
      tokens = _branched(tokens, event)
    layers.append(tokens)
  return tuple(layers)


def inserted(events: Sequence[Event]) -> int:
  """Returns how many tokens wait outside a host until they join."""
  return sum(event.slots_out - event.slots_in for event in events if event.kind == 'insert')


def _branched(tokens: Tokens, event: Event) -> Tokens:
  """Returns the tokens of a layer of which a part runs on fewer."""
  count = event.slots_out
  if event.parts == 'core':
    pairs = event.method.pairs(event.slots_in, count, event.protected or 0)
    return dataclasses.replace(tokens, pairs=pairs)
  if event.parts != 'mlp':
    tokens = dataclasses.replace(tokens, queries=count, values=count, attended=count)
  return tokens if event.parts == 'attention' else dataclasses.replace(tokens, mlp=count)


def _after(event: Event, now: int) -> int:
  """Returns the slots after an event."""
  if event.reduction.mode == 'mask':
    return now
  grows = event.kind in ('insert', 'expand')
  fits = event.slots_out >= now if grows else 0 < event.slots_out <= now
  if event.slots_in != now or not fits:
    raise ValueError(f'{event.reduction.name} in layer {event.layer} goes from {event.slots_in} to '
                     f'{event.slots_out} tokens, but {now} are there')
  return now if event.kind == 'branch' else event.slots_out


def make_events(reduction: Reduction, site: str, cuts: Sequence[Cut | Event], *,
                protected: int | None = None, parts: str = '') -> tuple[Event, ...]:
  """Returns the events of cuts at a site, all by one method, with so many slots left alone.

  With `parts` they are branches.
  """
  kind = 'branch' if parts else 'cut'
  return tuple(Event(cut.layer, site, cut.slots_in, cut.slots_out, reduction, protected,
                     step=cut.step, kind=kind, parts=parts) for cut in cuts)
