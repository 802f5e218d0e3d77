"""Token transforming: every token left is a mixture of all tokens like it.

Axes: B batch, N slots now, M slots after, K tokens chosen, H heads, d features a head.
"""

import dataclasses

import jax.numpy as jnp
from jax import nn

from ops.assignments import Assignment, take
from ops.attention import HIDDEN_LOGIT, log_weight
from ops.primitives.match import cosine
from ops.primitives.mixing import mix_where_too_many
from ops.primitives.select import top
from ops.reducers.base import ByAttention
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class TokenTransforming(ByAttention):
  """Mixes all tokens into the most attended ones by the similarity of their keys.

  A variant of our own in the spirit of Token Transforming (Zeng et al., 2025), arXiv:2506.05709,
  which sees pruning and merging as matrices and takes one of many inputs and many outputs, without
  training. How that paper builds its matrix is not reproduced here, and its figures are not ours.
  Here a row is exp(tau cos(key of the chosen token, keys of all)), each token counted as often as
  it has originals, divided by its sum. Protected tokens lead, the chosen ones follow, the most
  attended first; a row with no more tokens than there is room for keeps them as they are.

  Attributes:
    by: the attention by which tokens are chosen: 'cls_attention' or 'received_attention'.
    tau: how sharply similarity counts; large values leave the chosen tokens as they are.
  """

  tau: float = 20.0
  proportional = True

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.tau > 0:
      raise ValueError(f'tau={self.tau} must be positive')

  @property
  def needs(self) -> frozenset[str]:
    return super().needs | {'keys'}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    scores = self.attention(signals).mean(axis=1)
    chosen = top(scores, num_slots - tokens.protected, excluded=~tokens.free)
    keys = signals.keys.astype(jnp.float32).mean(axis=2)
    logits = self.tau * cosine(take(keys, chosen), keys) + log_weight(tokens.sizes)[:, None]
    logits = jnp.where(tokens.free[:, None], logits, HIDDEN_LOGIT)
    return mix_where_too_many(tokens, nn.softmax(logits))
