"""CaM: entries that leave give their values to those that follow them.

Axes: B batch, N entries now, M entries after, H heads, K kv heads.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from ops.caches.merge import KVMerge
from ops.primitives.kv_select import by_kv_head, keep_best, oldest
from ops.reducers.scoring import EvictingWrapper
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class CaM(EvictingWrapper):
  """Keeps the best entries, and merges into their values those of the entries that leave before.

  CaM: Cache Merging for Memory-efficient LLMs Inference (Zhang et al., ICML 2024), Alg. 1,
  openreview.net/forum?id=LCTmppB165. An entry that leaves gives its value, in equal parts, to the
  next `merged` ones that stay, with a probability of its attention over theirs. The release draws;
  here the value is weighed by the probability, which is the mean of the draws, so that equal
  prompts have equal caches. With `capacity` in the config it does so as the release does: the one
  entry that leaves for a decoded token gives its value, by the attention of that token, over the
  mean of all that stay behind it. The release leaves prompts whole; a budget for these, which is
  ours, has all entries that leave merge at once, by a mean with such weights instead of a sum.

  Attributes:
    inner: the method that ranks entries; 'streaming_llm' in the release.
    merged: entries that a value is divided among.
  """

  merged: Count = 32
  default: ClassVar[dict[str, str]] = {'inner': 'snapkv'}
  reads: ClassVar[frozenset[str]] = frozenset({'received_attention'})
  shared = False  # Each head divides by its own attention.

  @property
  def evict_needs(self) -> frozenset[str]:
    return self.inner.evict_needs | {'last_attention'}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVMerge:
    ranking = self.inner.ranking(tokens, signals, num_slots=num_slots)
    kept = keep_best(tokens, ranking, num_slots=num_slots, order='slot')
    heads, slots = ranking.shape[1:]
    filled = jnp.take_along_axis(jnp.broadcast_to(tokens.real[:, None], ranking.shape), kept.src, 2)
    if kept.valid is not None:
      filled &= kept.valid
    stays = jax.vmap(jax.vmap(lambda place, flag: jnp.zeros(slots, bool).at[place].max(flag)))(
        kept.src, filled)
    # Where an entry leaves all places are filled, in the order of slots: the first one behind it.
    first = jnp.cumsum(stays, axis=2, dtype=jnp.int32)
    count = first[:, :, -1:]
    received = by_kv_head(signals.received_attention, heads).mean(axis=2)
    targets = jnp.where(filled, jnp.take_along_axis(received, kept.src, axis=2), 0.0)
    sums = jnp.pad(jnp.cumsum(targets, axis=2), ((0, 0), (0, 0), (1, 0)))
    last = jnp.minimum(first + self.merged, count)
    share = jnp.maximum(last - first, 1)
    mean = (jnp.take_along_axis(sums, last, axis=2)
            - jnp.take_along_axis(sums, first, axis=2)) / share
    tiny = jnp.finfo(jnp.float32).tiny
    weight = jnp.clip(received / jnp.maximum(mean, tiny), 0.0, 1.0) / share
    leaves = tokens.real[:, None] & ~stays & (first < count)
    return KVMerge(kept, jnp.where(leaves, first, num_slots), jnp.where(leaves, weight, 0.0),
                   self.merged)

  def absorb(self, tokens: TokenSet, signals: Signals, stays: Array) -> Array:
    """Divides the value of the entry that leaves among those behind it, as `MergingMethod`."""
    attention, gone = signals.last_attention.mean(axis=1), tokens.real & ~stays
    place = jnp.max(jnp.where(gone, tokens.pos, -1), axis=1, keepdims=True)
    behind = stays & (tokens.pos > place) & (place >= 0)
    own, others = (jnp.sum(jnp.where(flags, attention, 0.0), axis=1, keepdims=True)
                   for flags in (gone, behind))
    mean = others / jnp.maximum(behind.sum(axis=1, keepdims=True), 1)
    chance = jnp.clip(own / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny), 0.0, 1.0)
    return jnp.where(behind & oldest(tokens.replace(valid=behind), self.merged),
                     chance / self.merged, 0.0)
