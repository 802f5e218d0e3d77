"""DART: a few pivots, and the tokens that are least like each of them.

Axes: B batch, N slots now, P pivots, D features, K kv heads, d features a head.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.moves.rows import put, take
from ops.primitives.match import l2_normalize
from ops.primitives.queries import text_after_images
from ops.primitives.select import keep_top, ranks, top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, count, num_kept
from ops.values import Count, CountOrZero

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DART(Reducer):
  """Keeps the tokens with the longest keys, and for each of them those that are least like it.

  DART (Wen et al., 2025), arXiv:2502.11494, as released: pivots are the tokens, and the words after
  the image, whose keys of the layer before the cut have the largest L1 norm over all heads. One
  pivot after another takes as many tokens that are left, by the smallest cosine of features. The
  release goes through its pivots in the order of a hash table, of which the answer depends: here
  the tokens' own go first, then the words, the largest norm first; what does not divide evenly goes
  to the first of them. It compares features after the norm behind the last layer; here they are
  compared as they are, without that norm's weights. Its cut stands before layer 2.

  Attributes:
    image: pivots among the tokens.
    text: pivots among the words after the image, as far as there are any.
  """

  image: Count = 4
  text: CountOrZero = 4
  needs = frozenset({'keys'})
  site = 'before'
  positions = 'keep'
  drops = 'pruning drops tokens'
  can_empty = True

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    kept = num_kept(tokens, num_slots)
    norms = jnp.sum(jnp.abs(signals.keys.astype(jnp.float32)), axis=(2, 3))
    pivots, there = [], []
    for asked, among, most in ((self.image, tokens.free, kept),
                               (self.text, text_after_images(tokens), tokens.slots)):
      asked = min(asked, tokens.slots)
      pivots.append(top(norms, asked, excluded=~among))
      there.append(jnp.arange(asked)[None] < jnp.minimum(count(among), most))
    own, at, real = pivots[0], *(jnp.concatenate(both, axis=1) for both in (pivots, there))
    # Tokens that each pivot takes: their sum is what is left of the budget.
    rest = kept - count(there[0])
    order, number = jnp.cumsum(real, axis=1) - 1, jnp.maximum(count(real), 1)
    takes = jnp.where(real, rest // number + (order < rest % number), 0)
    taken = put(jnp.zeros(tokens.kind.shape, bool), jnp.where(there[0], own, tokens.slots),
                    there[0])
    vectors = jax.lax.stop_gradient(l2_normalize(tokens.x))

    def step(number: Array, taken: Array) -> Array:
      pivot = take(vectors, jax.lax.dynamic_slice_in_dim(at, number, 1, axis=1))[:, 0]
      alike = jnp.einsum('bd,bnd->bn', pivot, vectors, precision='highest')
      place = ranks(top(-alike, tokens.slots, excluded=taken | ~tokens.free), tokens.slots)
      return taken | (place < jax.lax.dynamic_slice_in_dim(takes, number, 1, axis=1))

    taken = jax.lax.fori_loop(0, at.shape[1], step, taken)
    return keep_top(tokens, taken.astype(jnp.float32), num_slots=num_slots)
