"""Token merging for models of code: the subtokens of a word become one token.

Axes: B batch, N slots now.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.moves.rows import take
from ops.primitives.crops.frames import best
from ops.primitives.crops.groups import average_flagged
from ops.primitives.match import l2_normalize
from ops.primitives.select import ranks
from ops.reducers.base import Reducer
from ops.rope import sequence_index
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class SubtokenMerge(Reducer):
  """Averages the subtokens of each semantic unit, such as an identifier.

  On the Effect of Token Merging on Pre-trained Models for Code (Saad et al., 2025),
  arXiv:2507.14423, of which the abstract alone was read: its strategy of averaging; the one that
  learns weights is not here, nor are encoder-decoders. Units are runs of neighbours with the same
  number in the stat 'unit' of the tokens, int[B, N], which a parser gives, or `word_numbers`
  (lib/data/tokenizers.py); tokens without such a stat are units of their own. How many tokens that
  leaves is the text's: `keep` is the most. Where there are more units, neighbours merge until the
  budget is met, the most alike first by cosine, which is this project's. Give token_kinds='text' in
  a language model, and layer 0 to merge embeddings; merged tokens take the place of their last.
  """

  # Units are of text, which a host without a rope has none of, or cannot tell about.
  needs = frozenset({'rope'})
  reads = frozenset({'unit'})
  reconstructed = 'the abstract'
  site = 'before'
  positions = 'keep'
  adaptive = 'a unit of several tokens fills one slot'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    own = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), tokens.kind.shape)
    last = jnp.iinfo(jnp.int32).max
    order = jnp.argsort(jnp.where(tokens.free, sequence_index(tokens.pos), last), axis=1,
                        stable=True).astype(jnp.int32)
    place = ranks(order, tokens.slots)
    before = take(order, jnp.maximum(place - 1, 0))
    follows = tokens.free & (place > 0)
    unit = tokens.stats.get('unit', place)
    same = follows & (unit == take(unit, before))
    x = jax.lax.stop_gradient(l2_normalize(tokens.x))
    apart = jnp.where(follows, -jnp.sum(x * take(x, before), axis=2), jnp.inf)
    starts = best(tokens, ~same, apart, num_slots=num_slots)
    # The latest start up to each token, in order.
    first = jax.lax.cummax(jnp.where(take(starts, order), own, 0), axis=1)
    partner = jnp.where(tokens.free, take(order, take(first, place)), own)
    return average_flagged(tokens, starts, partner, num_slots=num_slots)
