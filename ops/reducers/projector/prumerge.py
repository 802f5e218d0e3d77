"""PruMerge: keeps attended tokens, adds similar ones, and makes one more token of the rest.

Axes: B batch, N slots now, M slots after, H heads, d features a head.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment, Mix, take
from ops.primitives.match import cosine
from ops.primitives.queries import whole_attention
from ops.primitives.select import ranks, top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, filled, num_left
from ops.values import Count

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PruMerge(Reducer):
  """Keeps the tokens with the highest [CLS] attention, each with similar tokens added to it.

  LLaVA-PruMerge (Shang et al., 2024), arXiv:2403.15388, as released, with a count that is given
  in place of that of outliers. Attention is one softmax over all heads at once; a token adds to
  those that it is most like, kept or not, in proportion to its attention; what is not kept also
  adds up to one token more, which stands last. Nothing is normalised again. The release compares
  the last layer's queries and keys and reduces the features before that layer; here both are of
  the layer at hand.

  Attributes:
    neighbours: how many tokens, by cosine of the keys, each one that is kept takes in.
  """

  neighbours: Count = 32
  # The first is not read: a host that offers it has a [CLS].
  needs = frozenset({'cls_attention', 'queries', 'keys'})
  site = 'after'
  extra_slots = 1

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    slots = tokens.slots
    queries, keys = (x.astype(jnp.float32).reshape(*x.shape[:2], -1)
                     for x in (signals.queries, signals.keys))
    scores = whole_attention(tokens, queries, keys)
    order = top(scores, num_slots, forced=tokens.fixed, excluded=~tokens.real)
    left = num_left(tokens, num_slots)
    enough = jnp.sum(tokens.real, axis=1, keepdims=True) <= left
    kept = (jnp.arange(num_slots)[None] < left - 1) | enough
    rows = kept[:, :, None] & (order[:, :, None] == jnp.arange(slots)[None, None])
    weights = rows.astype(jnp.float32)

    refined = kept & take(tokens.free, order) & ~enough
    alike = cosine(take(keys, order), keys)
    alike = jnp.where(tokens.free[:, None] & ~rows, alike, -jnp.inf)
    count = min(self.neighbours, slots - 1)
    closest = jax.lax.top_k(jax.lax.stop_gradient(alike), count)[1].astype(jnp.int32)
    near = ranks(closest.reshape(-1, count), slots).reshape(alike.shape) < count
    near &= (alike > -jnp.inf) & refined[:, :, None]
    rest = tokens.free & (ranks(order, slots) >= left - 1) & ~enough
    last = (jnp.arange(num_slots)[None] == left - 1)[:, :, None]
    weights += jnp.where(near | (last & rest[:, None]), scores[:, None], 0.0)
    valid = filled(tokens, num_slots)
    if valid is None and tokens.valid is not None:
      valid = take(tokens.valid, order)
    return Mix(weights, valid=valid)
