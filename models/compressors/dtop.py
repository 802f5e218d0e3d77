"""DToP: drops tokens of a segmentation model once an auxiliary head is sure of their class.

Axes: B batch, N slots now, M slots after, T original tokens, C classes, D features, H heads,
d features of a head, S keys.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from ops.argmax import max_and_index
from ops.assignments import Assignment, Gather
from ops.attention import HIDDEN_LOGIT
from ops.moves.rows import put, take
from ops.primitives.select import top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, num_left, restore
from ops.values import Count, CountOrZero, Width

Array = jax.Array


class Grades(struct.PyTreeNode):
  """Holds the predictions of a mask head.

  Attributes:
    masks: float32[B, N, C], logits of "this token is of that class".
    classes: float32[B, C, 2], logits of "this class is in the image", and of "it is not".
  """

  masks: Array
  classes: Array

  def probabilities(self) -> Array:
    """Multiplies the chances of a class in the image and of a token in it, float32[B, N, C]."""
    return jax.nn.softmax(self.classes)[:, None, :, 0] * jax.nn.sigmoid(self.masks)


class DToP(Reducer, nn.Module):
  """Drops the tokens with a certain class, except a few of each class.

  Dynamic Token Pruning (Tang et al., 2023), Sec. 3, arXiv:2308.01045, as released for SegViT (the
  head: Zhang et al., 2022, Sec. 3, arXiv:2210.05844). `num_slots` is a capacity: where more tokens
  stay than fit, the most certain go too. Tokens stay in slot order. Two things are not here:
  dropout in the head, and its loss, which needs the segmentation.

  A token that left has its mask logits already. The caller collects them, cut by cut, from the
  tokens before the cut and the cut's parameters:

    grades = method.apply({'params': params['reducer_07']}, out['before'][7], method='grade')
    canvas = paint(canvas, out['before'][7], grades.masks)

  and lets a last head, of the same kind, paint the tokens that are left. As released, the result
  is Grades(canvas, last.classes).probabilities(): the last head says which classes there are.

  Attributes:
    classes: C.
    threshold: probability above which a token may leave.
    spared: the surest tokens of each class that stay all the same.
    layers: decoder layers of the head.
    head_width: features of an attention head in it.
  """

  classes: Count = 150
  threshold: float = 0.95
  spared: CountOrZero = 5
  layers: Count = 2
  head_width: Width = 64
  site = 'after'
  drops = 'pruning drops tokens'
  adaptive = 'tokens leave as soon as they are certain'

  def setup(self) -> None:
    self.head = MaskHead(self.classes, self.layers, self.head_width)

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    probability = jax.lax.stop_gradient(self.grade(tokens).probabilities())
    certainty, likeliest = max_and_index(probability, axis=2)
    gone = leaves(certainty, likeliest, tokens.free,
                  threshold=self.threshold, spared=self.spared)
    stays = tokens.real & ~gone
    picked = top(-certainty, num_slots, forced=tokens.fixed, excluded=~stays)
    fits = jnp.arange(num_slots)[None] < num_left(tokens, num_slots)
    src = jnp.sort(jnp.where(take(stays, picked) & fits, picked, tokens.slots), axis=1)
    valid = src < tokens.slots
    return Gather(jnp.minimum(src, tokens.slots - 1), tokens.slots, valid=valid,
                  wanted=jnp.sum(stays, axis=1, dtype=jnp.int32))

  def grade(self, tokens: TokenSet) -> Grades:
    """Grades the tokens by the head; grades of tokens that are not free have no meaning."""
    return self.head(tokens.x, tokens.free)


def leaves(certainty: Array, klass: Array, among: Array, *, threshold: float,
           spared: int) -> Array:
  """Selects the tokens that are certain enough to leave, bool[B, N].

  Args:
    certainty: float32[B, N], probability of the likeliest class.
    klass: int[B, N], that class.
    among: bool[B, N], tokens that may leave.
    threshold: tokens above it leave.
    spared: the most certain tokens of each class that stay nevertheless; ties go to the first.

  Returns:
    bool[B, N].
  """
  sure = among & (certainty > threshold)
  klass = jnp.where(sure, klass, -1)
  order = jnp.lexsort((-certainty, klass), axis=1)
  sorted_class = take(klass, order)
  rank = jnp.broadcast_to(jnp.arange(klass.shape[1]), klass.shape)
  new = jnp.concatenate([jnp.ones_like(sure[:, :1]), sorted_class[:, 1:] != sorted_class[:, :-1]],
                        axis=1)
  first = jax.lax.cummax(jnp.where(new, rank, 0), axis=1)
  return sure & (put(rank, order, rank - first) >= spared)


def paint(canvas: Array, tokens: TokenSet, masks: Array) -> Array:
  """Writes the mask logits of the tokens that are left over those from before.

  Args:
    canvas: float32[B, T, C], of the original tokens; zeros at the start.
    tokens: N slots.
    masks: float32[B, N, C].
  """
  present = restore(tokens, tokens.real)
  return jnp.where(present[:, :, None], restore(tokens, masks), canvas)


class MaskHead(nn.Module):
  """Predicts masks: the attention logits of one query for each class over the tokens."""

  classes: int
  layers: int
  head_width: int

  @nn.compact
  def __call__(self, x: Array, among: Array) -> Grades:
    """Grades tokens: float[B, N, D], bool[B, N] of those that count -> Grades."""
    width, heads = x.shape[2], max(1, x.shape[2] // self.head_width)
    tokens = _norm('norm')(_dense(width, 'project')(x))
    queries = self.param('queries', nn.initializers.normal(1.0), (self.classes, width))
    queries = jnp.broadcast_to(queries, (len(x), *queries.shape))
    everyone = jnp.ones(queries.shape[:2], bool)
    for i in range(self.layers):
      mixed, _ = _Attention(heads, name=f'self_{i}')(queries, queries, everyone)
      queries = _norm(f'norm1_{i}')(queries + mixed)
      mixed, masks = _Attention(heads, name=f'cross_{i}')(queries, tokens, among)
      queries = _norm(f'norm2_{i}')(queries + mixed)
      hidden = nn.relu(_dense(4 * width, f'fc1_{i}')(queries))
      queries = _norm(f'norm3_{i}')(queries + _dense(width, f'fc2_{i}')(hidden))
    return Grades(masks.swapaxes(1, 2), _dense(2, 'classes')(queries))


def _dense(features: int, name: str) -> nn.Dense:
  return nn.Dense(features, dtype=jnp.float32, name=name,
                  kernel_init=nn.initializers.truncated_normal(0.02))


def _norm(name: str) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, name=name)


class _Attention(nn.Module):
  """Attention that also returns its logits."""

  heads: int

  @nn.compact
  def __call__(self, x: Array, y: Array, among: Array) -> tuple[Array, Array]:
    """Queries float32[B, N, D], keys float32[B, S, D], bool[B, S] -> [B, N, D], logits [B, N, S].

    The logits are the mean over heads, before anything is hidden.
    """
    def split(name: str, x: Array) -> Array:
      return _dense(x.shape[2], name)(x).reshape(*x.shape[:2], self.heads, -1)

    q, k, v = split('query', x), split('key', y), split('value', y)
    logits = jnp.einsum('bnhd,bshd->bhns', q, k, precision='highest') * q.shape[3] ** -0.5
    weights = jax.nn.softmax(jnp.where(among[:, None, None], logits, HIDDEN_LOGIT))
    mixed = jnp.einsum('bhns,bshd->bnhd', weights, v).reshape(x.shape)
    return _dense(x.shape[2], 'out')(mixed), jnp.mean(logits, axis=1)
