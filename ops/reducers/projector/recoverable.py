"""Recoverable Compression: keeps tokens that stand out by [CLS] or by the prompt, and sums up more.

Axes: B batch, N slots now, M slots after, D features, T words, H heads, d features a head.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.assignments import Assignment, Mix
from ops.moves.rows import take
from ops.primitives.match import cosine, l2_normalize
from ops.primitives.quantiles import local_outliers
from ops.primitives.queries import whole_attention
from ops.primitives.select import rank_of, ranks, top
from ops.reducers.base import Checked, Reducer
from ops.signals import TEXT_SIGNALS, Signals
from ops.tokens import TokenSet, count, num_left
from ops.values import Count, OneOf

Array = jax.Array
VARIANTS = ('release', 'paper')
# How much the prompt weighs beside the keys where similar tokens are sought.
PROMPT_WEIGHT = 50.0


@dataclasses.dataclass(frozen=True)
class Recoverable(Checked, Reducer):
  """Keeps as many tokens as stand out by [CLS] attention, and by the prompt, and merges others.

  Recoverable Compression (Chen et al., 2024), arXiv:2409.01179, as the first author released it.
  There are as many main tokens as local outliers: the most attended ones; and of the others those
  most like the prompt. Of what is left, as many as its attention has outliers each take in the
  tokens most like them, by cosine of keys and by the prompt, in proportion to their attention, as
  in `prumerge`; the others add up to one token more. Main tokens come first, in their order. At
  least one token stays. The prompt is its mean word, as the language model embeds it; the release
  asks CLIP's text tower. Without words there is attention alone.

  Attributes:
    variant: 'release' takes the share of outliers of the tower's width, where 'paper' (as far as
      the release's own steps tell it) takes it of the tokens that are left; compares the wrong
      keys, those of the first tokens of the image; and drops the last token where it merges none.
    peers: neighbours by whose density a token stands out; half as many of what is left.
    neighbours: how many tokens each merged one takes in.
  """

  variant: Annotated[str, OneOf(VARIANTS)] = 'release'
  peers: Count = 20
  neighbours: Count = 32
  # The first is not read: a host that offers it has a [CLS].
  needs = frozenset({'cls_attention', 'queries', 'keys'}) | TEXT_SIGNALS
  site = 'after'
  extra_slots = 1
  merges = True
  adaptive = 'as many tokens stay as stand out'

  @property
  def drops(self) -> str:
    return 'where none is merged, the rest goes' if self.variant == 'release' else ''

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    slots, free = tokens.slots, tokens.free
    queries, keys = (jax.lax.stop_gradient(x.astype(jnp.float32).reshape(*x.shape[:2], -1))
                     for x in (signals.queries, signals.keys))
    attention = whole_attention(tokens, queries, keys)
    asked = self.relevance(tokens, signals)
    room = num_left(tokens, num_slots) - count(tokens.fixed) - 1
    main, asked, wanted = self._main(free, attention, asked, room)
    rest = free & ~main
    found = count(local_outliers(attention, rest, neighbours=max(self.peers // 2, 1)))
    if self.variant == 'release':
      found = jnp.minimum(keys.shape[2] * found // jnp.maximum(count(rest), 1), count(rest))
    number = jnp.minimum(found, room - count(main))
    by_attention = ranks(top(attention, slots, excluded=~rest), slots)
    centre = rest & (by_attention < number)
    left = rest & ~centre
    last = (count(left) > 0) & ((number > 0) | (self.variant == 'paper'))

    own = jnp.arange(slots, dtype=jnp.int32)[None]
    turn = jnp.where(tokens.fixed, own, jnp.where(main, slots + own, jnp.where(
        rest, 2 * slots + by_attention, 3 * slots + own)))
    src = jnp.argsort(turn, axis=1)[:, :num_slots].astype(jnp.int32)
    plain = count(tokens.fixed) + count(main) + number
    place = jnp.arange(num_slots, dtype=jnp.int32)[None]
    rows = (place < plain)[:, :, None] & (src[:, :, None] == own[:, None])
    near = self._near(tokens, keys, asked, src, rest)
    takes = (near & take(centre, src)[:, :, None]) | ((place == plain)[:, :, None] & left[:, None])
    weights = rows + jnp.where(takes, attention[:, None], 0.0)
    return Mix(weights, valid=place < plain + last,
               wanted=(count(tokens.fixed) + wanted + found + last)[:, 0])

  def relevance(self, tokens: TokenSet, signals: Signals) -> Array:
    """Returns how like the mean word each token is, float32[B, N]; 0 without words."""
    x, text = (jax.lax.stop_gradient(each) for each in (tokens.x, signals.text))
    words = jnp.where(signals.text_valid[:, :, None], l2_normalize(text), 0.0)
    mean = jnp.sum(words, axis=1, keepdims=True)
    return cosine(mean, x)[:, 0] * x.shape[2] ** -0.5

  def _main(self, free: Array, attention: Array, asked: Array,
            room: Array | int) -> tuple[Array, Array, Array]:
    """Returns main tokens bool[B, N], the prompt's scores of the others, and how many are wanted.
    """
    slots = free.shape[1]
    seen = jnp.maximum(count(local_outliers(attention, free, neighbours=self.peers)), 1)
    by_attention = ranks(top(attention, slots, excluded=~free), slots)
    first = free & (by_attention < seen)
    lowest = jnp.min(jnp.where(free, asked, jnp.inf), axis=1, keepdims=True)
    asked = jnp.where(first, lowest, asked)
    more = count(local_outliers(asked, free, neighbours=self.peers))
    more = (count(free) - seen) * more // jnp.maximum(count(free), 1)
    by_text = ranks(top(asked, slots, excluded=~free | first), slots)
    rank = jnp.where(first, by_attention, seen + by_text)
    return free & (rank < jnp.minimum(seen + more, room)), asked, seen + more

  def _near(self, tokens: TokenSet, keys: Array, asked: Array, src: Array, rest: Array) -> Array:
    """bool[B, M, N], the tokens of the rest that are most like each token at int32[B, M]."""
    if self.variant == 'release':
      patches = jnp.argsort(~tokens.free, axis=1, stable=True)
      keys = take(keys, take(patches, rank_of(rest)))
    slots = tokens.slots
    alike = cosine(take(keys, src), keys) + PROMPT_WEIGHT * asked[:, None]
    others = rest[:, None] & (src[:, :, None] != jnp.arange(slots)[None, None])
    size = min(self.neighbours, slots - 1)
    closest = jax.lax.top_k(jnp.where(others, alike, -jnp.inf), size)[1].astype(jnp.int32)
    return (ranks(closest.reshape(-1, size), slots).reshape(alike.shape) < size) & others
