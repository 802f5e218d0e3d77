"""VidCom2: frames that stand out keep more, and of each frame what stands out.

Axes: B batch, N slots now, F frames, D features.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.moves.rows import by_row
from ops.primitives.crops.frames import FRAME_SIGNALS, Frames, best, check_share
from ops.primitives.crops.regions import keep_flagged, ranks_within
from ops.primitives.match import l2_normalize
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Positive

Array = jax.Array
WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)


@dataclasses.dataclass(frozen=True)
class VidCom2(Reducer):
  """Keeps of each frame the tokens least like the video and the frame, more of unusual frames.

  VidCom2 (Liu et al., 2025), arXiv:2505.14454, as released. Of the half of the channels that vary
  least over the video, a token is compared with the mean of the video and that of its frame: a sum
  of Gaussians of five widths of the distance. A frame keeps the budget's share of its tokens times
  1 + p - mean p, rounded, at least one and at most all; p is a softmax over frames of minus the
  mean likeness to the video, divided by `temperature`. Where rounding asks for more than the budget
  the tokens that are most alike go. Newlines stay. Tokens keep their order.

  Attributes:
    temperature: of the softmax over frames.
    share: of the tokens that stay, None for the budget's.
  """

  temperature: Positive = 0.01
  share: float | None = None
  needs = FRAME_SIGNALS
  site = 'after'
  drops = 'pruning drops tokens'
  adaptive = "a frame's share is rounded"

  def __post_init__(self) -> None:
    check_share(self.share)

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    frames = Frames.of(tokens, signals)
    sizes = frames.sizes
    to_video, to_frame = likeness(frames, jax.lax.stop_gradient(tokens.x))
    total = jnp.sum(sizes, axis=1, keepdims=True)
    share = frames.num_kept(tokens, num_slots) / jnp.maximum(total, 1)
    share = share if self.share is None else jnp.full_like(share, self.share)

    real = sizes > 0
    usual = frames.means(to_video[..., None])[..., 0] / self.temperature
    part = jax.nn.softmax(jnp.where(real, -usual, -1e9), axis=1)
    mean = 1 / jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1)
    budget = jnp.round(jnp.minimum(share * (1 + part - mean), 1.0) * sizes).astype(jnp.int32)
    scores = -(to_video + to_frame)
    own = frames.spread(jnp.maximum(budget, 1))
    stays = ~frames.there | (ranks_within(frames.frame, scores) < own)
    stays = best(tokens, stays, jnp.where(frames.there, scores, 1.0), num_slots=num_slots)
    return keep_flagged(tokens, stays, num_slots=num_slots)


def likeness(frames: Frames, x: Array) -> tuple[Array, Array]:
  """Compares tokens with the means of the video and of their frame, float32[B, N] twice.

  Args:
    frames: of N slots.
    x: float[B, N, D].
  """
  def of_row(*row: Any) -> tuple[Array, Array]:
    frames, x = jax.tree.map(lambda leaf: leaf[None], row)
    there = frames.there[..., None]
    x = jnp.where(there, x.astype(jnp.float32), 0.0)
    number = jnp.maximum(jnp.sum(there, axis=1, keepdims=True), 1)
    mean = jnp.sum(x, axis=1, keepdims=True) / number
    variance = jnp.sum(jnp.where(there, (x - mean) ** 2, 0.0), axis=1)
    rank = jnp.argsort(jnp.argsort(variance, axis=1, stable=True), axis=1)
    unit = l2_normalize(jnp.where((rank < x.shape[2] // 2)[:, None], x, 0.0))
    centre = jnp.sum(unit, axis=1, keepdims=True) / number

    def gaussians(centre: Array) -> Array:
      squares = jnp.sum((unit - centre) ** 2, axis=2)
      return sum((jnp.exp(-squares / (2 * width)) for width in WIDTHS), jnp.zeros_like(squares))

    return gaussians(centre)[0], gaussians(frames.spread(frames.means(unit)))[0]

  return by_row(of_row, frames, x)
