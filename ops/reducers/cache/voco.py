"""VoCo-LLaMA: keeps the tokens that an image was compressed into, and what follows them.

Axes: B batch, N slots now, M slots after, K kv heads.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.kv_cache import KVGather
from ops.masks import SUMMARY, around_summaries
from ops.primitives.kv_select import keep_best
from ops.primitives.select import rank_of
from ops.reducers.base import CacheReducer
from ops.rope import sequence_index
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class VoCo(CacheReducer):
  """Keeps the entries from the first summary token on, which nothing later looks behind.

  VoCo-LLaMA (Ye et al., 2024), Sec. 3, arXiv:2406.12275, as released, for a language model with
  mask='summary'. With `keep` at least the ids of a prompt, decoding is that over the whole cache,
  whose other entries are hidden; fewer keep the latest, and so does a row without summary tokens.
  """

  needs = frozenset({'keys'})

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVGather:
    if SUMMARY in tokens.stats:
      before, _ = around_summaries(sequence_index(tokens.pos), tokens.real & tokens.stats[SUMMARY])
      tokens = tokens.replace(valid=tokens.real & ~before)
    # Chosen once: all heads keep the same entries, the later the sooner.
    later = rank_of(tokens.real).astype(jnp.float32)[:, None]
    chosen = keep_best(tokens, later, num_slots=num_slots, order='slot')
    heads = signals.keys.shape[2]
    return jax.tree.map(lambda x: jnp.repeat(x, heads, axis=1), chosen)
