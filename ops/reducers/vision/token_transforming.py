"""Token transforming: what goes is divided among all that stays and is like it.

Axes: B batch, N slots now, M slots after, K tokens chosen, H heads, d features a head.
"""

import dataclasses

import jax.numpy as jnp
from jax import nn

from ops.assignments import Assignment
from ops.attention import HIDDEN_LOGIT
from ops.moves.rows import take
from ops.primitives.match import cosine
from ops.primitives.mixing import mix_where_too_many
from ops.primitives.select import top
from ops.reducers.base import ByAttention
from ops.signals import Signals
from ops.tokens import TokenSet, num_kept


@dataclasses.dataclass(frozen=True)
class TokenTransforming(ByAttention):
  """Keeps the most attended tokens, and divides each of the others among all that are like it.

  A variant of our own in the spirit of Token Transforming (Zeng et al., 2025), arXiv:2506.05709,
  which sees pruning and merging as matrices and takes one of many inputs and many outputs, without
  training. How that paper builds its matrix is not reproduced here, and its figures are not ours.
  Here a token that goes joins every token that stays in the share exp(tau cos(its key, theirs))
  over the sum of these, and what stays becomes the mean of what it holds, each token counted as
  often as it has originals. Keys are taken from their mean first: on pretrained weights they have
  most in common, and all shares would be alike. Protected tokens lead, the chosen ones follow, the
  most attended first; a row with no more tokens than there is room for keeps them as they are.

  Attributes:
    by: the attention by which tokens are chosen: 'cls_attention' or 'received_attention'.
    tau: how sharply similarity counts; large values give each token to its nearest.
  """

  tau: float = 30.0
  reconstructed = 'the abstract'
  proportional = True

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.tau > 0:
      raise ValueError(f'tau={self.tau} must be positive')

  @property
  def needs(self) -> frozenset[str]:
    return super().needs | {'keys'}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    most, free = num_slots - tokens.protected, tokens.free
    chosen = top(self.attention(signals).mean(axis=1), most, excluded=~free)
    stays = jnp.arange(most)[None] < num_kept(tokens, num_slots)
    own = (chosen[:, :, None] == jnp.arange(tokens.slots)[None, None]) & stays[:, :, None]
    keys, sizes = signals.keys.astype(jnp.float32).mean(axis=2), jnp.where(free, tokens.sizes, 0.0)
    total = jnp.maximum(jnp.sum(sizes, axis=1), 1.0)[:, None, None]
    keys -= jnp.sum(jnp.where(free[..., None], keys * sizes[..., None], 0.0), axis=1,
                    keepdims=True) / total
    logits = jnp.where(stays[:, :, None], self.tau * cosine(take(keys, chosen), keys), HIDDEN_LOGIT)
    shares = jnp.where(jnp.any(own, axis=1, keepdims=True), own, nn.softmax(logits, axis=1))
    weights = shares * sizes[:, None]
    mass = jnp.sum(weights, axis=2, keepdims=True)
    return mix_where_too_many(tokens, weights / jnp.where(mass > 0, mass, 1.0))
