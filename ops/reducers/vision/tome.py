"""ToMe: merges similar tokens by a bipartite matching of even and odd slots.

Axes: B batch, N slots now, M slots after, H heads, d features a head.
"""

import dataclasses

import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.match import bipartite, parity_order
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class ToMe(Reducer):
  """Merges the most similar pairs of even and odd tokens by size-weighted mean.

  Token Merging: Your ViT But Faster (Bolya et al., 2023), Sec. 3, arXiv:2210.09461. At most half
  of the free tokens can go at once. Slot order is the released code's, as later layers pair by it:
  protected tokens, the even slots left (in slot order where something is protected, else the most
  similar first), the odd slots.

  Attributes:
    proportional: whether attention counts a slot as often as it has tokens (off for MAE weights
      that were trained without).
  """

  proportional: bool = True
  needs = frozenset({'keys'})

  def min_slots(self, slots: int, protected: int) -> int:
    return slots - (slots - protected) // 2

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    order = parity_order(tokens)
    metric = signals.keys.astype(jnp.float32).mean(axis=2)
    return bipartite(tokens, metric, order[:, ::2], order[:, 1::2], num_slots=num_slots,
                     order='given' if tokens.protected else 'score')
