"""STILL's selection: keeps the entries whose tokens attend to themselves.

Axes: B batch, N entries now, M entries after, H heads, K kv heads, W window, d features a head.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ops.moves.rows import take
from ops.reducers.scoring import ScoringReducer
from ops.rope import sequence_index
from ops.signals import Signals, latest
from ops.tokens import TokenSet
from ops.values import Count, Positive

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class STILL(ScoringReducer):
  """Keeps the entries whose removal from their own windows would change attention most, by head.

  The Self-Saliency Score of STILL (Meng et al., 2026), arXiv:2602.02180, from the paper's text:
  each token attends to the last W before it, with itself and without; its saliency is the
  divergence between the two, in which what is not there has a share of `epsilon`. So only the share
  p that a token keeps for itself counts: (1 - p) log(1 - p) + p log((p + epsilon) / epsilon), a
  mean over the heads that share a key. The paper keeps softmax attention to salient tokens and sums
  up the others by linear attention, which is trained, and not here: they leave the cache.

  Attributes:
    window: W.
    epsilon: of a share that is not there.
  """

  window: Count = 64
  epsilon: Positive = 1e-6
  reconstructed = "the paper's text"
  needs = frozenset({'keys', 'queries'})

  def scores(self, tokens: TokenSet, signals: Signals) -> Array:
    """float32[B, K, N], how much of its own window each token is."""
    order = latest(sequence_index(tokens.pos), tokens.valid, tokens.kind.shape)
    queries, keys = (take(x, order).astype(jnp.float32) for x in (signals.queries, signals.keys))
    real, heads = take(tokens.real, order), keys.shape[2]
    queries = queries.reshape(*order.shape, heads, -1, keys.shape[3])
    scale = keys.shape[3] ** -0.5
    own = jnp.einsum('bnkgd,bnkd->bnkg', queries, keys, precision='highest') * scale

    def further(back: Array, total: Array) -> Array:
      """Adds the key of the token `back` slots before each to log-sum-exps."""
      before = jnp.roll(keys, back, axis=1)
      there = real & jnp.roll(real, back, axis=1) & (jnp.arange(order.shape[1])[None] >= back)
      logits = jnp.einsum('bnkgd,bnkd->bnkg', queries, before, precision='highest') * scale
      return jnp.where(there[:, :, None, None], jnp.logaddexp(total, logits), total)

    total = jax.lax.fori_loop(1, min(self.window, order.shape[1]), further, own)
    share = jnp.exp(own - total)
    rest = jnp.maximum(-jnp.expm1(own - total), 1e-30)
    saliency = rest * jnp.log(rest) + share * jnp.log((share + self.epsilon) / self.epsilon)
    back = jnp.argsort(order, axis=1)
    return jnp.moveaxis(take(saliency.mean(axis=3), back), 2, 1)
