"""G-Prune: keeps the tokens to which most flows in a graph of similar tokens.

Axes: B batch, N slots now, M slots after, D features.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.match import cosine
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Iterations, Positive, Ratio

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class GPrune(Reducer):
  """Keeps the tokens that most information reaches, passed on among similar tokens.

  G-Prune (Jiang et al., 2025), arXiv:2501.02268, as released for LLaVA-NeXT: thumbnail and crops
  each for themselves, by the features behind the projector. Tokens with a cosine of at least the
  threshold are joined; each passes what it has on to these and to itself by a softmax of their
  cosines, a number of times, and begins with its length. What has reached a token is divided by how
  many it is joined to. The release keeps all newlines; here they are tokens like others.

  Attributes:
    similarity: the threshold.
    temperature: of the softmax.
    steps: how many times.
  """

  similarity: Ratio = 0.5
  temperature: Positive = 0.03
  steps: Iterations = 5
  site = 'after'
  drops = 'pruning drops tokens'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    x = jax.lax.stop_gradient(tokens.x.astype(jnp.float32))
    return keep_top(tokens, self.reached(x, tokens.free), num_slots=num_slots)

  def reached(self, x: Array, among: Array) -> Array:
    """Returns how much reaches each slot, float32[B, N].

    Args:
      x: float32[B, N, D].
      among: bool[B, N], slots that are in the graph.
    """
    alike = cosine(x, x)
    joined = (alike >= self.similarity) & among[:, None] & among[:, :, None]
    shares = jax.nn.softmax(alike / self.temperature, axis=2, where=joined)

    def step(_: int, held: Array) -> Array:
      return jnp.einsum('bn,bnm->bm', held, shares, precision='highest')

    held = jnp.where(among, jnp.linalg.norm(x, axis=2), 0.0)
    return jax.lax.fori_loop(0, self.steps, step, held) / jnp.maximum(jnp.sum(joined, axis=2), 1)
