"""VisionZip: keeps the most attended tokens, and a few that sum up the rest.

Axes: B batch, N slots now, M slots after, H heads, C contextual tokens, d features a head.
"""

import dataclasses
from typing import Annotated

import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.contextual import zip_tokens
from ops.primitives.select import rank_of, ranks, top
from ops.reducers.base import ByAttention
from ops.signals import Signals
from ops.tokens import TokenSet, num_left, of_kept
from ops.values import Count, OneOf, Range

METRICS = ('keys', 'plain_keys')
CLS = ('dropped', 'kept')
VARIANTS = ('release', 'paper')


@dataclasses.dataclass(frozen=True)
class VisionZip(ByAttention):
  """Keeps the tokens with the highest [CLS] attention and merges the rest into a few tokens.

  VisionZip (Yang et al., 2024), arXiv:2412.04467, as released. Of the tokens that are not
  dominant, evenly spaced ones are contextual; each of the others joins the one whose key (mean
  over heads) is most like its own. What joins is averaged and added to the contextual token;
  variant='paper' averages all of them. Dominant tokens come first, both in raster order. Of several
  crops the release has the dominant tokens of all in raster order, then their [CLS], then what is
  contextual (`ops.primitives.contextual.order_over_crops`).

  Attributes:
    contextual: C, among the tokens kept.
    share: the part of the tokens kept that is contextual, rounded half to even, in place of C.
      10 / 64 gives the release's 54 + 10, 108 + 20 and 162 + 30.
    metric: the signal that is compared, 'keys' or 'plain_keys', those before a tower with rotary
      positions turns them, which the release reads there.
    cls: 'kept' hands the tower's [CLS] on to the language model, as one of the dominant tokens, as
      the release does; 'dropped' leaves it behind.
    variant: 'release' or 'paper'.
  """

  contextual: Count = 10
  share: Annotated[float, Range(above=0, below=1)] | None = None
  metric: Annotated[str, OneOf(METRICS)] = 'keys'
  cls: Annotated[str, OneOf(CLS)] = 'dropped'
  variant: Annotated[str, OneOf(VARIANTS)] = 'release'
  site = 'after'

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.contextual < 1:
      raise ValueError(f'contextual={self.contextual} must be at least 1')

  @property
  def needs(self) -> frozenset[str]:
    return super().needs | {self.metric}

  @property
  def hands_on(self) -> int:
    return 1 if self.cls == 'kept' else 0

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    most = self._num_contextual(max(num_slots - tokens.protected, 0))
    context = of_kept(tokens, num_slots, self._num_contextual)
    dominant = num_left(tokens, num_slots) - context
    picks = num_slots - (most if self.share is None else 1)
    order = top(self.attention(signals).mean(axis=1), picks, forced=tokens.fixed,
                excluded=~tokens.real)
    rest = tokens.real & (ranks(order, tokens.slots) >= dominant)
    metric = getattr(signals, self.metric).astype(jnp.float32).mean(axis=2)
    return zip_tokens(tokens, metric, tokens.real, rest, rank_of(rest), context=context, most=most,
                      num_slots=num_slots,
                      adds='mean' if self.variant == 'release' else 'members')

  def _num_contextual(self, kept: int) -> int:
    return self.contextual if self.share is None else max(round(kept * self.share), 1)

  def min_slots(self, slots: int, protected: int) -> int:
    return min(slots, protected + self._num_contextual(1) + 1)
