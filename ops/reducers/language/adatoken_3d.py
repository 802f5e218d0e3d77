"""AdaToken-3D: prunes the tokens that hardly any information flows from.

Axes: B batch, N slots now, H heads.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.queries import text_after_images
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, count, num_kept
from ops.values import Share

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class AdaToken3D(Reducer):
  """Keeps the tokens that contribute most to later text, but for the last few percent together.

  AdaToken-3D (Zhang et al., 2025), arXiv:2505.12782, from its abstract alone, which tells of
  information flows in attention, by layer, and that over 60 % of the tokens contribute less than 5
  %: here a token contributes the attention of text after the image, times the length of its value
  behind the output projection, summed over heads. The lowest leave that together have less than
  `share`; a budget says how many may stay.

  Attributes:
    share: of the contributions, that may go.
  """

  share: Share = 0.05
  reconstructed = 'the abstract'
  needs = frozenset({'row_attention', 'projected_norms'})
  site = 'after'
  positions = 'keep'
  drops = 'pruning drops tokens'
  adaptive = 'contributions decide how many stay'
  can_empty = True

  def rows(self, tokens: TokenSet) -> Array:
    """bool[B, N], text after the last visual token."""
    return text_after_images(tokens)

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    flow = jax.lax.stop_gradient(jnp.sum(signals.row_attention * signals.projected_norms, axis=1))
    rising = jnp.sort(jnp.where(tokens.free, flow, jnp.inf), axis=1)
    counted = jnp.isfinite(rising)
    part = jnp.cumsum(jnp.where(counted, rising, 0.0), axis=1)
    go = count(counted & (part < self.share * part[:, -1:]))
    stay = count(tokens.free) - go
    budget = jnp.minimum(stay, num_kept(tokens, num_slots))[:, 0]
    kept = keep_top(tokens.replace(budget=budget), flow, num_slots=num_slots)
    return kept.replace(wanted=(count(tokens.fixed) + stay)[:, 0])
