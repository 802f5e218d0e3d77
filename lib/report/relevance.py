"""How relevant each token of a prompt is to what a language model says next, by a whole pass.

  scores = relevance(lm, variables, prompts)
  prompts = prompts.replace(stats=prompts.stats | {'relevance': scores})   # read by `explained`

Relevance is propagated as by Chefer, Gur and Wolf (2021), arXiv:2103.15679, for self-attention: of
each layer the attention map times its gradient, its positive part, a mean over heads, is added to
the identity, and the maps of all layers are multiplied. Only the row of the last token is formed,
from the last layer to the first, as the gradient comes by: one layer's map is held at a time.

Axes: B batch, N slots, H heads, K kv heads, d features a head, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct

from models.backbones.lm import LM
from models.blocks import ReducibleBlock, add
from models.storage import Params, layer_of
from ops import attention
from ops.primitives.kv_select import latest
from ops.primitives.sparse_attention import Attend, Pattern
from ops.signals import Signals
from ops.tokens import TokenSet

Array = jax.Array


class Gated(Pattern, struct.PyTreeNode):
  """Multiplies an attention map by gates: at ones, their gradient is the map times its own.

  Attributes:
    gates: float32[B, H, N, N].
  """

  gates: Array

  def attend(self, attend: Attend, q: Array, k: Array, v: Array, bias: Array | None,
             positions: Array | None, *, causal: bool, window: int | None = None) -> Array:
    """Attends by the whole map, as `Pattern.attend`."""
    del attend
    maps = attention.eager(q, k, bias=bias, causal=causal, positions=positions, window=window)
    return jnp.einsum('bhnm,bmhd->bnhd', maps * self.gates,
                      jnp.repeat(v, q.shape[2] // v.shape[2], axis=2))


@functools.partial(jax.jit, static_argnums=0)
def relevance(lm: LM, variables: Mapping[str, Any], tokens: TokenSet,
              target: Array | None = None) -> Array:
  """Returns how much each token adds to the logit of the token that follows a prompt.

  Args:
    lm: without a plan, causal in all layers; attention is computed whole, by implementation='xla'.
    variables: its parameters.
    tokens: [B, N], embeddings of prompts.
    target: int[B], the token that follows; None for the one that the model finds likeliest.

  Returns:
    float32[B, N], not negative; 0 at padding.
  """
  lm = lm.clone(implementation='xla')
  block, blocks = lm.bind(variables).stack.block, variables['params']['stack']['blocks']
  last = latest(tokens, 1)
  x, entered = tokens.x, []
  for layer in range(lm.depth):
    entered.append(x)
    ran = block.apply({'params': layer_of(blocks, layer)}, tokens.replace(x=x))
    x = cast(TokenSet, ran).x

  def logit(x: Array) -> Array:
    x = jnp.sum(jnp.where(last[..., None], x, 0), axis=1)
    logits = cast(Array, lm.apply(variables, x, method=lambda lm, x: lm.logits(lm.norm(x))))
    said = jnp.argmax(logits, axis=1) if target is None else target
    return jnp.sum(jnp.take_along_axis(logits, said[:, None], axis=1))

  gradient, row = jax.grad(logit)(x), last.astype(jnp.float32)
  gates = jnp.ones((len(x), lm.heads, tokens.slots, tokens.slots))
  for layer in reversed(range(lm.depth)):
    _, back = jax.vjp(lambda x, gates, layer=layer: _layer(
        block, layer_of(blocks, layer), tokens.replace(x=x), gates), entered[layer], gates)
    gradient, change = back(gradient)
    row += jnp.einsum('bn,bnm->bm', row, jnp.mean(jnp.maximum(change, 0.0), axis=1),
                      precision='highest')
  return jnp.where(tokens.real, row, 0.0)


def _layer(block: ReducibleBlock, params: Params, tokens: TokenSet, gates: Array) -> Array:
  """Returns the features after a layer whose attention map is multiplied by gates."""
  def choose(signals: Signals) -> Gated:
    del signals
    return Gated(gates)

  bound = {'params': params}
  change, _ = block.apply(bound, tokens, method='attend', needs=frozenset(), proportional=False,
                          choose=choose)
  tokens = add(tokens, change)
  change, _ = block.apply(bound, tokens, method='feed_forward')
  return add(tokens, change).x
