"""HiRED: a budget for every crop by what the whole image's [CLS] looks at early.

Axes: B batch, N slots now, H heads, G patches of a crop.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.crops.regions import keep_flagged, ranks_within, region, sums
from ops.reducers.base import Checked, Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, count, num_kept, of_kept
from ops.values import OneOf, Share

Array = jax.Array
VARIANTS = ('paper', 'release')


@dataclasses.dataclass(frozen=True)
class HiRED(Checked, Reducer):
  """Keeps the tokens with the highest [CLS] attention of each crop, as many as its part is worth.

  HiRED (Arif et al., 2024), arXiv:2408.10945, as released for LLaVA-NeXT. A share of the budget is
  for the whole image in small. The other crops divide the rest by how many of that image's most
  attended patches, in the tower's first layer, lie where they are; shares are rounded down, so that
  a row may fill fewer slots. Within a crop the attention of the layer at hand decides. An image of
  one crop keeps its most attended tokens, as released for LLaVA-1.5. Tokens keep their order.

  Attributes:
    alpha: the share of the whole image, and of its patches that count for no crop.
    early: the layer that tells what crops are worth.
    variant: 'paper', a crop shows its part of the grid of patches; or 'release', where the first
      crop has the first patches in raster order, and so on, whatever it shows.
  """

  alpha: Share = 0.5
  early: int = 0
  variant: Annotated[str, OneOf(VARIANTS)] = 'paper'
  needs = frozenset({'cls_attention', 'crop', 'patch', 'tiling', 'crop_grid'})
  watch_needs = frozenset({'cls_attention'})
  site = 'after'
  drops = 'pruning drops tokens'
  adaptive = "a crop's share is rounded down"

  def watched(self, cuts: tuple[int, ...]) -> tuple[int, ...]:
    return (self.early,) if cuts else ()

  def watch(self, tokens: TokenSet, signals: Signals) -> dict[str, Array]:
    """{'early': float32[B, N]}, [CLS] attention of the first layer."""
    del tokens
    return {'early': jax.lax.stop_gradient(signals.cls_attention.sum(axis=1))}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    scores, crop = signals.cls_attention.sum(axis=1), jnp.where(tokens.free, signals.crop, -1)
    patches = signals.crop_grid[0] * signals.crop_grid[1]
    several = (signals.tiling > 0).all(axis=1, keepdims=True)
    total, sizes = num_kept(tokens, num_slots), sums(tokens.free, crop, patches + 1)
    whole = jnp.where(several, of_kept(tokens, num_slots, lambda kept: int(kept * self.alpha)),
                      total)
    whole = jnp.minimum(whole, sizes[:, :1])
    rest = jnp.minimum(total - whole, count(tokens.free) - sizes[:, :1])

    tiling = jnp.maximum(signals.tiling, 1)
    if self.variant == 'paper':
      shown = region(signals.patch, tiling, signals.crop_grid)
    else:
      shown = 1 + signals.patch // (patches // tiling.prod(axis=1, keepdims=True))
    early = tokens.stats.get('early', scores)
    hot = (crop == 0) & (ranks_within(crop, early) < int(patches * (1 - self.alpha)))
    hits = sums(hot, jnp.where(hot, shown, -1), patches + 1)
    budget = hits * rest // jnp.maximum(hits.sum(axis=1, keepdims=True), 1)
    budget = jnp.minimum(budget, sizes).at[:, :1].set(whole)
    own = jnp.take_along_axis(budget, jnp.maximum(crop, 0), axis=1)
    return keep_flagged(tokens, (crop >= 0) & (ranks_within(crop, scores) < own),
                        num_slots=num_slots)
