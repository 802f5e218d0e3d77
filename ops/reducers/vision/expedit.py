"""Expedit: soft clusters of the patch grid, from which every token can be reconstructed.

Axes: B batch, N slots now, M slots after, P protected, K clusters.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops import tokens as tk
from ops.assignments import Assignment
from ops.primitives.crops.superpixels import (
  cell_masks,
  cells,
  reconstruct,
  soft_clusters,
  square_bands,
)
from ops.primitives.mixing import mix_where_too_many
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, count, num_kept, of_kept

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Expedit(Reducer):
  """Mixes neighbouring tokens into soft clusters on a coarser grid.

  Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning (Liang et al.,
  2022), Sec. 3, arXiv:2210.01035, as released. Clusters start from the mean of a cell of the grid.
  A token shares itself out among the clusters around its cell by their distance in features, and
  a cluster is the mean of its shares; each slot counts once. A row with no more tokens than
  clusters keeps them. The K clusters stand in raster order behind the protected tokens.

  The way back is the paper's token reconstruction: a config's `expand` names the layer after which
  every token is made of the clusters that were nearest to it. In SAM every window is clustered by
  itself: a host that keeps windows on the batch axis (models/backbones/windows.py) does so with any
  method.

  Attributes:
    temperature: of squared distances; 0.02 for Segmenter, 0.01 for SAM.
    iterations: rounds of sharing out tokens and moving clusters.
    reach: clusters so many cells away may be joined, in each direction.
    bands: rows of clusters; None for cells as square as they come.
    nearest: clusters that a token is reconstructed from.
  """

  temperature: float = 0.02
  iterations: int = 5
  reach: int = 2
  bands: int | None = None
  nearest: int = 20
  needs = frozenset({'grid'})
  site = 'before'

  def __post_init__(self) -> None:
    for field in ('temperature', 'iterations', 'bands', 'nearest'):
      value = getattr(self, field)
      if value is not None and value <= 0:
        raise ValueError(f'{field}={value} must be positive')
    if self.reach < 0:
      raise ValueError(f'reach={self.reach} must not be negative')

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    inside, near = self._cells(tokens, signals.grid, num_slots)
    soft = soft_clusters(tokens.x, inside, near, tokens.free, iterations=self.iterations,
                         temperature=self.temperature)
    return mix_where_too_many(tokens, soft)

  def expand(self, before: TokenSet, after: TokenSet, now: TokenSet) -> Array:
    if now.slots != after.slots:
      raise ValueError(f'expedit made {after.slots} slots, of which another cut left {now.slots}: '
                       'expand before that cut')
    back = reconstruct(before.x, after.x, now.x, nearest=self.nearest,
                       temperature=self.temperature, valid=after.free)
    clustered = before.free & (count(before.free) > count(after.free))
    return jnp.where(clustered[:, :, None], back, tk.expand(before, now))

  def _cells(self, tokens: TokenSet, grid: tuple[int, int],
             num_slots: int) -> tuple[Array, Array]:
    """bool[B, K, N], twice: the tokens that each cluster starts from, and those near it."""
    most = num_slots - tokens.protected
    layout = cells(grid, most, bands=self.bands, reach=self.reach)
    pos = jnp.clip(tokens.pos, 0, layout.near.shape[1] - 1)
    if tokens.budget is None:
      inside, near = (jnp.asarray(mask.T)[pos].swapaxes(1, 2)
                      for mask in (layout.inside, layout.near))
      return inside, near
    kept = jnp.maximum(num_kept(tokens, num_slots), 1)
    bands = of_kept(tokens, num_slots, lambda count: min(
        self.bands or square_bands(grid, max(count, 1)), max(count, 1)))
    inside, near = cell_masks(pos[:, None], jnp.arange(most, dtype=jnp.int32)[None, :, None], grid,
                              kept[:, :, None], jnp.asarray(bands)[:, :, None], reach=self.reach)
    there = jnp.arange(most)[None, :, None] < kept[:, :, None]
    return inside & there, near & there
