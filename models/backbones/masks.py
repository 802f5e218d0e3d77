"""What a token of a prompt sees in a language model, beside what came before it or not of it.

Axes: B batch, N slots.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from ops.attention import Alone, Blocks, Exceptions, Pairs
from ops.masks import FRAME, SUMMARY, around_summaries
from ops.primitives.queries import text_after_images
from ops.rope import sequence_index
from ops.tokens import TEXT, VISUAL, TokenSet

# `models.backbones.lm.LM.mask`.
MASKS = ('causal', 'mutual', 'summary', 'composite', 'frames', 'full')


def with_stats(tokens: TokenSet, mask: str, *, frames: bool) -> TokenSet:
  """Returns a prompt's tokens with the stats that a mask goes by, where they lack them.

  Args:
    tokens: of a prompt.
    mask: one of `MASKS`.
    frames: whether positions go by frames, whatever the mask.

  Raises:
    ValueError: a stat that the caller alone can give.
  """
  if mask == 'summary' and SUMMARY not in tokens.stats:
    raise ValueError("mask='summary' goes by the stat 'summary' of the tokens, which these do "
                     'not have: give ids, or the stat')
  if mask == 'mutual' and 'question' not in tokens.stats:
    tokens = tokens.replace(stats=tokens.stats | {'question': text_after_images(tokens)})
  if (mask == 'frames' or frames) and FRAME not in tokens.stats:
    frame = tokens.stats.get('group', jnp.where(tokens.kind == VISUAL, 0, -1))
    tokens = tokens.replace(stats=tokens.stats | {FRAME: frame})
  return tokens


def apart_by_summaries(tokens: TokenSet) -> Pairs:
  """Names what stands behind the summary tokens of a row, and what it does not see."""
  before, behind = around_summaries(sequence_index(tokens.pos),
                                    tokens.real & tokens.stats[SUMMARY])
  return Pairs(behind, before, shown=False)


def _mutual(tokens: TokenSet) -> Pairs:
  """Visual tokens, and the question that all of them see."""
  return Pairs(tokens.real & (tokens.kind == VISUAL), tokens.real & tokens.stats['question'])


def _alone(tokens: TokenSet) -> Alone:
  """All tokens but text, which see themselves alone."""
  return Alone(tokens.real & (tokens.kind != TEXT))


def _frames(tokens: TokenSet) -> Blocks:
  """The frames of a video, whose tokens see each other."""
  return Blocks(tokens.stats[FRAME], tokens.stats[FRAME])


# By mask: what a token sees beside those before it, or does not see of them.
EXCEPTIONS: dict[str, Callable[[TokenSet], Exceptions]] = {
    'mutual': _mutual, 'summary': apart_by_summaries, 'composite': _alone, 'frames': _frames}
