"""MMTok: keeps the tokens that together cover the words of the prompt and the whole image.

Axes: B batch, N slots now, M slots after, D features, C features of the tower, T words, R rows.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.farthest import pick_greedily
from ops.primitives.match import l2_normalize
from ops.primitives.products import pairs
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, count
from ops.values import NotNegative, Positive

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class MMTok(Reducer):
  """Keeps tokens that cover most of the prompt's words and of the image, picked one by one.

  MMTok (Dong et al., 2025), arXiv:2508.18264, as released. How much a token covers of a word is a
  softmax over tokens of their cosines, and so it is for each token of the image, by the tower's
  features; of each the best token that was picked counts. Whatever adds most is picked next. Words
  are those of the question where the host is told of one; the release also drops stop words, and
  the padding of images that are not square. A row without words covers its image alone.

  Attributes:
    text_temperature, vision_temperature: of the softmax for words and for tokens.
    alpha: the weight of the image.
  """

  text_temperature: Positive = 0.02
  vision_temperature: Positive = 0.2
  alpha: NotNegative = 0.5
  needs = frozenset({'text', 'text_valid', 'vision_features'})
  site = 'after'
  drops = 'pruning drops tokens'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    x, features = (jax.lax.stop_gradient(l2_normalize(x, eps=1e-8))
                   for x in (tokens.x, signals.vision_features))
    text = jax.lax.stop_gradient(l2_normalize(signals.text, eps=1e-8))
    covered = jnp.concatenate([
        shares(text, x, signals.text_valid, tokens.free, self.text_temperature),
        self.alpha * shares(features, features, tokens.free, tokens.free, self.vision_temperature),
    ], axis=1)
    turn = cover(covered, tokens.free, count=max(num_slots - tokens.protected, 0))
    return keep_top(tokens, -turn, num_slots=num_slots)


def shares(wanted: Array, vectors: Array, real: Array, among: Array, temperature: float) -> Array:
  """Returns how much each slot covers of each row, float32[B, R, N]; all adds up to 1.

  Args:
    wanted: float32[B, R, D], of length one.
    vectors: float32[B, N, D], of length one.
    real: bool[B, R], rows that count.
    among: bool[B, N], slots that count.
    temperature: of the softmax over slots.
  """
  share = jax.nn.softmax(pairs(wanted, vectors) / temperature, axis=2, where=among[:, None])
  return jnp.where(real[:, :, None], share, 0.0) / jnp.maximum(count(real), 1)[:, :, None]


def cover(covered: Array, among: Array, *, count: int) -> Array:
  """Picks slots one by one, each the one that adds most to what is covered.

  Args:
    covered: float32[B, R, N], how much of each row each slot covers.
    among: bool[B, N], slots that may be picked.
    count: how many to pick.

  Returns:
    int32[B, N], at which step each slot was picked, `count` where it was not.
  """

  def look(covered: Array, best: Array, pick: Array, number: Array) -> tuple[Array, Array]:
    del number
    best = jnp.maximum(best, covered[:, pick])
    return best, jnp.sum(jnp.maximum(covered - best[:, None], 0.0), axis=0)

  return pick_greedily(look, covered, among, jnp.sum(covered, axis=1),
                       jnp.zeros(covered.shape[:2]), count=count)
