"""FrameFusion's merging: places that stand still become one token, the most alike first.

Axes: B batch, N slots now.
"""

import dataclasses

import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.crops.frames import FRAME_SIGNALS, Frames, best
from ops.primitives.crops.groups import average_flagged
from ops.primitives.crops.regions import ranks_within
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class FrameFusion(Reducer):
  """Merges tokens of a video into the same place of the frame before, where they are most alike.

  The merging of FrameFusion (2025), arXiv:2501.01986, as released, in one step before the language
  model. Likeness is the cosine of two frames' features at a place. As many tokens as the budget
  asks for merge, the most alike first; a place that does so over several frames becomes one token
  in its first one, the mean of all. In the first layers of the language model, where the release
  merges what is above a threshold, it is `framefusion_merge`; what a budget lacks then is pruned by
  attention, there or by `framefusion_prune`. No budget takes the first frame's places apart: one
  that is less than a frame drops the last of them. Newlines stay. Tokens keep their order.
  """

  needs = FRAME_SIGNALS
  site = 'after'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    frames, slots = Frames.of(tokens, signals), tokens.slots
    like = frames.likeness(tokens.x, frames.at(frames.frame - 1))
    excess = jnp.sum(frames.sizes, axis=1, keepdims=True) - frames.num_kept(tokens, num_slots)
    rank = ranks_within(jnp.where(frames.there, 0, -1), like)
    merges = frames.there & (like > -2) & (rank < excess)
    start = frames.at(frames.frame - frames.runs(merges))
    own = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), start.shape)
    partner = jnp.where(frames.there, start, own)
    stays = best(tokens, ~merges, jnp.where(frames.there, -own.astype(jnp.float32), 1.0),
                 num_slots=num_slots)
    return average_flagged(tokens, stays, partner, num_slots=num_slots)
