"""Sampling of the next token, and padding of prompts to one batch.

Axes: B batch, N slots of a prompt, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from ops import choices
from ops.values import CountOrZero, NotNegative, Range, check_fields

Array = jax.Array
SIDES = ('left', 'right')


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Holds how a token is picked from its logits; greedily by default.

  Attributes:
    temperature: divides the logits; 0 picks the largest.
    top_k: samples only among this many of the largest logits, 0 for all.
    top_p: samples, after top_k, only among the fewest of the largest logits whose probabilities
      reach this sum (nucleus sampling, arXiv:1904.09751), and those equal to the last of them.
  """

  temperature: NotNegative = 0.0
  top_k: CountOrZero = 0
  top_p: Annotated[float, Range(high=1, above=0)] = 1.0

  def __post_init__(self) -> None:
    check_fields(self)


def sample(logits: Array, keys: Array, sampling: Sampling) -> Array:
  """Picks one token a row.

  Args:
    logits: float32[B, V].
    keys: B random keys; a row's token depends on its own.
    sampling: static.

  Returns:
    int32[B].
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits.astype(jnp.float32) / sampling.temperature
  if sampling.top_k or sampling.top_p < 1:
    ranked = jnp.sort(logits, axis=-1, descending=True)
    if 0 < sampling.top_k < logits.shape[-1]:
      ranked = jnp.where(jnp.arange(logits.shape[-1])[None] < sampling.top_k, ranked, -jnp.inf)
    chances = jax.nn.softmax(ranked, axis=-1)
    # A token stays if the larger ones without it fall short of top_p: the first always does.
    inside = (jnp.cumsum(chances, axis=-1) - chances < sampling.top_p) & (chances > 0)
    least = jnp.min(jnp.where(inside, ranked, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits >= least, logits, -jnp.inf)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def padded(prompts: Sequence[Sequence[int]], slots: int, *, side: str = 'left',
           fill: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Returns prompts of any lengths as ids int32[B, N] and valid bool[B, N].

  Args:
    prompts: token ids.
    slots: N.
    side: where padding goes, a name in `SIDES`.
    fill: id of padding.

  Raises:
    ValueError: no prompt, an empty one, one that is longer than `slots`, or an unknown side.
  """
  choices.check('side=', side, SIDES)
  lengths = [len(prompt) for prompt in prompts]
  if not lengths or min(lengths) == 0 or max(lengths) > slots:
    raise ValueError(f'prompts of {lengths} tokens do not fit into {slots} slots: give at least '
                     'one, none of them empty or longer')
  ids, valid = np.full((len(lengths), slots), fill, np.int32), np.zeros((len(lengths), slots), bool)
  for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
    filled = slice(slots - length, slots) if side == 'left' else slice(length)
    ids[row, filled], valid[row, filled] = prompt, True
  return ids, valid
