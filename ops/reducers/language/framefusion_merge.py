"""FrameFusion inside the language model: places that stand still merge, what is left over leaves.

Axes: B batch, N slots now, H heads.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.masks import FRAME
from ops.moves.rows import take
from ops.primitives.crops.frames import Frames, best
from ops.primitives.crops.groups import joined, merge_flagged
from ops.primitives.crops.regions import ranks_within
from ops.reducers.base import Checked, Reducer
from ops.rope import sequence_index
from ops.signals import Signals
from ops.tokens import TokenSet, count, num_kept
from ops.values import Range

PLACE = 'place'


@dataclasses.dataclass(frozen=True)
class FrameFusionMerge(Checked, Reducer):
  """Merges tokens of a video into the same place of the frame before, and prunes what is too much.

  FrameFusion (2025), arXiv:2501.01986, as released: likeness is the cosine of the features of two
  tokens that follow each other at a place of the frame. What is alike enough merges, the most alike
  first and no more than the budget asks for; tokens of a place that do so in a row become one in
  the first of them, their mean, each counting once whatever it stands for. The release merges in
  every layer until fewer than a tenth do, and prunes in the next by attention, a mean over all
  heads and queries, down to what a share of the whole model's cost leaves; here a config names the
  layers and their budgets, and each cut prunes what its merging leaves too much. Give layers
  (0, 1, 2) or so. In the release a merged token keeps the first one's position; here, where
  attention is causal, it takes the latest.

  Frames are the crops of an image, or the images of a prompt: the stat 'frame' int32[B, N], -1 for
  none, by default 'group', else one frame. The first cut takes down which place of its frame each
  token is (stat 'place'). Before the language model `framefusion` merges alone.

  Attributes:
    threshold: the least cosine with which tokens merge.
  """

  threshold: Annotated[float, Range(-1, 1)] = 0.6
  needs = frozenset({'received_attention'})
  reads = frozenset({FRAME})
  positions = 'keep'
  drops = 'what merging leaves above the budget is pruned'
  merges = True

  def watched(self, cuts: tuple[int, ...]) -> tuple[int, ...]:
    return cuts[:1]

  def watch(self, tokens: TokenSet, signals: Signals) -> dict[str, jax.Array]:
    """{'place': int32[B, N]}, which of its frame's tokens each is, -1 for none."""
    del signals
    return {PLACE: places(tokens)}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    place = tokens.stats[PLACE] if PLACE in tokens.stats else places(tokens)
    place = jnp.where(tokens.free, place, -1)
    turn = ranks_within(place, -sequence_index(tokens.pos).astype(jnp.float32))
    frames = Frames.by(jnp.where(place < 0, -1, turn), place)
    like = frames.likeness(tokens.x, frames.at(frames.frame - 1))
    excess = count(tokens.free) - num_kept(tokens, num_slots)
    rank = ranks_within(jnp.where(frames.there, 0, -1), like)
    merges = frames.there & (like >= self.threshold) & (rank < excess)
    own = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), place.shape)
    partner = jnp.where(frames.there, frames.at(frames.frame - frames.runs(merges)), own)
    members = joined(jnp.ones(place.shape), partner)
    stays = best(tokens, ~merges, signals.received_attention.mean(axis=1), num_slots=num_slots)
    return merge_flagged(tokens, stays, partner, 1 / jnp.maximum(take(members, partner), 1),
                         num_slots=num_slots)


def places(tokens: TokenSet) -> jax.Array:
  """Numbers the tokens of each frame in their order: int32[B, N], -1 for those of none."""
  none = jnp.where(tokens.free, 0, -1)
  frame = jnp.where(tokens.free, tokens.stats.get(FRAME, tokens.stats.get('group', none)), -1)
  rank = ranks_within(frame, -sequence_index(tokens.pos).astype(jnp.float32))
  return jnp.where(frame < 0, -1, rank)
