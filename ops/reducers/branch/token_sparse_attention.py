"""Token Sparse Attention: in some layers, each head attends among the tokens that matter to it.

Axes: B batch, N slots, M slots that take part, G groups of heads, H heads, W last queries.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated

import jax
import jax.numpy as jnp

from ops.primitives.kv_select import latest, pool_neighbours
from ops.primitives.select import top
from ops.primitives.sparse_attention import HeadGather
from ops.reducers.base import BranchReducer, Checked
from ops.signals import Signals
from ops.tokens import TokenSet, num_left
from ops.values import Count, CountOrZero, OneOf, Share

Array = jax.Array
SELECT = ('head', 'layer')
TINY = 1e-8


@dataclasses.dataclass(frozen=True)
class TokenSparseAttention(Checked, BranchReducer):
  """Lets the tokens that the end of the prompt attends to most take part in attention.

  Token Sparse Attention (Jo et al., 2026), arXiv:2602.03216, as released. All tokens make queries,
  keys and values, which are cached; in each head the last W and the best others attend to each
  other, and the rest get nothing from that head. Scores are means over the last W queries, pooled
  over neighbours. How many stay follows, for all heads of a row, from the mean of their scores: the
  lowest go that together have less than `coverage` of it. What a token gets depends on the end of
  the prompt, so reading an answer with its prompt differs from decoding it, which reads the whole
  cache. Without layers and budget in a config, the second half of the layers is sparse, and
  coverage alone decides; the release has a list of layers for some models, found by how little a
  layer changes its tokens.

  Attributes:
    window: W.
    kernel: neighbouring tokens that are pooled, an odd number; the ends count as zeros.
    coverage: share of the scores that may go; 0 to keep as many as the budget says.
    least: tokens before the window that stay at least, where coverage decides.
    select: 'head', each head has its own tokens; 'layer', one choice for all heads by their mean.
  """

  window: Count = 128
  kernel: Count = 7
  coverage: Share = 0.005
  least: CountOrZero = 1024
  select: Annotated[str, OneOf(SELECT)] = 'head'
  parts = 'core'
  positions = 'keep'
  needs = frozenset({'row_attention'})

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.kernel % 2 == 0:
      raise ValueError(f'kernel={self.kernel} must be odd')

  @property
  def adaptive(self) -> str:
    return 'coverage decides how many tokens take part' if self.coverage else ''

  def rows(self, tokens: TokenSet) -> Array:
    """bool[B, N], the last W tokens."""
    return latest(tokens, self.window)

  def max_rows(self, tokens: TokenSet) -> int:
    return min(self.window, tokens.slots)

  def min_slots(self, slots: int, protected: int) -> int:
    return min(slots, max(protected, self.window) + 1)

  def default_shares(self, depth: int) -> Mapping[int, float]:
    """Returns the second half of the layers, with all tokens that coverage leaves."""
    return dict.fromkeys(range(depth // 2, depth), 1.0)

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> HeadGather:
    scores = self.scores(tokens, signals)
    mean = scores.mean(axis=1, keepdims=True)
    wanted = self.wanted(tokens, mean[:, 0])
    scores = scores if self.select == 'head' else mean
    batch, groups, slots = scores.shape

    def each_group(flags: Array) -> Array:
      return jnp.repeat(flags, groups, axis=0)

    stays = tokens.fixed | latest(tokens, self.window)
    picked = top(scores.reshape(-1, slots), num_slots, forced=each_group(stays),
                 excluded=each_group(~tokens.real)).reshape(batch, groups, num_slots)
    count = jnp.minimum(num_left(tokens, num_slots), jnp.sum(tokens.real, axis=1, keepdims=True))
    count = jnp.minimum(count, wanted[:, None]) if self.coverage else count
    filled = jnp.arange(num_slots)[None] < count
    src = jnp.sort(jnp.where(filled[:, None], picked, slots), axis=2)
    return HeadGather(jnp.minimum(src, slots - 1), valid=src < slots,
                      wanted=wanted if self.coverage else None)

  def scores(self, tokens: TokenSet, signals: Signals) -> Array:
    """float32[B, H, N], attention from the window, pooled; 0 in the window."""
    before = (tokens.real & ~latest(tokens, self.window))[:, None]
    rows = jnp.where(before, signals.row_attention, 0.0)
    return jnp.where(before, pool_neighbours(rows, tokens, kernel=self.kernel, pool='avg'), 0.0)

  def wanted(self, tokens: TokenSet, mean: Array) -> Array:
    """int32[B], tokens that take part by coverage of float32[B, N], those of the window too."""
    before = tokens.real & ~latest(tokens, self.window)
    share = mean / (jnp.sum(mean, axis=1, keepdims=True) + TINY)
    covered = jnp.cumsum(jnp.sort(jnp.where(before, share, jnp.inf), axis=1), axis=1)
    go = jnp.sum(covered < self.coverage, axis=1, dtype=jnp.int32)
    total = jnp.sum(before, axis=1, dtype=jnp.int32)
    kept = jnp.minimum(total, jnp.maximum(self.least, total - go - (go > 0)))
    stays = jnp.sum(tokens.fixed & before, axis=1, dtype=jnp.int32)
    return jnp.sum(tokens.real & ~before, axis=1, dtype=jnp.int32) + jnp.maximum(kept, stays)
