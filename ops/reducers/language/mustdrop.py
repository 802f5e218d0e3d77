"""MustDrop's filter in the language model: tokens that no word attends to are dropped.

Axes: B batch, N slots now, H heads.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.kv_select import latest
from ops.primitives.queries import fold_rows, text_after_images
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TEXT, TokenSet, count, num_kept
from ops.values import Share

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class MustDrop(Reducer):
  """Keeps the tokens that the text attends to, or one word does, and those marked as key tokens.

  Multi-Stage Vision Token Dropping (Liu et al., 2024), arXiv:2411.10803, the filter in its prefill,
  as released: attention is a mean over heads. What text after the image pays a token must reach
  `overall` of what it pays all tokens, or what one word pays it must reach `single`; else it goes,
  unless the bool stat 'key' of the tokens names it (the release's stage in the tower does). Where
  no text follows, the last token asks. Where more stay than the budget lets, the key tokens and
  those with the most attention do. It acts behind layers 2, 6, 10 and 14 of 32, and numbers tokens
  anew. The release also takes what goes out of the caches of earlier layers from the first cut on,
  and not before; here each layer caches what its attention saw.

  Attributes:
    overall: threshold of the sum over words, a share.
    single: threshold of the largest.
  """

  overall: Share = 0.001
  single: Share = 0.001
  needs = frozenset({'queries', 'keys', 'rope'})
  site = 'after'
  positions = 'compact'
  drops = 'pruning drops tokens'
  adaptive = 'thresholds decide how many stay'
  can_empty = True

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    def add(state: tuple[Array, Array], rows: Array, asks: Array) -> tuple[Array, Array]:
      rows = jnp.where(asks[0][:, :, None], rows.mean(axis=1), 0.0)
      return state[0] + rows.sum(axis=1), jnp.maximum(state[1], rows.max(axis=1))

    none, after = jnp.zeros(tokens.kind.shape), text_after_images(tokens)
    asks = jnp.where(after.any(axis=1, keepdims=True), after, latest(tokens, 1))
    words = tokens.slots if TEXT in tokens.of else max(tokens.protected, 1)
    paid, most = fold_rows(tokens, signals, asks[None], (none, none), add, most=words)
    total = jnp.sum(jnp.where(tokens.free, paid, 0.0), axis=1, keepdims=True)
    key = tokens.free & tokens.stats.get('key', none > 0)
    important = key | (paid >= self.overall * total) | (most >= self.single)
    stay = count(tokens.free & important)
    order = jnp.argsort(jnp.argsort(paid, axis=1, stable=True), axis=1).astype(jnp.float32)
    scores = order + tokens.slots * (important.astype(jnp.float32) + key)
    budget = jnp.minimum(stay, num_kept(tokens, num_slots))[:, 0]
    kept = keep_top(tokens.replace(budget=budget), scores, num_slots=num_slots)
    return kept.replace(wanted=(count(tokens.fixed) + stay)[:, 0])
