"""YOPO: patches of an image see their neighbours alone, and some heads and layers no patch at all.

Axes: B batch, N slots, V patches, R other slots.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated

import jax.numpy as jnp

from ops.primitives.sparse_attention import Neighbourhood
from ops.reducers.base import BranchReducer, Checked
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, CountOrZero, OneOf

UNSEEN = ('heads', 'all')


@dataclasses.dataclass(frozen=True)
class YOPO(Checked, BranchReducer):
  """Lets patches attend to a square of patches around them, and to text before the image.

  Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See (Zhang et al., 2024),
  arXiv:2410.06169, as released. Within the square a patch sees in both directions; text sees all
  that came before. In dropped heads patches read nothing, and nobody reads them, though they still
  count in the softmax; in dropped layers nobody does in any head. Give one config for each group of
  layers with the same heads, in a language model with token_kinds='visual'. The release masks a
  whole map; here no map of all tokens is formed, and fused kernels are not used in these layers.
  Its smaller MLPs for patches are not here: a branch leaves tokens out of an MLP, where these leave
  out neurons, and masks alone would save nothing.

  Attributes:
    window: side of the square, an odd number.
    grid: (rows, columns) of an image's patches; None for one square image.
    heads: dropped heads. The release finds them by how little they attend to patches, as
      lib/report/visual_heads.py does.
    unseen: 'heads', patches are read in all heads but those; 'all', in none (a dropped layer).
  """

  window: Count = 7
  grid: tuple[Count, Count] | None = None
  heads: tuple[CountOrZero, ...] = ()
  unseen: Annotated[str, OneOf(UNSEEN)] = 'heads'
  parts = 'core'
  positions = 'keep'
  drops = ''

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.window % 2 == 0:
      raise ValueError(f'window={self.window} must be odd')

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Neighbourhood:
    del signals, num_slots
    count = tokens.slots - tokens.protected
    free = tokens.free
    order = jnp.argsort(jnp.where(free, 2, jnp.where(tokens.real, 0, 1)), axis=1, stable=True)
    patches = jnp.argsort(~free, axis=1, stable=True)[:, :count]
    valid = jnp.arange(count)[None] < jnp.sum(free, axis=1, keepdims=True)
    return Neighbourhood(
        patches.astype(jnp.int32), order[:, :tokens.slots - count].astype(jnp.int32), valid,
        self._grid(count), self.window, self.heads, None if self.unseen == 'all' else ())

  def _grid(self, patches: int) -> tuple[int, int]:
    side = math.isqrt(patches)
    rows, columns = self.grid or (side, side)
    if patches % (rows * columns):
      raise ValueError(f'{patches} patches are no images of {rows} x {columns}: set args.grid, and '
                       'let no reduction before it take patches')
    return rows, columns

  def min_slots(self, slots: int, protected: int) -> int:
    del protected
    return slots

  def pairs(self, slots: int, num_slots: int, protected: int) -> int:
    patches = slots - protected
    near = self.window * self._grid(patches)[1]
    return protected * slots + patches * (protected + near)

  def default_shares(self, depth: int) -> Mapping[int, float]:
    """Returns all layers, with all tokens."""
    return dict.fromkeys(range(depth), 1.0)
