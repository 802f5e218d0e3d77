"""VisionZip: keeps the most attended tokens, and a few that sum up the rest.

Axes: B batch, N slots now, M slots after, H heads, C contextual tokens, d features a head.
"""

import dataclasses

import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.contextual import zip_tokens
from ops.primitives.select import rank_of, ranks, top
from ops.reducers.base import ByAttention
from ops.signals import Signals
from ops.tokens import TokenSet, num_left


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
    dominant = num_left(tokens, num_slots) - self.contextual
    order = top(self.attention(signals).mean(axis=1), num_slots - self.contextual,
                forced=tokens.fixed, excluded=~tokens.real)
    rest = tokens.real & (ranks(order, tokens.slots) >= dominant)
    metric = signals.keys.astype(jnp.float32).mean(axis=2)
    return zip_tokens(tokens, metric, tokens.real, rest, rank_of(rest), context=self.contextual,
                      num_slots=num_slots)

  def min_slots(self, slots: int, protected: int) -> int:
    return min(slots, protected + self.contextual + 1)
