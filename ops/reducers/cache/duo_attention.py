"""DuoAttention: some heads keep everything, the others the first and the last entries.

Axes: B batch, N entries now, M entries a head on average, H heads, K kv heads, G heads that share
one, d features a head, L positions of a probe.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.caches.heads import KVHeads
from ops.primitives.kv_select import (
  best_of_all_heads,
  budgets,
  by_kv_head,
  earliest,
  latest,
)
from ops.primitives.select import rank_of
from ops.reducers.base import CacheReducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, CountOrZero, check_fields

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DuoAttention(CacheReducer):
  """Keeps all entries of the heads that look far back, and of the others the first and the last.

  DuoAttention (Xiao et al., 2024), arXiv:2410.10819, without its trained values of heads: these
  are worked out on the fly, as in the kvpress library. The mean query of the prompt, before
  rotation, attends from the last of L positions to its mean key at each of them; a head looks the
  further back, the larger the area under its cumulated attention. There the means are those of 50
  texts, and the heads of all layers are ranked together; here a prompt decides for itself, and a
  layer for its own heads. The K heads keep K M entries: every head the first and the last, then
  the heads that look furthest back all of theirs, in turn, until the budget is spent, so that one
  head may be left with a longer end. Heads that lose entries are as small in memory as what they
  hold.

  Attributes:
    sinks, recent: first and last entries that every head keeps.
    length: L.
  """

  sinks: CountOrZero = 128
  recent: Count = 256
  length: Count = 500
  needs = frozenset({'keys', 'plain_queries', 'rope'})

  def __post_init__(self) -> None:
    check_fields(self)

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVHeads:
    heads = signals.keys.shape[2]
    # The latest entries first, head by head.
    order = jnp.argsort(jnp.argsort(self.far(tokens, signals), axis=1), axis=1)[..., None]
    scores = order * tokens.slots + rank_of(tokens.real)[:, None]
    scores = jnp.where(tokens.real[:, None], scores.astype(jnp.float32), -jnp.inf)
    ends = earliest(tokens, self.sinks) | latest(tokens, self.recent)
    keep = best_of_all_heads(scores, heads * budgets(tokens, num_slots), heads * num_slots,
                             jnp.broadcast_to(ends[:, None], scores.shape))
    return KVHeads.create(keep, heads * num_slots)

  def far(self, tokens: TokenSet, signals: Signals) -> Array:
    """Measures how far back heads look: float32[B, K], from 0 to 1."""
    keys = signals.rope.turn_back(signals.keys, tokens.pos)
    share = tokens.real / jnp.maximum(jnp.sum(tokens.real, axis=1, keepdims=True), 1)

    def mean(x: Array) -> Array:
      """float[B, N, H, d] as float32[B, H, d]."""
      x = jnp.where(tokens.real[..., None, None], x.astype(jnp.float32), 0.0)
      return jnp.einsum('bn,bnhd->bhd', share, x, precision='highest')

    # A product goes by how far apart two positions are: so queries turn, and the keys stand.
    back = jnp.arange(self.length - 1, -1, -1, dtype=jnp.int32)[None]
    if signals.rope.sections:
      back = jnp.repeat(back[..., None], 1 + len(signals.rope.sections), axis=2)
      back *= signals.rope.steps
    query = mean(signals.plain_queries)[:, None]
    turned = signals.rope.rotate(jnp.broadcast_to(query, (query.shape[0], self.length,
                                                          *query.shape[2:])), back)
    turned = by_kv_head(jnp.swapaxes(turned, 1, 2), keys.shape[2]) * signals.rope.amplitude
    logits = jnp.einsum('bkgld,bkd->bkgl', turned, mean(keys), precision='highest')
    weights = jax.nn.softmax(logits * keys.shape[3] ** -0.5, axis=3)
    return jnp.cumsum(weights, axis=3).mean(axis=(2, 3))

  def stored_bytes(self, num_slots: int, heads: int, width: int,
                   itemsize: int) -> tuple[int, int]:
    return KVHeads.stored_bytes(heads * num_slots, heads, width, itemsize)

  def min_slots(self, slots: int, protected: int) -> int:
    del protected
    return min(slots, self.sinks + self.recent + 1)
