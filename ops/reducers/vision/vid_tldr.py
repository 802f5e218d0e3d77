"""vid-TLDR: merges in early layers, and background tokens count less in the mean.

Axes: B batch, N slots now, M slots after, R query rows of a chunk, C chunks, H heads, d features a
head.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops import attention
from ops.assignments import Assignment, Merge
from ops.moves.rows import take
from ops.primitives.match import bipartite, parity_order
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, key_bias

Array = jax.Array
ROWS = 32  # Query rows of attention held at a time.


@dataclasses.dataclass(frozen=True)
class VidTLDR(Reducer):
  """Merges the most similar pairs of even and odd tokens, the even token weighted by saliency.

  vid-TLDR (Choi et al., 2024), Sec. 3, arXiv:2403.13347, as released. A token whose attention is
  spread evenly is background: saliency is the negative entropy of its row of attention (mean over
  heads, without a bias for size), zero below the mean over the tokens and rising to 1. The even
  slot of a merged pair counts saliency times its size, in the mean and in the size that is left, so
  sizes no longer count tokens. At most half of the free tokens go at once. The release protects
  nothing; here protected tokens lead and stay, then the even slots left, then the odd ones.
  """

  needs = frozenset({'queries', 'keys'})
  proportional = True
  drops = 'a token merged away counts only as far as it is salient'
  merges = True

  def min_slots(self, slots: int, protected: int) -> int:
    return slots - (slots - protected) // 2

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    entropy = negative_entropy(signals.queries, signals.keys,
                               bias=key_bias(tokens, proportional=False))
    salient = jax.lax.stop_gradient(saliency(entropy, tokens.free))
    order = parity_order(tokens)
    merge = bipartite(tokens, tokens.x, order[:, ::2], order[:, 1::2], num_slots=num_slots,
                      order='given')
    anchor = take(merge.src, jnp.minimum(merge.dst, num_slots - 1))
    own = jnp.arange(tokens.slots, dtype=jnp.int32)[None]
    size_weights = jnp.where(tokens.free & (anchor != own), salient, 1.0)
    mean = Merge.mean(merge.src, merge.dst, size_weights * tokens.sizes, valid=merge.valid)
    return mean.replace(size_weights=size_weights)


def negative_entropy(queries: Array, keys: Array, *, bias: Array | None) -> Array:
  """float[B, N, H, d], twice -> float32[B, N]: sum of a log a over each row of mean attention.

  Rows are taken a few at a time: the largest buffer is float32[B, H, R, N].
  """
  batch, slots = queries.shape[:2]
  rows = min(ROWS, slots)
  padded = jnp.pad(queries, ((0, 0), (0, -slots % rows), (0, 0), (0, 0)))
  chunks = padded.reshape(batch, -1, rows, *queries.shape[2:]).swapaxes(0, 1)

  def of(chunk: Array) -> Array:
    mean = attention.rows(chunk, keys, None, bias=bias).mean(axis=1)
    return jnp.sum(mean * jnp.log(jnp.maximum(mean, jnp.finfo(jnp.float32).tiny)), axis=2)

  entropy = jax.lax.map(of, jax.lax.stop_gradient(chunks))
  return entropy.swapaxes(0, 1).reshape(batch, -1)[:, :slots]


def saliency(entropy: Array, among: Array) -> Array:
  """Measures how far each token lies above the mean, float32[B, N] from 0 to 1 (the largest).

  All are zero where all are equal.

  Args:
    entropy: float32[B, N], negative entropies.
    among: bool[B, N], the tokens that count.
  """
  count = jnp.maximum(jnp.sum(among, axis=1, keepdims=True), 1)
  mean = jnp.sum(jnp.where(among, entropy, 0.0), axis=1, keepdims=True) / count
  above = jnp.where(among, jnp.maximum(entropy - mean, 0.0), 0.0)
  return above / jnp.maximum(jnp.max(above, axis=1, keepdims=True), 1e-12)
