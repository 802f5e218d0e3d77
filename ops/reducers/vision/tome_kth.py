"""ToMe's k-th matching: every token merges into the most similar of evenly spaced ones.

Axes: B batch, N slots now, M slots after, H heads, d features a head.
"""

import dataclasses

import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.match import evenly_spaced, join, nearest
from ops.primitives.select import rank_of
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, count, num_kept


@dataclasses.dataclass(frozen=True)
class ToMeKth(Reducer):
  """Merges each token into the most similar of evenly spaced tokens by size-weighted mean.

  The k-th matching beside Token Merging (Bolya et al., 2023), arXiv:2210.09461, released code:
  every k-th token is a destination. Here m destinations stand at floor(n i / m) - 1 for i = 1 to m
  of n free tokens, which is the same where m divides n, needs no remainder to be cut off, and may
  leave fewer than half.
  """

  proportional: bool = True
  needs = frozenset({'keys'})

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    stays = tokens.free & evenly_spaced(rank_of(tokens.free) + 1, count(tokens.free),
                                        num_kept(tokens, num_slots))
    own = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), stays.shape)
    target = jnp.argsort(~stays, axis=1, stable=True)[:, :num_slots].astype(jnp.int32)
    source = tokens.free & ~stays
    metric = signals.keys.astype(jnp.float32).mean(axis=2)
    _, match = nearest(metric, own, target, use_a=source,
                       use_b=jnp.take_along_axis(stays, target, axis=1))
    return join(tokens, jnp.where(source, match, own), own, num_slots=num_slots)
