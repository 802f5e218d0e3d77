"""Periodic: compresses the cache by any ranking of its entries while a model decodes."""

import dataclasses
from typing import ClassVar

from ops.kv_cache import KVGather
from ops.reducers.scoring import EvictingWrapper
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count


@dataclasses.dataclass(frozen=True)
class Periodic(EvictingWrapper):
  """Lets the entries go that another method ranks lowest, every so many decoded tokens.

  As the kvpress library has it (DecodingPress; Devoto et al., 2025, arXiv:2510.00636). Between two
  evictions the cache grows by `every` entries. A prompt is cut by the inner method, to as many as
  the config's budget says: keep_ratio=1 leaves it whole, as the library does, until the first
  eviction.

  Attributes:
    inner: the method that ranks entries, by what a decoded token tells.
    every: tokens between two evictions.
  """

  every: Count = 128
  default: ClassVar[dict[str, str]] = {'inner': 'knorm'}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVGather:
    return self.inner(tokens, signals, num_slots=num_slots)
