"""DynamicViT: a small network predicts which tokens stay, and learns it through attention.

Axes: B batch, N slots now, M slots after, D features.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, identity, num_kept
from ops.values import NotNegative

Array = jax.Array


class DynamicViT(Reducer, nn.Module):
  """Keeps the tokens with the highest scores of a learned predictor.

  DynamicViT (Rao et al., 2021), Sec. 3.2 to 3.4, arXiv:2106.02034. In evaluation the best stay,
  best first. In training all N slots stay: a Gumbel softmax decides token by token, straight
  through, and the decision (1 kept, 0 dropped for good) multiplies the slot's size, by which
  attention counts it. So a dropped token is no key for anyone; in the released code it remains one
  for itself, which no kept token can see.

  Sows the loss 'ratio', float32[B]: the weighted squared error of the share of tokens still kept.

  Attributes:
    ratio_weight: of that loss. The paper's 2.0 is for the mean over all cuts: with S cuts whose
      losses are added up, 2 / S is the same.
  """

  ratio_weight: NotNegative = 2.0
  site = 'before'
  proportional = True
  drops = 'pruning drops tokens'

  @nn.compact
  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    free = tokens.free
    before = jnp.where(free, tokens.sizes, 0.0)
    scores = Predictor(name='predictor')(tokens.x, before)
    if not self.has_rng('dropout'):
      return keep_top(tokens, scores[..., 0], num_slots=num_slots, order='score')
    decision = jnp.where(free, decide(scores, self.make_rng('dropout')), 1.0)
    count = jnp.maximum(jnp.sum(free, axis=1, dtype=jnp.float32), 1.0)
    share = jnp.sum(before * decision, axis=1) / count
    # Nothing left the row, so its free tokens are as many as at the start.
    target = num_kept(tokens, num_slots)[:, 0] / count
    self.sow('losses', 'ratio', self.ratio_weight * (share - target) ** 2)
    return identity(tokens).replace(policy=decision)


class Predictor(nn.Module):
  """Scores every token by its own features and by the mean of the tokens still kept."""

  @nn.compact
  def __call__(self, x: Array, weight: Array) -> Array:
    """Predicts.

    Args:
      x: float[B, N, D].
      weight: float32[B, N], how much a token counts in the mean: 1 kept, 0 dropped or not free.

    Returns:
      float32[B, N, 2], log-probabilities of keep and drop.
    """
    width = x.shape[-1]

    def dense(features: int, name: str) -> nn.Dense:
      return nn.Dense(features, dtype=jnp.float32, name=name,
                      kernel_init=nn.initializers.truncated_normal(0.02))

    x = nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, name='norm')(x)
    x = nn.gelu(dense(width, 'embed')(x), approximate=False)
    own, shared = x[..., :width // 2], x[..., width // 2:]
    total = jnp.maximum(jnp.sum(weight, axis=1), 1e-6)
    mean = jnp.einsum('bn,bnd->bd', weight, shared) / total[:, None]
    x = jnp.concatenate([own, jnp.broadcast_to(mean[:, None], shared.shape)], axis=-1)
    x = nn.gelu(dense(width // 2, 'fc1')(x), approximate=False)
    x = nn.gelu(dense(width // 4, 'fc2')(x), approximate=False)
    return jax.nn.log_softmax(dense(2, 'out')(x), axis=-1)


def decide(scores: Array, key: Array) -> Array:
  """Samples keep (1) or drop (0): exact in value, with the gradient of the soft probability.

  The straight-through Gumbel softmax (Jang et al., 2017), arXiv:1611.01144, at temperature 1.

  Args:
    scores: float32[B, N, 2], log-probabilities of keep and drop.
    key: random key.

  Returns:
    float32[B, N].
  """
  noisy = scores + jax.random.gumbel(key, scores.shape)
  soft = jax.nn.softmax(noisy, axis=-1)[..., 0]
  hard = (noisy[..., 0] >= noisy[..., 1]).astype(jnp.float32)
  return hard + (soft - jax.lax.stop_gradient(soft))
