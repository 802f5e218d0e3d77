"""Sinkhorn: divides tokens evenly among learned clusters by optimal transport.

Axes: B batch, N slots now, K clusters, D features.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.attention import HIDDEN_LOGIT
from ops.primitives.match import inverse_norm, l2_normalize
from ops.primitives.mixing import mix_free
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, num_kept
from ops.values import Iterations, Positive

Array = jax.Array


class Sinkhorn(Reducer, nn.Module):
  """Mixes unit-length tokens by an optimal transport plan to learned centres.

  The plan is entropic. The Sinkhorn baseline of Which Tokens to Use? (Haurum et al., 2023),
  arXiv:2308.04657; transport after Cuturi (2013), arXiv:1306.0895. The released code brings its
  centres back to unit length by writing to the parameter in every forward pass; here the forward
  pass normalises them.

  Attributes:
    eps: temperature of the plan; smaller is harder.
    iterations: of the row and column scaling.
  """

  eps: Positive = 1.0
  iterations: Iterations = 3
  site = 'before'

  @nn.compact
  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    centres = self.param('v', nn.initializers.normal(1.0),
                         (num_slots - tokens.protected, tokens.x.shape[-1]))
    # Lengths apart from directions: unit vectors in float32 would be a second copy of the tokens.
    inverse = inverse_norm(tokens.x)
    scores = jnp.einsum('kd,bnd->bkn', l2_normalize(centres), tokens.x.astype(jnp.float32),
                        precision='highest') * inverse[:, None] / self.eps
    free = tokens.free
    used = jnp.arange(scores.shape[1])[None] < num_kept(tokens, num_slots)
    weights = plan(scores, used, free, iterations=self.iterations)
    return mix_free(tokens, weights, tokens.x * inverse[..., None].astype(tokens.x.dtype))


def plan(scores: Array, rows: Array, columns: Array, *, iterations: int) -> Array:
  """Scales exp(scores) so that rows come out equally heavy and every column adds up to 1.

  The columns are scaled last and are exact. The masses that the rows start from (1 / (K + N) each
  in the released code, for columns as well) only add a constant that the columns' scaling cancels.

  Args:
    scores: float32[B, K, N].
    rows: bool[B, K], the rows that take part; the others come out zero.
    columns: bool[B, N], the same for columns.
    iterations: at least 1.

  Returns:
    float32[B, K, N].
  """
  part = rows[:, :, None] & columns[:, None]
  for _ in range(iterations):
    scores = jnp.where(part, scores, HIDDEN_LOGIT)
    scores = scores - jax.nn.logsumexp(scores, axis=2, keepdims=True)
    scores = jax.nn.log_softmax(jnp.where(part, scores, HIDDEN_LOGIT), axis=1)
  return jnp.where(part, jnp.exp(scores), 0.0)
