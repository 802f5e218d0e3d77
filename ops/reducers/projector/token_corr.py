"""Token-level correlation: fewer tokens of an image whose patches repeat each other.

Axes: B batch, N slots now, M slots after, H heads, d features a head.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.farthest import num_similar
from ops.primitives.select import keep_flagged, ranks, top
from ops.reducers.base import ByAttention
from ops.signals import Signals
from ops.tokens import TokenSet, count, num_kept
from ops.values import Count, CountOrZero

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TokenCorr(ByAttention):
  """Keeps as many tokens as do not repeat others, those with the highest [CLS] attention.

  Token-level Correlation-guided Compression (Zhang et al., 2024), arXiv:2407.14439. There is no
  release: this is built from the paper's abstract and what is known of it second hand. A token is
  redundant if `partners` others are more alike than `threshold`, by cosine of the keys (mean over
  heads); all the tokens that are not make the count. The paper samples so many by the attention of
  [CLS] in a middle layer and in the last one; here those with the highest mean of both stay, in
  their order. `num_slots` is a capacity. It measures an image as a whole, and keeps one token at
  least; the paper measures each crop, and keeps the thumbnail whole.

  Attributes:
    threshold: cosine above which two tokens are partners.
    partners: how many make a token redundant.
    middle: the other layer; a cut that no watch comes before goes by its own alone.
  """

  threshold: float = 0.8
  partners: Count = 4
  middle: CountOrZero = 11
  reconstructed = 'the abstract'
  site = 'after'
  drops = 'pruning drops tokens'
  adaptive = 'images of repeated patterns keep fewer tokens'

  @property
  def needs(self) -> frozenset[str]:
    return super().needs | {'keys'}

  @property
  def watch_needs(self) -> frozenset[str]:
    return super().needs

  def watched(self, cuts: tuple[int, ...]) -> tuple[int, ...]:
    return (self.middle,) if max(cuts, default=-1) > self.middle else ()

  def watch(self, tokens: TokenSet, signals: Signals) -> dict[str, Array]:
    """{'local': float32[B, N]}, the attention of the middle layer."""
    del tokens
    return {'local': jax.lax.stop_gradient(self.attention(signals).mean(axis=1))}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    keys = signals.keys.astype(jnp.float32).mean(axis=2)
    similar = num_similar(keys, tokens.free, threshold=self.threshold)
    wanted = jnp.maximum(count(tokens.free & (similar < self.partners)), 1)
    attention = jax.lax.stop_gradient(self.attention(signals).mean(axis=1))
    scores = (attention + tokens.stats.get('local', attention)) / 2
    place = ranks(top(scores, tokens.slots, excluded=~tokens.free), tokens.slots)
    stays = tokens.free & (place < jnp.minimum(wanted, num_kept(tokens, num_slots)))
    return keep_flagged(tokens, stays, num_slots=num_slots).replace(
        wanted=(count(tokens.fixed) + wanted)[:, 0])
