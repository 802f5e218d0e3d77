"""FlashVLM: keeps tokens that [CLS] and the prompt find relevant, and others that repeat none.

Axes: B batch, N slots now, M slots after, D features, T words, H heads.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.dedup import keep_diverse
from ops.primitives.match import cosine
from ops.primitives.quantiles import above_lowest, quantile
from ops.reducers.base import ByAttention
from ops.signals import TEXT_SIGNALS, Signals
from ops.tokens import TokenSet
from ops.values import Share

Array = jax.Array
# As released: temperatures of the softmax over words and over tokens, the power that sharpens it,
# the share of tokens that are turned down and how far, and what counts as nothing.
WORD_TEMPERATURE, TOKEN_TEMPERATURE, POWER = 0.05, 0.01, 2.5
TURNED_DOWN, BY, NOTHING = 0.995, 0.1, 1e-6


@dataclasses.dataclass(frozen=True)
class FlashVLM(ByAttention):
  """Keeps the tokens that [CLS] attends to and the prompt asks for, and the most diverse of others.

  FlashVLM (Cai et al., 2025), arXiv:2512.20561, as found in a repository of its first author's
  name. A token's relevance is the mean cosine of its projected features and the prompt's words,
  each word weighed by a softmax of it; a softmax over tokens and a power sharpen it, and all but
  the highest are turned down. Its logarithm joins that of [CLS] attention. Of what is not kept so,
  repetitions go in rounds, as in `vispruner`, by the tower's features. Sharpened so far, relevance
  sets few tokens apart, and attention ranks the rest. In a row without words attention ranks all.
  The release for Qwen takes the system prompt for its words, and weighs them by their length; that
  form is not here.

  Attributes:
    eta: the weight of the prompt, against that of attention.
    important: the part of the tokens kept that goes by relevance and attention.
  """

  eta: Share = 0.5
  important: Share = 0.5
  site = 'after'
  drops = 'pruning drops tokens'

  @property
  def needs(self) -> frozenset[str]:
    return super().needs | TEXT_SIGNALS | {'vision_features'}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    asked = relevance_of(tokens, jax.lax.stop_gradient(signals.text), signals.text_valid)
    attended = min_max(self.attention(signals).mean(axis=1), tokens.free)
    attended, asked = (jnp.log(jnp.maximum(part, NOTHING)) for part in (attended, asked))
    scores = (1 - self.eta) * attended + self.eta * asked
    return keep_diverse(tokens, scores, signals.vision_features, num_slots=num_slots,
                        important=self.important)


def relevance_of(tokens: TokenSet, text: Array, real: Array) -> Array:
  """Returns how relevant each token is to the words, float32[B, N], 0 to 1; 0 without words.

  Args:
    tokens: N slots.
    text: float[B, T, D].
    real: bool[B, T], words that count.
  """
  alike = cosine(jax.lax.stop_gradient(tokens.x), text)
  weights = jax.nn.softmax(alike / WORD_TEMPERATURE, axis=2, where=real[:, None])
  among = tokens.free
  pooled = jnp.sum(jnp.where(real[:, None], weights * alike, 0.0), axis=2)
  asked = jax.nn.softmax(pooled / TOKEN_TEMPERATURE, axis=1, where=among)
  asked = min_max(asked ** POWER, among)
  asked = jnp.where(asked < quantile(asked, among, TURNED_DOWN), asked * BY, asked)
  return min_max(asked, among)


def min_max(scores: Array, among: Array) -> Array:
  """Scales each row to 0 to 1, float32[B, N]; to 0 where all are the same."""
  above, spread = above_lowest(scores, among)
  return jnp.where(spread > 0, above / (spread + NOTHING), 0.0)
