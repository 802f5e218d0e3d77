"""ToDRE's stage in the language model: no visual token is left once words do without them.

Axes: B batch, N slots now, H heads.
"""

import dataclasses

import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.queries import sample_of, sum_rows
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TEXT, VISUAL, TokenSet, count, identity
from ops.values import Share


@dataclasses.dataclass(frozen=True)
class ToDREExit(Reducer):
  """Lets all tokens leave a row where words and image attend to each other less than a threshold.

  The second stage of ToDRE (Li et al., 2025), arXiv:2505.18757, from the paper's text: behind a
  layer, 7 of 8 on the way through the model, the share of attention that words behind the first
  image pay the image, and that the image pays these words, both means over heads, are compared with
  a threshold; if both are less, everything leaves. What the paper's threshold is is not known here.
  Under a causal mask an image sees those words alone that stand before it, as between two images. A
  row without words behind its image keeps all. Rows decide for themselves, which is known only when
  the layer has run, so slots stay as padding (mode='mask'): exact, and as costly as without.

  Attributes:
    threshold: below which all leave.
  """

  threshold: Share = 0.1
  reconstructed = "the paper's text"
  needs = frozenset({'queries', 'keys', 'rope'})
  site = 'after'
  mode = 'mask'
  positions = 'keep'
  drops = 'pruning drops tokens'
  adaptive = 'a row that still attends across kinds keeps all its tokens'
  can_empty = True

  def default_shares(self, depth: int) -> dict[int, float]:
    """Returns the layer behind which all may leave."""
    return {max(7 * depth // 8 - 1, 0): 0.0}

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del num_slots
    words = tokens.real & (tokens.kind == TEXT) & (sample_of(tokens) > 0)
    image = tokens.real & (tokens.kind == VISUAL)
    rows = sum_rows(tokens, signals, jnp.stack([words, image]), jnp.mean)
    paid = [jnp.sum(jnp.where(to, row, 0.0), axis=1, keepdims=True) / jnp.maximum(count(of), 1)
            for row, of, to in zip(rows, (words, image), (image, words), strict=True)]
    leaves = (jnp.maximum(*paid) < self.threshold) & words.any(axis=1, keepdims=True)
    return identity(tokens).replace(valid=tokens.real & (tokens.fixed | ~leaves))
