"""HoliTom's stage in the language model: what FastV would drop is folded into what it keeps.

Axes: B batch, N slots now, M slots after, H heads, D features.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.argmax import max_and_index
from ops.assignments import Assignment, Merge
from ops.moves.rows import take
from ops.primitives.crops.regions import ranks_within, sums
from ops.primitives.match import cosine
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class HoliTomMerge(Reducer):
  """Keeps the tokens that the last one attends to, and merges each other into the most similar.

  The inner stage of HoliTom (Shao et al., 2025), arXiv:2505.21334, as released: the choice is
  `fastv`'s. The others join in their order, by cosine of the features that enter the layer: each
  time the token that is kept becomes the mean of itself and the one that joins, so that the last
  one counts half, the one before a quarter. In the release tokens keep their own positions; here,
  where attention is causal, one that is joined takes the latest. The outer stage is `holitom`.
  """

  needs = frozenset({'last_attention'})
  site = 'before'
  positions = 'keep'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    picked = keep_top(tokens, signals.last_attention.mean(axis=1), num_slots=num_slots)
    src, dst, x = picked.src, picked.dst, jax.lax.stop_gradient(tokens.x)
    open_ = take(tokens.free, src)
    if picked.valid is not None:
      open_ &= picked.valid
    alike = jnp.where(open_[:, :, None], cosine(take(x, src), x), -jnp.inf)
    joins = tokens.free & (dst == num_slots) & jnp.any(open_, axis=1, keepdims=True)
    dst = jnp.where(joins, max_and_index(alike, axis=1).index, dst)
    group = jnp.where(joins, dst, -1)
    number = jnp.pad(sums(joins, group, num_slots), ((0, 0), (0, 1)))
    halvings = take(number, dst) - jnp.where(joins, ranks_within(group, jnp.zeros(dst.shape)), 0)
    weight = jnp.where(tokens.real, jnp.exp2(-halvings.astype(jnp.float32)), 0.0)
    return Merge(src, dst, weight, valid=picked.valid)
