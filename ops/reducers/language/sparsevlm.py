"""SparseVLM: the words that look like the image rate its tokens, and some that go are recycled.

Axes: B batch, N slots now, D features, H heads, K kv heads, G heads that share one, R rows that may
rate.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ops import attention
from ops.assignments import Assignment
from ops.attention import HIDDEN_LOGIT
from ops.moves.rows import take
from ops.primitives.contextual import recycle
from ops.primitives.queries import heads_in_turn, text_after_images
from ops.primitives.select import keep_top
from ops.reducers.base import Checked, Reducer
from ops.signals import Signals
from ops.tokens import TEXT, VISUAL, TokenSet, count
from ops.values import Count, OneOf, Share

Array = jax.Array
VARIANTS = ('release', 'plus', 'paper')


@dataclasses.dataclass(frozen=True)
class SparseVLM(Checked, Reducer):
  """Keeps the tokens that rating words attend to, and a few means of the best of the others.

  SparseVLM (Zhang et al., 2024), arXiv:2410.04417. Words rate that image tokens are more like than
  like the mean word: by a softmax over the text after the image of products of input embeddings.
  Scores are means over their rows and over heads, of the layer behind which tokens go. The best 30
  % of those that go are recycled: one in ten of them is the centre of a DPC-KNN cluster, whose mean
  stands behind the tokens that stay. A budget counts what is recycled, too. Where no word stands
  out, all text after the image rates. In the paper's 32 layers cuts stand after layers 2, 6 and 15;
  309, 204 and 113 tokens there are what the release calls 192.

  Attributes:
    variant: 'release', version 1.5, where a list says how many stay, and what stays is numbered
      anew; it breaks ties of density by noise, which is left out here. 'plus', the release's second
      version: attention is divided by what RoPE makes of equal vectors, of all heads those count
      that the words spend most on, nothing is recycled, and positions stay. Or 'paper', where of V
      tokens `scale` * (V - the rank of the words' attention to them) go, if the budget lets as many
      stay; the rank is of the mean over heads, which the text does not say.
    heads: of 'plus', those that count.
    scale: of 'paper', whose own value is not known here.
  """

  variant: Annotated[str, OneOf(VARIANTS)] = 'release'
  heads: Count = 14
  scale: Share = 0.5
  watch_needs = frozenset({'hidden_in'})
  site = 'after'
  drops = 'pruned tokens that are not recycled are gone'
  can_empty = True

  @property
  def needs(self) -> frozenset[str]:
    """Names the mean of rows, or what the rows are made of."""
    rows = frozenset({'queries', 'keys', 'rope'})
    return frozenset({'row_attention'}) | (rows if self.variant != 'release' else frozenset())

  @property
  def positions(self) -> str:
    return 'keep' if self.variant == 'plus' else 'compact'

  @property
  def merges(self) -> bool:
    return self.variant != 'plus'

  @property
  def adaptive(self) -> str:
    return 'the rank of attention decides how many stay' if self.variant == 'paper' else ''

  def watched(self, cuts: tuple[int, ...]) -> tuple[int, ...]:
    return (0,) if cuts else ()

  def watch(self, tokens: TokenSet, signals: Signals) -> dict[str, Array]:
    """{'rates': bool[B, N]}, words that stand out in the first layer's input."""
    return {'rates': raters(tokens, signals.hidden_in)}

  def rows(self, tokens: TokenSet) -> Array:
    """bool[B, N], words that rate; all text after the image where there are none."""
    after = text_after_images(tokens)
    rates = tokens.real & tokens.stats.get('rates', after)
    return jnp.where(rates.any(axis=1, keepdims=True), rates, after)

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    if self.variant == 'plus':
      rows = self.corrected(tokens, signals)
      spent = jnp.sum(jnp.where(tokens.free[:, None], rows, 0.0), axis=2)
      heads = jax.lax.top_k(spent, min(self.heads, rows.shape[1]))[1]
      return keep_top(tokens, take(rows, heads).mean(axis=1), num_slots=num_slots)
    stay = None if self.variant == 'release' else self.num_staying(tokens, signals)
    return recycle(tokens, signals.row_attention.mean(axis=1), num_slots=num_slots, stay=stay)

  def corrected(self, tokens: TokenSet, signals: Signals) -> Array:
    """Sums the rows of rating words, over what RoPE makes of equal vectors, float32[B, H, N]."""
    at, rates = self._raters(tokens)
    batch, slots, _, width = signals.keys.shape
    equal = signals.rope.rotate(jnp.ones((batch, slots, 1, width)), tokens.pos)[:, :, 0]
    gravity = jnp.einsum('brd,bnd->brn', take(equal, at), equal, precision='highest')
    weight = rates[:, :, None] / (gravity * width ** -0.5)
    items, rows = heads_in_turn(tokens, signals, at)
    found = jax.lax.map(lambda item: jnp.sum(rows(item) * weight[:, None], axis=2), items)
    return jnp.moveaxis(found, 0, 1).reshape(batch, -1, slots)

  def num_staying(self, tokens: TokenSet, signals: Signals) -> Array:
    """Counts the tokens that stay by the rank of what the words attend to, int32[B, 1]."""
    at, rates = self._raters(tokens)
    items, rows = heads_in_turn(tokens, signals, at)
    start = jnp.zeros((*at.shape, tokens.slots)) + 0.0 * signals.keys[:1, :1, 0, :1]
    total, _ = jax.lax.scan(lambda sum, item: (sum + rows(item).sum(axis=1), None), start, items)
    total = jnp.where(rates[:, :, None] & tokens.free[:, None], total, 0.0)
    values = jnp.linalg.svd(jax.lax.stop_gradient(total), compute_uv=False)
    free = count(tokens.free)
    # As for a matrix without the rows and columns that are not there.
    least = jnp.maximum(count(rates), free) * jnp.finfo(jnp.float32).eps * values[:, :1]
    rank = jnp.sum(values > least, axis=1, keepdims=True, dtype=jnp.int32)
    return free - jnp.floor(self.scale * (free - rank)).astype(jnp.int32)

  def _raters(self, tokens: TokenSet) -> tuple[Array, Array]:
    """int32[B, R], the rating words first, and bool[B, R], which of these do."""
    rows = self.rows(tokens)
    most = tokens.slots if TEXT in tokens.of else min(max(tokens.protected, 1), tokens.slots)
    at = jnp.argsort(~rows, axis=1, stable=True)[:, :most]
    return at, take(rows, at)


def raters(tokens: TokenSet, embeddings: Array) -> Array:
  """Finds words that stand out from the text after the image, bool[B, N], by float[B, N, D]."""
  after, x = text_after_images(tokens), jax.lax.stop_gradient(embeddings)[:, :, None]
  share = attention.received(
      x, x, None, scale=1.0, bias=jnp.where(after, 0.0, HIDDEN_LOGIT),
      query_valid=tokens.real & (tokens.kind == VISUAL))[:, 0]
  mean = jnp.sum(jnp.where(after, share, 0.0), axis=1, keepdims=True) / jnp.maximum(
      count(after), 1)
  return after & (share > mean)
