"""FitPrune: keeps the tokens that both the image and the text attend to.

Axes: B batch, N slots now, H heads.
"""

import dataclasses

import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.queries import sums_of_image_and_text, text_after_images
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class FitPrune(Reducer):
  """Keeps the tokens with the highest attention from image tokens times that from later text.

  FitPrune (Ye et al., 2024), arXiv:2409.10197, as released: of each row the largest over heads
  counts, and rows are added up; where no text follows, the image alone counts. Tokens leave behind
  the attention of a layer, which still reads them, and before its MLP. How many leave in which
  layer is fitted to what hundreds of images lose of the two sums (`python -m tools.fit`, which says
  what a config's `layers` and `keep` are); the release has lists of them for LLaVA-1.5.
  """

  needs = frozenset({'queries', 'keys', 'rope'})
  positions = 'keep'
  drops = 'pruning drops tokens'
  can_empty = True

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    after = text_after_images(tokens)
    image, text = sums_of_image_and_text(tokens, signals, after)
    text = jnp.where(after.any(axis=1, keepdims=True), text, 1.0)
    return keep_top(tokens, image * text, num_slots=num_slots)
