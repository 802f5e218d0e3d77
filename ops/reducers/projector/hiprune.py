"""HiPrune: objects by a middle layer, their surroundings, and the rest by a deep layer.

Axes: B batch, N slots now, M slots after, H heads, A anchors.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.moves.rows import take
from ops.primitives.select import keep_flagged, keep_top, ranks, top
from ops.reducers.base import ByAttention
from ops.signals import Signals
from ops.tokens import TokenSet, count, num_kept, of_kept
from ops.values import Count, CountOrZero, NotNegative, OneOf

Array = jax.Array
GRIDS = ('same', 'own')
VARIANTS = ('paper', 'release')


@dataclasses.dataclass(frozen=True)
class HiPrune(ByAttention):
  """Keeps the most attended tokens of a middle layer with their neighbours, then of this layer.

  HiPrune (Liu et al., 2025), arXiv:2508.00553, as released for LLaVA. Anchors are the round(alpha
  K / 5) tokens of the K kept that get most attention in the middle layer; the tokens left, right,
  above and below come with them (beyond the grid's ends the first or the last one, and of a row's
  end the next row's); the rest is what gets most attention in the layer at hand. A cut that no
  watch comes before takes its anchors from its own layer. Tokens keep their order.

  For Qwen2.5-VL (`by='received_attention'`, `grid='own'`, `middle=15`), where a token's attention
  is the mean of its patches', the release sums attention over the queries and lowers it by 1 for
  those that stay anyway. As 1 is the mean then, some of them are chosen once more, and fewer tokens
  stay than asked. So does variant='release'; 'paper' fills the budget.

  Attributes:
    by: the attention to rank by; as in the release, the mean over all tokens by default.
    middle: the layer that gives the anchors.
    alpha: about the share of tokens that are anchors and their neighbours.
    grid: 'same' for images of one size, 'own' where each has its own.
    patches: patches that a token is the mean of; counts with variant='release'.
    variant: 'paper' or 'release'.
  """

  by: str = 'received_attention'
  middle: CountOrZero = 8
  alpha: NotNegative = 0.1
  grid: Annotated[str, OneOf(GRIDS)] = 'same'
  patches: Count = 4
  variant: Annotated[str, OneOf(VARIANTS)] = 'paper'
  site = 'after'
  drops = 'pruning drops tokens'

  @property
  def needs(self) -> frozenset[str]:
    return super().needs | {'grid' if self.grid == 'same' else 'grids'}

  @property
  def watch_needs(self) -> frozenset[str]:
    return super().needs

  @property
  def adaptive(self) -> str:
    return 'some tokens are chosen twice' if self.variant == 'release' else ''

  def watched(self, cuts: tuple[int, ...]) -> tuple[int, ...]:
    return (self.middle,) if max(cuts, default=-1) >= self.middle else ()

  def watch(self, tokens: TokenSet, signals: Signals) -> dict[str, Array]:
    """{'object': float32[B, N]}, the attention of the middle layer."""
    del tokens
    return {'object': jax.lax.stop_gradient(self.attention(signals).mean(axis=1))}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    deep = self.attention(signals).mean(axis=1)
    anchors_of_row = of_kept(tokens, num_slots, self._num_anchors)
    most = self._num_anchors(max(num_slots - tokens.protected, 0))
    anchors = top(tokens.stats.get('object', deep), most, excluded=~tokens.free)
    place = ranks(anchors, tokens.slots)
    grid = signals.grid if self.grid == 'same' else (signals.grids[:, :1], signals.grids[:, 1:])
    near_one = near(tokens, anchors, take(place, anchors) < anchors_of_row, grid)
    forced = ((place < anchors_of_row) | near_one) & tokens.free
    if self.variant == 'paper':
      # Far above any attention, and finite, so that what may not be touched still comes first.
      return keep_top(tokens, jnp.where(forced, 2.0, 0.0) + deep, num_slots=num_slots)
    summed = deep * (self.patches * count(tokens.free)) - jnp.where(forced, 1.0, 0.0)
    rest = num_kept(tokens, num_slots) - count(forced)
    chosen = ranks(top(summed, tokens.slots, excluded=~tokens.free), tokens.slots) < rest
    return keep_flagged(tokens, forced | (chosen & tokens.free), num_slots=num_slots)

  def _num_anchors(self, kept: int) -> int:
    return round(kept * self.alpha / 5)


def near(tokens: TokenSet, anchors: Array, counts: Array,
         grid: tuple[int | Array, int | Array]) -> Array:
  """bool[B, N]: whether a slot's patch is left of, right of, above or below an anchor's.

  Args:
    tokens: N slots.
    anchors: int32[B, A], slots.
    counts: bool[B, A], anchors that count.
    grid: (rows, columns), of all or int32[B, 1] of each row.
  """
  rows, columns = grid
  place, real = take(tokens.pos, anchors), take(tokens.free, anchors) & counts
  around = jnp.concatenate([jnp.clip(place + by, 0, rows * columns - 1)
                            for by in (-1, 1, -columns, columns)], axis=1)
  meets = (tokens.pos[:, :, None] == around[:, None]) & jnp.tile(real, (1, 4))[:, None]
  return jnp.any(meets, axis=2)
