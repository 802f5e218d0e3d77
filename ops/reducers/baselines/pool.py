"""Average pooling: a baseline that reads positions and nothing else.

Axes: B batch, N slots now, M slots after.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.moves.rows import take
from ops.primitives.match import join
from ops.primitives.select import ranks
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, count, num_kept, of_kept

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Pool(Reducer):
  """Averages neighbouring tokens in cells of the grid, one cell for each token of the budget.

  Adaptive average pooling, as DeCo (Yao et al., 2024), arXiv:2405.20985, puts before a language
  model; but for any count, on any subset of a grid, and without overlap. The n free tokens in
  raster order are cut into bands, and each band in column order into cells: cell i of m begins at
  token floor(i n / m). Where squares tile a whole grid, that is average pooling; else cells differ
  by one token at most and none is empty. Means are weighted by size, in raster order of the cells.
  """

  needs = frozenset({'grid'})

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    height, width = signals.grid
    num_free = jnp.maximum(count(tokens.free), 1)
    cells = jnp.maximum(num_kept(tokens, num_slots), 1)
    bands = of_kept(tokens, num_slots,
                    lambda kept: max(1, round(math.sqrt(kept * height / width))))

    def cell(order: Array) -> Array:
      """The cell of each slot: the last i with floor(i n / m) up to its place in the order."""
      return ((ranks(order, tokens.slots) + 1) * cells - 1) // num_free

    def by(key: Array) -> Array:
      key = jnp.where(tokens.free, key, jnp.iinfo(jnp.int32).max)
      return jnp.argsort(key, axis=1, stable=True).astype(jnp.int32)

    band = ((cell(by(tokens.pos)) + 1) * bands - 1) // cells
    order = by((band * width + tokens.pos % width) * height + tokens.pos // width)
    first = jnp.minimum(cell(order) * num_free // cells, tokens.slots - 1)
    own = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), first.shape)
    partner = jnp.where(tokens.free, take(order, first), own)
    return join(tokens, partner, ranks(order, tokens.slots), num_slots=num_slots)
