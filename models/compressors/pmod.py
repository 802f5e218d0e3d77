"""p-MoD: a router lets fewer and fewer visual tokens run the layers of a language model.

Axes: B batch, N slots, M slots that run the layer, D features.
"""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.moves.rows import take
from ops.primitives.select import keep_top
from ops.reducers.base import BranchReducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import NotNegative, Positive


class PMoD(BranchReducer, nn.Module):
  """Lets the tokens with the highest score of a learned router run a layer.

  p-MoD (Zhang et al., 2024), arXiv:2412.04449, as released. The score of a token is linear in its
  features as they enter the layer; its weight is 1 + scale tanh(score). What the MLP adds to a
  token is multiplied with its weight, and so are the features of a token that skips the layer.
  Tokens that may not be touched run every layer with a weight of 1. A decoded token runs them all.
  Without a budget in a config, layer l of L keeps cos(pi l / (L - 1)) / 2 + mean of the tokens, at
  least `floor`, and all where that is more than `ceiling`. The release divides by 31
  whatever the depth; its models have 32 layers.

  Attributes:
    scale: of the weights' distance from 1.
    mean, floor, ceiling: of the schedule.
  """

  scale: NotNegative = 0.2
  mean: Positive = 0.5
  floor: Positive = 0.15
  ceiling: Positive = 0.85
  gated = 'mlp'
  positions = 'keep'

  @nn.compact
  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    # All weights are 1 until the router has learned something.
    scores = nn.Dense(1, dtype=jnp.float32, kernel_init=nn.initializers.zeros, name='router')(
        tokens.x)[..., 0]
    weight = 1 + self.scale * jnp.tanh(scores)
    weight = jnp.where(tokens.free, weight, 1.0)
    picked = keep_top(tokens, weight, num_slots=num_slots)
    return picked.replace(gate=take(weight, picked.src), skip_scale=weight)

  def default_shares(self, depth: int) -> Mapping[int, float]:
    """Returns the share of tokens by layer."""
    shares = {layer: math.cos(math.pi * layer / max(depth - 1, 1)) / 2 + self.mean
              for layer in range(depth)}
    return {layer: max(share, self.floor) for layer, share in shares.items()
            if share <= self.ceiling}
