"""CaM: entries that leave give their values to those that follow them.

Axes: B batch, N entries now, M entries after, H heads, K kv heads.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from ops.caches.merge import KVMerge
from ops.primitives.kv_select import by_kv_head, keep_best
from ops.reducers.scoring import Wrapper
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class CaM(Wrapper):
  """Keeps the best entries, and adds to their values those of the entries that leave before them.

  CaM: Cache Merging for Memory-efficient LLMs Inference (Zhang et al., ICML 2024), Alg. 1,
  openreview.net/forum?id=LCTmppB165. An entry that leaves gives its value, in equal parts, to the
  next `merged` ones that stay, with a probability of its attention over theirs. The release draws;
  here the value is weighed by the probability, which is the mean of the draws, so that equal
  prompts have equal caches. The release merges one entry a decoded token; here all that leave after
  the prompt, head by head.

  Attributes:
    inner: the method that ranks entries.
    merged: entries that a value is divided among.
  """

  merged: Count = 32
  default: ClassVar[dict[str, str]] = {'inner': 'snapkv'}
  reads: ClassVar[frozenset[str]] = frozenset({'received_attention'})

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
