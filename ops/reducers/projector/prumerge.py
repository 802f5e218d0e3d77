"""PruMerge: keeps attended tokens, adds similar ones, and makes one more token of the rest.

Axes: B batch, N slots now, M slots after, H heads, d features a head.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.assignments import Assignment, Mix
from ops.moves.rows import take
from ops.primitives.match import cosine
from ops.primitives.quantiles import outliers
from ops.primitives.queries import whole_attention
from ops.primitives.select import rank_of, ranks
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, count, num_left
from ops.values import Count, OneOf

Array = jax.Array
KEEPS = ('given', 'outliers', 'spaced')
# Why a slot stays, in the order in which capacity is given out.
FIXED, CHOSEN, SPACED, DROPPED, PADDING = range(5)


@dataclasses.dataclass(frozen=True)
class PruMerge(Reducer):
  """Keeps the tokens with the highest [CLS] attention, each with similar tokens added to it.

  LLaVA-PruMerge (Shang et al., 2024), arXiv:2403.15388, as released. Attention is one softmax over
  all heads at once; a token adds to those that it is most like, kept or not, in proportion to its
  attention; what is not kept also adds up to one token more, which stands last. Nothing is
  normalised again, as the paper has it. The release compares the last layer's queries and keys and
  reduces the features before that layer; here both are of the layer at hand. There outliers are
  counted over a batch, and PruMerge+ takes a batch of one; here each row has its own. In a tower
  every crop of an image is a row, with its own outliers, and its last token in its place among the
  patches: reduce there where images have several crops.

  Attributes:
    neighbours: how many tokens, by cosine of the keys, each one that is kept takes in.
    keeps: 'given' fills the slots of the schedule, and with the others `num_slots` is a capacity.
      'outliers' keeps those whose attention lies above the third quartile by more than 1.5 times
      the interquartile range, the release's PruMerge. 'spaced' also keeps evenly spaced ones, about
      three to an outlier, behind these, its PruMerge+; where they do not fit, the least attended of
      them go first. The last token is never one of them, and steps are one token at least.
  """

  neighbours: Count = 32
  keeps: Annotated[str, OneOf(KEEPS)] = 'given'
  # The first is not read: a host that offers it has a [CLS].
  needs = frozenset({'cls_attention', 'queries', 'keys'})
  site = 'after'
  extra_slots = 1

  @property
  def adaptive(self) -> str:
    return '' if self.keeps == 'given' else 'as many stay as attention has outliers'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    slots = tokens.slots
    queries, keys = (x.astype(jnp.float32).reshape(*x.shape[:2], -1)
                     for x in (signals.queries, signals.keys))
    scores = whole_attention(tokens, queries, keys)
    left, real = num_left(tokens, num_slots), count(tokens.real)
    enough = real <= left
    tier = self._tiers(tokens, scores)
    rank = jnp.where(tokens.free, -jax.lax.stop_gradient(scores), 0.0)
    place = ranks(jnp.lexsort((rank, tier), axis=1).astype(jnp.int32), slots)
    stays = tokens.real & (((tier < DROPPED) & (place < left - 1)) | enough)
    turn = jnp.where(tier == SPACED, slots + rank_of(tokens.real), place)
    order = jnp.argsort(jnp.where(stays, turn, 3 * slots), axis=1)[:, :num_slots]
    number, output = count(stays), jnp.arange(num_slots, dtype=jnp.int32)[None]
    kept = output < number
    rows = kept[:, :, None] & (order[:, :, None] == jnp.arange(slots)[None, None])
    weights = rows.astype(jnp.float32)

    refined = kept & take(tokens.free, order) & ~enough
    alike = cosine(take(keys, order), keys)
    alike = jnp.where(tokens.free[:, None] & ~rows, alike, -jnp.inf)
    most = min(self.neighbours, slots - 1)
    closest = jax.lax.top_k(jax.lax.stop_gradient(alike), most)[1].astype(jnp.int32)
    near = ranks(closest.reshape(-1, most), slots).reshape(alike.shape) < most
    near &= (alike > -jnp.inf) & refined[:, :, None]
    last = (~enough & (output == number))[:, :, None]
    rest = tokens.free & ~stays
    weights += jnp.where(near | (last & rest[:, None]), scores[:, None], 0.0)
    filled = number + ~enough
    if self.keeps == 'given':
      partly = tokens.budget is not None or tokens.valid is not None
      return Mix(weights, valid=output < filled if partly else None)
    wanted = jnp.where(enough, real, count(tier < DROPPED) + 1)
    return Mix(weights, valid=output < filled, wanted=wanted[:, 0])

  def _tiers(self, tokens: TokenSet, scores: Array) -> Array:
    """Says why a slot stays, int32[B, N]: one of the numbers from `FIXED` to `PADDING`."""
    chosen = tokens.free if self.keeps == 'given' else outliers(scores, tokens.free)
    spaced = jnp.zeros_like(chosen)
    if self.keeps == 'spaced':
      raster, number = rank_of(tokens.free), count(tokens.free)
      step = jnp.maximum(number // jnp.maximum(count(chosen), 1) // 3, 1)
      spaced = tokens.free & ~chosen & (raster % step == 0) & (raster < number - 1)
    tiers = ((tokens.fixed, FIXED), (chosen, CHOSEN), (spaced, SPACED), (tokens.real, DROPPED))
    return jnp.select([flags for flags, _ in tiers], [tier for _, tier in tiers], PADDING)
