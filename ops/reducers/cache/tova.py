"""TOVA: keeps the cache entries that the last token attends to.

Axes: B batch, N entries now, M entries after, H heads, K kv heads.
"""

import dataclasses

from ops.kv_cache import KVGather
from ops.primitives.kv_select import broadcast_to_heads, keep_best, latest
from ops.reducers.base import CacheReducer
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class TOVA(CacheReducer):
  """Keeps the last entry and those with its highest attention, the same in every head.

  Transformers are Multi-State RNNs (Oren et al., 2024), arXiv:2401.06104, applied once, after the
  prompt. Scores are means over all heads.
  """

  needs = frozenset({'keys', 'last_attention'})

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVGather:
    scores = broadcast_to_heads(signals.last_attention.mean(axis=1), signals.keys.shape[2])
    return keep_best(tokens, scores, num_slots=num_slots, forced=latest(tokens, 1))
