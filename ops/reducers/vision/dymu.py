"""DyMU: merges more tokens in a plain image than in a rich one.

Axes: B batch, N slots now, M slots after.
"""

import dataclasses

import jax.numpy as jnp

from ops import tokens as tk
from ops.assignments import Assignment
from ops.moves.rows import put
from ops.primitives.match import even_matches, join, num_excess
from ops.primitives.select import ranks, top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class DyMU(Reducer):
  """Merges the pairs of even and odd tokens with a similarity above a threshold.

  Dynamic token merging of DyMU (Wang et al., 2025), Sec. 3, arXiv:2504.17040, as released: ToMe
  (arXiv:2210.09461) with a count of its own for every image. `num_slots` is a capacity: where more
  tokens are left than fit, the next most similar pairs merge too, so none is lost; at most half of
  the free tokens can go at once. Slot order is that of ToMe. A language model sees the tokens as if
  they were still apart with unmerging='virtual' (models/backbones/lm.py, ops/unmerge.py).

  Attributes:
    threshold: cosine above which a pair merges, one for all layers or one for each layer of the
      model. It belongs to a checkpoint and a budget: `python -m tools.fit` measures it.
    most: pairs that may merge at once by the threshold, None for as many as pass it.
  """

  threshold: float | tuple[float, ...] = 0.9
  most: int | None = None
  needs = frozenset({'keys', 'layer', 'depth'})
  proportional = True
  adaptive = 'pairs merge where they are similar enough'

  def __post_init__(self) -> None:
    if self.most is not None and self.most < 1:
      raise ValueError(f'most={self.most} must be at least 1, or None for no limit')

  def min_slots(self, slots: int, protected: int) -> int:
    return slots - (slots - protected) // 2

  def threshold_at(self, layer: int, depth: int) -> float:
    """The threshold of one of `depth` layers."""
    if not isinstance(self.threshold, tuple):
      return self.threshold
    if len(self.threshold) != depth:
      raise ValueError(f'{len(self.threshold)} thresholds do not fit {depth} layers: give one for '
                       'each layer, or one for all')
    return self.threshold[layer]

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    threshold = self.threshold_at(signals.layer, signals.depth)
    a, b, best, match = even_matches(tokens, signals.keys)
    half, crowd = tk.count(tokens.free) // 2, num_excess(tokens, num_slots)
    alike = jnp.sum(best > threshold, axis=1, keepdims=True)
    alike = jnp.minimum(alike, half if self.most is None else jnp.minimum(half, self.most))
    place = ranks(top(best, a.shape[1]), a.shape[1])
    source = (place < jnp.maximum(alike, crowd)) & (best > -jnp.inf)

    own = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), tokens.kind.shape)
    turn = put(own, a, own[:, :a.shape[1]] if tokens.protected else place)
    turn = put(turn, b, tokens.slots + own[:, :b.shape[1]])
    merge = join(tokens, put(own, a, jnp.where(source, match, a)), turn, num_slots=num_slots)
    count = jnp.sum(tokens.real, axis=1, keepdims=True, dtype=jnp.int32)
    left = count - jnp.sum(source, axis=1, keepdims=True, dtype=jnp.int32)
    return merge.replace(valid=jnp.arange(num_slots)[None] < left, wanted=(count - alike)[:, 0])
