"""ZOO-Prune: keeps diverse tokens to which the projector is sensitive.

Axes: B batch, N slots now, M slots after, D features, C features of the tower, U directions.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.farthest import farthest_first
from ops.primitives.match import l2_normalize
from ops.primitives.quantiles import above_lowest
from ops.primitives.select import keep_top
from ops.reducers.base import Checked, Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, OneOf, Positive, Seed

Array = jax.Array
VARIANTS = ('derivative', 'differences')


@dataclasses.dataclass(frozen=True)
class ZOOPrune(Checked, Reducer):
  """Keeps tokens that are far apart, and of which the projector makes much of a small change.

  ZOO-Prune (Kim et al., 2025), arXiv:2509.24837, as released. A token's sensitivity is the mean
  over random directions, the same for all tokens, of how far its projected features move; a row's
  are scaled to 0 to 1 (all to 1 where they are equal). The most sensitive token is first; then, one
  by one, whichever has the largest product of its sensitivity and its distance, by cosine, from the
  nearest one picked. The release draws anew each time, and measures in half precision, where
  rounding is about as large as the step, for several crops on a projector of low rank; ours is the
  whole one in float32. It takes round down(ratio N) tokens.

  Attributes:
    variant: 'derivative', exact, in one pass a direction, or 'differences' as released, in two.
    directions: U.
    step: of the differences.
    seed: of the directions.
  """

  variant: Annotated[str, OneOf(VARIANTS)] = 'derivative'
  directions: Count = 64
  step: Positive = 0.01
  seed: Seed = 0
  needs = frozenset({'vision_features', 'project'})
  site = 'after'
  drops = 'pruning drops tokens'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    features = jax.lax.stop_gradient(signals.vision_features.astype(jnp.float32))
    above, spread = above_lowest(jax.lax.stop_gradient(
        self.sensitivity(signals.project, features, self.draw(features.shape[2]))), tokens.free)
    weight = jnp.where(spread > 0, above / (spread + 1e-8), 1.0)
    first = jnp.argmax(jnp.where(tokens.free, weight, -1.0), axis=1).astype(jnp.int32)
    turn = farthest_first(tokens.x, tokens.free, first, weight=weight,
                          count=max(num_slots - tokens.protected, 0))
    return keep_top(tokens, -turn, num_slots=num_slots)

  def draw(self, width: int) -> Array:
    """Returns the directions, float32[U, C]."""
    return l2_normalize(jax.random.normal(jax.random.key(self.seed), (self.directions, width)))

  def sensitivity(self, project: Callable[[Array], Array], features: Array,
                  directions: Array) -> Array:
    """Returns how far the projector moves each token, a unit of change, on average.

    Args:
      project: float32[..., C] -> float32[..., D].
      features: float32[B, N, C].
      directions: float32[U, C], of length one.

    Returns:
      float32[B, N].
    """
    if self.variant == 'derivative':
      moves = jax.linearize(project, features)[1]
    else:
      def moves(by: Array) -> Array:
        there, back = project(features + self.step * by), project(features - self.step * by)
        return (there - back) / (2 * self.step)

    def distance(direction: Array) -> Array:
      return jnp.linalg.norm(moves(jnp.broadcast_to(direction, features.shape)), axis=2)

    # One direction after another: what the projector makes of all would be U times as large.
    total, _ = jax.lax.scan(lambda total, direction: (total + distance(direction), None),
                            jnp.zeros(features.shape[:2]), directions)
    return total / len(directions)
