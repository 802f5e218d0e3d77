"""EVS: drops what has not changed since the frame before.

Axes: B batch, N slots now, F frames.
"""

import dataclasses

import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.crops.frames import FRAME_SIGNALS, Frames
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class EVS(Reducer):
  """Keeps the tokens of a video that are least like the same place of the frame before.

  Efficient Video Sampling (2025), arXiv:2510.14624, as released in serving engines. Likeness is the
  cosine of the features; the first frame comes before all others, and of equals the earlier token.
  A budget of less than a frame keeps the first of its tokens, where the release keeps the whole
  frame. Newlines stay. Tokens keep their order.
  """

  needs = FRAME_SIGNALS
  site = 'after'
  drops = 'pruning drops tokens'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    frames = Frames.of(tokens, signals)
    like = frames.likeness(tokens.x, frames.at(frames.frame - 1))
    # What is compared with nothing is at -2: newer than anything else.
    return keep_top(tokens, jnp.where(frames.there, -like, 3.0), num_slots=num_slots)
