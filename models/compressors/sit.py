"""SiT: a small network predicts the part of each token that goes into each output.

Axes: B batch, N slots now, K outputs, D features.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.attention import HIDDEN_LOGIT
from ops.primitives.mixing import mix_free
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet


class SiT(Reducer, nn.Module):
  """Mixes the tokens by weights that an MLP predicts from each token.

  The token slimming module of Self-slimmed Vision Transformer (Zong et al., 2022), Sec. 3,
  arXiv:2111.12624, in the form of Which Tokens to Use? (Haurum et al., 2023), arXiv:2308.04657:
  layer norm, D to D / 2, GELU, D / 2 to K, and a learned scale of the scores. The features that are
  mixed are the tokens' own. The module that undoes the mixing for distillation is left out.
  """

  site = 'before'

  @nn.compact
  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals

    def dense(features: int, name: str) -> nn.Dense:
      return nn.Dense(features, dtype=jnp.float32, name=name,
                      kernel_init=nn.initializers.truncated_normal(0.02))

    x = nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False,
                     name='norm')(tokens.x)
    x = nn.gelu(dense(tokens.x.shape[-1] // 2, 'fc1')(x), approximate=False)
    scores = dense(num_slots - tokens.protected, 'fc2')(x).swapaxes(1, 2)
    scores *= self.param('scale', nn.initializers.ones, ())
    weights = jax.nn.softmax(jnp.where(tokens.free[:, None], scores, HIDDEN_LOGIT), axis=2)
    return mix_free(tokens, weights, tokens.x)
