"""Uniform subsampling: a baseline that reads no features.

Axes: B batch, N slots now, M slots after.
"""

import dataclasses
from typing import Annotated

import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.match import evenly_spaced
from ops.primitives.select import keep_top, rank_of
from ops.reducers.base import Checked, Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, count, num_kept
from ops.values import OneOf

PHASES = ('first', 'middle')


@dataclasses.dataclass(frozen=True)
class Stride(Checked, Reducer):
  """Keeps evenly spaced tokens.

  Of n free tokens, those of rank floor(i n / m) stay, i from 0 to m - 1.

  Attributes:
    phase: the token that stays of each n / m tokens: the 'first', or 'middle', rank
      floor((i + 1/2) n / m), as the sparse sampling that CenterCLIP (Zhao et al., 2022),
      arXiv:2205.00823, is compared with.
  """

  phase: Annotated[str, OneOf(PHASES)] = 'first'
  drops = 'pruning drops tokens'
  can_empty = True

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    stays = evenly_spaced(rank_of(tokens.free), count(tokens.free), num_kept(tokens, num_slots),
                          late=PHASES.index(self.phase))
    return keep_top(tokens, stays.astype(jnp.float32), num_slots=num_slots)
