"""Compression by explanations: keeps the tokens that a whole pass has found relevant.

Axes: B batch, N slots now.
"""

import dataclasses

from ops.assignments import Assignment
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet


@dataclasses.dataclass(frozen=True)
class RelevanceRank(Reducer):
  """Keeps the tokens that an explanation of the model's answer finds most relevant.

  Generic Token Compression in Multimodal Large Language Models from an Explainability Perspective
  (Lei et al., 2025), arXiv:2506.01097, of which the abstract was read, and no code is known: the
  relevance of visual tokens to an instruction, by a whole pass and its gradient, ranks them before
  the language model runs again. It is the stat 'relevance' of the tokens, float[B, N], which
  lib/report/relevance.py works out; give layer 0. Which rule of explanation the paper takes is not
  known here. What it deploys, a network that foresees relevance, is `explained`.
  """

  # Relevance is of a language model: no other host has a rope.
  needs = frozenset({'rope'})
  reads = frozenset({'relevance'})
  reconstructed = 'the abstract'
  site = 'before'
  positions = 'keep'
  drops = 'pruning drops tokens'
  can_empty = True

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    if 'relevance' not in tokens.stats:
      raise ValueError("relevance_rank ranks tokens by their stat 'relevance', which they lack: "
                       'add it, as lib/report/relevance.py makes it, or choose explained')
    return keep_top(tokens, tokens.stats['relevance'], num_slots=num_slots)
