"""γ-MoD: one router for many layers lets the tokens that it finds important run them.

Axes: B batch, N slots, M slots that run the layer, D features.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.moves.rows import take
from ops.primitives.select import keep_top
from ops.reducers.base import BranchReducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import NotNegative, Share

Array = jax.Array


class GammaMoD(BranchReducer, nn.Module):
  """Lets the tokens to which a learned router gives the most weight run a layer.

  γ-MoD (Luo et al., 2024), arXiv:2410.13859, as released. One router for all layers, linear in
  what enters a layer's attention (normed), gives a token's probability p of running it; what the
  MLP adds is multiplied with p. In training the best run, as many as the budget leaves, and tokens
  that may not be touched (the question: masked routing). In evaluation those run whose p is above
  `threshold`, as many as the budget leaves at most: give a keep_ratio of 1 to let the threshold
  alone decide. Tokens are numbered anew in every layer. A decoded token skips a layer where its p
  is below `decode_threshold`, and leaves nothing in that layer's cache; with other thresholds for
  prompt and answer, as released, reading an answer with its prompt differs from decoding it.
  Without layers and budget in a config, all layers but the first three and the last are routed;
  lib/report/attention_ranks.py ranks them as the paper chooses.

  Sows the loss 'route' in training, float32[B]: the weighted cross-entropy of p against the choice.

  Attributes:
    threshold: of a prompt's tokens.
    decode_threshold: of a decoded token.
    route_weight: of the loss.
  """

  threshold: Share = 0.005
  decode_threshold: Share = 0.5
  route_weight: NotNegative = 0.01
  gated = 'mlp'
  tied = True
  positions = 'compact'
  needs = frozenset({'next_hidden'})
  adaptive = 'as many tokens run as the router finds important'

  def setup(self) -> None:
    self.router = nn.Dense(2, use_bias=False, dtype=jnp.float32)

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    logits = jax.nn.log_softmax(self.router(signals.next_hidden), axis=-1)
    weight = jnp.exp(logits[..., 1])
    picked = keep_top(tokens, weight, num_slots=num_slots)
    gate = take(weight, picked.src)
    if not self.has_rng('dropout'):
      runs = tokens.real & (tokens.fixed | (weight > self.threshold))
      passed = take(runs, picked.src)
      return picked.replace(gate=gate,
                            valid=passed if picked.valid is None else picked.valid & passed,
                            wanted=jnp.sum(runs, axis=1, dtype=jnp.int32))
    chosen = picked.dst < num_slots
    missed = -jnp.where(chosen, logits[..., 1], logits[..., 0])
    count = jnp.maximum(jnp.sum(tokens.real, axis=1, dtype=jnp.float32), 1.0)
    loss = jnp.sum(jnp.where(tokens.real, missed, 0.0), axis=1) / count
    self.sow('losses', 'route', self.route_weight * loss)
    return picked.replace(gate=gate)

  def route(self, hidden: Array) -> tuple[Array, Array]:
    """Returns whether a decoded token runs the layer, bool[B], and its gate float32[B]."""
    weight = jax.nn.softmax(self.router(hidden), axis=-1)[..., 1]
    return weight >= self.decode_threshold, weight

  def default_shares(self, depth: int) -> Mapping[int, float]:
    """Returns all layers but the first three and the last, with all tokens that pass."""
    return dict.fromkeys(range(3, depth - 1), 1.0)
