"""ATS: adapts the number of tokens to the image, by inverse transform sampling of significance.

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
class ATS(ByQuantiles):
  """Keeps the tokens at evenly spaced quantiles of significance; repeats become padding.

  Adaptive Token Sampling (Fayyaz et al., 2022), Sec. 3, arXiv:2111.15667, as released by its
  authors. Significance is [CLS] attention (on a backbone without, `by` the mean attention of all
  tokens) times the length of the value. A sampled token keeps its row of attention over all tokens,
  dropped ones included. Protected tokens lead, the others follow, the least significant first.
  `num_slots` is a capacity. Two things differ from the release: there, padding left by an earlier
  cut saves the least significant token, and 1e-6 smooths the softmax, which moves a result by about
  as much. The release takes as many sample points in every layer as the whole image has tokens.
  """

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    scores = significance(signals, by=self.by)
    hit = sample(scores, tokens.free, points=self.num_points(tokens, num_slots),
                 most=self.most_points(tokens, num_slots))
    return keep_sampled(tokens, scores, hit, num_slots=num_slots)


def significance(signals: Signals, *, by: str = 'cls_attention') -> Array:
  """float32[B, N]: attention over all heads, times the length of the values of all heads."""
  values = signals.values.astype(jnp.float32)
  length = jnp.sqrt(jnp.sum(values * values, axis=(2, 3)))
  return jax.lax.stop_gradient(getattr(signals, by).sum(axis=1) * length)


def sample(scores: Array, among: Array, *, points: Array | int, most: int | None = None) -> Array:
  """Inverse transform sampling without chance: the tokens nearest to evenly spaced quantiles.

  The distribution runs over tokens of rising score and is stretched to [0, 1], so the lowest has
  no share and is picked only where it is alone. The quantiles run from the lowest share to 1.

  Args:
    scores: float32[B, N], not negative.
    among: bool[B, N], tokens to sample.
    points: P, quantiles; or int32[B, 1], each row's own.
    most: P where rows have their own.

  Returns:
    bool[B, N], sampled at least once.
  """
  order = jnp.argsort(jnp.where(among, scores, jnp.inf), axis=1)
  counts = take(among, order)
  share = jnp.cumsum(jnp.where(counts, take(scores, order), 0.0), axis=1)
  share = share / jnp.maximum(share[:, -1:], 1e-20)
  share = (share - share[:, :1]) / jnp.maximum(share[:, -1:] - share[:, :1], 1e-20)
  return sample_at(quantiles(share, counts, points=points, most=most), share, order, counts) & among


def quantiles(share: Array, counts: Array, *, points: Array | int,
              most: int | None = None) -> Array:
  """Spaces quantiles evenly from the lowest share above 0 to 1, float32[B, P].

  Args:
    share: float32[B, N].
    counts: bool[B, N], the entries that count.
    points: P; or int32[B, 1], each row's own, beyond which its last is repeated.
    most: P where rows have their own.
  """
  lowest = jnp.min(share, axis=1, keepdims=True, initial=1.0, where=counts & (share > 0))
  if isinstance(points, int):
    place = jnp.arange(points, dtype=jnp.float32)[None] / max(points - 1, 1)
  else:
    number = jnp.minimum(jnp.arange(most, dtype=jnp.int32)[None], points - 1)
    place = number.astype(jnp.float32) / jnp.maximum(points - 1, 1)
  return lowest + (1 - lowest) * place
