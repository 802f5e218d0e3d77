"""Compression by explanations: a small network predicts how relevant each visual token will be.

Axes: B batch, N slots now, H heads.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.moves.rows import take
from ops.primitives.queries import text_after_images
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, count
from ops.values import Count, NotNegative, Width

Array = jax.Array


class Explained(Reducer, nn.Module):
  """Keeps the tokens that a small network expects to be relevant to the answer.

  Generic Token Compression in Multimodal Large Language Models from an Explainability Perspective
  (Lei et al., 2025), arXiv:2506.01097, of which the abstract was read, and no code is known. A
  network of convolutions predicts what `relevance_rank` reads from what the words behind the image
  pay each token in the first layer: give layer 0, so that tokens leave before the language model
  has run. The order of tokens as the network's only axis, and as its input the share of a token's
  attention in the image's, times how many tokens there are, are this project's.

  Sows the loss 'relevance', float32[B], in training, where tokens have the stat 'relevance'
  (lib/report/relevance.py): the weighted divergence of the network's softmax from the relevance as
  shares of a row. It needs no gradient of the language model: `tools.fit` trains the network alone.

  Attributes:
    width: of the network's hidden features.
    kernel: neighbouring tokens that a convolution reads.
    layers: of the network, its last one included.
    weight: of the loss.
  """

  width: Width = 32
  kernel: Count = 3
  layers: Count = 3
  weight: NotNegative = 1.0
  reconstructed = 'the abstract'
  needs = frozenset({'next_row_attention'})
  site = 'before'
  positions = 'keep'
  drops = 'pruning drops tokens'
  can_empty = True

  def rows(self, tokens: TokenSet) -> Array:
    """bool[B, N], text after the last visual token."""
    return text_after_images(tokens)

  @nn.compact
  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    # Neighbours are neighbours whatever stands between them.
    order = jnp.argsort(~tokens.free, axis=1, stable=True)
    there = take(tokens.free, order)[..., None]
    paid = jnp.where(there, take(jnp.swapaxes(signals.next_row_attention, 1, 2), order), 0.0)
    total = jnp.sum(paid, axis=1, keepdims=True)
    x = paid * count(tokens.free)[..., None] / jnp.where(total > 0, total, 1.0)
    x = jnp.log1p(jax.lax.stop_gradient(x))
    for layer in range(self.layers):
      width = self.width if layer + 1 < self.layers else 1
      x = jnp.where(there, nn.Conv(width, (self.kernel,), name=f'conv{layer + 1}')(
          nn.gelu(x) if layer else x), 0.0)
    scores = take(x[..., 0], jnp.argsort(order, axis=1))
    if 'relevance' in tokens.stats and self.has_rng('dropout'):
      missed = divergence(scores, tokens.stats['relevance'], tokens.free)
      self.sow('losses', 'relevance', self.weight * missed)
    return keep_top(tokens, scores, num_slots=num_slots)


def divergence(scores: Array, relevance: Array, among: Array) -> Array:
  """Returns the Kullback-Leibler divergence of a softmax from shares of relevance, float32[B].

  Args:
    scores: float32[B, N].
    relevance: float32[B, N], not negative; a row without any has a divergence of 0.
    among: bool[B, N], the tokens that count.
  """
  target = jnp.where(among, relevance, 0.0).astype(jnp.float32)
  total = jnp.sum(target, axis=1, keepdims=True)
  target /= jnp.where(total > 0, total, 1.0)
  predicted = jax.nn.log_softmax(jnp.where(among, scores, -1e9), axis=1)
  entropy = jax.scipy.special.xlogy(target, target)
  return jnp.sum(entropy - target * predicted, axis=1)
