"""Quest: a decoded token reads the pages of the cache that may match it best.

Axes: B batch, N entries, K kv heads, L entries of a page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated

from ops.caches.best_pages import KVBestPages
from ops.reducers.base import CacheReducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, OneOf, check_fields

CHOICES = ('head', 'kv_head')
# Pages that are read at least, as released.
LEAST = 3
# Of an entry: position, order, and whether it is there.
PLACE_BYTES = 9
# Layers that are read whole, as released.
DENSE = 2


@dataclasses.dataclass(frozen=True)
class Quest(CacheReducer):
  """Keeps all entries, and lets a decoded token attend to the pages alone that may match it best.

  Quest (Tang et al., 2024), arXiv:2406.10774, as released. Nothing is evicted: memory grows by the
  bounds, two numbers a channel and page, and what a step reads shrinks. A page may match as well as
  the largest products of each channel's bounds with the query add up to. Layers 0 and 1 are read
  whole unless the config names `layers`. A chunk of tokens reads everything. The release masks what
  it has computed, and counts pages by the entries that there are: with a budget as long as the
  cache, it may leave out one page; here all are read. On two cores, in float32 with 8 heads, 4 of
  keys and 64 channels, a step over 32,768 entries took 17 ms, with the budget of 1,024 entries 3.9,
  or 1.4 where heads share pages; over 8,192 entries 1.7, 2.0 and 0.9.

  Attributes:
    budget: entries that a head reads, in whole pages, 3 at least.
    page: L.
    pages_of: each 'head' reads pages of its own, as released; or those of a 'kv_head' the same, by
      the highest bound among them, so that a page is read once and not once a head.
  """

  budget: Count = 1024
  page: Count = 16
  pages_of: Annotated[str, OneOf(CHOICES)] = 'head'
  drops = ''
  allocates = True

  def __post_init__(self) -> None:
    check_fields(self)

  @property
  def pages(self) -> int:
    """Returns the pages that are read."""
    return max(self.budget // self.page, LEAST)

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVBestPages:
    del tokens, signals, num_slots
    return KVBestPages(self.page, self.pages, self.pages_of == 'kv_head')

  def allocate(self, layer: int, depth: int, slots: int, asked: Fraction | None) -> int:
    """Returns the entries of a layer, as `CacheReducer.allocate`: all."""
    del layer, depth
    if asked is not None:
      raise ValueError('quest keeps all entries, and reads few: set args.budget, and leave '
                       'keep_ratio, keep and remove out')
    return slots

  def default_shares(self, depth: int) -> Mapping[int, float]:
    return dict.fromkeys(range(min(DENSE, depth - 1), depth), 1.0)

  def stored_bytes(self, num_slots: int, heads: int, width: int,
                   itemsize: int) -> tuple[int, int]:
    entry = 2 * heads * width * itemsize
    pages = -(-num_slots // self.page)
    return num_slots * entry, pages * entry + num_slots * (entry + PLACE_BYTES)

  def read_slots(self, slots: int) -> int:
    """Returns the entries that a step reads; the bounds of a page are as large as one of them."""
    return min(slots, self.pages * self.page) + -(-slots // self.page)
