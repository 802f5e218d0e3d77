"""CrossGET: merges similar tokens of low importance, matched on the graph of all pairs.

Axes: B batch, N slots now, M slots after, H heads, d features a head, F = H d.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.argmax import max_and_index
from ops.assignments import Assignment, Merge
from ops.moves.rows import take
from ops.primitives.match import cosine, num_excess, pairwise_cosine
from ops.primitives.select import ranks, top
from ops.reducers.base import Checked, Reducer
from ops.signals import Signals
from ops.tokens import SPECIAL, TokenSet, filled
from ops.values import OneOf

Array = jax.Array
FORMS = ('image', 'cross', 'text', 'attention')


@dataclasses.dataclass(frozen=True)
class CrossGET(Checked, Reducer):
  """Merges tokens into their most similar tokens, weighted by importance.

  CrossGET (Shi et al., 2024), Sec. 3, arXiv:2305.17455, as released. Tokens are ranked by their
  best similarity, and each may look at those ranked later only: that leaves no two that want to
  merge into each other. The tokens for which this best match exceeds their importance the most go.
  A pair weighs 2 softmax(importance), so a group is not a mean of its members once their sizes
  differ or several join one token. At most half of the free tokens go at once; those left stay in
  their order. All pairs are compared: float32[B, N, N] once a cut.

  The released text form averages token ids along with the features. They are only read for the
  largest, which marks the end of the text and is never merged, so here a slot keeps its anchor's.

  Attributes:
    form: where importance comes from, and which keys are compared.
      'image': cosine of a token's key with the query of [CLS], over all heads.
      'cross': the same with the last special token, for hosts that append a cross token.
      'text': the same with the end-of-text token, which is protected as well: the token of the
        largest id in `tokens.stats['token_id']`, float[B, N], the first of equals.
      'attention': attention from the host's query token (signals.cls_attention) plus the mean of
        that from all others; keys are averaged over heads (the release's form for LLaVA).
    proportional: whether attention counts a slot as often as it has tokens.
  """

  form: Annotated[str, OneOf(FORMS)] = 'image'
  proportional: bool = True

  @property
  def needs(self) -> frozenset[str]:
    if self.form == 'attention':
      return frozenset({'keys', 'cls_attention', 'received_attention', 'one_sequence'})
    return frozenset({'keys', 'queries'})

  def min_slots(self, slots: int, protected: int) -> int:
    return slots - max(slots - protected - (self.form == 'text'), 0) // 2

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    keys = jax.lax.stop_gradient(signals.keys.astype(jnp.float32))
    if self.form == 'attention':
      metric, importance = keys.mean(axis=2), _from_attention(tokens, signals)
    else:
      slot = self._query_slot(tokens)
      if self.form == 'text':
        end = jnp.arange(tokens.slots)[None] == slot
        budget = None if tokens.budget is None else jnp.maximum(tokens.budget - 1, 0)
        tokens = tokens.replace(kind=jnp.where(end, jnp.int8(SPECIAL), tokens.kind), budget=budget)
      flat = (*keys.shape[:2], -1)
      metric, query = keys.reshape(flat), take(signals.queries.reshape(flat), slot)
      importance = cosine(metric, jax.lax.stop_gradient(query))[..., 0]

    similarity = pairwise_cosine(metric, tokens.free)
    source = _sources(tokens, similarity, importance, num_slots)
    match = max_and_index(jnp.where(source[:, None], -jnp.inf, similarity), axis=2).index
    weight = 2 * jax.nn.sigmoid(importance - take(importance, match))

    own = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), source.shape)
    stays = tokens.real & ~source
    src = jnp.argsort(~stays, axis=1, stable=True)[:, :num_slots].astype(jnp.int32)
    dst = take(ranks(src, tokens.slots), jnp.where(source, match, own))
    merge = Merge.mean(src, dst, jnp.where(tokens.real, tokens.sizes, 0.0),
                       valid=filled(tokens, num_slots))
    # The other half of each pair's weight of 2, beyond the 1 that the target has anyway.
    change = merge.totals(jnp.where(source, 1 - weight, 0.0))
    factor = jnp.where(source, weight, 1 + take(change, jnp.minimum(dst, num_slots - 1)))
    return merge.replace(weight=merge.weight * factor)

  def _query_slot(self, tokens: TokenSet) -> Array:
    """Finds the slot whose query measures importance, int32[B, 1]."""
    if self.form == 'text':
      if 'token_id' not in tokens.stats:
        raise ValueError("crossget with form='text' finds the end of the text by "
                         "tokens.stats['token_id'], which this host does not set; it has "
                         f'{", ".join(tokens.stats) or "none"}')
      ids = jnp.where(tokens.real, tokens.stats['token_id'].astype(jnp.float32), -jnp.inf)
      return jnp.argmax(ids, axis=1, keepdims=True)
    if not tokens.protected:
      raise ValueError(f'crossget with form={self.form!r} reads importance from a special token, '
                       'of which this host has none')
    special = tokens.real & (tokens.kind == SPECIAL)
    if self.form == 'cross':
      return tokens.slots - 1 - jnp.argmax(special[:, ::-1], axis=1, keepdims=True)
    return jnp.argmax(special, axis=1, keepdims=True)


def _from_attention(tokens: TokenSet, signals: Signals) -> Array:
  """float32[B, N]: attention from the query token, plus the mean of that from all others."""
  query, received = (jax.lax.stop_gradient(rows.mean(axis=1))
                     for rows in (signals.cls_attention, signals.received_attention))
  count = jnp.sum(tokens.real, axis=1, keepdims=True, dtype=jnp.float32)
  return query + (received * count - query) / jnp.maximum(count - 1, 1.0)


def _sources(tokens: TokenSet, similarity: Array, importance: Array, num_slots: int) -> Array:
  """Selects the tokens that are merged away, bool[B, N]."""
  rank = ranks(top(jnp.max(similarity, axis=2), tokens.slots), tokens.slots)
  later = rank[:, None, :] > rank[:, :, None]
  best = jnp.max(jnp.where(later, similarity, -jnp.inf), axis=2)
  order = top(best - importance, tokens.slots, excluded=~tokens.free)
  return ranks(order, tokens.slots) < num_excess(tokens, num_slots)
