"""MCTF: merges tokens that are similar, uninformative and small.

Axes: B batch, N slots now, M slots after, A and C the even and the odd slots, H heads.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.argmax import max_and_index
from ops.assignments import Assignment, Merge
from ops.moves.rows import put, take
from ops.primitives.match import cosine, join, num_excess, parity_order
from ops.primitives.select import ranks, top
from ops.reducers.base import Checked, Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import OneOf

Array = jax.Array
DIRECTIONS = ('both', 'one')
POOLINGS = ('attention', 'size', 'mean', 'max')
ATTENTIONS = ('received_attention', 'next_received_attention')
# Stands for zero under a logarithm or in a weight; its square is still a float32.
TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class MCTF(Checked, Reducer):
  """Merges pairs of even and odd tokens by similarity, information and size.

  Multi-criteria Token Fusion (Lee et al., 2024), Sec. 3, arXiv:2403.10030, as released. A pair
  scores cos^(1/tau_sim) (cos mapped to [0, 1]) times, for information and size, the product of the
  inverses of received attention and of size to the power 1/tau. At most half of the free tokens go
  at once, and ten always stay. Protected tokens lead; then the even slots left, in slot order where
  something is protected, else best first; then the odd slots left, best first ('one': slot order).

  Inside attention the map shrinks with the tokens: one-step-ahead attention. The release's other
  forms: one attends again after the merge (site='before' with 'next_received_attention'), one does
  not look ahead (site='after').

  Attributes:
    tau_sim, tau_info, tau_size: temperatures of the three criteria; 0 switches one off.
    direction: 'both' merges half of the pairs from even to odd, the rest back; 'one' even to odd.
    pooling: weights of the mean: 'attention' received times size, 'size', or 'mean' for equal ones;
      'max' takes the elementwise maximum instead.
    attention: the signal that tells how informative a token is.
  """

  tau_sim: float = 1.0
  tau_info: float = 20.0
  tau_size: float = 40.0
  direction: Annotated[str, OneOf(DIRECTIONS)] = 'both'
  pooling: Annotated[str, OneOf(POOLINGS)] = 'attention'
  attention: Annotated[str, OneOf(ATTENTIONS)] = 'received_attention'
  site = 'inside'
  proportional = True

  def __post_init__(self) -> None:
    super().__post_init__()
    for field in ('tau_sim', 'tau_info', 'tau_size'):
      if getattr(self, field) < 0:
        raise ValueError(f'{field}={getattr(self, field)} must be positive, or 0 for off')

  @property
  def needs(self) -> frozenset[str]:
    return frozenset({self.attention})

  def min_slots(self, slots: int, protected: int) -> int:
    return max(slots - (slots - protected) // 2, min(slots, 10))

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    received = jax.lax.stop_gradient(getattr(signals, self.attention).mean(axis=1))
    order = parity_order(tokens)
    a, b = order[:, ::2], order[:, 1::2]
    scores = self._scores(tokens, received, a, b)
    removed = num_excess(tokens, num_slots)

    best, index = max_and_index(scores, axis=2)
    rank_a = _rank(best, take(tokens.free, a))
    source_a = rank_a < (removed // 2 if self.direction == 'both' else removed)
    source_a &= best > -jnp.inf
    match_a = take(b, index)
    back = jnp.where(source_a[:, :, None], -jnp.inf, scores)
    best, index = max_and_index(back, axis=1)
    rank_b = _rank(best, take(tokens.free, b))
    source_b = rank_b < removed - jnp.sum(source_a, axis=1, keepdims=True)
    source_b &= (best > -jnp.inf) & (self.direction == 'both')
    match_b = take(a, index)

    own = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), order.shape)
    # An odd slot that moves on takes along the even slots that joined it.
    partner = put(own, b, jnp.where(source_b, match_b, b))
    partner = put(partner, a, jnp.where(source_a, take(partner, match_a), a))
    turn = put(own, a, own[:, :a.shape[1]] if tokens.protected else rank_a)
    last = rank_b if self.direction == 'both' else own[:, :b.shape[1]]
    merge = join(tokens, partner, put(turn, b, tokens.slots + last), num_slots=num_slots)

    if self.pooling == 'max':
      return merge.replace(op='max')
    weight = {'attention': jnp.maximum(received * tokens.sizes, TINY), 'size': tokens.sizes,
              'mean': jnp.ones_like(tokens.sizes)}[self.pooling]
    return Merge.mean(merge.src, merge.dst, jnp.where(tokens.real, weight, 0.0),
                      valid=merge.valid)

  def _scores(self, tokens: TokenSet, received: Array, a: Array, b: Array) -> Array:
    """float32[B, A, C], -inf where a pair may not merge.

    The logarithm of the product: the same order, and no overflow where hardly anything is received.
    """

    def log(values: Array, tau: float) -> Array:
      return jnp.log(jnp.maximum(values, TINY)) / tau if tau else jnp.zeros_like(values)

    x = jax.lax.stop_gradient(tokens.x)
    single = -log(received, self.tau_info) - log(tokens.sizes, self.tau_size)
    scores = log((cosine(take(x, a), take(x, b)) + 1) / 2, self.tau_sim)
    scores += take(single, a)[:, :, None] + take(single, b)[:, None]
    allowed = take(tokens.free, a)[:, :, None] & take(tokens.free, b)[:, None]
    return jnp.where(allowed, scores, -jnp.inf)


def _rank(best: Array, free: Array) -> Array:
  """Ranks slots, the best first, int32[B, A]."""
  return ranks(top(best, best.shape[1], excluded=~free), best.shape[1])
