"""MustDrop's stage in the tower: windows of patches that are alike become one token.

Axes: B batch, N slots now, W windows.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.moves.rows import take
from ops.primitives.crops.frames import best
from ops.primitives.crops.groups import average_flagged
from ops.primitives.crops.regions import sums
from ops.primitives.match import l2_normalize
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, count, num_kept
from ops.values import Count


@dataclasses.dataclass(frozen=True)
class MustDropMerge(Reducer):
  """Merges windows of patches into one token each, those whose patches are most alike.

  The vision stage of MustDrop (Liu et al., 2024), arXiv:2411.10803, as released, with the count of
  tokens given (there is a threshold beside it). A window of 2 x 2 patches is as alike as the mean
  cosine of its pairs; the most alike ones become the mean of their tokens, by sizes, in the place
  of the last, until no more are left than the budget. Windows that the grid cuts short, or of which
  tokens are gone, merge what is there. Where all have merged and it is not enough, the last ones
  are dropped. Tokens keep their order, where the release has merged ones first; its stages in the
  language model are `mustdrop`.

  Attributes:
    side: of a window, in patches.
  """

  side: Count = 2
  needs = frozenset({'grid'})
  site = 'after'
  adaptive = 'a window that merges saves several tokens at once'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    rows, columns = signals.grid
    across = -(-columns // self.side)
    windows = -(-rows // self.side) * across
    window = tokens.pos // columns // self.side * across + tokens.pos % columns // self.side
    window = jnp.where(tokens.free, jnp.clip(window, 0, windows - 1), -1)
    unit = jnp.where(tokens.free[..., None], jax.lax.stop_gradient(l2_normalize(tokens.x)), 0)
    number = sums(tokens.free, window, windows)
    pairs = number * (number - 1)
    alike = (jnp.sum(sums(unit, window, windows) ** 2, axis=2) - number) / jnp.maximum(pairs, 1)
    order = jnp.argsort(jnp.where(pairs > 0, -alike, jnp.inf), axis=1, stable=True)
    saves = take(jnp.maximum(number - 1, 0), order)
    excess = count(tokens.free) - num_kept(tokens, num_slots)
    merged = jnp.cumsum(saves, axis=1) - saves < excess
    merged = take(merged, jnp.argsort(order, axis=1)) & (pairs > 0)

    own = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), window.shape)
    index = jnp.where(window < 0, windows, window)
    last = jax.vmap(lambda o, i: jax.ops.segment_max(o, i, num_segments=windows))(own, index)
    inside = jnp.maximum(window, 0)
    partner = jnp.where(take(merged, inside) & (window >= 0), take(last, inside), own)
    stays = best(tokens, partner == own, -own.astype(jnp.float32), num_slots=num_slots)
    return average_flagged(tokens, stays, partner, num_slots=num_slots)
