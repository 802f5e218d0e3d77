"""TextMonkey's token filter: keeps tokens that no later token repeats.

Axes: B batch, N slots now, D features, C slots compared at once.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Gather
from ops.primitives.match import l2_normalize
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TextMonkey(Reducer):
  """Keeps the tokens least similar to any later token.

  The token filter of TextMonkey (Liu et al., 2024), Sec. 3.2, arXiv:2403.04473, as released:
  cosines of the features. Tokens stay in their order. Of several alike the last stays, and the last
  token of all always does. Its resampler, which keeps these and lets them attend to all, is
  `textmonkey_resampler`.
  """

  site = 'after'
  drops = 'pruning drops tokens'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Gather:
    del signals
    return keep_top(tokens, -repeated(tokens.x, tokens.free), num_slots=num_slots)


def repeated(x: Array, among: Array, *, chunk: int = 64) -> Array:
  """Finds the largest cosine of each token with a later one, C = `chunk` slots at a time.

  Args:
    x: float[B, N, D].
    among: bool[B, N], tokens that count.
    chunk: how many slots are compared with all others at once.

  Returns:
    float32[B, N], -2 where no token follows.
  """
  x = jax.lax.stop_gradient(l2_normalize(x))
  places = jnp.arange(x.shape[1])

  def largest(item: tuple[Array, Array]) -> Array:
    place, row = item
    scores = jnp.einsum('bd,bnd->bn', row, x, precision='highest')
    later = among & (places > place)[None]
    return jnp.max(jnp.where(later, scores, -2.0), axis=1)

  largest_cosines = jax.lax.map(largest, (places, x.swapaxes(0, 1)),
                                batch_size=min(chunk, x.shape[1]))
  return largest_cosines.swapaxes(0, 1)
