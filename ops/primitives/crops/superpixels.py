"""Superpixels: soft clusters of a grid of tokens around a coarser grid, and the way back.

The token clustering and token reconstruction layers of Expediting Large-Scale Vision Transformer
for Dense Prediction without Fine-tuning (Liang et al., 2022), Sec. 3, arXiv:2210.01035, as
released. Neither has parameters.

Axes: B batch, N tokens, K clusters, D features, E features of what is reconstructed, H and W rows
and columns of the grid.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ops.argmax import min_and_index
from ops.attention import HIDDEN_LOGIT
from ops.primitives.match import l2_normalize

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Cells:
  """Holds the tokens where clusters start, and the tokens that may join them.

  Attributes:
    inside: bool[K, H * W], the tokens whose mean a cluster starts from. Neighbouring cells overlap
      where the grid does not divide, as in adaptive average pooling.
    near: bool[K, H * W], the tokens that may join it.
  """

  inside: np.ndarray
  near: np.ndarray


@functools.lru_cache(maxsize=64)
def cells(grid: tuple[int, int], count: int, *, bands: int | None = None, reach: int = 2) -> Cells:
  """Divides a grid into cells, in raster order: bands of as many cells as the next, or one more.

  Args:
    grid: (H, W).
    count: K, cells wanted.
    bands: rows of cells; None for cells as square as they come.
    reach: a token may join the cells up to so many away from the one it lies in, in rows and in
      columns.

  Raises:
    ValueError: if there are more bands than cells.
  """
  bands = bands or square_bands(grid, count)
  if bands > count:
    raise ValueError(f'bands={bands} are more than the {count} clusters: lower bands, or None for '
                     'cells as square as they come')
  place, number = np.arange(grid[0] * grid[1])[None], np.arange(count)[:, None]
  return Cells(*cell_masks(place, number, grid, count, bands, reach=reach))


def square_bands(grid: tuple[int, int], count: int) -> int:
  """Returns the bands of cells that are as square as they come."""
  height, width = grid
  return max(1, min(count, height, round(math.sqrt(count * height / width))))


def cell_masks(place: Any, number: Any, grid: tuple[int, int], count: Any, bands: Any, *,
               reach: int) -> tuple[Any, Any]:
  """Names the tokens of cells, as `Cells` does: whole numbers, of numpy or of JAX, in and out.

  Args:
    place: of tokens in the grid, int[..., 1, N].
    number: of cells, int[..., K, 1].
    grid: (H, W).
    count: cells in all, an int or int[..., 1, 1].
    bands: rows of cells, likewise, at most `count`.
    reach: see `cells`.

  Returns:
    bool[..., K, N] twice: inside, and near.
  """
  height, width = grid
  y, x = place // width, place % width
  # The first bands have one cell more than the others.
  fewest, longer = count // bands, count % bands
  start = longer * (fewest + 1)
  early, rest = number < start, number - start
  band = early * (number // (fewest + 1)) + ~early * (longer + rest // fewest)
  column = early * (number % (fewest + 1)) + ~early * (rest % fewest)
  columns = fewest + (band < longer)
  inside = _covers(y, band, bands, height) & _covers(x, column, columns, width)
  near = ((abs(y * bands // height - band) <= reach)
          & (abs(x * columns // width - column) <= reach))
  return inside, near


def _covers(index: Any, interval: Any, count: Any, length: int) -> Any:
  """Tells which indices lie in an interval of `count` that cover [0, length)."""
  return (index >= interval * length // count) & (index < -(-(interval + 1) * length // count))


def soft_clusters(x: Array, inside: Array, near: Array, among: Array, *, iterations: int,
                  temperature: float) -> Array:
  """Clusters tokens softly; a token divides itself among the clusters that it is near.

  A cluster that no token is near starts, and stays, at the mean of all tokens.

  Args:
    x: float[B, N, D].
    inside, near: bool[B, K, N], see `Cells`.
    among: bool[B, N], tokens that count.
    iterations: rounds of sharing out tokens and moving centres, at least 1.
    temperature: of the squared distance in the softmax over clusters; larger is harder.

  Returns:
    float32[B, K, N], the weights of each cluster's mean; its rows add up to 1.
  """
  x = jnp.where(among[:, :, None], jax.lax.stop_gradient(x).astype(jnp.float32), 0.0)
  near = near & among[:, None]
  all_real = jnp.broadcast_to(among[:, None], near.shape)
  some = jnp.any(near, axis=2, keepdims=True)
  fallback = _mean(jnp.where(some, near, all_real).astype(jnp.float32))
  start = (inside & among[:, None]).astype(jnp.float32)
  start = jnp.where(jnp.any(start > 0, axis=2, keepdims=True), _mean(start), fallback)

  # A centre is a mean of tokens, so its products with tokens, and with itself, are means of theirs.
  # Where the tokens are no more than twice as many as their features, that is less work a round.
  products = None
  if x.shape[1] <= 2 * x.shape[2]:
    # Around the mean numbers are smaller, and so is what rounding leaves of their differences.
    count = jnp.maximum(jnp.sum(among, axis=1), 1)[:, None, None]
    around = x - jnp.sum(x, axis=1, keepdims=True) / count
    products = jnp.einsum('bnd,bmd->bnm', around, around, precision='highest')

  def nearness(weights: Array) -> Array:
    # Squared distances, negative, but for each token's own length: the softmax over clusters is the
    # same without, and half as far off in float32, which that length would use up.
    if products is None:
      centres = jnp.einsum('bkn,bnd->bkd', weights, x, precision='highest')
      lengths = jnp.sum(centres * centres, axis=2)[:, :, None]
      return 2 * jnp.einsum('bkd,bnd->bkn', centres, x, precision='highest') - lengths
    with_centres = jnp.einsum('bkn,bnm->bkm', weights, products, precision='highest')
    return 2 * with_centres - jnp.sum(with_centres * weights, axis=2, keepdims=True)

  def update(_: int, weights: Array) -> Array:
    scores = jnp.where(near, temperature * nearness(weights), HIDDEN_LOGIT)
    shares = jnp.where(near, jax.nn.softmax(scores, axis=1), 0.0)
    return jnp.where(jnp.sum(shares, axis=2, keepdims=True) > 0, _mean(shares), fallback)

  return jax.lax.fori_loop(0, iterations, update, start)


def _mean(weights: Array) -> Array:
  return weights / jnp.maximum(jnp.sum(weights, axis=2, keepdims=True), 1e-16)


def squares(a: Array, b: Array) -> Array:
  """Squared distances of all pairs: float32[B, K, D], float32[B, N, D] -> float32[B, K, N]."""
  products = jnp.einsum('bkd,bnd->bkn', a, b, precision='highest')
  lengths = jnp.sum(a * a, axis=2)[:, :, None] + jnp.sum(b * b, axis=2)[:, None]
  return lengths - 2 * products


def cluster_map(x: Array, shape: tuple[int, int], *, iterations: int = 5, temperature: float = 0.01,
                reach: int = 2) -> Array:
  """A map of features on a coarser grid: float[B, H, W, D] -> float[B, h, w, D], shape = (h, w).

  In SAM the maps are its windows (`to_windows`), as a batch; see `soft_clusters`.
  """
  grid, flat = x.shape[1:3], x.reshape(len(x), -1, x.shape[3])
  layout = cells(grid, shape[0] * shape[1], bands=shape[0], reach=reach)
  inside, near = (jnp.broadcast_to(mask, (len(x), *mask.shape))
                  for mask in (layout.inside, layout.near))
  weights = soft_clusters(flat, inside, near, jnp.ones(flat.shape[:2], bool),
                          iterations=iterations, temperature=temperature)
  mixed = jnp.einsum('bkn,bnd->bkd', weights, flat.astype(jnp.float32), precision='highest')
  return mixed.reshape(len(x), *shape, -1).astype(x.dtype)


def labels(x: Array, centres: Array) -> Array:
  """The nearest centre of each token: float[B, N, D], float[B, K, D] -> int32[B, N]."""
  distance = squares(centres.astype(jnp.float32), x.astype(jnp.float32))
  return min_and_index(distance, axis=1).index


def reconstruct(before: Array, centres: Array, deep: Array, *, nearest: int = 20,
                temperature: float = 0.01, valid: Array | None = None) -> Array:
  """Features for every token from the features of its nearest clusters, some layers later.

  A token weighs a cluster by exp(-temperature * squared distance), as they were when the clusters
  were made, keeps the largest weights, and, as released, brings their squares to a sum of 1.

  Args:
    before: float[B, N, D], the tokens that were clustered.
    centres: float[B, K, D], what the clustering made of them.
    deep: float[B, K, E], what became of the clusters: features of a later layer, or logits.
    nearest: clusters that make up a token (equally near ones beyond count too); all if fewer.
    temperature: as in the clustering.
    valid: bool[B, K] or None, False for clusters that are padding.

  Returns:
    float[B, N, E].
  """
  distance = squares(before.astype(jnp.float32), centres.astype(jnp.float32))
  weights = jnp.exp(-temperature * jnp.maximum(distance, 0.0))
  if valid is not None:
    weights = jnp.where(valid[:, None], weights, 0.0)
  least = jax.lax.top_k(weights, min(nearest, weights.shape[2]))[0][:, :, -1:]
  weights = l2_normalize(jnp.where(weights >= least, weights, 0.0))
  return jnp.einsum('bnk,bke->bne', weights, deep.astype(jnp.float32),
                    precision='highest').astype(deep.dtype)


def to_windows(x: Array, side: int) -> Array:
  """Square windows of a map, zeros beyond its edges: [B, H, W, D] -> [B windows, side, side, D]."""
  batch, height, width, _ = x.shape
  x = jnp.pad(x, ((0, 0), (0, -height % side), (0, -width % side), (0, 0)))
  x = x.reshape(batch, x.shape[1] // side, side, x.shape[2] // side, side, -1)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side, side, x.shape[5])


def from_windows(windows: Array, grid: tuple[int, int]) -> Array:
  """The map of grid (H, W) that `to_windows` cut up: [B windows, side, side, D] -> [B, H, W, D]."""
  side, (height, width) = windows.shape[1], grid
  rows, columns = -(-height // side), -(-width // side)
  x = windows.reshape(-1, rows, columns, side, side, windows.shape[3]).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(len(x), rows * side, columns * side, -1)[:, :height, :width]
