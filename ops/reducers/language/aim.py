"""AIM: prunes visual tokens in a language model by a PageRank of its attention.

Axes: B batch, N slots now, H heads, K kv heads, G heads that share one, d features a head.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ops import attention
from ops.assignments import Assignment
from ops.attention import HIDDEN_LOGIT
from ops.moves.rows import by_row
from ops.primitives.select import keep_top
from ops.reducers.base import Checked, Reducer
from ops.rope import sequence_index
from ops.signals import Signals
from ops.tokens import TokenSet, identity
from ops.values import OneOf

Array = jax.Array
VARIANTS = ('paper', 'release')
# Of the softmax that the PageRank walks by, and how many steps it takes.
TEMPERATURE, STEPS = 0.1, 5


@dataclasses.dataclass(frozen=True)
class AIM(Checked, Reducer):
  """Keeps the tokens where random walks over the attention of a layer end.

  AIM (Zhong et al., 2024), arXiv:2412.03248: walks begin anywhere, and take five steps from queries
  to keys by the layer's logits at a temperature of 0.1; a token counts by the root of the mean
  square over heads. Its schedule for 28 layers is keep_ratio=(0.875, 0.75, …, 0.125, 0.0) after
  layers 14 to 21, ratio_of='start', rounded down. The stage before the language model is
  `aim_merge`.

  The walk needs the whole map of the layer that it acts in, in float32, of one kv head at a time.

  Attributes:
    variant: 'paper', what goes is gone; or 'release', where it is only hidden as a key, and still
      runs and walks as a query (mode='mask', which saves nothing).
  """

  variant: Annotated[str, OneOf(VARIANTS)] = 'paper'
  # The map is built anew, from rotated queries and keys in causal order: no other host has a rope.
  needs = frozenset({'queries', 'keys', 'rope'})
  site = 'after'
  positions = 'keep'
  drops = 'pruning drops tokens'
  can_empty = True

  @property
  def mode(self) -> str:
    """Returns the mode that the release's variant needs."""
    return 'mask' if self.variant == 'release' else ''

  @property
  def proportional(self) -> bool:
    """Returns whether sizes count in attention: those that are hidden have none."""
    return self.variant == 'release'

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    shown = tokens.sizes > 0
    ends = by_row(ends_in_row, signals.queries, signals.keys, sequence_index(tokens.pos), shown,
                  tokens.real)
    scores = jnp.where(shown, jnp.sqrt(jnp.mean(ends * ends, axis=1)), -1.0)
    kept = keep_top(tokens, scores, num_slots=num_slots)
    if self.variant == 'paper':
      return kept
    return identity(tokens).replace(policy=(kept.dst < num_slots).astype(jnp.float32))


def ends_in_row(queries: Array, keys: Array, place: Array, shown: Array, real: Array) -> Array:
  """Walks over the map of each head of one row.

  Args:
    queries: float[N, H, d].
    keys: float[N, K, d].
    place: int32[N], positions.
    shown: bool[N], keys that may be stepped to.
    real: bool[N], where walks begin.

  Returns:
    float32[H, N], as `ends_of`.
  """
  slots, heads, width = keys.shape
  bias = jnp.where(shown, 0.0, HIDDEN_LOGIT)[None]

  def of_head(item: tuple[Array, Array]) -> Array:
    queries, keys = item
    return ends_of(attention.eager(queries[None], keys[None, :, None], bias=bias,
                                   scale=width ** -0.5 / TEMPERATURE, positions=place[None]),
                   real[None])[0]

  grouped = queries.reshape(slots, heads, -1, width)
  return jax.lax.map(of_head, (jnp.moveaxis(grouped, 1, 0), jnp.moveaxis(keys, 1, 0))).reshape(
      -1, slots)


def ends_of(walks: Array, real: Array) -> Array:
  """Finds where walks end, of which one begins at each real token.

  Args:
    walks: float32[B, H, N, N], the probability of a step from each query to each key.
    real: bool[B, N].

  Returns:
    float32[B, H, N], shares.
  """
  begin = real / jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1)
  at = jnp.broadcast_to(begin[:, None], walks.shape[:3])
  for _ in range(STEPS):
    at = jnp.einsum('bhn,bhnm->bhm', at, walks, precision='highest')
  return at
