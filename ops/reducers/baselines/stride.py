"""Uniform subsampling: a baseline that reads no features.

Axes: B batch, N slots now, M slots after.
"""

import dataclasses

import jax.numpy as jnp

from ops import choices
from ops.assignments import Assignment
from ops.primitives.match import evenly_spaced
from ops.primitives.select import keep_top, rank_of
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, count, num_kept

PHASES = ('first', 'middle')


@dataclasses.dataclass(frozen=True)
class Stride(Reducer):
  """Keeps evenly spaced tokens.

  Of n free tokens, those of rank floor(i n / m) stay, i from 0 to m - 1.

  Attributes:
    phase: the token that stays of each n / m tokens: the 'first', or 'middle', rank
      floor((i + 1/2) n / m), as the sparse sampling that CenterCLIP (Zhao et al., 2022),
      arXiv:2205.00823, is compared with.
  """

  phase: str = 'first'
  drops = 'pruning drops tokens'

  def __post_init__(self) -> None:
    choices.check('phase=', self.phase, PHASES)

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    stays = evenly_spaced(rank_of(tokens.free), count(tokens.free), num_kept(tokens, num_slots),
                          late=PHASES.index(self.phase))
    return keep_top(tokens, stays.astype(jnp.float32), num_slots=num_slots)
