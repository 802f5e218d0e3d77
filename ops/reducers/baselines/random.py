"""Random pruning: the baseline that every score has to beat.

Axes: B batch, N slots now, M slots after.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.select import keep_top, rank_of
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Seed


@dataclasses.dataclass(frozen=True)
class Random(Reducer):
  """Keeps randomly chosen tokens.

  The choice follows from the seed, the number of free tokens and the rank of each among them, and
  from nothing else: images with equally many tokens lose the same ones, whatever batch they are in
  and however they are padded, and successive layers choose anew.

  Attributes:
    seed: another seed, another choice.
  """

  seed: Seed | jax.Array = 0
  drops = 'pruning drops tokens'
  can_empty = True

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    key = jax.random.key(self.seed)

    def score(count: jax.Array, rank: jax.Array) -> jax.Array:
      return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, count), rank))

    count = jnp.sum(tokens.free, axis=1)
    scores = jax.vmap(jax.vmap(score, in_axes=(None, 0)))(count, rank_of(tokens.free))
    return keep_top(tokens, scores, num_slots=num_slots)
