"""DyMU: merges more tokens in a plain image than in a rich one.

Axes: B batch, N slots now, M slots after, A even slots, H heads, d features a head.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops import tokens as tk
from ops.assignments import Assignment, take
from ops.primitives.match import join, nearest, num_excess, parity_order, scatter
from ops.primitives.select import ranks, top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet

Array = jax.Array


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
      model. It belongs to a checkpoint and a budget: `find_threshold` measures it.
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
    a, b, best, match = candidates(tokens, signals.keys)
    half, crowd = tk.count(tokens.free) // 2, num_excess(tokens, num_slots)
    alike = jnp.sum(best > threshold, axis=1, keepdims=True)
    alike = jnp.minimum(alike, half if self.most is None else jnp.minimum(half, self.most))
    place = ranks(top(best, a.shape[1]), a.shape[1])
    source = (place < jnp.maximum(alike, crowd)) & (best > -jnp.inf)

    own = jnp.broadcast_to(jnp.arange(tokens.slots, dtype=jnp.int32), tokens.kind.shape)
    turn = scatter(own, a, own[:, :a.shape[1]] if tokens.protected else place)
    turn = scatter(turn, b, tokens.slots + own[:, :b.shape[1]])
    merge = join(tokens, scatter(own, a, jnp.where(source, match, a)), turn, num_slots=num_slots)
    count = jnp.sum(tokens.real, axis=1, keepdims=True, dtype=jnp.int32)
    left = count - jnp.sum(source, axis=1, keepdims=True, dtype=jnp.int32)
    return merge.replace(valid=jnp.arange(num_slots)[None] < left, wanted=(count - alike)[:, 0])


def candidates(tokens: TokenSet, keys: Array) -> tuple[Array, Array, Array, Array]:
  """Splits slots into even and odd ones, and finds the best match of each even one.

  Args:
    tokens: N slots.
    keys: float[B, N, H, d], compared by the cosine of their mean over heads.

  Returns:
    int32[B, A] and [B, N - A], slots; float32[B, A], the best cosine, -inf where nothing may merge;
    int32[B, A], the slot that has it.
  """
  order = parity_order(tokens)
  a, b = order[:, ::2], order[:, 1::2]
  metric = jax.lax.stop_gradient(keys).astype(jnp.float32).mean(axis=2)
  return a, b, *nearest(metric, a, b, use_a=take(tokens.free, a), use_b=take(tokens.free, b))


def find_threshold(tokens: TokenSet, keys: Array, *, remove: int) -> Array:
  """Finds the threshold at which the images of a batch lose `remove` tokens each, on average.

  It is the similarity of the best pair that stays apart when the most similar pairs of the whole
  batch merge. Run over many batches, layer after layer with the thresholds found so far, and take
  the mean of what each batch gives.

  Args:
    tokens: N slots.
    keys: float[B, N, H, d].
    remove: tokens; counts as half of the slots that are not protected where it is more.

  Returns:
    float32[], not negative.
  """
  best = candidates(tokens, keys)[2].reshape(-1)
  count = min(remove, (tokens.slots - tokens.protected) // 2) * len(tokens.x)
  first_left = jnp.sort(best, descending=True)[min(count, best.size - 1)]
  return jnp.maximum(first_left, 0.0)
