"""DTEM: learns a metric for merging, apart from the features of the model.

Axes: B batch, N slots now, M slots after, A and C the odd and the even tokens that may merge, G
candidates of each, D features, E features of the learned metric.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ops import tokens as tk
from ops.assignments import Assignment, Mix
from ops.attention import HIDDEN_LOGIT
from ops.moves.rows import take
from ops.primitives.match import bipartite, cosine, parity_order
from ops.primitives.select import rank_of, ranks, top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, Positive, Width

Array = jax.Array


class DTEM(Reducer, nn.Module):
  """Merges similar pairs of even and odd tokens, as ToMe does, on a learned metric.

  In training a soft merge keeps all N slots. Learning to Merge Tokens via Decoupled Embedding (Lee
  and Hong, 2024), Sec. 3, arXiv:2412.10569, as released. The metric is a linear map of the layer's
  normed input, from which no gradient flows back. `soft_merge` says how training merges; attention
  counts a slot by its size, down to 0. Only slots that the cuts before would have left take part.

  Attributes:
    features: E, width of the metric. The release takes that of a head, twice that from D = 1024 on.
    candidates: G, most similar tokens that a token may share itself out among.
    temperature: of the similarities.
    choice_temperature: of the softmax that picks a pair.
    proportional: whether attention counts a slot as often as it has tokens (the release: not in the
      evaluation of MAE weights).
  """

  features: Width = 64
  candidates: Count = 3
  temperature: Positive = 0.1
  choice_temperature: Positive = 0.1
  proportional: bool = True
  needs = frozenset({'hidden', 'slots'})

  def min_slots(self, slots: int, protected: int) -> int:
    return slots - (slots - protected) // 2

  @nn.compact
  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    metric = nn.Dense(self.features, dtype=jnp.float32, name='metric')(
        jax.lax.stop_gradient(signals.hidden))
    if self.has_rng('dropout'):
      count = tokens.slots if signals.slots is None else signals.slots
      return soft_merge(tokens, metric, num_slots=num_slots, count=count,
                        candidates=self.candidates,
                        temperature=self.temperature, choice_temperature=self.choice_temperature)
    order = parity_order(tokens)
    return bipartite(tokens, metric, order[:, ::2], order[:, 1::2], num_slots=num_slots,
                     order='given' if tokens.protected else 'score')


def soft_merge(tokens: TokenSet, metric: Array, *, num_slots: int, count: int, candidates: int,
               temperature: float, choice_temperature: float) -> Mix:
  """Divides every second free token among the ones between, as a relaxed choice decides.

  A token's size shrinks by the part that it gives away; its features stay. Slots come out protected
  ones first, then those that took part by falling size, so that those emptied are last, then the
  others.

  Args:
    tokens: N slots.
    metric: float[B, N, E], compared by cosine.
    num_slots: M, tokens that a hard merge would leave.
    count: slots, protected ones included, of which those that are free take part: the first so many
      that are real.
    candidates, temperature, choice_temperature: see `relaxed_choice`.
  """
  slots = tokens.slots
  part = tokens.free & (rank_of(tokens.real) < count)
  # Those that take part first, in slot order: every second one gives.
  order = jnp.argsort(~part, axis=1, stable=True).astype(jnp.int32)
  a, c = order[:, ::2], order[:, 1::2]
  among = take(part, a)[:, :, None] & take(part, c)[:, None]
  scores = cosine(take(metric, a), take(metric, c))
  picks = jnp.minimum(tk.count(tokens.free) - tk.num_kept(tokens, num_slots),
                      tk.count(part) // 2)
  moved = relaxed_choice(scores, among, picks, most=max(count - num_slots, 0),
                         candidates=candidates,
                         temperature=temperature, choice_temperature=choice_temperature)

  # size_weights[m, n], in the order above: the part of slot n that slot m has afterwards.
  moved = moved.swapaxes(1, 2)
  moved = jnp.stack([moved, jnp.zeros_like(moved)], axis=3).reshape(*moved.shape[:2], -1)
  moved = jnp.stack([jnp.zeros_like(moved), moved], axis=2).reshape(len(order), -1, moved.shape[2])
  moved = jnp.pad(moved, ((0, 0), (0, slots % 2), (0, 0)))[:, :, :slots]
  rest = 1 - jnp.sum(moved, axis=1)
  rest += jax.lax.stop_gradient(jnp.clip(rest, 0.0, 1.0) - rest)
  eye = jnp.eye(slots, dtype=jnp.float32)[None]
  size_weights = moved + eye * rest[:, None]

  sizes = take(tokens.sizes, order)
  held = size_weights * sizes[:, None]
  after = jnp.sum(held, axis=2)
  gets = (jnp.arange(slots) % 2 == 1)[None] & take(part, order) & (after > 0)
  weights = jnp.where(gets[:, :, None], held / jnp.where(gets, after, 1.0)[:, :, None], eye)

  # Back to slots: columns as the tokens came, rows as they leave.
  back = ranks(order, slots)
  leaves = top(take(after, back), slots, forced=tokens.fixed, excluded=~part & ~tokens.fixed)
  rows = take(back, leaves)
  weights, size_weights = (jnp.take_along_axis(take(matrix, rows), back[:, None], axis=2)
                           for matrix in (weights, size_weights))
  return Mix(weights, size_weights=size_weights)


def relaxed_choice(scores: Array, among: Array, picks: Array, *, most: int, candidates: int,
                   temperature: float, choice_temperature: float) -> Array:
  """Returns the part that each token of A gives to each of C when the best `picks` pairs merge.

  One softmax over all pairs picks one; its token's other pairs are made less likely by as much, and
  the next is picked. What a token was picked for beyond once is scaled back to once.

  Args:
    scores: float32[B, A, C].
    among: bool[B, A, C], pairs that may merge.
    picks: int32[B, 1].
    most: picks that are made at most.
    candidates: G, pairs of each token of A that count, the best ones.
    temperature: of the scores.
    choice_temperature: of the softmax over pairs.

  Returns:
    float32[B, A, C], rows adding up to 1 at most.
  """
  best, index = jax.lax.top_k(jnp.where(among, scores, -jnp.inf),
                              min(candidates, scores.shape[2]))
  allowed = best > -jnp.inf
  eps = jnp.finfo(jnp.float32).eps

  def pick(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
    logits, chosen = state
    flat = jnp.where(allowed, logits / choice_temperature, HIDDEN_LOGIT).reshape(len(logits), -1)
    one = jnp.where(allowed, jax.nn.softmax(flat, axis=1).reshape(logits.shape), 0.0)
    one = jnp.where((number < picks)[..., None], one, 0.0)
    left = jnp.maximum(1 - jnp.sum(one, axis=2, keepdims=True), eps)
    return logits + jnp.log(left), chosen + one

  start = jnp.where(allowed, best, 0.0) / temperature, jnp.zeros_like(best)
  chosen = jax.lax.fori_loop(0, most, pick, start)[1]
  total = jax.lax.stop_gradient(jnp.sum(chosen, axis=2, keepdims=True))
  chosen = chosen / jnp.maximum(total, 1.0)
  hit = index[..., None] == jnp.arange(scores.shape[2])[None, None, None]
  return jnp.sum(jnp.where(hit, chosen[..., None], 0.0), axis=2)
