"""FlowCut: keeps the tokens that information flows through, layer after layer.

Axes: B batch, N slots now, M slots after, H heads, d features a head.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ops.assignments import Assignment, Gather
from ops.attention import HIDDEN_LOGIT
from ops.moves.rows import take
from ops.primitives.select import keep_top, ranks, top
from ops.reducers.base import ByAttention
from ops.signals import Signals
from ops.tokens import SPECIAL, TokenSet, num_left
from ops.values import CountOrZero

Array = jax.Array
# Sums of attention may underflow to zero.
TINY = 1e-20


@dataclasses.dataclass(frozen=True)
class FlowCut(ByAttention):
  """Keeps the tokens with the most information flow, averaged over layers.

  FlowCut (Tong et al., 2025), arXiv:2505.19536, as released. A layer scores a token by the share of
  [CLS] attention it gets, plus its share of what it would get if the [CLS] value were compared with
  all values (the paper speaks of a cosine), times the length of its value (L1, mean over heads).
  The memory is half of what it was plus half of the new score. The release cuts after every second
  layer; a cut in `site='between'` leaves the same tokens and spares the MLP. Kept tokens stay in
  their order. By default every layer up to the last cut is watched; a cut in a layer that has seen
  no watch goes by that layer alone.

  Attributes:
    by: 'received_attention' leaves out both shares and the values of [CLS]: received attention
      times the length of the value, the release's form for Qwen2-VL.
    target: free tokens to end with, or None. None fills every slot of the schedule. A count makes
      `num_slots` a capacity: a row loses round((n - target) / sqrt(l) (1 - r ** 2)) of its n free
      tokens, r being the entropy of attention over log(n), l the layers until it reaches the
      target. The release takes the largest loss of the batch; here rows do not depend on others.
    spare: layers at the end that are not counted in l; 2 where, as in LLaVA, features come from the
      last layer but one.
  """

  target: int | None = None
  spare: CountOrZero = 2
  drops = 'pruning drops tokens'

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.target is not None and self.target < 1:
      raise ValueError(f'target={self.target} must be at least 1, or None to fill every slot')

  @property
  def needs(self) -> frozenset[str]:
    # The value of [CLS] is compared with all others.
    rows = {'one_sequence'} if self.by == 'cls_attention' else set()
    return super().needs | {'values'} | rows

  @property
  def watch_needs(self) -> frozenset[str]:
    return self.needs

  @property
  def adaptive(self) -> str:
    return '' if self.target is None else 'spread attention keeps more tokens'

  def watched(self, cuts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(max(cuts, default=-1) + 1))

  def watch(self, tokens: TokenSet, signals: Signals) -> dict[str, Array]:
    """{'flow': float32[B, N]}, the memory with this layer's score in it."""
    attention = self.attention(signals).mean(axis=1)
    values = signals.values.astype(jnp.float32)
    length = jnp.sum(jnp.abs(values.mean(axis=2)), axis=2)
    if self.by == 'cls_attention':
      attention = flow(attention, value_attention(tokens, values), tokens.free)
    score = jax.lax.stop_gradient(attention * length)
    past = tokens.stats.get('flow')
    return {'flow': score if past is None else 0.5 * past + 0.5 * score}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    scores = tokens.stats.get('flow')
    if scores is None:
      scores = self.watch(tokens, signals)['flow']
    if self.target is None:
      return keep_top(tokens, scores, num_slots=num_slots)
    left = signals.depth - self.spare - 1 - signals.layer
    lost = surplus(self.attention(signals).mean(axis=1), tokens.free, target=self.target, left=left)
    real = jnp.sum(tokens.real, axis=1, keepdims=True, dtype=jnp.int32)
    order = top(scores, num_slots, forced=tokens.fixed, excluded=~tokens.real)
    stays = ranks(order, tokens.slots) < jnp.minimum(real - lost, num_left(tokens, num_slots))
    src = jnp.argsort(~stays, axis=1, stable=True)[:, :num_slots].astype(jnp.int32)
    return Gather(src, tokens.slots, valid=take(stays, src))


def value_attention(tokens: TokenSet, values: Array) -> Array:
  """Compares all values with that of [CLS], the first special token of a row.

  Args:
    tokens: N slots.
    values: float32[B, N, H, d].

  Returns:
    float32[B, N], softmax of plain dot products over the real tokens, mean over heads.
  """
  first = jnp.argmax(tokens.real & (tokens.kind == SPECIAL), axis=1)[:, None]
  scores = jnp.einsum('bhd,bnhd->bhn', take(values, first)[:, 0], values, precision='highest')
  scores = jnp.where(tokens.real[:, None], scores, HIDDEN_LOGIT)
  return jnp.where(tokens.real[:, None], jax.nn.softmax(scores, axis=2), 0.0).mean(axis=1)


def flow(attention: Array, semantic: Array, free: Array) -> Array:
  """Sum of two shares, each of its own total: float32[B, N] twice, bool[B, N] -> float32[B, N]."""
  return normalize(attention, free) + normalize(semantic, free)


def normalize(attention: Array, free: Array) -> Array:
  """Attention float32[B, N] as parts of its sum over bool[B, N]."""
  attention = jnp.where(free, attention, 0.0)
  return attention / jnp.maximum(jnp.sum(attention, axis=1, keepdims=True), TINY)


def surplus(attention: Array, free: Array, *, target: int, left: int) -> Array:
  """Counts the free tokens that a layer can lose: more where attention concentrates.

  Args:
    attention: float32[B, N].
    free: bool[B, N], tokens that may go.
    target: how many are to be left in the end.
    left: layers until then; none means now.

  Returns:
    int32[B, 1], never more than there are above the target.
  """
  count = jnp.sum(free, axis=1, keepdims=True, dtype=jnp.float32)
  above = jnp.maximum(count - target, 0.0)
  if left <= 0:
    return above.astype(jnp.int32)
  parts = normalize(attention, free)
  entropy = -jnp.sum(parts * jnp.log(jnp.maximum(parts, TINY)), axis=1, keepdims=True)
  spread = entropy / jnp.log(jnp.maximum(count, 2.0))
  lost = jnp.round(above / math.sqrt(left) * (1 - spread ** 2))
  return jnp.clip(lost, 0.0, above).astype(jnp.int32)
