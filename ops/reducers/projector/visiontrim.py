"""VisionTrim: keeps dominant tokens, and tokens near the prompt into which all others merge.

Axes: B batch, N slots now, M slots after, D features, C features of the tower, T words, H heads, d
features a head, E complement tokens.
"""

import dataclasses
import itertools
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from ops.assignments import Assignment, Mix
from ops.moves.rows import take
from ops.primitives.match import cosine, l2_normalize
from ops.primitives.quantiles import by_each_others_variance, variance
from ops.primitives.queries import received_from_others
from ops.primitives.select import keep_top, ranks, top
from ops.reducers.base import Checked, Reducer
from ops.signals import TEXT_SIGNALS, Signals
from ops.tokens import TokenSet, count, num_left
from ops.values import Count, Iterations, OneOf

Array = jax.Array
VARIANTS = ('release', 'paper')
# The weight of positions beside features, and the cells of a token's neighbourhood.
OF_POSITIONS, NEIGHBOURHOOD = 0.5, 9


@dataclasses.dataclass(frozen=True)
class VisionTrim(Checked, Reducer):
  """Keeps the tokens that [CLS] and the others attend to, or that are dominant near and far.

  VisionTrim (Yu et al., 2026), arXiv:2601.22674, before the language model. As released a token's
  importance is the mean of its [CLS] attention and of what it gets from other patches, each of
  length one over all patches, and no more is done. The paper's steps are in the release too, which
  overwrites or skips them: attention, and how like its neighbours a token is, in features and
  position, are softmaxed and weighed by each other's variance; of the others those nearest to the
  prompt are complement tokens; each that is left joins, for some rounds, the one that the words
  make most like it, and the mean of what joins is added. Words and tokens are what the language
  model reads, where the release asks CLIP's text tower. Without words the next most dominant ones
  are complement tokens, and others join the most similar.

  Attributes:
    variant: 'release' or 'paper'.
    complement: E, among the tokens kept, of the paper.
    rounds: of joining.
  """

  variant: Annotated[str, OneOf(VARIANTS)] = 'release'
  complement: Count = 10
  rounds: Iterations = 3
  site = 'after'

  @property
  def needs(self) -> frozenset[str]:
    if self.variant == 'release':
      return frozenset({'cls_attention', 'queries', 'keys'})
    return frozenset({'cls_attention', 'vision_features', 'grid'}) | TEXT_SIGNALS

  @property
  def drops(self) -> str:
    return 'pruning drops tokens' if self.variant == 'release' else ''

  def min_slots(self, slots: int, protected: int) -> int:
    return min(slots, protected + 1 + self.complement * (self.variant == 'paper'))

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    free = tokens.free
    attended = jnp.where(free, jax.lax.stop_gradient(signals.cls_attention).mean(axis=1), 0.0)
    if self.variant == 'release':
      received = received_from_others(tokens, signals.queries, signals.keys)
      return keep_top(tokens, l2_normalize(attended) + l2_normalize(received), num_slots=num_slots)
    features = jax.lax.stop_gradient(signals.vision_features.astype(jnp.float32))
    near = local_importance(tokens, features, signals.grid)
    return self._with_complement(tokens, signals, by_each_others_variance(attended, near, free),
                                 num_slots)

  def _with_complement(self, tokens: TokenSet, signals: Signals, importance: Array,
                       num_slots: int) -> Mix:
    slots, free, size = tokens.slots, tokens.free, self.complement
    x, text = (jax.lax.stop_gradient(l2_normalize(each)) for each in (tokens.x, signals.text))
    text = jnp.where(signals.text_valid[:, :, None], text, 0.0)
    asked = count(signals.text_valid) > 0
    room = num_left(tokens, num_slots) - count(tokens.fixed)
    dominant = free & (ranks(top(importance, slots, excluded=~free), slots) < room - size)
    rest = free & ~dominant
    near = jnp.where(asked, jnp.einsum('bnd,btd->bn', x, text, precision='highest'), importance)
    chosen = rest & (ranks(top(near, slots, excluded=~rest), slots) < size)
    own, place = (jnp.arange(length, dtype=jnp.int32)[None] for length in (slots, num_slots))
    group = jnp.where(tokens.fixed, 0, jnp.where(dominant, 1, jnp.where(chosen, 2, 3)))
    src = jnp.argsort(slots * group + own, axis=1)[:, :num_slots].astype(jnp.int32)
    first = count(tokens.fixed | dominant)
    at = first + jnp.arange(size, dtype=jnp.int32)[None]
    target = take(src, jnp.minimum(at, num_slots - 1))
    added = self._joined(tokens.x, text, asked, target, take(chosen, target), rest & ~chosen)
    valid = place < first + count(chosen)
    rows = valid[:, :, None] & (src[:, :, None] == own[:, None])
    spread = (at[:, :, None] == place[:, None]).astype(jnp.float32)
    return Mix(rows + jnp.einsum('bem,ben->bmn', spread, added), valid=valid)

  def _joined(self, x: Array, text: Array, asked: Array, target: Array, there: Array,
              joins: Array) -> Array:
    """Returns what part of each token is added to each complement token, float32[B, E, N]."""
    x = jax.lax.stop_gradient(x.astype(jnp.float32))
    alike = jnp.einsum('bnd,btd->bnt', l2_normalize(x), text, precision='highest')
    grown, added = take(x, target), jnp.zeros((len(x), target.shape[1], x.shape[1]))
    for _ in range(self.rounds):
      by_words = jnp.einsum('bnt,bet->ben', alike, jnp.einsum(
          'bed,btd->bet', l2_normalize(grown), text, precision='highest'), precision='highest')
      scores = jnp.where(asked[:, :, None], by_words, cosine(grown, x))
      best = jnp.argmax(jnp.where(there[:, :, None], scores, -jnp.inf), axis=1)
      member = (best[:, None] == jnp.arange(target.shape[1])[None, :, None]) & joins[:, None]
      share = member / jnp.maximum(jnp.sum(member, axis=2, keepdims=True), 1)
      grown = grown + jnp.einsum('ben,bnd->bed', share, x, precision='highest')
      added = added + share
    return added


