"""DC2's division: an image is cut into quarters again and again, and quarters that are alike merge.

Axes: B batch, N slots now, D features.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.moves.rows import take
from ops.primitives.crops.frames import best
from ops.primitives.crops.groups import average_flagged
from ops.primitives.crops.quarters import Mosaic, average_linkage
from ops.primitives.crops.regions import sums
from ops.primitives.match import l2_normalize
from ops.reducers.base import Reducer
from ops.signals import CROP_SIGNALS, Signals
from ops.tokens import TokenSet
from ops.values import Count

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DC2(Reducer):
  """Divides an image into quarters, these into quarters, and averages those that are alike.

  The merging of Divide, Conquer and Combine (Wang et al., 2024), arXiv:2408.15556, whose release
  does it to pixels: it cuts an image into crops, clusters each four by average linkage of the
  cosines of their features, averages the crops of a cluster, and goes on with these down to what an
  encoder takes. Descriptions of crops in words, which are the rest of the paper, are not here. Here
  crops have run, and it is their tokens that merge, each with those at the same place: the cosine
  of two quarters is the mean over places, where the release asks the encoder for one feature of a
  crop. Quarters are compared by their own tokens on all levels, where the release goes on with
  averages; so one order of all merges, the most similar first, serves every budget. Sides that do
  not halve leave the first half longer, where the release cuts the rest off.

  The whole image in small, and each frame of a video, is divided by itself. Newlines stay. Where
  all that may merge has, and it is not enough, the last tokens are dropped.

  Attributes:
    least: side in patches at which division ends; the release ends at a crop's.
    threshold: cosine from which on quarters merge, 0.9 in the release; None for as many merges as
      the budget needs.
  """

  least: Count = 1
  threshold: float | None = None
  needs = CROP_SIGNALS
  site = 'after'

  @property
  def adaptive(self) -> str:
    return '' if self.threshold is None else 'a threshold decides how many quarters merge'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    image = Mosaic.of(tokens, signals)
    alike, partner = self.first_merges(image, jax.lax.stop_gradient(l2_normalize(tokens.x)))
    apart = alike < (jnp.inf if self.threshold is None else self.threshold)
    stays = best(tokens, apart, -alike, num_slots=num_slots)
    own = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), alike.shape)
    partner = jnp.where(stays | (alike == -jnp.inf), own, partner)
    # A partner may have merged in turn, at most three times on each level.
    for _ in range((3 * self._levels(image)).bit_length()):
      partner = take(partner, partner)
    return average_flagged(tokens, stays, partner, num_slots=num_slots)

  def first_merges(self, image: Mosaic, unit: Array) -> tuple[Array, Array]:
    """Finds the merge that takes each token away first, of quarters on all levels.

    Args:
      image: where tokens are.
      unit: float32[B, N, D], of length one.

    Returns:
      float32[B, N], the cosine, -inf where none does; int32[B, N], the token that it merges with.
    """
    batch, slots = unit.shape[:2]
    patch = image.crop >= 0

    def divide(_: int, state: tuple[Array, ...]) -> tuple[Array, ...]:
      alike, partner, size, corner, local = state
      size = jnp.where(size > self.least, (size + 1) // 2, size)
      digits = (local >= size).astype(jnp.int32)
      local -= digits * size
      number = 2 * digits[..., 0] + digits[..., 1]
      quarter = 4 * image.key(corner) + number

      def compare(other: Array) -> tuple[Array, Array]:
        """The slot at the same place of another quarter, and how alike the two quarters are."""
        slot = image.slot(corner + jnp.stack([other // 2, other % 2])[None, None] * size + local)
        pair = patch & (other < number) & (slot < slots)
        cosine = jnp.sum(unit * take(unit, jnp.minimum(slot, slots - 1)), axis=2)
        # Only some have a counterpart: the others count in no mean.
        totals = sums(jnp.stack([cosine, jnp.ones_like(cosine)], axis=2),
                      jnp.where(pair, quarter, -1), 4 * image.slots.shape[1])
        total, count = totals[..., 0], totals[..., 1]
        return slot, jnp.where(count > 0, total / jnp.maximum(count, 1), -jnp.inf)

      # One after another: gathered features of three quarters would be the largest buffer.
      there, similar = jax.lax.map(compare, jnp.arange(3))
      height, join = (take(values.reshape(batch, -1), jnp.where(patch, quarter, 0))
                      for values in average_linkage(jnp.moveaxis(similar, 0, 2).reshape(-1, 4, 3)))
      slot = jnp.take_along_axis(there, join[None], axis=0)[0]
      sooner = patch & (slot < slots) & (height > alike)
      return (jnp.where(sooner, height, alike), jnp.where(sooner, slot, partner), size,
              corner + digits * size, local)

    start = (jnp.full_like(unit[..., 0], -jnp.inf), jnp.zeros_like(image.crop), image.size,
             image.first + jnp.zeros_like(image.place), image.place - image.first)
    return jax.lax.fori_loop(0, self._levels(image), divide, start)[:2]

  def _levels(self, image: Mosaic) -> int:
    """Returns the most times that a side can be halved."""
    return (-(-image.longest // self.least) - 1).bit_length()
