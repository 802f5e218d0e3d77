"""CATP's first stage: tokens that stand for the others of their image, and for its text.

Axes: B batch, N slots now, S samples, D features.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.moves.rows import take
from ops.primitives.match import l2_normalize
from ops.primitives.products import pairs
from ops.primitives.queries import sample_of
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TEXT, TokenSet, count, num_kept
from ops.values import NotNegative

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class CATPImages(Reducer):
  """Keeps in each image the tokens that stand for the others and for the text beside it.

  The first stage of CATP (Li et al., 2025), arXiv:2508.07871, from the paper's text (no code is
  known): one token after another is picked that adds most to the sum, over the tokens of its image,
  of their cosine to the nearest picked one, plus `relevance` times its own with the mean of the
  image's text; cosines are rescaled to 0 to 1. Each image keeps the same share, rounded down, and
  the first ones what is left over. An image's text is what follows it up to the next image. It acts
  before layer 0, on embeddings, and leaves half of what goes to the second stage, `catp`.

  Attributes:
    relevance: weight of the text.
  """

  relevance: NotNegative = 0.7
  reconstructed = "the paper's text"
  site = 'before'
  positions = 'keep'
  drops = 'pruning drops tokens'
  can_empty = True

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    sample, free = sample_of(tokens), tokens.free
    x = jax.lax.stop_gradient(l2_normalize(tokens.x))
    words = (tokens.real & (tokens.kind == TEXT))[..., None]
    text = take(_each(jax.ops.segment_sum, jnp.where(words, tokens.x.astype(jnp.float32), 0.0),
                      sample), sample)
    near = _whole(self.relevance * (1 + jnp.sum(x * l2_normalize(text), axis=2)) / 2)
    quota = take(share(tokens, sample, num_kept(tokens, num_slots)), sample)
    alike = _whole((1 + pairs(x, x)) / 2)
    together = (sample[:, :, None] == sample[:, None]) & free[:, :, None] & free[:, None]
    alike = jnp.where(together, jnp.minimum(alike, alike.swapaxes(1, 2)), 0)
    slot = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), sample.shape)

    def pick(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
      """Picks one token more in each image."""
      covered, picked = state
      gain = near + jnp.sum(jnp.maximum(alike - covered[:, None], 0), axis=2)
      gain = jnp.where(free & ~picked & (number < quota), gain, -1)
      best = take(_each(jax.ops.segment_max, gain, sample), sample)
      first = jnp.where((gain == best) & (gain >= 0), slot, tokens.slots)
      new = slot == take(_each(jax.ops.segment_min, first, sample), sample)
      nearest = jnp.max(jnp.where(new[:, :, None], alike, 0), axis=1)
      return jnp.maximum(covered, nearest), picked | new

    start = (0 * near, jnp.zeros(sample.shape, bool))
    picked = jax.lax.fori_loop(0, max(num_slots - tokens.protected, 0), pick, start)[1]
    return keep_top(tokens, picked.astype(jnp.float32), num_slots=num_slots)


def share(tokens: TokenSet, sample: Array, left: Array) -> Array:
  """Divides the tokens int32[B, 1] that stay among the samples, int32[B, S]."""
  sizes = _each(jax.ops.segment_sum, tokens.free.astype(jnp.int32), sample)
  quota = sizes * left // jnp.maximum(count(tokens.free), 1)
  over = left - jnp.sum(quota, axis=1, keepdims=True)
  return quota + ((sizes > 0) & (jnp.cumsum(sizes > 0, axis=1) <= over))


def _whole(similarity: Array) -> Array:
  """Counts in 2^-16: two tokens alike each other tie, and sums of floats would break that at random
  for a prompt of another length."""
  return jnp.round(similarity * 2 ** 16).astype(jnp.int32)


def _each(operation: Callable[..., Array], values: Array, sample: Array) -> Array:
  """Runs a segment operation over the samples of each row: [B, N, ...] -> [B, S, ...]."""
  return jax.vmap(lambda v, s: operation(v, s, sample.shape[1] + 1))(values, sample)
