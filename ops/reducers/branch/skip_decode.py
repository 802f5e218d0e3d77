"""SkipDecode: the further an answer has come, the fewer lower layers its tokens run.

Axes: B batch, N slots.
"""

import dataclasses
from collections.abc import Mapping

from ops.assignments import Assignment
from ops.primitives.select import keep_top
from ops.reducers.base import BranchReducer
from ops.rope import sequence_index
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, CountOrZero


@dataclasses.dataclass(frozen=True)
class SkipDecode(BranchReducer):
  """Lets the first tokens of a sequence run a layer, in lower layers fewer.

  SkipDecode (Del Corro et al., 2023), arXiv:2307.02628; no code is released. Decoded token t runs
  `most` layers at t = 0 and `least` from t = `tokens` - 1 on, falling evenly, rounded up: the first
  `warmup` and the last of the stack. It is t that decides, for all rows of a batch alike, so those
  that run are never more than before, and each of their layers has cached all tokens before them. A
  prompt runs all layers. Where a prompt and its answer are read together, as in training, a config
  says as `keep` how many tokens run each layer: `decode_steps` more than those of the prompt.

  Attributes:
    tokens: of an answer, over which the layers become fewer.
    least: layers in the end.
    most: layers at the beginning, None for all.
    warmup: first layers, which always run.
  """

  tokens: Count = 128
  least: Count = 1
  most: Count | None = None
  warmup: CountOrZero = 1
  reconstructed = "the paper's text"
  positions = 'keep'

  def __post_init__(self) -> None:
    if self.least < self.warmup or (self.most or self.least) < self.least:
      raise ValueError(f'least={self.least} layers must be at least warmup={self.warmup} and at '
                       f'most most={self.most}: change one of them')

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    return keep_top(tokens, -sequence_index(tokens.pos), num_slots=num_slots)

  def default_shares(self, depth: int) -> Mapping[int, float]:
    """Returns the layers that some decoded token skips, each with the whole prompt."""
    return {layer: 1.0 for layer in range(depth) if self.decode_steps(layer, depth) is not None}

  def decode_steps(self, layer: int, depth: int) -> int | None:
    """Returns how many decoded tokens run a layer, None for all."""
    if layer < self.warmup:
      return None
    needed = depth + self.warmup - layer  # Layers that run where this one does.
    steps = next((t for t in range(self.tokens) if self.active(t, depth) < needed), None)
    return steps

  def active(self, step: int, depth: int) -> int:
    """Returns how many layers decoded token `step` runs."""
    most = min(depth, self.most or depth)
    least = min(self.least, most)
    step, last = min(step, self.tokens - 1), max(self.tokens - 1, 1)
    return most - (most - least) * step // last
