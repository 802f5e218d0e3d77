"""VisionDrop's stages in the language model: image tokens choose among themselves.

Axes: B batch, N slots now, M slots after, H heads, C contextual tokens, d features a head.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.contextual import zip_tokens
from ops.primitives.select import rank_of, ranks, top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import VISUAL, TokenSet, num_left
from ops.values import Count

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class VisionDrop(Reducer):
  """Keeps the tokens that other image tokens attend to, and merges the rest into a few tokens.

  VisionDrop (Xu et al., 2025), arXiv:2506.22283, as released: scores are means over the rows of all
  image tokens, in causal order, and over heads, by the queries and keys of the layer that the cut
  stands before. What is not dominant is merged as in `visionzip`, which is also its stage in the
  tower, by the keys of that layer; contextual tokens stand behind the dominant ones, and all are
  numbered anew. In the paper's 32 layers cuts stand before layers 8, 16 and 24; where 32 tokens are
  left on average, they are 30 and 5 contextual ones, 22 and 4, 16 and 3. Give a config for each, of
  its own `contextual`. The release gathers labels and masks by other indices than tokens, which is
  not followed.

  Attributes:
    contextual: C, among the tokens kept.
  """

  contextual: Count = 4
  needs = frozenset({'next_row_attention', 'next_keys'})
  site = 'before'
  positions = 'compact'

  def rows(self, tokens: TokenSet) -> Array:
    """bool[B, N], image tokens."""
    return tokens.real & (tokens.kind == VISUAL)

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    dominant = num_left(tokens, num_slots) - self.contextual
    order = top(signals.next_row_attention.mean(axis=1), num_slots - self.contextual,
                forced=tokens.fixed, excluded=~tokens.real)
    rest = tokens.real & (ranks(order, tokens.slots) >= dominant)
    metric = signals.next_keys.astype(jnp.float32).mean(axis=2)
    merged = zip_tokens(tokens, metric, tokens.real, rest, rank_of(rest), context=self.contextual,
                        num_slots=num_slots)
    return merged.replace(behind=rest)

  def min_slots(self, slots: int, protected: int) -> int:
    return min(slots, protected + self.contextual + 1)
