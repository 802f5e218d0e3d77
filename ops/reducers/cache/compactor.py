"""Compactor: keeps entries whose keys lie apart, and those that get attention from both sides.

Axes: B batch, N entries now, M entries after, H heads, K kv heads, G heads that share one, d
features a head, S entries of a part, R numbers of a sketch.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.attention import HIDDEN_LOGIT
from ops.primitives.kv_select import (
  along_slots,
  by_kv_head,
  earliest,
  in_parts,
  latest,
  packed,
  pool_neighbours,
  standardized,
)
from ops.reducers.scoring import ScoringReducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, CountOrZero, NotNegative, OneOf, check_fields

Array = jax.Array
SCORES = ('both', 'leverage', 'attention')
VARIANTS = ('release', 'paper')
# Added to the diagonal of the sketch's squares, as released.
RIDGE = 1e-2
# Weight of the leverage where nobody says the share that goes, as released.
BLEND = 0.35


@dataclasses.dataclass(frozen=True)
class Compactor(ScoringReducer):
  """Keeps the entries of high leverage among keys, and of much attention within their part.

  Compactor (Chari and Van Durme, 2025), arXiv:2507.08143, as its author gave it to the kvpress
  library (CompactorPress, LeverageScorePress and NonCausalAttnPress). Leverage is that of centred
  keys before rotation in a Gaussian sketch. Attention is what an entry gets from all entries of its
  part, later ones too, times the length of its value, mean over three neighbours. Both are
  standardized over the heads of a row (there: of the whole batch), and added. The sketch is drawn
  from a fixed key, so that equal prompts have equal caches; there it is a new one every time.

  Attributes:
    by: 'both', or the 'leverage' or the 'attention' alone.
    blend: the weight of leverage beside attention; None for the share of entries that goes, where
      the budget is a ratio, else 0.35.
    sketch: R.
    chunk: S.
    sinks, recent: first and last entries, which always stay and of which the scores know nothing.
    variant: 'release' leaves out 1 / sqrt(d) in front of the softmax, and lets the padding that
      makes the last part whole attend and be attended to, with logits of 0; 'paper' does neither.
  """

  by: Annotated[str, OneOf(SCORES)] = 'both'
  blend: NotNegative | None = None
  sketch: Count = 48
  chunk: Count = 256
  sinks: CountOrZero = 8
  recent: CountOrZero = 4
  variant: Annotated[str, OneOf(VARIANTS)] = 'release'
  needs = frozenset({'keys', 'values', 'queries', 'rope'})

  def __post_init__(self) -> None:
    check_fields(self)

  def with_ratio(self, ratio: Fraction) -> Compactor:
    return self if self.blend is not None else dataclasses.replace(self, blend=float(1 - ratio))

  def forced(self, tokens: TokenSet, num_slots: int) -> Array:
    """Names the first and the last entries."""
    del num_slots
    return earliest(tokens, self.sinks) | latest(tokens, self.recent)

  def min_slots(self, slots: int, protected: int) -> int:
    del protected
    return min(slots, self.sinks + self.recent + 1)

  def scores(self, tokens: TokenSet, signals: Signals) -> Array:
    """float32[B, K, N], of mean 0 without the first and the last entries."""
    between = tokens.replace(valid=tokens.real & ~self.forced(tokens, 0))
    scores = jnp.zeros(())
    if self.by != 'attention':
      weight = 1.0 if self.by == 'leverage' else BLEND if self.blend is None else self.blend
      scores += weight * standardized(self._leverage(between, signals), between)
    if self.by != 'leverage':
      scores += standardized(self._attention(between, signals), between)
    return scores

  def _leverage(self, between: TokenSet, signals: Signals) -> Array:
    """float32[B, K, N], from 0 to 1."""
    keys = signals.rope.turn_back(signals.keys, between.pos)
    heads, width = keys.shape[2:]
    real = between.real[..., None, None]
    number = jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1)
    mean = jnp.sum(jnp.where(real, keys, 0.0), axis=1, keepdims=True) / number
    draw = jax.random.normal(jax.random.key(0), (heads, width, self.sketch)) * self.sketch ** -0.5
    rows = jnp.einsum('bnkd,kdr->bknr', jnp.where(real, keys - mean, 0.0), draw,
                      precision='highest')
    # The ridge as rows of their own, as sums of squares round short axes away: in a layer of
    # SmolLM2-135M their eigenvectors are off by 4e-3, Cholesky's factors by 3e-4, this by 2e-6.
    ridge = RIDGE ** 0.5 * jnp.eye(self.sketch)[None, None]
    ridge = jnp.broadcast_to(ridge, (*rows.shape[:2], *ridge.shape[2:]))
    axes = jnp.linalg.qr(jnp.concatenate([rows, ridge], axis=2))[0]
    return jnp.sum(jnp.square(axes[:, :, :-self.sketch]), axis=3)

  def _attention(self, between: TokenSet, signals: Signals) -> Array:
    """float32[B, K, N], attention within parts times lengths of values, pooled."""
    order, place = packed(between)
    there = jnp.take_along_axis(between.real, order, axis=1)[:, None]
    heads, (slots, width) = signals.keys.shape[2], signals.queries.shape[1::2]
    # A part without padding need not be longer than all entries.
    length = self.chunk if self.variant == 'release' else min(self.chunk, slots)

    def parts(x: Array) -> Array:
      """float[B, N, H, d] as float32[C, B, H, S, d] of C parts, without first and last entries."""
      x = along_slots(jnp.swapaxes(x, 1, 2), order).astype(jnp.float32)
      return jnp.moveaxis(in_parts(jnp.where(there[..., None], x, 0.0), length), 2, 0)

    def received(part: tuple[Array, Array, Array]) -> Array:
      """float32[B, K, S]."""
      queries, keys, real = part
      logits = jnp.einsum('bkgsd,bktd->bkgst', by_kv_head(queries, heads), keys,
                          precision='highest')
      if self.variant == 'release':
        return jax.nn.softmax(logits, axis=4).sum(axis=3).mean(axis=2)
      logits = jnp.where(real[:, :, None, None], logits * width ** -0.5, HIDDEN_LOGIT)
      weights = jax.nn.softmax(logits, axis=4) * real[:, :, None, :, None]
      return weights.sum(axis=3).mean(axis=2)

    each = jax.lax.map(received, (parts(signals.queries), parts(signals.keys),
                                  jnp.moveaxis(in_parts(there, length), 2, 0)))
    each = jnp.moveaxis(each, 0, 2).reshape(*each.shape[1:3], -1)
    lengths = jnp.sqrt(jnp.sum(jnp.square(signals.values.astype(jnp.float32)), axis=3))
    weighed = along_slots(each, place) * lengths.swapaxes(1, 2)
    return pool_neighbours(jnp.where(between.real[:, None], weighed, 0.0), between, kernel=3,
                           pool='avg')
