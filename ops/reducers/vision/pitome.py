"""PiToMe: merges tokens with many similar tokens, and leaves rare ones alone.

Axes: B batch, N slots now, M slots after, H heads, d features a head.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.assignments import Assignment, Merge
from ops.moves.rows import put, take
from ops.primitives.match import bipartite, cosine, join, nearest, num_excess
from ops.primitives.select import ranks, top
from ops.reducers.base import Checked, Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import OneOf

Array = jax.Array
PAIRINGS = ('deit', 'mae', 'energy', 'bipartite', 'text')


@dataclasses.dataclass(frozen=True)
class PiToMe(Checked, Reducer):
  """Merges the tokens of highest energy (with the most similar tokens) by size-weighted mean.

  Accelerating Transformers with Spectrum-Preserving Token Merging (Tran et al., 2024), Sec. 3,
  arXiv:2405.16148, as released. At most half of the free tokens can go at once. Keys are compared,
  averaged over heads, all with all: float32[B, N, N] once a cut.

  Attributes:
    pairing: the rule that pairs tokens.
      'energy': of the 2 r tokens of highest energy, every second one merges into the others; the
        paper's algorithm.
      'bipartite': of all tokens in order of energy, every second one may merge into the others,
        and the r most similar pairs do.
      'text': the r tokens of highest energy merge into the next r; energy is a Gaussian of the
        distance.
      'deit': 'bipartite' in the first half of the layers, then 'energy'; 'mae': the reverse.
    margin: similarity above which a token adds to another's energy, at layer 0.
    last_margin: what it falls to, linearly, one layer after the last.
    proportional: whether attention counts a slot as often as it has tokens.
  """

  pairing: Annotated[str, OneOf(PAIRINGS)] = 'deit'
  margin: float = 0.75
  last_margin: float = 0.0
  proportional: bool = False
  needs = frozenset({'keys', 'layer', 'depth'})

  def min_slots(self, slots: int, protected: int) -> int:
    return slots - (slots - protected) // 2

  def pairing_at(self, layer: int, depth: int) -> str:
    """Returns the pairing of one of `depth` layers: 'energy', 'bipartite' or 'text'."""
    if self.pairing not in ('deit', 'mae'):
      return self.pairing
    early = 2 * layer < depth
    return 'bipartite' if early == (self.pairing == 'deit') else 'energy'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    pairing = self.pairing_at(signals.layer, signals.depth)
    metric = signals.keys.astype(jnp.float32).mean(axis=2)
    margin = self.margin + (self.last_margin - self.margin) * signals.layer / signals.depth
    similarity = cosine(metric, metric)
    energy = (gaussian_energy if pairing == 'text' else elu_energy)(similarity, tokens.free, margin)
    order = top(energy, tokens.slots, excluded=~tokens.free)
    if pairing == 'bipartite':
      return bipartite(tokens, metric, order[:, ::2], order[:, 1::2], num_slots=num_slots,
                       order='score')
    return _pairs(tokens, metric, order, pairing, num_slots)


def elu_energy(similarity: Array, free: Array, margin: float) -> Array:
  """Averages the similarity above the margin over the free tokens, float32[B, N]."""
  return _mean(jax.nn.elu(similarity - margin), free)


def gaussian_energy(similarity: Array, free: Array, margin: float) -> Array:
  """float32[B, N]: mean density of a Gaussian of deviation 1 - margin around similarity 1."""
  deviation = 1 - margin
  peak = 1 / (deviation * math.sqrt(2 * math.pi))
  return _mean(peak * jnp.exp(-0.5 * ((1 - similarity) / deviation) ** 2), free)


def _mean(values: Array, free: Array) -> Array:
  total = jnp.sum(jnp.where(free[:, None], values, 0.0), axis=2)
  return total / jnp.maximum(jnp.sum(free, axis=1, keepdims=True), 1)


def _pairs(tokens: TokenSet, metric: Array, order: Array, pairing: str, num_slots: int) -> Merge:
  """Merges r of the 2 r first slots in the order into the others."""
  number = jnp.arange(max(tokens.slots - num_slots, 1), dtype=jnp.int32)[None]
  removed = num_excess(tokens, num_slots)
  first, second = (number, number + removed) if pairing == 'text' else (2 * number, 2 * number + 1)
  a, b = (take(order, jnp.broadcast_to(jnp.minimum(i, tokens.slots - 1),
                                       (len(order), number.size))) for i in (first, second))
  use = number < removed
  _, match = nearest(metric, a, b, use_a=use, use_b=use)
  own = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), order.shape)
  partner = put(own, a, jnp.where(use, match, a))
  rank = ranks(order, tokens.slots)
  turn = jnp.where(rank < 2 * removed, tokens.slots + rank, rank)
  return join(tokens, partner, turn, num_slots=num_slots)
