"""CriticalKV: half of the budget by scores, half by scores times what values become in the output.

Axes: B batch, N entries now, M entries after, H heads, K kv heads.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from ops.kv_cache import KVGather
from ops.primitives.kv_select import (
  best_of_each_head,
  budgets,
  by_kv_head,
  keep_best,
  share_with_floor,
)
from ops.reducers.scoring import ScoringReducer, Wrapper
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import NotNegative, Ratio

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class CriticalKV(Wrapper, ScoringReducer):
  """Keeps the best by scores, then the best by scores times the length of the projected value.

  Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective (Feng et al.,
  2025), arXiv:2502.03805, Alg. 1. A value's length is the L1 norm of what the output projection
  makes of it, mean over the heads that share it, as in the kvpress library.

  Attributes:
    inner: the method that ranks entries.
    first_stage: the share of M that goes by scores alone.
    epsilon: added to scores before they are multiplied.
  """

  first_stage: Ratio = 0.5
  epsilon: NotNegative = 1e-4
  default: ClassVar[dict[str, str]] = {'inner': 'snapkv'}
  reads: ClassVar[frozenset[str]] = frozenset({'projected_norms'})

  def ranking(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Array:
    """Returns the scores of the second stage, float32[B, K, N], those of the first above all."""
    scores = self.inner.ranking(tokens, signals, num_slots=num_slots)
    counts = budgets(tokens, num_slots)
    first = best_of_each_head(scores, share_with_floor(counts, self.first_stage, num_slots))
    norms = by_kv_head(signals.projected_norms, scores.shape[1]).mean(axis=2)
    weighted = jnp.where(tokens.real[:, None], (scores + self.epsilon) * norms, -jnp.inf)
    return jnp.where(first, jnp.finfo(jnp.float32).max / 8, weighted)

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVGather:
    scores = self.ranking(tokens, signals, num_slots=num_slots)
    return keep_best(tokens, scores, num_slots=num_slots)
