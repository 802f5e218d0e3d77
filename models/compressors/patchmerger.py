"""PatchMerger: learned queries attend to the tokens; their outputs replace the tokens.

Axes: B batch, N slots now, K queries, D features.
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
from ops.values import Positive


class PatchMerger(Reducer, nn.Module):
  """Mixes the tokens into one output for each learned query, by attention.

  Learning to Merge Tokens in Vision Transformers (Renggli et al., 2022), arXiv:2202.12015. The
  outputs are mixtures of the layer-normed features, without a residual; the protected tokens pass
  as they are.

  Attributes:
    scale: of the scores. 1 as in the paper; D ** -0.5 is the scaled variant of the benchmark in
      arXiv:2308.04657.
  """

  scale: Positive = 1.0
  site = 'before'

  @nn.compact
  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    hidden = nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False,
                          name='norm')(tokens.x)
    queries = self.param('queries', nn.initializers.normal(1.0),
                         (num_slots - tokens.protected, tokens.x.shape[-1]))
    scores = jnp.einsum('kd,bnd->bkn', queries, hidden, precision='highest') * self.scale
    weights = jax.nn.softmax(jnp.where(tokens.free[:, None], scores, HIDDEN_LOGIT), axis=2)
    return mix_free(tokens, weights, hidden)
