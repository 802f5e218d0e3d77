"""TOVA: keeps the cache entries that the last token attends to.

Axes: B batch, N entries now, M entries after, H heads, K kv heads.
"""

import dataclasses

import jax

from ops.primitives.kv_select import broadcast_to_heads, latest
from ops.reducers.scoring import ScoringReducer
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class TOVA(ScoringReducer):
  """Keeps the last entry and those with its highest attention, the same in every head.

  Transformers are Multi-State RNNs (Oren et al., 2024), arXiv:2401.06104, applied once, after the
  prompt. Scores are means over all heads.
  """

  needs = frozenset({'keys', 'last_attention'})

  def scores(self, tokens: TokenSet, signals: Signals) -> jax.Array:
    """float32[B, K, N], mean attention of the last token over all heads."""
    del tokens
    return broadcast_to_heads(signals.last_attention.mean(axis=1), signals.keys.shape[2])

  def forced(self, tokens: TokenSet, num_slots: int) -> jax.Array:
    """Names the last entry."""
    del num_slots
    return latest(tokens, 1)
