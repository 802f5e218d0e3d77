"""What methods need of a host, and the layers that they act in and watch."""

from __future__ import annotations

from collections.abc import Sequence

from models.plans.hosts import Host
from models.reduction import Event
from ops.budgets import (
  Cut,
  parse_layers,
)
from ops.reducers.method import Method
from ops.signals import MLP_SIGNALS, NEXT_LAYER, STATIC

# Signals that a method can read before the first attention has run.
FREE_OF_ATTENTION = STATIC | NEXT_LAYER
# Signals that are measured for a cut alone, never for a layer that is only watched.
ONLY_CUTS = NEXT_LAYER | {'attention'}


def check_needs(name: str, method: Method, host: Host, site: str, parts: str = '') -> None:
  """Raises if a method asks for a signal that its host, or its site, cannot give."""
  missing = sorted((method.needs | (method.watch_needs - host.watches)) - host.offers)
  if missing:
    hint = '; choose a method that reads one of these'
    if [getattr(method, 'by', None)] == missing and 'received_attention' in host.offers:
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
  if MLP_SIGNALS & method.needs and site not in ('before', 'after', 'cache') and not begins:
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
