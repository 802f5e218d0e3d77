"""FitPrune: keeps the tokens that both the image and the text attend to.

Axes: B batch, N slots now, C rows at a time, H heads.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ops import attention
from ops.assignments import Assignment, take
from ops.primitives.queries import text_after_images
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.rope import sequence_index
from ops.signals import Signals
from ops.tokens import VISUAL, TokenSet, key_bias

Array = jax.Array
ROWS = 32


@dataclasses.dataclass(frozen=True)
class FitPrune(Reducer):
  """Keeps the tokens with the highest attention from image tokens times that from later text.

  FitPrune (Ye et al., 2024), arXiv:2409.10197, as released: of each row the largest over heads
  counts, and rows are added up; where no text follows, the image alone counts. Tokens leave behind
  the attention of a layer, which still reads them, and before its MLP. How many leave in which
  layer is fitted to what hundreds of images lose of the two sums; the release has lists of them for
  LLaVA-1.5 (`remove`, one a layer), and the fit is not here.
  """

  needs = frozenset({'queries', 'keys', 'rope'})
  positions = 'keep'
  drops = 'pruning drops tokens'
  can_empty = True

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    after = text_after_images(tokens)
    image, text = largest_rows(tokens, signals, jnp.stack([
        tokens.real & (tokens.kind == VISUAL), after]))
    text = jnp.where(after.any(axis=1, keepdims=True), text, 1.0)
    return keep_top(tokens, image * text, num_slots=num_slots)


def largest_rows(tokens: TokenSet, signals: Signals, of: Array) -> Array:
  """Adds up rows of a causal attention map, of each entry the largest over heads.

  Args:
    tokens: N slots.
    signals: with `queries` and `keys`.
    of: bool[G, B, N], the rows of G sums.

  Returns:
    float32[G, B, N].
  """
  place, bias = sequence_index(tokens.pos), key_bias(tokens, proportional=False)
  q, k = (jax.lax.stop_gradient(x) for x in (signals.queries, signals.keys))
  chunks = np.arange(-(-tokens.slots // ROWS) * ROWS).reshape(-1, ROWS)

  def add(total: Array, chunk: Array) -> tuple[Array, None]:
    at = jnp.broadcast_to(jnp.minimum(chunk, tokens.slots - 1)[None], (len(place), ROWS))
    rows = attention.rows(take(q, at), k, None, bias=bias, positions=place, last=take(place, at))
    counts = of[:, :, at[0]] & (chunk < tokens.slots)[None, None]
    return total + jnp.einsum('gbc,bcn->gbn', counts.astype(jnp.float32), rows.max(axis=1),
                              precision='highest'), None

  start = jnp.zeros(of.shape) + 0.0 * k[:1, :1, 0, :1]
  return jax.lax.scan(add, start, jnp.asarray(chunks))[0]
