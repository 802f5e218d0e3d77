"""TransPrune: keeps the tokens that change most from layer to layer.

Axes: B batch, N slots now, D features, H heads.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.attention import HIDDEN_LOGIT
from ops.primitives.queries import text_after_images
from ops.primitives.select import keep_top
from ops.reducers.base import Checked, Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import OneOf

Array = jax.Array
TINY = 1e-8
VARIANTS = ('release', 'paper')


@dataclasses.dataclass(frozen=True)
class TransPrune(Checked, Reducer):
  """Keeps the tokens with the largest change across layers plus attention from later text.

  TransPrune (Li et al., 2025), arXiv:2507.20630. How much a token changes is how long what
  attention, and the MLP, add to it is beside what went in, times a softmax over all tokens of 1
  minus the cosine of the two, summed over the layers watched: by default those from the layer
  before the first cut to the last cut. Attention is that of the next layer's queries and keys.
  Both are divided by their sums over the tokens that may go, and added. Otherwise as `pyramiddrop`.

  Attributes:
    variant: 'release' takes the cosine with its sign, 'paper' its size.
  """

  variant: Annotated[str, OneOf(VARIANTS)] = 'release'
  needs = frozenset({'next_row_attention'})
  watch_needs = frozenset({'hidden', 'attention_out', 'mlp_in', 'mlp_out'})
  site = 'before'
  positions = 'compact'
  drops = 'pruning drops tokens'
  can_empty = True

  def rows(self, tokens: TokenSet) -> Array:
    """bool[B, N], text after the last visual token."""
    return text_after_images(tokens)

  def watched(self, cuts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(max(cuts[0] - 1, 0), cuts[-1])) if cuts else ()

  def watch(self, tokens: TokenSet, signals: Signals) -> dict[str, Array]:
    """{'change': float32[B, N]}, the sum so far."""
    change = (self._transition(tokens, signals.hidden, signals.attention_out)
              + self._transition(tokens, signals.mlp_in, signals.mlp_out))
    return {'change': tokens.stats.get('change', 0.0) + jax.lax.stop_gradient(change)}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    scores = normalize(signals.next_row_attention.mean(axis=1), tokens.free)
    if 'change' in tokens.stats:
      scores += normalize(tokens.stats['change'], tokens.free)
    return keep_top(tokens, scores, num_slots=num_slots)

  def _transition(self, tokens: TokenSet, before: Array, added: Array) -> Array:
    """Measures the change of each token by a sublayer: float[B, N, D] twice -> float32[B, N]."""
    before, added = before.astype(jnp.float32), added.astype(jnp.float32)
    lengths = [jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=2), TINY ** 2)) for x in (before, added)]
    cosine = jnp.sum(before * added, axis=2) / (lengths[0] * lengths[1])
    turn = 1 - (jnp.abs(cosine) if self.variant == 'paper' else cosine)
    parts = jax.nn.softmax(jnp.where(tokens.real, turn, HIDDEN_LOGIT), axis=1)
    return lengths[1] / lengths[0] * parts


def normalize(scores: Array, free: Array) -> Array:
  """Divides scores float32[B, N] by their sum over bool[B, N]."""
  return scores / (jnp.sum(jnp.where(free, scores, 0.0), axis=1, keepdims=True) + TINY)
