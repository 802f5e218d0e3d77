"""EViT: top-k by attention, and one fused token for the rest.

Axes: B batch, N slots now, M slots after, H heads.
"""

import dataclasses

import jax.numpy as jnp

from ops.assignments import Assignment, Merge
from ops.primitives.select import ranks, top
from ops.reducers.base import ByAttention
from ops.signals import Signals
from ops.tokens import TokenSet, filled, num_left


@dataclasses.dataclass(frozen=True)
class EViT(ByAttention):
  """Keeps the tokens with the highest [CLS] attention and fuses the others into one token.

  Not All Patches Are What You Need (Liang et al., 2022), Sec. 3, arXiv:2202.07800. The fused token
  is the sum of the rest weighted by that attention, not renormalised, and stands last. It counts as
  a patch in later layers. On a backbone without [CLS], `by` the mean attention of all tokens.
  """

  extra_slots = 1

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    scores = self.attention(signals).mean(axis=1)
    order = top(scores, num_slots, forced=tokens.fixed, excluded=~tokens.real)
    # The last slot belongs to the fused token, whose anchor is the best of the dropped.
    place = ranks(order, tokens.slots)
    left = num_left(tokens, num_slots)
    dst = jnp.where(tokens.real, jnp.minimum(place, left - 1), num_slots)
    enough = jnp.sum(tokens.real, axis=1, keepdims=True) <= left
    weight = jnp.where((place < left - 1) | enough, 1.0, scores)
    return Merge(order, dst, weight, valid=filled(tokens, num_slots))
