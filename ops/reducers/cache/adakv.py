"""AdaKV: heads share a layer's entries among each other, by scores.

Axes: B batch, N entries now, M entries a head on average, K kv heads.
"""

import dataclasses
from typing import ClassVar

import jax

from ops.caches.heads import KVHeads
from ops.primitives.kv_select import (
  best_of_all_heads,
  best_of_each_head,
  budgets,
  share_with_floor,
)
from ops.reducers.scoring import Wrapper
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Ratio

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class AdaKV(Wrapper):
  """Keeps the best entries of all heads of a layer together, a safe number of each head first.

  Ada-KV (Feng et al., 2024), arXiv:2407.11550, Alg. 1. The K heads keep K M entries, each as many
  as its scores earn. The release flattens a batch of one row, and the kvpress library hides the
  others' keys; here they are gone, and a cache is as large as what its heads hold.

  Attributes:
    inner: the method that ranks entries.
    safeguard: the share of M that every head keeps.
  """

  safeguard: Ratio = 0.2
  default: ClassVar[dict[str, str]] = {'inner': 'snapkv'}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVHeads:
    scores = self.inner.ranking(tokens, signals, num_slots=num_slots)
    counts, heads = budgets(tokens, num_slots), scores.shape[1]
    safe = best_of_each_head(scores, share_with_floor(counts, self.safeguard, num_slots))
    keep = best_of_all_heads(scores, heads * counts, heads * num_slots, safe)
    return KVHeads.create(keep, heads * num_slots)

  def stored_bytes(self, num_slots: int, heads: int, width: int,
                   itemsize: int) -> tuple[int, int]:
    return KVHeads.stored_bytes(heads * num_slots, heads, width, itemsize)
