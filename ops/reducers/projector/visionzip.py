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

Array = jax.Array


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
    left = num_left(tokens, num_slots)
    stay, rest, rank = self.candidates(tokens, signals, num_slots - context, left - context)
    step = jnp.maximum(jnp.sum(rest, axis=1, keepdims=True, dtype=jnp.int32) // context, 1)
    target = rest & (rank % step == 0) & (rank // step < context)
    group = jnp.where(rest, jnp.where(target, 1, 3), jnp.where(stay, 0, 2))
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

  def candidates(self, tokens: TokenSet, signals: Signals, most: int,
                 dominant: Array | int) -> tuple[Array, Array, Array]:
    """Returns the tokens of which contextual ones are made.

    Args:
      tokens, signals: as of a call.
      most: dominant tokens of a row at most.
      dominant: of each row, int32[B, 1], or `most`.

    Returns:
      bool[B, N], of which those that are no candidates are dominant; bool[B, N], the candidates;
      and int32[B, N], their ranks among each other.
    """
    order = top(self.attention(signals).mean(axis=1), most, forced=tokens.fixed,
                excluded=~tokens.real)
    rest = tokens.real & (ranks(order, tokens.slots) >= dominant)
    return tokens.real, rest, rank_of(rest)

  def min_slots(self, slots: int, protected: int) -> int:
    return min(slots, protected + self.contextual + 1)
