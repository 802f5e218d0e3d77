"""VisionZip: keeps the most attended tokens, and a few that sum up the rest.

Axes: B batch, N slots now, M slots after, H heads, C contextual tokens, d features a head.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment, Merge, take
from ops.primitives.match import cosine
from ops.primitives.select import rank_of, ranks, top
from ops.reducers.base import ByAttention
from ops.signals import Signals
from ops.tokens import TokenSet, filled, num_left


@dataclasses.dataclass(frozen=True)
class VisionZip(ByAttention):
  """Keeps the tokens with the highest [CLS] attention and merges the rest into a few tokens.

  VisionZip (Yang et al., 2024), arXiv:2412.04467, as released. Of the tokens that are not
  dominant, evenly spaced ones are contextual; each of the others joins the one whose key (mean
  over heads) is most like its own. What joins is averaged and added to the contextual token,
  which the paper has averaged. Dominant tokens come first, both in raster order.

  Attributes:
    contextual: C, among the tokens kept.
  """

  contextual: int = 10
  site = 'after'

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.contextual < 1:
      raise ValueError(f'contextual={self.contextual} must be at least 1')

  @property
  def needs(self) -> frozenset[str]:
    return super().needs | {'keys'}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    slots, context = tokens.slots, self.contextual
    own = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), tokens.kind.shape)
    order = top(self.attention(signals).mean(axis=1), num_slots - context, forced=tokens.fixed,
                excluded=~tokens.real)
    left = num_left(tokens, num_slots)
    rest = tokens.real & (ranks(order, slots) >= left - context)
    step = jnp.maximum(jnp.sum(rest, axis=1, keepdims=True, dtype=jnp.int32) // context, 1)
    rank = rank_of(rest)
    target = rest & (rank % step == 0) & (rank // step < context)
    group = jnp.where(rest, jnp.where(target, 1, 3), jnp.where(tokens.real, 0, 2))
    src = jnp.argsort(slots * group + own, axis=1)[:, :num_slots].astype(jnp.int32)

    metric = jax.lax.stop_gradient(signals.keys.astype(jnp.float32).mean(axis=2))
    at = jnp.maximum(left - context + jnp.arange(context, dtype=jnp.int32)[None], 0)
    targets = take(src, jnp.broadcast_to(at, (len(src), context)))
    alike = jnp.where(take(target, targets)[:, None], cosine(metric, take(metric, targets)), -2.0)
    merges = rest & ~target
    partner = jnp.where(merges, take(targets, jnp.argmax(alike, axis=2)), own)
    dst = take(ranks(src, slots), partner)
    count = Merge(src, dst, jnp.ones(dst.shape)).apply(merges.astype(jnp.float32))
    shares = take(jnp.pad(1 / jnp.maximum(count, 1.0), ((0, 0), (0, 1))), dst)
    return Merge(src, dst, jnp.where(merges, shares, jnp.where(tokens.real, 1.0, 0.0)),
                 valid=filled(tokens, num_slots))

  def min_slots(self, slots: int, protected: int) -> int:
    return min(slots, protected + self.contextual + 1)
