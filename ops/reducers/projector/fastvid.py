"""FastVID: segments of a video, salient tokens of every frame, and anchors that sum up a segment.

Axes: B batch, N slots now, M slots after, H heads, F frames, D features.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.assignments import Assignment, Mix
from ops.moves.rows import take
from ops.primitives.crops.frames import FRAME_SIGNALS, Frames, asked, best, check_share
from ops.primitives.crops.groups import cluster_groups
from ops.primitives.crops.regions import keep_flagged, ranks_within, sums
from ops.primitives.crops.segments import segments
from ops.primitives.match import cosine, l2_normalize
from ops.reducers.base import ATTENTIONS, Checked, Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, OneOf, Share

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class FastVID(Checked, Reducer):
  """Keeps the most attended tokens of every frame, and merges the rest of a segment into anchors.

  FastVID (Shen et al., 2025), arXiv:2503.11187, as released for LLaVA-OneVision, but for frame
  features, which are means of tokens here and come of the tower's pooling head there. A segment
  ends where two frames' features are among the least alike of the video, or below a threshold.
  Every frame spends part of its budget on its most attended tokens; the rest goes to anchors in
  every so manyth frame of its segment, counted from the last: density peaks (DPC-KNN) of what is
  not salient. For each frame with anchors, all that is not salient in the segment joins the most
  similar of them, by cosine: an anchor becomes a A + (1 - a) mean, a = max(1 / (n + 1), `alpha`),
  of the n that join, itself among them. Where a budget leaves a segment no anchor, its rest is
  dropped. Newlines stay. Tokens keep their order. The release adds noise of 1e-6 to densities;
  there is none here.

  Attributes:
    by: the attention to rank by; a tower with [CLS] may rank by 'cls_attention'.
    segments: the fewest that a video has, if it has the frames.
    threshold: cosine of two frames' features below which a segment ends.
    context: the share of a frame's budget that goes to anchors.
    every: of so many frames of a segment one has anchors.
    alpha: the least weight of an anchor in what it becomes.
    share: of the tokens that stay, None for the budget's.
  """

  by: Annotated[str, OneOf(ATTENTIONS)] = 'received_attention'
  segments: Count = 8
  threshold: float = 0.9
  context: Share = 0.4
  every: Count = 4
  alpha: Share = 0.6
  share: float | None = None
  site = 'after'
  adaptive = "a segment's share is rounded down"

  def __post_init__(self) -> None:
    super().__post_init__()
    check_share(self.share)

  @property
  def needs(self) -> frozenset[str]:
    return FRAME_SIGNALS | {'crop_grid', self.by}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    frames, x = Frames.of(tokens, signals), jax.lax.stop_gradient(tokens.x)
    kept = asked(frames, tokens, num_slots, self.share)
    context = jnp.floor(kept * self.context + 1e-4).astype(jnp.int32)
    attention = getattr(signals, self.by).mean(axis=1)
    salient = ranks_within(frames.frame, attention) < frames.spread(kept - context)
    first, last = segments(self._starts(frames, x), frames.counts)
    has = (last - jnp.arange(frames.number)[None]) % self.every == 0
    number = take(sums(context, first, frames.number), first) // (
        (last - first + self.every) // self.every)

    rest = jnp.where(salient, -1, frames.frame)
    found = cluster_groups(x, rest, jnp.where(has, number, 0), neighbours=4,
                           width=signals.crop_grid[0] * signals.crop_grid[1])
    anchor = found.centre == jnp.arange(tokens.slots)[None]
    stays = ~frames.there | salient | anchor
    stays = best(tokens, stays, jnp.where(anchor, -1.0, 0.0), num_slots=num_slots)
    picked = keep_flagged(tokens, stays, num_slots=num_slots)
    src, anchors = picked.src, anchor & stays
    of_frame = jnp.where(take(anchors, src), take(frames.frame, src), -1)
    segment = jnp.where(rest >= 0, frames.spread(first), -1)
    joins = joining(cosine(take(x, src), x), of_frame, take(segment, src), segment, frames.number)
    count = jnp.sum(joins, axis=2, keepdims=True)
    own = jnp.where(count > 0, jnp.maximum(1 / (count + 1), self.alpha), 1.0)
    return Mix(own * picked.matrix() + (1 - own) * joins / jnp.maximum(count, 1),
               valid=picked.valid)

  def _starts(self, frames: Frames, x: Array) -> Array:
    """bool[B, F], where segments begin."""
    unit = l2_normalize(frames.means(x))
    alike = jnp.sum(unit[:, 1:] * unit[:, :-1], axis=2)
    alike = jnp.where(jnp.arange(1, frames.number)[None] < frames.counts, alike, jnp.inf)
    rank = jnp.argsort(jnp.argsort(alike, axis=1, stable=True), axis=1)
    cuts = (rank < self.segments - 1) | (alike < self.threshold)
    return jnp.pad(cuts, ((0, 0), (1, 0)))


def joining(alike: Array, of_frame: Array, of_segment: Array, segment: Array,
            number: int) -> Array:
  """Finds for each frame that has anchors the one that each token of its segment is most like.

  Args:
    alike: float32[B, M, N], anchors and tokens.
    of_frame: int32[B, M], the frame of an anchor, -1 for what is none.
    of_segment: int32[B, M], and segment: int32[B, N], -1 for tokens that join none.
    number: F.

  Returns:
    bool[B, M, N]; of equals the first anchor.
  """
  pairs = (of_frame >= 0)[:, :, None] & (of_segment[:, :, None] == segment[:, None])
  pairs &= (segment >= 0)[:, None]
  index = jnp.where(of_frame >= 0, of_frame, number)
  at = jnp.minimum(index, number - 1)

  def by_frame(values: Array) -> Array:
    """The largest over the anchors of a frame, for each of them."""
    most = jax.vmap(lambda v, i: jax.ops.segment_max(v, i, num_segments=number))(values, index)
    return take(most, at)

  alike = jnp.where(pairs, alike, -jnp.inf)
  pairs &= alike == by_frame(alike)
  turn = -jnp.arange(alike.shape[1], dtype=jnp.int32)[None, :, None]
  turn = jnp.where(pairs, turn, jnp.iinfo(jnp.int32).min)
  return pairs & (turn == by_frame(turn))
