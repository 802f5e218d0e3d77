"""ATS in the order of the image: quantiles of significance summed up along the slots.

Axes: B batch, N slots now, M slots after, P sample points, H heads, d features a head.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.moves.rows import take
from ops.primitives.quantiles import keep_sampled, sample_at
from ops.reducers.base import ByQuantiles
from ops.signals import Signals
from ops.tokens import TokenSet

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ATSSpatial(ByQuantiles):
  """Keeps the tokens at evenly spaced quantiles of significance, summed in slot order.

  Adaptive Token Sampling (Fayyaz et al., 2022), Sec. 3, arXiv:2111.15667, in the form of Which
  Tokens to Use? (Haurum et al., 2023), arXiv:2308.04657. It differs from `ats`, the authors' own:
  tokens are not sorted, so neighbours share their significance and rows of unimportant tokens are
  thinned out evenly; the length of the values is taken head by head; quantiles are the middles of
  P + 1 equal parts, the last left out. Kept tokens stay in their order, repeats are padding at the
  end. `num_slots` is a capacity; with `points` above it, the least significant are dropped.
  """

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    scores = significance_by_head(signals, by=self.by)
    hit = sample_in_order(scores, tokens.free, points=self.num_points(tokens, num_slots),
                          most=self.most_points(tokens, num_slots))
    turn = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.float32), scores.shape)
    return keep_sampled(tokens, scores, hit, num_slots=num_slots, turn=turn)


def significance_by_head(signals: Signals, *, by: str = 'cls_attention') -> Array:
  """float32[B, N]: attention times the length of the values, summed over heads."""
  values = signals.values.astype(jnp.float32)
  length = jnp.sqrt(jnp.sum(values * values, axis=3)).swapaxes(1, 2)
  return jax.lax.stop_gradient(jnp.sum(getattr(signals, by) * length, axis=1))


def sample_in_order(scores: Array, among: Array, *, points: Array | int,
                    most: int | None = None) -> Array:
  """The tokens nearest to P quantiles of a distribution that runs over the slots as they stand.

  Args:
    scores: float32[B, N], not negative.
    among: bool[B, N], tokens to sample.
    points: P, quantiles, at (2 i + 1) / (2 P + 2) for i from 0 to P - 1; or int32[B, 1], each row's
      own, beyond which its last is repeated.
    most: P where rows have their own.

  Returns:
    bool[B, N], sampled at least once.
  """
  order = jnp.argsort(~among, axis=1, stable=True)
  counts = take(among, order)
  share = jnp.cumsum(jnp.where(counts, take(scores, order), 0.0), axis=1)
  share = share / jnp.maximum(share[:, -1:], 1e-20)
  if isinstance(points, int):
    quantiles = (2 * jnp.arange(points, dtype=jnp.float32) + 1) / (2 * points + 2)
  else:
    number = jnp.minimum(jnp.arange(most, dtype=jnp.int32)[None], points - 1)
    quantiles = (2 * number.astype(jnp.float32) + 1) / (2 * points + 2)
  quantiles = jnp.broadcast_to(quantiles, (len(scores), quantiles.shape[-1]))
  return sample_at(quantiles, share, order, counts) & among
