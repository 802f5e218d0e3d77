"""ARank of a language model's layers, by which γ-MoD (arXiv:2410.13859) chooses those to route.

  ranks = attention_ranks(lm, variables, prompts)
  layers = lowest_ranks(ranks, 16, never=(0, 1, 2, lm.depth - 1))   # ops/primitives/arank.py

Axes: B batch, N slots, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.backbones.lm import LM
from models.stack import Tap
from ops import attention
from ops.primitives.arank import attention_rank
from ops.rope import sequence_index
from ops.signals import Signals
from ops.tokens import TokenSet, key_bias

Array = jax.Array


def attention_ranks(lm: LM, variables: Mapping[str, Any], tokens: TokenSet) -> np.ndarray:
  """Returns the rank of each layer's attention maps, a mean over heads and prompts.

  Args:
    lm: without a plan; a whole map is formed in every layer.
    variables: its parameters.
    tokens: [B, N], embeddings of prompts.

  Returns:
    float32[L].
  """

  def read(first: int, tokens: TokenSet, signals: Signals) -> Array:
    del first
    maps = attention.eager(signals.queries, signals.keys, positions=sequence_index(tokens.pos),
                           bias=key_bias(tokens, proportional=False))
    return attention_rank(jnp.where(tokens.real[:, None, :, None], maps, 0))

  def run(lm: LM, tokens: TokenSet) -> Array:
    _, out = lm.stack(tokens, Tap(frozenset({'queries', 'keys'}), read))
    return jnp.mean(jnp.stack(out['taps']), axis=1)

  ranks = jax.jit(lambda variables, tokens: lm.apply(variables, tokens, method=run))
  return np.asarray(ranks(variables, tokens))
