"""LeMo: blocks of tokens that nobody attends to leave a layer out.

Axes: B batch, N slots, H heads.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.primitives.select import keep_top
from ops.reducers.base import BranchReducer
from ops.rope import sequence_index
from ops.signals import Signals
from ops.tokens import TokenSet, count, num_kept
from ops.values import Count, NotNegative


@dataclasses.dataclass(frozen=True)
class LeMo(BranchReducer):
  """Lets the blocks of neighbouring tokens run a layer in which some token is attended to.

  LeMo (Wang et al., 2025), arXiv:2501.09767, of whose paper the abstract and a description of its
  token elimination are known, and no code: for fine-tuning on long texts, forwards and backwards. A
  token is as informative as the attention that it receives in the layer, added up over queries, a
  mean over heads; a block as its most informative token. Blocks below a threshold, found for each
  layer on samples, stay out of it: give one config for each layer with a threshold of its own, and
  as `keep` the most tokens that may run. The paper predicts attention by a small network, and here
  it is worked out, which saves memory and not time; its kernels are not here.

  Attributes:
    block: tokens of a block.
    threshold: of the attention received, below which a block stays out; 0 for `keep` alone.
  """

  block: Count = 64
  threshold: NotNegative = 0.0
  reconstructed = 'the abstract'
  positions = 'keep'
  needs = frozenset({'next_received_attention'})

  @property
  def adaptive(self) -> str:
    return 'a threshold decides how many blocks run' if self.threshold else ''

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    received = signals.next_received_attention.mean(axis=1) * count(tokens.real)
    length = tokens.owner.shape[1]
    block = jnp.clip(sequence_index(tokens.pos), 0, length - 1) // self.block
    number = -(-length // self.block)
    most = jax.vmap(lambda v, b: jax.ops.segment_max(v, b, number))(
        jnp.where(tokens.free, jax.lax.stop_gradient(received), 0.0), block)
    scores = jnp.take_along_axis(most, block, axis=1)
    if not self.threshold:
      return keep_top(tokens, scores, num_slots=num_slots)
    run = count(tokens.free & (scores >= self.threshold))
    budget = jnp.minimum(run, num_kept(tokens, num_slots))[:, 0]
    kept = keep_top(tokens.replace(budget=budget), scores, num_slots=num_slots)
    return kept.replace(wanted=(count(tokens.fixed) + run)[:, 0])
