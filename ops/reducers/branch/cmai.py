"""CMAI: words see less of what they, and the words that they look at, do not look at.

Axes: B batch, N slots, R other slots than those of images, H heads, K kv heads, d features a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct

from ops import attention
from ops.assignments import Gather
from ops.kernels.fused import LOWEST_BIAS
from ops.moves.rows import take
from ops.primitives.kv_select import share_of
from ops.primitives.sparse_attention import Attend, Pattern
from ops.reducers.base import BranchReducer
from ops.rope import sequence_index
from ops.signals import Signals
from ops.tokens import TEXT, VISUAL, TokenSet, key_bias
from ops.values import Share

Array = jax.Array


class Inhibition(Pattern, struct.PyTreeNode):
  """Hides keys from some queries; all others attend as ever.

  Attributes:
    rows: int32[B, R], the queries.
    hidden: bool[B, R, N], keys that each of them does not see.
  """

  rows: Array
  hidden: Array

  def attend(self, attend: Attend, q: Array, k: Array, v: Array, bias: Array | None,
             positions: Array | None, *, causal: bool, window: int | None = None) -> Array:
    """Attends as `Pattern.attend`: once for all, and again for these queries."""
    read = attend(q, k, v, bias, positions).out
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    shares = attention.rows(
        take(q, self.rows), k, None, positions=positions, window=window,
        last=take(positions, self.rows) if causal else None,
        bias=None if bias is None else jnp.maximum(bias, LOWEST_BIAS))
    shares = jnp.where(self.hidden[:, None], 0.0, shares)
    shares /= jnp.maximum(jnp.sum(shares, axis=3, keepdims=True), 1e-20)
    again = jnp.einsum('bhrn,bnhd->brhd', shares.astype(v.dtype),
                       jnp.repeat(v, q.shape[2] // v.shape[2], axis=2))
    gather = Gather(self.rows, q.shape[1])
    own = self.hidden.any(axis=2)[:, :, None, None]
    return read + gather.restore(jnp.where(own, again - take(read, self.rows), 0))


@dataclasses.dataclass(frozen=True)
class CMAI(BranchReducer):
  """Lets each word see the image tokens alone that it focuses on, together with the words it reads.

  Cross-Modality Attention Inhibition, of which the abstract alone is known here (Enhancing
  Instruction-Following Capability of Visual-Language Models by Reducing Image Redundancy): a word's
  focus on an image token is the attention that words pay it, added up by the attention that the
  word pays these words, means over heads; of each word the `share` of image tokens with the least
  focus is hidden, rounded down, and its attention divided among the rest. It goes for the prompt;
  what is decoded sees the whole cache. The other half of the paper, which condenses the image, is
  not here.

  Attributes:
    share: of the image tokens, that each word does not see.
  """

  share: Share = 0.5
  reconstructed = 'the abstract'
  parts = 'core'
  positions = 'keep'
  drops = ''
  needs = frozenset({'queries', 'keys', 'rope'})

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Inhibition:
    del num_slots
    words = tokens.real & (tokens.kind == TEXT)
    image = tokens.real & (tokens.kind == VISUAL)
    most = tokens.slots if TEXT in tokens.of else max(tokens.protected, 1)
    at = jnp.argsort(~words, axis=1, stable=True)[:, :most].astype(jnp.int32)
    there, place = take(words, at), sequence_index(tokens.pos)
    shares = jax.lax.stop_gradient(attention.rows(
        take(signals.queries, at), signals.keys, None, positions=place, last=take(place, at),
        bias=key_bias(tokens, proportional=False)).mean(axis=1))
    shares = jnp.where(there[:, :, None], shares, 0.0)
    read = jnp.take_along_axis(shares, at[:, None], axis=2)
    focus = jnp.einsum('brs,bsn->brn', jnp.where(there[:, None], read, 0.0), shares,
                       precision='highest')
    seen = image[:, None] & (place[:, None] <= take(place, at)[:, :, None])
    order = jnp.argsort(jnp.where(seen, focus, jnp.inf), axis=2, stable=True)
    rank = jnp.argsort(order, axis=2)
    least = share_of(jnp.sum(seen, axis=2, keepdims=True), self.share, tokens.slots)
    return Inhibition(at, there[:, :, None] & seen & (rank < least))

  def min_slots(self, slots: int, protected: int) -> int:
    del protected
    return slots

  def default_shares(self, depth: int) -> Mapping[int, float]:
    """Returns all layers, with all tokens."""
    return dict.fromkeys(range(depth), 1.0)
