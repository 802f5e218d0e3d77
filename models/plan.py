"""Plans: a named method and a budget from a config, resolved for one host before anything runs."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any

from models.compressors import COMPRESSORS
from ops.reducers import REDUCERS
from ops.schedule import BUDGETS, Cut, Limits, resolve

SITES = ('before', 'inside', 'between', 'after')
MODES = ('gather', 'mask')
KEYS = ('method', 'args', 'site', 'layers', 'rounding', 'ratio_of', 'mode', *BUDGETS)


@dataclasses.dataclass(frozen=True)
class Host:
  """What a backbone is to a reduction.

  Attributes:
    depth: number of layers.
    slots: tokens at the start, protected ones included.
    protected: tokens at the start of every row that are never touched.
    offers: names of the `Signals` fields that it can measure.
  """

  depth: int
  slots: int
  protected: int
  offers: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Plan:
  """A method, where it acts, and how many slots it leaves in which layer.

  Attributes:
    name: the method's name in `methods()`.
    method: the method itself: a frozen dataclass, or a Flax module without parameters yet.
    site: 'before', 'inside', 'between' or 'after'.
    cuts: one Cut a layer that loses tokens.
    mode: 'gather' really removes slots; 'mask' keeps them as padding (to train hard decisions).
  """

  name: str
  method: Any
  site: str
  cuts: tuple[Cut, ...]
  mode: str = 'gather'

  def cut(self, layer: int) -> Cut | None:
    """The cut in a layer, if there is one."""
    return next((cut for cut in self.cuts if cut.layer == layer), None)


def methods() -> dict[str, type]:
  """Every method by name, those with parameters included."""
  twice = REDUCERS.keys() & COMPRESSORS.keys()
  if twice:
    raise ValueError(f'methods named twice: {sorted(twice)}; rename one in its __init__')
  return {**REDUCERS, **COMPRESSORS}


def make_method(name: str, args: Mapping[str, Any]) -> Any:
  """Builds a method; unknown names and arguments are errors that list what there is."""
  known = methods()
  if name not in known:
    raise ValueError(f'method {name!r} is unknown{_near(name, known)}: choose one of '
                     f'{", ".join(sorted(known))}')
  fields = [f.name for f in dataclasses.fields(known[name]) if f.name not in ('parent', 'name')]
  for key in args:
    if key not in fields:
      raise ValueError(f'{name} has no argument {key!r}{_near(key, fields)}: it takes '
                       f'{", ".join(fields) or "none"}')
  frozen = {key: tuple(v) if isinstance(v, list) else v for key, v in args.items()}
  return known[name](**frozen)


def make_plan(config: Mapping[str, Any], host: Host, *,
              macs: Callable[[tuple[Cut, ...]], float] | None = None) -> Plan:
  """Resolves `config.reduce.<tower>` for a host.

  Args:
    config: method, args, site, layers, mode and one budget (ops/schedule.py lists the forms).
    host: the backbone's depth, tokens and signals.
    macs: the backbone's MACs under given cuts, for budgets in FLOPs.

  Raises:
    ValueError: for an unknown key, method, argument, site or layer, an impossible budget, or a
      method that needs what the host does not offer; each names the value and the choices.
  """
  for key in config:
    if key not in KEYS:
      raise ValueError(f'a reduction has no key {key!r}{_near(key, KEYS)}: choose from '
                       f'{", ".join(KEYS)}')
  name = config.get('method')
  method = make_method(name, config.get('args') or {})
  site, mode = config.get('site') or method.site, config.get('mode') or 'gather'
  if site not in SITES:
    raise ValueError(f'site {site!r} is unknown{_near(site, SITES)}: choose one of '
                     f'{", ".join(SITES)}')
  if mode not in MODES:
    raise ValueError(f'mode {mode!r} is unknown{_near(mode, MODES)}: choose one of '
                     f'{", ".join(MODES)}')
  if (mode, site) == ('mask', 'inside'):
    raise ValueError("mode 'mask' keeps all slots, but inside attention the map shrinks with them: "
                     f"use mode='gather', or {name} at another site")
  check_needs(name, method, host, site)
  limits = Limits(host.depth, host.slots, host.protected, method.extra_slots,
                  functools.partial(method.fewest, protected=host.protected))
  cuts = resolve(config, limits, macs=macs)
  check_layers(name, method, host, cuts, site)
  return Plan(name, method, site, cuts, mode)


# What a layer can still tell before its own attention ran: only what is known without it.
FREE_OF_ATTENTION = frozenset({'grid', 'next_received_attention'})


def check_needs(name: str, method: Any, host: Host, site: str) -> None:
  """Raises if a method asks for a signal that its host, or its site, cannot give."""
  missing = sorted(method.needs - host.offers)
  if missing:
    raise ValueError(f'{name} needs {", ".join(missing)}, which this host does not offer: it '
                     f'offers {", ".join(sorted(host.offers)) or "nothing"}')
  if 'attention' in method.needs and site != 'inside':
    raise ValueError(f'{name} needs the whole attention map, which exists only inside attention: '
                     f"set site='inside' (got {site!r})")
  if 'next_received_attention' in method.needs and site not in ('before', 'after'):
    raise ValueError(f"{name} looks ahead to the next layer's attention, which needs "
                     f"site='before' or 'after' (got {site!r})")


def check_layers(name: str, method: Any, host: Host, cuts: tuple[Cut, ...], site: str) -> None:
  """Raises if a cut asks for a layer before the first or after the last."""
  if site == 'before' and cuts and cuts[0].layer == 0 and method.needs - FREE_OF_ATTENTION:
    raise ValueError(f'{name} before layer 0 has no earlier layer to read '
                     f'{", ".join(sorted(method.needs))} from: start at layer 1')
  ahead = site == 'after' and 'next_received_attention' in method.needs
  if ahead and cuts and cuts[-1].layer == host.depth - 1:
    raise ValueError(f'{name} after layer {host.depth - 1} has no next layer to look at: end at '
                     f'layer {host.depth - 2}')


def _near(word: str, words: Any) -> str:
  near = difflib.get_close_matches(str(word), list(words), n=1)
  return f' (did you mean {near[0]!r}?)' if near else ''
