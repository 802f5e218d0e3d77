"""GlobalCom2: the whole image tells what each of its crops may keep, and which tokens.

Axes: B batch, N slots now, H heads, G patches of a crop.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.moves.rows import put, take
from ops.primitives.crops.regions import keep_flagged, ranks_within, region, sums
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, count, num_kept
from ops.values import Positive

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class GlobalCom2(Reducer):
  """Keeps of each crop what itself and the whole image find important, more where there is more.

  GlobalCom2 (Liu et al., 2025), arXiv:2501.05179, as released for LLaVA-NeXT. Scores are the logits
  of [CLS] before the softmax, means over heads. Of the whole image in small the highest stay. A
  crop keeps the budget's share of its tokens times 1 + p - mean p, where p is a softmax over crops
  of the whole image's scores within each one's part, added up and divided by `temperature`; those
  tokens stay whose own score and the whole image's, interpolated at their place, are highest
  together, each divided by its length over the crop. An image of one crop keeps its highest.

  Tokens keep their order. The release has the whole image's in the order of their scores; with
  letter boxing it puts tokens into other cells than they come from, which is not done here.

  Attributes:
    temperature: of the softmax over crops.
    share: of the tokens that stay, None for the budget's.
  """

  temperature: Positive = 10.0
  share: float | None = None
  needs = frozenset({'cls_logits', 'crop', 'patch', 'tiling', 'crop_grid'})
  site = 'after'
  drops = 'pruning drops tokens'
  adaptive = "a crop's share is rounded down"

  def __post_init__(self) -> None:
    if self.share is not None and not 0 < self.share <= 1:
      raise ValueError(f'share={self.share} must be above 0 and at most 1, or None for that of the '
                       'budget')

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    logits, crop = signals.cls_logits.mean(axis=1), jnp.where(tokens.free, signals.crop, -1)
    rows, columns = signals.crop_grid
    groups, several = rows * columns + 1, (signals.tiling > 0).all(axis=1, keepdims=True)
    tiling = jnp.maximum(signals.tiling, 1)
    sizes = sums(tokens.free, crop, groups)
    share = num_kept(tokens, num_slots) / jnp.maximum(count(tokens.free), 1)
    share = share if self.share is None else jnp.full_like(share, self.share)

    first = crop == 0
    shown = jnp.where(first, region(signals.patch, tiling, signals.crop_grid), -1)
    worth = sums(jnp.where(first, logits, 0.0), shown, groups)
    number = jnp.arange(groups)[None]
    there = (number > 0) & (number <= tiling.prod(axis=1, keepdims=True))
    part = jax.nn.softmax(jnp.where(there, worth / self.temperature, -jnp.inf), axis=1)
    mean = 1 / tiling.prod(axis=1, keepdims=True)
    shares = jnp.minimum(share * (1 + part - mean), 1.0).at[:, :1].set(share)
    # A product that should be whole may come out a rounding below.
    budget = jnp.floor(sizes * shares + 1e-4).astype(jnp.int32)

    seen = _interpolated(tokens, logits, crop, signals)
    both = sum(_by_length(scores, crop, groups) for scores in (logits, seen))
    scores = jnp.where(several & (crop > 0), both, logits)
    own = jnp.take_along_axis(budget, jnp.maximum(crop, 0), axis=1)
    return keep_flagged(tokens, (crop >= 0) & (ranks_within(crop, scores) < own),
                        num_slots=num_slots)


def _by_length(scores: Array, crop: Array, groups: int) -> Array:
  """Divides scores by their length over the crop, float32[B, N]."""
  squares = sums(scores ** 2, crop, groups)
  length = jnp.sqrt(jnp.take_along_axis(squares, jnp.maximum(crop, 0), axis=1))
  return scores / jnp.maximum(length, 1e-12)


def _interpolated(tokens: TokenSet, logits: Array, crop: Array, signals: Signals) -> Array:
  """The whole image's scores at the place of each token of its crops, float32[B, N].

  Crops may be cut to the image without its padding, which is all that the whole image shows.
  """
  rows, columns = signals.crop_grid
  across = jnp.maximum(signals.tiling[:, 1:], 1)
  part, patch = jnp.maximum(crop - 1, 0), jnp.maximum(signals.patch, 0)
  index = jnp.where(crop == 0, patch, rows * columns)
  image = put(jnp.zeros((len(logits), rows * columns)), index, logits)
  image = image.reshape(-1, rows, columns)

  def taps(place: Array, length: int) -> tuple[Array, Array, Array]:
    """Lower and upper patch, and the weight of the upper, by the place among the image's cells."""
    low = jnp.where(crop > 0, place, jnp.iinfo(jnp.int32).max).min(axis=1, keepdims=True)
    high = jnp.where(crop > 0, place, -1).max(axis=1, keepdims=True)
    point = (place - low + 0.5) * length / jnp.maximum(high - low + 1, 1) - 0.5
    point = jnp.clip(point, 0, length - 1)
    below = jnp.floor(point).astype(jnp.int32)
    return below, jnp.minimum(below + 1, length - 1), point - below

  top, bottom, down = taps(part // across * rows + patch // columns, rows)
  left, right, over = taps(part % across * columns + patch % columns, columns)

  def at(row: Array, column: Array) -> Array:
    return take(image.reshape(len(image), -1), row * columns + column)

  upper, lower = ((1 - over) * at(row, left) + over * at(row, right) for row in (top, bottom))
  return (1 - down) * upper + down * lower
