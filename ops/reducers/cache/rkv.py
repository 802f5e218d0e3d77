"""R-KV: keeps the cache entries that are attended to and that no later one repeats.

Axes: B batch, N entries now, W latest queries, H heads, K kv heads, G heads that share one, d
features a head.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.attention import HIDDEN_LOGIT
from ops.primitives.kv_select import by_kv_head, latest, pool_neighbours
from ops.reducers.scoring import ScoringReducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, Share

Array = jax.Array
# Rows of the map of similarities that are formed at a time.
_ROWS = 64


@dataclasses.dataclass(frozen=True)
class RKV(ScoringReducer):
  """Keeps the latest entries, and of the others the important ones that are not redundant.

  R-KV (Cai et al., 2025), Sec. 3, arXiv:2505.24133, as released: `mix` times the attention of the
  latest queries (the largest logit of the heads that share a key, pooled over neighbours), less
  1 - `mix` times the softmax of a key's mean cosine to all keys, of which each leaves out the last
  key that is like it (the first key of all where none is). It is asked every so many tokens while a
  model decodes (`capacity` in the config). The release pools and takes the last in the order in
  which it left the entries; here their order is that of the tokens, whatever was evicted.

  Attributes:
    every: tokens between two evictions.
    window: W, latest entries, which always stay.
    kernel: neighbouring entries that are pooled, an odd number.
    mix: share of attention in the score.
    threshold: cosine above which keys are alike.
  """

  every: Count = 128
  window: Count = 8
  kernel: Count = 7
  mix: Share = 0.1
  threshold: Share = 0.5
  needs = frozenset({'keys', 'window_queries'})

  def __post_init__(self) -> None:
    if self.kernel % 2 == 0:
      raise ValueError(f'kernel={self.kernel} must be odd: an entry has as many neighbours before '
                       'it as behind it')

  @property
  def span(self) -> int:
    return self.window

  def forced(self, tokens: TokenSet, num_slots: int) -> Array:
    """Names the window."""
    del num_slots
    return latest(tokens, self.window)

  def scores(self, tokens: TokenSet, signals: Signals) -> Array:
    """float32[B, K, N], importance less redundancy."""
    keys = jnp.swapaxes(signals.keys, 1, 2).astype(jnp.float32)
    return self.mix * self._importance(tokens, signals.window_queries, keys) - (
        1 - self.mix) * self._redundancy(tokens.real, keys)

  def min_slots(self, slots: int, protected: int) -> int:
    del protected
    return min(slots, self.window + 1)

  def _importance(self, tokens: TokenSet, queries: Array, keys: Array) -> Array:
    """float32[B, K, N], mean attention of the latest queries to all before them, pooled."""
    queries = by_kv_head(jnp.swapaxes(queries, 1, 2).astype(jnp.float32), keys.shape[1])
    logits = jnp.einsum('bkgwd,bknd->bkgwn', queries, keys, precision='highest').max(axis=2)
    before = (tokens.real & ~latest(tokens, self.window))[:, None]
    # A row has fewer queries than W where it has fewer tokens; the first ones are then empty.
    there = jnp.sum(tokens.real, axis=1)[:, None] > jnp.arange(queries.shape[3])[None, ::-1]
    weights = jax.nn.softmax(jnp.where(before[:, :, None], logits * keys.shape[3] ** -0.5,
                                       HIDDEN_LOGIT), axis=3)
    weights = jnp.where(there[:, None, :, None] & before[:, :, None], weights, 0.0).sum(axis=2)
    weights /= jnp.maximum(jnp.sum(there, axis=1), 1)[:, None, None]
    return pool_neighbours(weights, tokens, kernel=self.kernel, pool='max')

  def _redundancy(self, real: Array, keys: Array) -> Array:
    """float32[B, K, N], softmax of the mean cosine to other keys."""
    slots = keys.shape[2]
    units = keys / (jnp.sqrt(jnp.sum(keys * keys, axis=3, keepdims=True)) + 1e-8)
    units = jnp.where(real[:, None, :, None], units, 0.0)
    iota, first = jnp.arange(slots)[None, None, None], jnp.argmax(real, axis=1)[:, None, None]

    def add(part: Array) -> Array:
      """Sums the cosines of some keys, int[R], to all: [B, K, N]."""
      cosine = jnp.einsum('bkrd,bknd->bkrn', units[:, :, part], units, precision='highest')
      cosine = jnp.where(part[None, None, :, None] == iota, 0.0, cosine)
      like = jnp.where(cosine > self.threshold, iota, -1).max(axis=3)
      like = jnp.where(like < 0, first, like)
      return jnp.where(iota == like[..., None], 0.0, cosine).sum(axis=2)

    whole = slots - slots % _ROWS
    total = jnp.zeros(keys.shape[:3])
    if whole:
      total, _ = jax.lax.scan(lambda total, part: (total + add(part), None), total,
                              jnp.arange(whole).reshape(-1, _ROWS))
    if whole < slots:
      total += add(jnp.arange(whole, slots))
    real = real[:, None]
    mean = total / jnp.maximum(jnp.sum(real, axis=2, keepdims=True), 1)
    return jax.nn.softmax(jnp.where(real, mean, HIDDEN_LOGIT), axis=2)
