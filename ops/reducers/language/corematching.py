"""CoreMatching: keeps the image tokens that activate the same neurons as the text.

Axes: B batch, N slots now, F MLP width.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.queries import latest_but, shared_neurons
from ops.primitives.select import above_elbow, keep_top
from ops.reducers.base import Checked, Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, count, num_kept
from ops.values import Count, OneOf, Share

Array = jax.Array
VARIANTS = ('release', 'paper')


@dataclasses.dataclass(frozen=True)
class CoreMatching(Checked, Reducer):
  """Keeps the tokens that share more MLP neurons with the text than those at the elbow.

  CoreMatching (Wang et al., 2025), arXiv:2505.19235. Shared neurons are counted and sorted; the
  elbow is the token farthest from the line between the first and the last. Where more tokens are
  above it than the budget lets stay, the best stay; where all share as many, all count as above.
  What goes is gone, here as in the paper; what the release does instead is `corematching_cache`.
  Its other half, to leave out neurons while a model decodes, is not here: weights are read whole,
  and columns picked for each row would be copied in every step.

  Attributes:
    variant: whose neurons are shared. 'release': all that are positive, of the token that is `back`
      from the end of the prompt. 'paper': of each token its `own` most active share of those, and
      of the prompt the `common` share of all neurons that the most tokens have; which tokens vote,
      and the two shares, are not known here: all do.
    back: from the end of the prompt, 1 for the last token.
    own, common: of the paper's variant.
  """

  variant: Annotated[str, OneOf(VARIANTS)] = 'release'
  back: Count = 5
  own: Share = 0.4
  common: Share = 0.4
  needs = frozenset({'mlp_hidden'})
  site = 'after'
  positions = 'keep'
  drops = 'pruning drops tokens'
  adaptive = 'the elbow decides how many stay'
  can_empty = True

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    scores = self.shared(tokens, signals)
    core = count(above_elbow(scores, tokens.free))
    budget = jnp.minimum(core, num_kept(tokens, num_slots))[:, 0]
    kept = keep_top(tokens.replace(budget=budget), scores, num_slots=num_slots)
    return kept.replace(wanted=(count(tokens.fixed) + core)[:, 0])

  def shared(self, tokens: TokenSet, signals: Signals) -> Array:
    """Counts the neurons that each token shares with the prompt, int32[B, N]."""
    hidden = signals.mlp_hidden
    if self.variant == 'release':
      return shared_neurons(hidden, latest_but(tokens, self.back, hidden) > 0)
    active = hidden > 0
    inner = jnp.sort(jnp.where(active, -hidden, 0), axis=2)
    number = jnp.ceil(self.own * jnp.sum(active, axis=2, keepdims=True)).astype(jnp.int32)
    least = -jnp.take_along_axis(inner, jnp.maximum(number - 1, 0), axis=2)
    active &= hidden >= least
    votes = jnp.sum(active & tokens.real[:, :, None], axis=1)
    neurons = max(1, int(self.common * votes.shape[1]))
    return shared_neurons(active, votes >= jax.lax.top_k(votes, neurons)[0][:, -1:])
