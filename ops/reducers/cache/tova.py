"""TOVA: keeps the cache entries that the last token attends to.

Axes: B batch, N entries now, M entries after, H heads, K kv heads.
"""

import dataclasses

import jax

from ops.primitives.kv_select import broadcast_to_heads, latest, stays
from ops.reducers.scoring import ScoringReducer
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class TOVA(ScoringReducer):
  """Keeps the last entry and those with its highest attention, the same in every head.

  Transformers are Multi-State RNNs (Oren et al., 2024), arXiv:2401.06104. Scores are means over all
  heads. Of a prompt the last entry always stays, as in the kvpress library; while a model decodes
  (`capacity` in the config) the entry with the least attention of the newest one goes, as released,
  and that may be the newest.
  """

  needs = frozenset({'keys', 'last_attention'})
  shared = True
  evict_needs = frozenset({'last_attention'})

  def scores(self, tokens: TokenSet, signals: Signals) -> jax.Array:
    """float32[B, K, N], mean attention of the last token over all heads."""
    del tokens
    return broadcast_to_heads(signals.last_attention.mean(axis=1), signals.keys.shape[2])

  def forced(self, tokens: TokenSet, num_slots: int) -> jax.Array:
    """Names the last entry."""
    del num_slots
    return latest(tokens, 1)

  def evict(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> jax.Array:
    """Lets the entry go that the newest token attends to least."""
    return stays(tokens, signals.last_attention.mean(axis=1), num_slots)
