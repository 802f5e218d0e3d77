"""How much heads of a language model look at images: by that YOPO (arXiv:2410.06169) drops some.

  ratios = visual_ratios(lm, variables, prompts)
  heads = lowest_heads(ratios[layer], 0.5)            # args.heads of `yopo` in this layer

Axes: B batch, N slots, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.backbones.lm import LM
from models.stack import Tap
from ops import attention
from ops.primitives.queries import text_after_images
from ops.rope import sequence_index
from ops.signals import Signals
from ops.tokens import VISUAL, TokenSet, key_bias

Array = jax.Array


def visual_ratios(lm: LM, variables: Mapping[str, Any], tokens: TokenSet) -> np.ndarray:
  """Returns what words behind an image pay images over what they pay all else, a mean over prompts.

  Args:
    lm: without a plan.
    variables: its parameters.
    tokens: [B, N], embeddings of prompts.

  Returns:
    float32[L, H].
  """

  def read(first: int, tokens: TokenSet, signals: Signals) -> Array:
    del first
    paid = attention.received(signals.queries, signals.keys, None,
                              positions=sequence_index(tokens.pos),
                              query_valid=text_after_images(tokens),
                              bias=key_bias(tokens, proportional=False))
    image = tokens.real & (tokens.kind == VISUAL)
    visual = jnp.sum(jnp.where(image[:, None], paid, 0.0), axis=2)
    return visual / jnp.maximum(jnp.sum(paid, axis=2) - visual, 1e-20)

  def run(lm: LM, tokens: TokenSet) -> Array:
    _, out = lm.stack(tokens, Tap(frozenset({'queries', 'keys'}), read))
    return jnp.mean(jnp.stack(out['taps']), axis=1)

  ratios = jax.jit(lambda variables, tokens: lm.apply(variables, tokens, method=run))
  return np.asarray(ratios(variables, tokens))


def lowest_heads(ratios: Sequence[float] | np.ndarray, share: float) -> tuple[int, ...]:
  """Returns the share of heads with the lowest ratios, rounded down, in order; of equals the first.

  Args:
    ratios: [H], of one layer.
    share: of its heads.
  """
  order = np.argsort(np.asarray(ratios), kind='stable')
  return tuple(sorted(order[:int(len(order) * share)].tolist()))
