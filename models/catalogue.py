"""Every method as an entry of a list: what its docstring, its attributes and its file say of it."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import cast

import flax.linen as nn

from models.plans.hosts import Host
from models.plans.methods import branch_methods, make_method, methods
from models.projectors import PROJECTORS
from ops.reducers import join
from ops.reducers.cache import CACHE_REDUCERS
from ops.reducers.insert import INSERTS
from ops.reducers.method import Method
from ops.signals import NEXT_LAYER


@dataclasses.dataclass(frozen=True)
class Entry:
  """Holds one method of the catalogue.

  Attributes:
    name: as configs write it.
    summary: the first paragraph of its docstring, in one line.
    paper: number of the paper at arXiv, '' for a baseline.
    site: where it acts unless a config says otherwise; 'cache' for a method on the cache.
    needs: names of the signals that it reads, sorted.
    learned: whether it has parameters.
    reconstructed: from what it is made, where no code of its authors is known; else ''.
    file: where it is written, from the root of the project.
  """

  name: str
  summary: str
  paper: str
  site: str
  needs: tuple[str, ...]
  learned: bool
  reconstructed: str
  file: str


def entries() -> dict[str, Entry]:
  """Returns every method by name, in alphabetical order, of branches and on the cache too."""
  return {name: _entry(name, method) for name, method in every_method().items()}


def every_method() -> dict[str, type[Method]]:
  """Returns every method by name, in alphabetical order, of branches and on the cache too."""
  return dict(sorted(join(methods(), branch_methods(), INSERTS, CACHE_REDUCERS).items()))


def projectors() -> dict[str, Entry]:
  """Returns every projector that compresses by name; `needs` is what it reads beside features."""
  return {name: _described(name, made, site='projector',
                           needs=made(width=8).reads)
          for name, made in sorted(PROJECTORS.items())}


def why_not(name: str, host: Host, place: str) -> str:
  """Returns why a method cannot act in a host, '' where it can.

  Args:
    name: of the method, with the arguments that it has by default.
    host: of a tower or a language model, or behind a tower.
    place: 'layers', 'projector' or 'cache'.

  Returns:
    The signals that the host does not offer, or what else is missing, in a few words.
  """
  made = make_method(name, {}, every_method())
  if (made.site == 'cache') != (place == 'cache'):
    return 'is made for the cache' if made.site == 'cache' else 'is not made for the cache'
  if place == 'projector' and (made.site == 'branch' or made.kind == 'insert'):
    return 'there are no layers'
  if made.kind == 'insert' and not host.counts:
    return 'there is one kind of tokens'
  offers = host.offers - NEXT_LAYER - {'attention'} if place == 'cache' else host.offers
  missing = sorted((made.needs | made.watch_needs) - offers)
  if missing:
    return ', '.join(f'`{signal}`' for signal in missing)
  if made.positions not in ('', *host.positions) and made.site not in ('branch', 'cache'):
    return f'positions `{made.positions}`'
  return ''


def _entry(name: str, method: type[Method]) -> Entry:
  # A property where it follows from an argument: then that of the default.
  needs = (method.needs if isinstance(method.needs, frozenset)
           else make_method(name, {}, {**CACHE_REDUCERS, name: method}).needs)
  return _described(name, method, site=cast(str, method.site), needs=needs,
                    reconstructed=cast(str, method.reconstructed))


def _described(name: str, made: type, *, site: str, needs: frozenset[str],
               reconstructed: str = '') -> Entry:
  text = inspect.cleandoc(made.__doc__ or '')
  paper = re.search(r'arXiv:(\d{4}\.\d{5})', text)
  return Entry(
      name=name, summary=' '.join(text.split('\n\n')[0].split()), paper=paper[1] if paper else '',
      site=site, needs=tuple(sorted(needs)), learned=issubclass(made, nn.Module),
      reconstructed=reconstructed, file=made.__module__.replace('.', '/') + '.py')
