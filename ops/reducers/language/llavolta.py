"""LLaVolta's Visual Context Compressor: runs of visual tokens become their averages.

Axes: B batch, N slots now, M slots after.
"""

import dataclasses

import jax.numpy as jnp

from ops.assignments import Assignment
from ops.moves.rows import take
from ops.primitives.match import join
from ops.primitives.select import ranks
from ops.reducers.base import Reducer
from ops.rope import sequence_index
from ops.signals import Signals
from ops.tokens import TokenSet, count, num_kept


@dataclasses.dataclass(frozen=True)
class LLaVolta(Reducer):
  """Averages each run of tokens in the order of the sequence, one run for each that is kept.

  The Visual Context Compressor of LLaVolta (Chen et al., 2024), Sec. 3.2, arXiv:2406.20092, as
  released. The stride follows from the budget: of n tokens that become m, run i begins at token
  floor(i n / m), so that keep_ratio = 1 / stride gives the release's runs where the stride divides
  n. Elsewhere runs differ by one token at most; the release drops what is left over. Means are
  weighted by size. A mean stands at the middle token of its run, which is the floor of the mean of
  their positions where these follow each other (positions='anchor'); in the release half precision
  rounds that from 2048 on. Its fixed schedules are keep_ratio=1/8 in layer 2 ('heavy') and in layer
  16 ('light'); the staged one ends without any cut.
  """

  site = 'before'
  positions = 'anchor'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    own = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), tokens.kind.shape)
    last = jnp.iinfo(jnp.int32).max
    order = jnp.argsort(jnp.where(tokens.free, sequence_index(tokens.pos), last), axis=1,
                        stable=True).astype(jnp.int32)
    place, number = ranks(order, tokens.slots), jnp.maximum(count(tokens.free), 1)
    runs = jnp.maximum(num_kept(tokens, num_slots), 1)
    # The last run that begins up to a place, and the middle one of its places, the earlier of two.
    run = ((place + 1) * runs - 1) // number
    middle = (run * number // runs + (run + 1) * number // runs - 1) // 2
    partner = take(order, jnp.minimum(middle, tokens.slots - 1))
    return join(tokens, jnp.where(tokens.free, partner, own), place, num_slots=num_slots)
