"""Uniform subsampling: a baseline that looks at nothing.

Axes: B batch, N slots now, M slots after.
"""

import dataclasses

import jax.numpy as jnp

from ops.match import evenly
from ops.reducers.base import Reducer
from ops.select import keep_top, place
from ops.signals import Signals
from ops.tokens import Assignment, TokenSet


@dataclasses.dataclass(frozen=True)
class Stride(Reducer):
  """Keeps evenly spaced tokens: of n free ones those of rank floor(i n / m), i from 0 to m - 1."""

  conserves = 'pruning drops tokens'

  def __call__(self, tokens: TokenSet, signals: Signals, *, keep: int) -> Assignment:
    del signals
    count, kept = (jnp.sum(flags, axis=1, keepdims=True, dtype=jnp.int32)
                   for flags in (tokens.free, tokens.kept))
    stays = evenly(place(tokens.free), count, jnp.clip(keep - kept, 0, count))
    return keep_top(tokens, stays.astype(jnp.float32), keep=keep)
