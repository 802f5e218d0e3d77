"""PACT: prunes tokens by keys and queries alone, then merges the rest around dense keys.

Axes: B batch, N slots now, M slots after, D features, H heads, K kv heads, d features a head.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment, Merge
from ops.moves.rows import take
from ops.primitives.cluster import bounded_peaks
from ops.primitives.kv_select import by_kv_head, share_of
from ops.primitives.match import cosine
from ops.primitives.select import ranks, top
from ops.reducers.base import Reducer
from ops.rope import sequence_index
from ops.signals import Signals
from ops.tokens import VISUAL, TokenSet, count, num_kept
from ops.values import NotNegative, Share

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PACT(Reducer):
  """Keeps one mean for each group of tokens of like keys, without the tokens that matter least.

  PACT (Dhouib et al., 2025), arXiv:2504.08966, as released, by queries and keys of the layer that
  it stands before. What a token matters is a softmax over all tokens up to the end of the image of
  its products with their mean query, both before they are rotated, a mean over heads, times its
  length; `keep` of the tokens stay. Of these, the ones that most others are near to come first: one
  that is farther than `cutoff`, a cosine distance of rotated keys, from every centre so far becomes
  a centre. The others join the nearest one; so do pruned tokens within `coefficient` * cutoff. A
  mean stands for as many tokens as it has, and counts as often in attention. Where there are more
  centres than a budget lets stay, those of the densest tokens do. A centre keeps its own position
  in the release, here it takes the latest of its group, as causal order asks.

  Attributes:
    keep: share that is not pruned, rounded down.
    cutoff: least distance between two centres.
    coefficient: how much farther a pruned token may be.
  """

  keep: Share = 0.55
  cutoff: NotNegative = 0.21
  coefficient: NotNegative = 1.5
  needs = frozenset({'next_queries', 'next_keys', 'rope'})
  site = 'before'
  positions = 'keep'
  proportional = True
  drops = 'pruned tokens that are like no centre are gone'
  merges = True
  adaptive = 'the distances of keys decide how many centres there are'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    free, slots = tokens.free, tokens.slots
    most = max(slots - tokens.protected, 0)
    number = jnp.maximum(share_of(jnp.minimum(count(free), most), self.keep, most), 1)
    order = ranks(top(jnp.where(free, self.importance(tokens, signals), -jnp.inf), slots), slots)
    stays = free & (order < number)
    keys = signals.next_keys.reshape(*free.shape, -1)
    # One product: all pairs are compared for densities anyway.
    between = jnp.maximum(1 - jax.lax.stop_gradient(cosine(keys, keys)), 0.0)
    between = jnp.where(jnp.eye(slots, dtype=bool)[None], 0.0, between)
    left = num_kept(tokens, num_slots)
    centre, label, distance = bounded_peaks(between, stays, cutoff=self.cutoff, most=left,
                                            picks=most)
    reach = self.cutoff * self.coefficient
    joins = free & (stays | (distance <= reach))
    own = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), free.shape)
    alone = tokens.fixed | centre
    src = jnp.argsort(jnp.where(alone, own, slots + own), axis=1)[:, :num_slots].astype(jnp.int32)
    target = jnp.where(alone, own, jnp.where(joins, label, slots))
    place = jnp.pad(ranks(src, slots), ((0, 0), (0, 1)), constant_values=num_slots)
    filled = count(tokens.fixed) + count(centre)
    return Merge.mean(
        src, take(place, target), jnp.ones(free.shape),
        valid=jnp.arange(num_slots, dtype=jnp.int32)[None] < filled).replace(wanted=filled[:, 0])

  def importance(self, tokens: TokenSet, signals: Signals) -> Array:
    """float32[B, N]."""
    place = sequence_index(tokens.pos)
    image = tokens.real & (tokens.kind == VISUAL)
    end = jnp.max(jnp.where(image, place, -1), axis=1, keepdims=True)
    asks = tokens.real & (place <= end)
    back = tokens.pos * -1
    queries, keys = (signals.rope.rotate(x.astype(jnp.float32), back)
                     for x in (signals.next_queries, signals.next_keys))
    share = asks / jnp.maximum(count(asks), 1)
    mean = jnp.einsum('bn,bnhd->bhd', share, queries, precision='highest')
    logits = jnp.einsum('bkgd,bnkd->bkgn', by_kv_head(mean, keys.shape[2]), keys,
                        precision='highest') * keys.shape[3] ** -0.5
    logits = jnp.where(asks[:, None, None], logits, -jnp.inf)
    logits = jnp.where(asks.any(axis=1)[:, None, None, None], logits, 0.0)
    length = jnp.sqrt(jnp.sum(jnp.square(tokens.x.astype(jnp.float32)), axis=2))
    return jax.lax.stop_gradient(jax.nn.softmax(logits, axis=3).mean(axis=(1, 2)) * length)