def local_importance(tokens: TokenSet, features: Array, grid: tuple[int, int]) -> Array:
  """Returns how like its neighbours on the grid each token is, float32[B, N]; all add up to 1.

  Args:
    tokens: N slots.
    features: float32[B, N, C]; neighbours that are not there count as alike.
    grid: (rows, columns).
  """
  rows, columns = grid
  free, slots = tokens.free, tokens.slots
  spread = variance(features, jnp.broadcast_to(free[:, :, None], features.shape))[:, None]
  of_places = max(float(np.var(np.indices(grid), ddof=1)), 1e-12)
  cell = jnp.where(free, tokens.pos, rows * columns)
  slot = jax.vmap(lambda at, own: jnp.full(rows * columns + 1, slots, jnp.int32).at[at].set(own))(
      cell, jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), cell.shape))
  row, column = tokens.pos // columns, tokens.pos % columns
  total = jnp.zeros(free.shape)
  for down, right in itertools.product((-1, 0, 1), repeat=2):
    inside = (row + down >= 0) & (row + down < rows) & (column + right >= 0)
    inside &= (column + right < columns) & free
    other = take(slot, jnp.where(inside, tokens.pos + down * columns + right, rows * columns))
    inside &= other < slots
    gap = features - take(features, jnp.minimum(other, slots - 1))
    unlike = jnp.sum(gap * gap, axis=2) / jnp.maximum(spread, 1e-12)
    unlike += OF_POSITIONS * (down * down + right * right) / of_places
    total -= jnp.where(inside, unlike, 0.0)
  return jax.nn.softmax(total / NEIGHBOURHOOD, axis=1, where=free)
