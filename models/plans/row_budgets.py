"""Budgets that belong to rows: how many tokens each row of a batch keeps in each event of a plan.

A plan's slots are capacities: what the longest row needs. A row keeps as many tokens as it would
keep alone, by its own real tokens, whatever it is padded to; the other slots are padding.

Axes: B batch, N slots.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp

from models.reduction import Event
from ops.tokens import TokenSet

Array = jax.Array
Kind = TypeVar('Kind', bound=Hashable)
Count = TypeVar('Count', int, Array)


class Pools(Generic[Kind, Count]):
  """Keeps count of the tokens of each kind, as far as reductions let it be known."""

  def __init__(self, counts: Sequence[tuple[Kind, Count]]) -> None:
    self._pools: dict[tuple[Kind, ...], Count] = {(kind,): count for kind, count in counts}

  def of(self, kinds: Sequence[Kind], refuse: Callable[[tuple[Kind, ...]], Exception]) -> Count:
    """Counts the tokens of some kinds.

    Args:
      kinds: which.
      refuse: makes the error for kinds of which an earlier reduction left a number together that is
        not known one by one.
    """
    wanted, found = set(kinds), []
    for pool, count in self._pools.items():
      if wanted >= set(pool):
        found.append(count)
      elif wanted & set(pool):
        raise refuse(pool)
    return sum(found[1:], found[0])

  def copy(self) -> Pools[Kind, Count]:
    """Returns the counts as they are now."""
    other: Pools[Kind, Count] = Pools(())
    other._pools = dict(self._pools)
    return other

  def left(self, kinds: Sequence[Kind], count: Count) -> None:
    """Takes down how many tokens of some kinds a reduction has left."""
    self._pools = {pool: tokens for pool, tokens in self._pools.items()
                   if not set(pool) <= set(kinds)} | {tuple(kinds): count}


def row_budgets(events: Sequence[Event], tokens: TokenSet) -> tuple[Array | None, ...]:
  """Counts the free tokens that each row keeps in each event, by what it has at the start.

  Args:
    events: of a plan, in order.
    tokens: N slots, as they enter the first layer.

  Returns:
    int32[B] for each event; None where all rows are full, or where no budget says what others keep:
    the event's slots are then every row's own.
  """
  if tokens.valid is None:
    return (None,) * len(events)
  kinds = {kind for event in events for kind in _kinds(event, tokens)}
  start = {kind: _count(tokens.real & (tokens.kind == kind)) for kind in kinds}
  free = {kind: _count(tokens.replace(of=(kind,)).free) for kind in kinds}
  pools: Pools[int, Array] = Pools(tuple(start.items()))
  budgets: list[Array | None] = []
  before: dict[int, Pools[int, Array]] = {}
  for event in events:
    if event.since is not None:
      pools = before[event.since].copy()
      budgets.append(None)
      continue
    before.setdefault(event.layer, pools.copy())
    own = _kinds(event, tokens)
    now = pools.of(own, lambda pool: AssertionError(f'a plan split the pool {pool}'))
    kept = event.kept(now, _sum(start, own), tokens.slots, tokens.protected)
    # Budgets count the tokens that are held, which stay in any case.
    held = _sum(start, own) - _sum(free, own)
    budgets.append(None if event.step is None else jnp.maximum(kept - held, 0))
    if event.kind == 'cut':
      pools.left(own, jnp.maximum(kept, held))
  return tuple(budgets)


def entry_budget(event: Event, tokens: TokenSet) -> Array | None:
  """Counts the entries that each row keeps of a layer's cache, int32[B]; None where all are full.

  Args:
    event: of a cache, each layer of which is cut by itself.
    tokens: N slots, as the layer's attention sees them; all real ones are entries, of any kind.
  """
  if tokens.valid is None:
    return None
  real = _count(tokens.real)
  return event.kept(real, real, tokens.slots)


def _kinds(event: Event, tokens: TokenSet) -> tuple[int, ...]:
  return tokens.of if event.reduction.of is None else event.reduction.of


def _sum(counts: Mapping[int, Array], kinds: Sequence[int]) -> Array:
  return sum((counts[kind] for kind in kinds[1:]), counts[kinds[0]])


def _count(flags: Array) -> Array:
  return jnp.sum(flags, axis=1, dtype=jnp.int32)
