"""Backbones as reductions see them, and what a reduction may touch in one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from models.plans.events import SITES
from ops import choices
from ops.budgets import (
  Limits,
)
from ops.reducers.method import Method


@dataclasses.dataclass(frozen=True)
class Host:
  """Describes a backbone to a reduction.

  Attributes:
    depth: number of layers.
    slots: tokens at the start, protected ones included.
    protected: tokens at the start of every row that are never touched.
    offers: names of the `Signals` fields that it can measure.
    watches: those that a method may watch beside them, where the layers are another host's.
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
  watches: frozenset[str] = frozenset()


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


def free_slots(host: Host, kinds: tuple[str, ...]) -> int:
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
