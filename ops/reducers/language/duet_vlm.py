"""DUET-VLM's stage in the language model: keeps the tokens that the text attends to.

Axes: B batch, N slots now, H heads.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.queries import text_after_images
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DUETVLM(Reducer):
  """Keeps the tokens with the highest attention from the text after the image, in the next layer.

  The second stage of DUET-VLM (2026), arXiv:2602.18846, as released: means over the rows of salient
  words, the bool stat 'salient' of the tokens, and over heads. A row that names none, or has no
  such stat, takes all text after the image. (The release finds salient words by a tagger: nouns and
  the like.) Its last ratio is 0: no visual token is left. The first stage is `duet_zip`. Otherwise
  as `pyramiddrop`.
  """

  needs = frozenset({'next_row_attention'})
  site = 'before'
  positions = 'compact'
  drops = 'pruning drops tokens'
  can_empty = True

  def rows(self, tokens: TokenSet) -> Array:
    """bool[B, N], salient words; where there are none, text after the last visual token."""
    after = text_after_images(tokens)
    if 'salient' not in tokens.stats:
      return after
    salient = tokens.real & tokens.stats['salient']
    return jnp.where(salient.any(axis=1, keepdims=True), salient, after)

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    return keep_top(tokens, signals.next_row_attention.mean(axis=1), num_slots=num_slots)
