"""Radial masks: a baseline that reads positions and nothing else.

Axes: B batch, N slots now, M slots after.
"""

import dataclasses
from typing import Annotated

import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.select import keep_top
from ops.reducers.base import Checked, Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import OneOf

NORMS = ('l1', 'l2', 'linf')


@dataclasses.dataclass(frozen=True)
class Radial(Checked, Reducer):
  """Keeps the tokens nearest to the centre of the image, in slot order.

  The fixed patterns of Which Tokens to Use? (Haurum et al., 2023), arXiv:2308.04657. There a radius
  is given and tokens beyond are masked; here a count, and they are removed, which is the same for
  what is left. Of equally distant tokens the first stay.

  Attributes:
    norm: of the distance: 'l1', 'l2' or 'linf'.
  """

  norm: Annotated[str, OneOf(NORMS)] = 'l2'
  site = 'before'
  needs = frozenset({'grid'})
  drops = 'pruning drops tokens'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    height, width = signals.grid
    # Twice the offset from the centre, so that distances are whole numbers and ties exact.
    down = jnp.abs(2 * (tokens.pos // width) - height + 1)
    right = jnp.abs(2 * (tokens.pos % width) - width + 1)
    distance = {'l1': down + right, 'l2': down ** 2 + right ** 2,
                'linf': jnp.maximum(down, right)}[self.norm]
    return keep_top(tokens, -distance.astype(jnp.float32), num_slots=num_slots)
