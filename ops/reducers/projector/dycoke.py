"""DyCoke's stage before the language model: frames in fours, of which the first is kept whole.

Axes: B batch, N slots now, F frames.
"""

import dataclasses
from typing import Annotated

import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.crops.frames import FRAME_SIGNALS, Frames, best, shares
from ops.primitives.crops.regions import keep_flagged, ranks_within
from ops.reducers.base import Checked, Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import OneOf

VARIANTS = ('paper', 'release')


@dataclasses.dataclass(frozen=True)
class DyCoke(Checked, Reducer):
  """Keeps every fourth frame, and of the others what is least like the frame that they go by.

  The first stage of DyCoke (Tao et al., 2024), arXiv:2411.15024. Of each four frames the second and
  the fourth are compared with the one just before, the third with the first, place by place, by
  cosine of the features. These three keep equal parts of what the budget leaves. Below the first
  frames of all fours, these are cut too: of each the first tokens stay. Newlines stay. Tokens keep
  their order, where the release puts those of a frame in the order of their cosines.

  The second stage is not here: behind layer 3 a decoded token reads, of the visual entries, those
  alone that it attended to most in the layer before, which no cache here knows of another layer.

  Attributes:
    variant: 'paper', all fours alike; or 'release', where the third frame of the last four is kept
      whole too (if it has four), and a last frame without a pair is dropped.
  """

  variant: Annotated[str, OneOf(VARIANTS)] = 'paper'
  needs = FRAME_SIGNALS
  site = 'after'
  drops = 'pruning drops tokens'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    frames = Frames.of(tokens, signals)
    frame, sizes, counts = frames.frame, frames.sizes, frames.counts
    like = frames.likeness(tokens.x, frames.at(frame - jnp.where(frame % 4 == 2, 2, 1)))
    number = jnp.arange(frames.number, dtype=jnp.int32)[None]
    whole = number % 4 == 0
    if self.variant == 'release':
      whole |= (number % 4 == 2) & (number - 2 >= counts - 4)
      paired = jnp.where(counts > 1, counts - counts % 2, counts)
      sizes = jnp.where(number < paired, sizes, 0)
    total = jnp.minimum(frames.num_kept(tokens, num_slots), jnp.sum(sizes, axis=1, keepdims=True))
    first, others = (jnp.where(of, sizes, 0) for of in (whole, ~whole))
    budget = shares(first, jnp.minimum(total, jnp.sum(first, axis=1, keepdims=True)))
    budget += shares(others, total - jnp.sum(budget, axis=1, keepdims=True))
    scores = jnp.where(frames.spread(whole), 0.0, -like)
    stays = ~frames.there | (ranks_within(frame, scores) < frames.spread(budget))
    # Newlines alone may be more than the budget.
    stays = best(tokens, stays, jnp.zeros(frame.shape), num_slots=num_slots)
    return keep_flagged(tokens, stays, num_slots=num_slots)
