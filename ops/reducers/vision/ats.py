"""ATS: adapts the number of tokens to the image, by inverse transform sampling of significance.

Axes: B batch, N slots now, M slots after, P sample points, H heads, d features a head.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment, Gather, take
from ops.primitives.match import scatter
from ops.primitives.select import top
from ops.reducers.base import ByAttention
from ops.signals import Signals
from ops.tokens import TokenSet

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ATS(ByAttention):
  """Keeps the tokens at evenly spaced quantiles of significance; repeats become padding.

  Adaptive Token Sampling (Fayyaz et al., 2022), Sec. 3, arXiv:2111.15667, as released by its
  authors. Significance is [CLS] attention (on a backbone without, `by` the mean attention of all
  tokens) times the length of the value. A sampled token keeps its row of attention over all tokens,
  dropped ones included. Protected tokens lead, the others follow, the least significant first.
  `num_slots` is a capacity. Two things differ from the release: there, padding left by an earlier
  cut saves the least significant token, and 1e-6 smooths the softmax, which moves a result by about
  as much.

  Attributes:
    points: sample points; None for as many as slots are to be filled. The release takes the
      number of tokens of the whole image in every layer. Where more tokens are sampled than fit,
      the least significant are dropped.
  """

  points: int | None = None
  site = 'inside'
  drops = 'pruning drops tokens'
  adaptive = 'a token that is sampled twice fills one slot'

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.points is not None and self.points < 1:
      raise ValueError(f'points={self.points} must be at least 1, or None for as many as fit')

  @property
  def needs(self) -> frozenset[str]:
    return super().needs | {'values'}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    scores = significance(signals, by=self.by)
    points = max(num_slots - tokens.protected, 1) if self.points is None else self.points
    return keep_sampled(tokens, scores, sample(scores, tokens.free, points=points),
                        num_slots=num_slots)


def significance(signals: Signals, *, by: str = 'cls_attention') -> Array:
  """float32[B, N]: attention over all heads, times the length of the values of all heads."""
  values = signals.values.astype(jnp.float32)
  length = jnp.sqrt(jnp.sum(values * values, axis=(2, 3)))
  return jax.lax.stop_gradient(getattr(signals, by).sum(axis=1) * length)


def sample(scores: Array, among: Array, *, points: int) -> Array:
  """Inverse transform sampling without chance: the tokens nearest to evenly spaced quantiles.

  The distribution runs over tokens of rising score and is stretched to [0, 1], so the lowest has
  no share and is picked only where it is alone. The quantiles run from the lowest share to 1.

  Args:
    scores: float32[B, N], not negative.
    among: bool[B, N], tokens to sample.
    points: P, quantiles.

  Returns:
    bool[B, N], sampled at least once.
  """
  order = jnp.argsort(jnp.where(among, scores, jnp.inf), axis=1)
  counts = take(among, order)
  share = jnp.cumsum(jnp.where(counts, take(scores, order), 0.0), axis=1)
  share = share / jnp.maximum(share[:, -1:], 1e-20)
  share = (share - share[:, :1]) / jnp.maximum(share[:, -1:] - share[:, :1], 1e-20)
  wanted = quantiles(share, counts, points=points)
  nearest = take(order, jax.vmap(nearest_share)(jnp.where(counts, share, jnp.inf), wanted))
  return scatter(jnp.zeros_like(among), nearest, jnp.ones_like(nearest, bool)) & among


def quantiles(share: Array, counts: Array, *, points: int) -> Array:
  """Spaces quantiles evenly from the lowest share above 0 to 1, float32[B, P].

  Args:
    share: float32[B, N].
    counts: bool[B, N], the entries that count.
    points: P.
  """
  lowest = jnp.min(share, axis=1, keepdims=True, initial=1.0, where=counts & (share > 0))
  return lowest + (1 - lowest) * jnp.arange(points, dtype=jnp.float32)[None] / max(points - 1, 1)


def nearest_share(share: Array, quantiles: Array) -> Array:
  """int32[P]: where float32[N], rising, is nearest to float32[P]; the first of equals."""
  above = jnp.minimum(jnp.searchsorted(share, quantiles), share.shape[0] - 1)
  below = jnp.searchsorted(share, share[jnp.maximum(above - 1, 0)])
  lower = jnp.abs(quantiles - share[below]) <= jnp.abs(share[above] - quantiles)
  return jnp.where(lower, below, above).astype(jnp.int32)


def keep_sampled(tokens: TokenSet, scores: Array, hit: Array, *, num_slots: int,
                 turn: Array | None = None) -> Gather:
  """Keeps the protected tokens, then the sampled ones, then padding.

  Args:
    tokens: N slots.
    scores: float32[B, N]; where more tokens were sampled than fit, the highest stay.
    hit: bool[B, N], the sampled tokens.
    num_slots: M.
    turn: float32[B, N], the order of the sampled tokens; None for the lowest score first.
  """
  picked = top(scores, num_slots, forced=tokens.fixed, excluded=~(tokens.fixed | hit))
  rank = jnp.where(tokens.fixed, -jnp.inf,
                   jnp.where(hit, scores if turn is None else turn, jnp.inf))
  src = take(picked, jnp.argsort(take(rank, picked), axis=1))
  stays = tokens.fixed | hit
  return Gather(src, tokens.slots, valid=take(stays, src),
                wanted=jnp.sum(stays, axis=1, dtype=jnp.int32))
