"""DUET-VLM's stage in the language model: keeps the tokens that the text attends to.

Axes: B batch, N slots now, H heads.
"""

import dataclasses

import jax

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

  The second stage of DUET-VLM (2026), arXiv:2602.18846, as released, where no words are singled
  out: means over the rows of that text and over heads. (Its choice of salient words needs a
  tagger.) The first stage, in the tower, is a form of `visionzip`. Otherwise as `pyramiddrop`.
  """

  needs = frozenset({'next_row_attention'})
  site = 'before'
  positions = 'compact'
  drops = 'pruning drops tokens'

  def rows(self, tokens: TokenSet) -> Array:
    """bool[B, N], text after the last visual token."""
    return text_after_images(tokens)

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    return keep_top(tokens, signals.next_row_attention.mean(axis=1), num_slots=num_slots)
