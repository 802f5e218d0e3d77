"""HoliTom's stage before the language model: windows of frames in which what stands still is one.

Axes: B batch, N slots now, H heads, F frames, W frames of a window.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.moves.rows import take
from ops.primitives.crops.frames import FRAME_SIGNALS, Frames, best, check_share
from ops.primitives.crops.groups import cluster_groups, joined, means_of_still, merge_flagged
from ops.primitives.crops.regions import ranks_within, sums
from ops.primitives.crops.segments import segments, windows
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, Share

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class HoliTom(Reducer):
  """Averages places that stand still over windows of frames, then keeps the most attended tokens.

  The outer stage of HoliTom (Shao et al., 2025), arXiv:2505.21334, as released. Windows are those
  that save most tokens: a place whose features stay alike (cosine) from frame to frame of a window
  becomes one token, the mean over the window. What is left after that keeps the ratio that makes
  the budget: of each frame's moving places the most attended ones, and with `context` density peaks
  (DPC-KNN) of the others; of a window's still places density peaks. A peak becomes b times itself
  plus 1 - b times the mean of those that are nearest to it. The most attended are rounded up; where
  all that asks for more than the budget the least attended go.

  Newlines stay. Tokens keep their order, a still place that of its first frame, where the release
  has a window's still places first. Its noise of 1e-6 on densities is not here; with a `context`
  above 0 it stops, by a mask of the wrong shape. The stage in the language model is
  `holitom_merge`.

  Attributes:
    threshold: cosine above which a place stands still.
    context: the share of a frame's tokens that are peaks.
    beta: b.
    neighbours: nearest tokens that make up the density, at most as many as peaks.
    share: of the tokens that stay, None for the budget's.
  """

  threshold: float = 0.8
  context: Share = 0.0
  beta: Share = 0.6
  neighbours: Count = 7
  share: float | None = None
  needs = FRAME_SIGNALS | {'crop_grid', 'received_attention'}
  site = 'after'
  drops = 'moving places that few attend to are dropped'
  merges = True
  adaptive = 'places that stand still are fewer tokens'

  def __post_init__(self) -> None:
    check_share(self.share)

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    frames, x, slots = Frames.of(tokens, signals), jax.lax.stop_gradient(tokens.x), tokens.slots
    own = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), frames.frame.shape)
    runs = frames.runs(frames.likeness(x, frames.at(frames.frame - 1)) > self.threshold)
    starts, saved = windows(frames, runs)
    first, last = (frames.spread(ends) for ends in segments(starts, frames.counts))
    end = frames.at(last)
    still = (last > first) & (end < slots) & (take(runs, jnp.minimum(end, slots - 1))
                                              >= last - first)
    anchor, length, group, x = means_of_still(frames, x, still, first, last)

    total = jnp.sum(frames.sizes, axis=1, keepdims=True)
    kept = frames.num_kept(tokens, num_slots) if self.share is None else self.share * total
    ratio = jnp.minimum(kept / jnp.maximum(total - saved, 1), 1.0)
    asked = sums(group >= 0, group, 2 * frames.number) * ratio
    moving = jnp.ceil(asked[:, :frames.number] - 1e-4)
    dominant = jnp.round(moving * (1 - self.context) + 1e-5)
    attention = signals.received_attention.mean(axis=1)
    chosen = frames.there & ~still & (
        ranks_within(jnp.where(still, -1, group), attention) < frames.spread(dominant))
    centres = jnp.concatenate([moving - dominant, jnp.round(asked[:, frames.number:])], axis=1)
    found = cluster_groups(x, jnp.where(chosen, -1, group), centres.astype(jnp.int32),
                           neighbours=self.neighbours, few=True,
                           width=signals.crop_grid[0] * signals.crop_grid[1])

    partner = jnp.where(chosen | ~frames.there, own, take(found.centre, anchor))
    stays = best(tokens, partner == own, jnp.where(frames.there, attention, jnp.inf),
                 num_slots=num_slots)
    others = joined(((found.centre != own) & (group >= 0)).astype(jnp.float32), found.centre)
    others = take(others, jnp.minimum(partner, slots - 1))
    weight = jnp.where(partner == anchor, jnp.where(others > 0, self.beta, 1.0),
                       (1 - self.beta) / jnp.maximum(others, 1.0))
    return merge_flagged(tokens, stays, partner, weight / length, num_slots=num_slots)
