"""CDPruner: keeps the tokens that are most diverse, given the prompt.

Axes: B batch, N slots now, M slots after, D features, T words, P picks.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.farthest import RowOf, pick_greedily, with_cosines
from ops.primitives.match import l2_normalize
from ops.primitives.quantiles import above_lowest
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, count

Array = jax.Array
# Of a slot's volume, so much or less is what rounding left: others already span it.
ROUNDING = 1e-5


@dataclasses.dataclass(frozen=True)
class CDPruner(Reducer):
  """Keeps the most diverse tokens, weighed by how they relate to the prompt: a DPP, greedily.

  CDPruner (Zhang et al., 2025), arXiv:2506.10967, as released. A token's relevance is minus the
  mean cosine of its features and the prompt's words, scaled to 0 to 1; the kernel of a
  determinantal point process is the cosine of two tokens times the relevance of both; whichever
  adds most to its determinant is picked next. The release scales relevance over a whole batch, so
  that a row depends on its neighbours, where here each row is scaled by itself; and it compares the
  words of CLIP's text tower with CLIP's own projection of the tokens, where here both are what the
  language model reads. In a row without words all tokens are equally relevant.
  """

  needs = frozenset({'text', 'text_valid'})
  site = 'after'
  drops = 'pruning drops tokens'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    vectors = jax.lax.stop_gradient(l2_normalize(tokens.x))
    text = jax.lax.stop_gradient(l2_normalize(signals.text))
    relevance = relevance_of(vectors, text, tokens.free, signals.text_valid)
    turn = most_diverse(tokens.x, relevance, tokens.free,
                        count=max(num_slots - tokens.protected, 0))
    return keep_top(tokens, -turn, num_slots=num_slots)


def relevance_of(vectors: Array, text: Array, among: Array, real: Array) -> Array:
  """Returns how relevant each slot is to the words, float32[B, N], 0 to 1; 1 without words.

  Args:
    vectors: float32[B, N, D], of length one.
    text: float32[B, T, D], of length one.
    among: bool[B, N], slots that count.
    real: bool[B, T], words that count.
  """
  mean = jnp.sum(jnp.where(real[:, :, None], text, 0.0), axis=1) / jnp.maximum(count(real), 1)
  scores = -jnp.einsum('bnd,bd->bn', vectors, mean, precision='highest')
  above, spread = above_lowest(scores, among)
  return jnp.where(spread > 0, (above + 1e-6) / jnp.where(spread > 0, spread, 1.0), 1.0)


def most_diverse(x: Array, relevance: Array, among: Array, *, count: int) -> Array:
  """Picks slots one by one, each the one that adds most to the volume that all span.

  It factors the kernel, cosines times the relevance of both, a row at a time (Cholesky's way).

  Args:
    x: float[B, N, D].
    relevance: float32[B, N], the length of each slot's vector.
    among: bool[B, N], slots that may be picked.
    count: P, how many to pick.

  Returns:
    int32[B, N], at which step each slot was picked, `count` where it was not.
  """
  # A slot without features spans nothing.
  whole = jnp.where(jnp.any(x != 0, axis=2), relevance * relevance, 0.0)

  def pick(values: Array, row_of: RowOf) -> Array:
    def look(data: tuple[Array, ...], state: tuple[Array, Array], pick: Array,
             number: Array) -> tuple[tuple[Array, Array], Array]:
      (values, relevance, whole), (factor, left) = data, state
      own = left[pick]
      row = row_of(values, pick) * relevance * relevance[pick]
      known = jnp.einsum('p,pn->n', factor[:, pick], factor, precision='highest')
      row = jnp.where(own > 0, (row - known) * jax.lax.rsqrt(jnp.where(own > 0, own, 1.0)), 0.0)
      left = left - row * row
      left = jnp.where(left > ROUNDING * whole, left, 0.0)
      return (factor.at[number].set(row), left), left

    nothing = jnp.zeros((len(among), count, among.shape[1]))
    return pick_greedily(look, (values, relevance, whole), among, whole, (nothing, whole),
                         count=count)

  return with_cosines(pick, x)
