"""CATP's second stage: prunes the images of in-context examples, then that of the query.

Axes: B batch, N slots now, D features, H heads.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.match import cosine
from ops.primitives.queries import sample_of
from ops.primitives.select import keep_top
from ops.reducers.base import Checked, Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import NotNegative, OneOf

Array = jax.Array
PARTS = ('context', 'query')


@dataclasses.dataclass(frozen=True)
class CATP(Checked, Reducer):
  """Keeps tokens of the examples that the query turns to, or those of the query that are like them.

  The second stage of CATP (Li et al., 2025), arXiv:2508.07871, from the paper's text (no code is
  known). Behind a layer the examples are pruned: a token counts by how much more attention the last
  token pays it than in the layer above, a mean over heads, 0 at least, plus `likeness` times its
  cosine to the mean of the query's image and text. Behind the next layer the image of the query is
  pruned: tokens count by their cosine to the mean of what is left of the examples. Give a config
  for each, as layers 6 and 7 for 32 layers, 10 and 11 for 40; a budget counts the tokens of all
  images. The query is the last image with the text behind it, an example every other one; a prompt
  of one image is pruned as an example, or by the mean of the whole prompt. The first stage is
  `catp_images`.

  Attributes:
    part: 'context', the examples' images, or 'query'.
    likeness: weight of the cosine, of the first.
  """

  part: Annotated[str, OneOf(PARTS)] = 'context'
  likeness: NotNegative = 0.6
  reconstructed = "the paper's text"
  watch_needs = frozenset({'last_attention'})
  site = 'after'
  positions = 'keep'
  drops = 'pruning drops tokens'
  can_empty = True

  @property
  def needs(self) -> frozenset[str]:
    """Names attention, which the query's part does not read."""
    return frozenset({'last_attention'} if self.part == 'context' else {'rope'})

  def watched(self, cuts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(layer - 1 for layer in cuts if layer and self.part == 'context')

  def watch(self, tokens: TokenSet, signals: Signals) -> dict[str, Array]:
    """{'asked': float32[B, N]}, attention of the last token in the layer above the cut."""
    return {'asked': jax.lax.stop_gradient(signals.last_attention.mean(axis=1))}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    sample = sample_of(tokens)
    last = jnp.max(sample, axis=1, keepdims=True)
    query = tokens.real & ((sample == last) & (last > 1))
    if self.part == 'context':
      rise = signals.last_attention.mean(axis=1) - tokens.stats.get('asked', 0.0)
      scores = jnp.maximum(rise, 0.0) + self.likeness * likeness(
          tokens, jnp.where(last > 1, query, tokens.real))
      spared = query
    else:
      spared = tokens.real & (last > 1) & ~query
      scores = likeness(tokens, jnp.where(last > 1, spared & (sample > 0), tokens.real))
    return keep_top(tokens, jnp.where(spared, jnp.inf, scores), num_slots=num_slots)


def likeness(tokens: TokenSet, among: Array) -> Array:
  """Compares each token with the mean of those among bool[B, N]: float32[B, N], a cosine."""
  x = jax.lax.stop_gradient(tokens.x.astype(jnp.float32))
  mean = jnp.sum(jnp.where(among[:, :, None], x, 0.0), axis=1, keepdims=True)
  return cosine(x, mean)[:, :, 0]
