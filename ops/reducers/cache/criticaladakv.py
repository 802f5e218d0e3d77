"""CriticalAdaKV: numbers a head by AdaKV, entries of each head by CriticalKV.

Axes: B batch, N entries now, M entries a head on average, H heads, K kv heads.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from ops.caches.heads import KVHeads
from ops.primitives.kv_select import (
  best_of_all_heads,
  best_of_each_head,
  budgets,
  by_kv_head,
  share_of,
  share_with_floor,
)
from ops.reducers.scoring import Wrapper
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import NotNegative, Ratio

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class CriticalAdaKV(Wrapper):
  """Keeps in each head as many entries as its scores earn, chosen in CriticalKV's two stages.

  Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective (Feng et al.,
  2025), arXiv:2502.03805, Alg. 1 with the numbers of Ada-KV, arXiv:2407.11550. As in the kvpress
  library, but that entries that do not stay are gone instead of hidden.

  Attributes:
    inner: the method that ranks entries.
    safeguard: the share of M that every head keeps.
    first_stage: the share of a head's entries that goes by scores alone.
    epsilon: added to scores before they are multiplied by the lengths of projected values.
  """

  safeguard: Ratio = 0.2
  first_stage: Ratio = 0.5
  epsilon: NotNegative = 1e-4
  default: ClassVar[dict[str, str]] = {'inner': 'snapkv'}
  reads: ClassVar[frozenset[str]] = frozenset({'projected_norms'})

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVHeads:
    scores = self.inner.ranking(tokens, signals, num_slots=num_slots)
    counts, heads, slots = budgets(tokens, num_slots), *scores.shape[1:]
    safe_count = share_with_floor(counts, self.safeguard, num_slots)
    safe = best_of_each_head(scores, safe_count)
    earned = best_of_all_heads(scores, heads * counts, heads * num_slots, safe)
    earned_count = jnp.sum(earned, axis=2, dtype=jnp.int32)
    # The safe ones are the best of their head, so the first stage never leaves one out.
    first = best_of_each_head(scores, jnp.maximum(
        safe_count, share_of(earned_count, self.first_stage, slots)))
    norms = by_kv_head(signals.projected_norms, heads).mean(axis=2)
    weighted = jnp.where(tokens.real[:, None], (scores + self.epsilon) * norms, -jnp.inf)
    keep = best_of_each_head(weighted, earned_count, first)
    return KVHeads.create(keep, heads * num_slots)

  def stored_bytes(self, num_slots: int, heads: int, width: int,
                   itemsize: int) -> tuple[int, int]:
    return KVHeads.stored_bytes(heads * num_slots, heads, width, itemsize)
