"""Expected attention: scores cache entries by the attention that future queries will likely pay.

Axes: B batch, N entries now, M entries after, H heads, K kv heads, G heads that share one, d
features a head, F coming positions.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.attention import HIDDEN_LOGIT
from ops.primitives.kv_select import by_kv_head, earliest
from ops.reducers.base import Checked
from ops.reducers.scoring import ScoringReducer
from ops.rope import Rope, sequence_index
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, CountOrZero, NotNegative, OneOf

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ExpectedAttention(Checked, ScoringReducer):
  """Keeps the entries with the highest expected attention times value norm.

  Expected Attention (Devoto et al., 2025), arXiv:2510.00636, as in the kvpress library. Queries
  to come are taken to be normal, with the mean and covariance of the prompt's before rotation,
  turned by the mean rotation of the next positions; a key then expects exp of its mean logit plus
  half of its variance.

  Attributes:
    future: F, coming positions.
    sinks: first entries, which always stay and which the statistics leave out.
    covariance: 'full', or 'none' for the mean alone.
    epsilon: added to the attention before it is weighed by values.
    weigh: 'value_norm', or 'none' for the attention alone.
  """

  future: Count = 512
  sinks: CountOrZero = 4
  covariance: Annotated[str, OneOf(('full', 'none'))] = 'full'
  epsilon: NotNegative = 0.0
  weigh: Annotated[str, OneOf(('value_norm', 'none'))] = 'value_norm'
  needs = frozenset({'keys', 'values', 'plain_queries', 'rope'})

  def forced(self, tokens: TokenSet, num_slots: int) -> Array:
    """Names the sinks."""
    del num_slots
    return earliest(tokens, self.sinks)

  def scores(self, tokens: TokenSet, signals: Signals) -> Array:
    """float32[B, K, N], expected attention, times the length of the value."""
    keys, values, queries = (x.astype(jnp.float32) for x in (
        signals.keys, signals.values, signals.plain_queries))
    heads, width = keys.shape[2:]
    counts = tokens.real & ~earliest(tokens, self.sinks)
    share = counts / jnp.maximum(jnp.sum(counts, axis=1, keepdims=True, dtype=jnp.float32), 1.0)
    mean = jnp.einsum('bn,bnhd->bhd', share, queries, precision='highest')
    after = jnp.max(jnp.where(tokens.real, sequence_index(tokens.pos), -1), axis=1) + 1
    turn = mean_rotation(signals.rope, after, self.future)
    ahead = by_kv_head(jnp.einsum('bij,bhj->bhi', turn, mean, precision='highest'), heads)
    logits = jnp.einsum('bkgd,bnkd->bkgn', ahead, keys, precision='highest') / width ** 0.5
    if self.covariance == 'full':
      centred = jnp.where(counts[..., None, None], queries - mean[:, None], 0.0)
      spread = jnp.einsum('bn,bnhi,bnhj->bhij', share, centred, centred, precision='highest')
      spread = jnp.einsum('bij,bhjk,blk->bhil', turn, spread, turn, precision='highest')
      logits += jnp.einsum('bnki,bkgij,bnkj->bkgn', keys, by_kv_head(spread, heads), keys,
                           precision='highest') / (2 * width)
    logits = jnp.where(counts[:, None, None], logits, HIDDEN_LOGIT)
    expected = jax.nn.softmax(logits, axis=3).mean(axis=2)
    if self.weigh == 'none':
      return expected
    return (expected + self.epsilon) * jnp.sqrt(jnp.sum(values * values, axis=3)).swapaxes(1, 2)

  def min_slots(self, slots: int, protected: int) -> int:
    del protected
    return min(slots, self.sinks + 1)


def mean_rotation(rope: Rope, first: Array, count: int) -> Array:
  """Averages the rotations of `count` positions from int32[B] on: float32[B, d, d].

  With several numbers a position, as text has them: all equal.
  """
  pos = first[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
  if rope.sections:
    pos = jnp.repeat(pos[..., None], 1 + len(rope.sections), axis=2)

  # A vector of ones in the first half and zeros in the second turns into cosines and sines.
  ones = jnp.concatenate([jnp.ones(rope.width // 2), jnp.zeros(rope.width // 2)])
  turned = rope.rotate(jnp.broadcast_to(ones, (*pos.shape[:2], 1, rope.width)), pos)
  cos, sin = (jax.vmap(jnp.diag)(half) for half in jnp.split(turned.mean(axis=1)[:, 0], 2, axis=1))
  return jnp.concatenate([jnp.concatenate([cos, -sin], axis=2),
                          jnp.concatenate([sin, cos], axis=2)], axis=1)
