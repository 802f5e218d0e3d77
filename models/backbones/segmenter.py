"""Dense outputs under reduction: from the slots that are left back to every patch of the grid.

Three ways back, by name: a merged patch always gets the features of the slot that holds it; what
differs is what a dropped patch gets. Then a head that tells the class of every pixel.

Axes: B batch, N slots, T original tokens (special ones lead, patches follow in raster order),
D features, C classes, P patch side in pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models import renames
from models.backbones.vit import ViT
from models.stack import Outputs
from ops import tokens as tk
from ops.tokens import TokenSet
from ops.values import Count, CountOrZero, OneOf

Array = jax.Array
Cuts = Mapping[int, TokenSet]


def restore(tokens: TokenSet, before: Cuts, cuts: Cuts, grid: tuple[int, int]) -> Array:
  """Every patch gets the features of the slot that owns it; a dropped one gets zeros.

  Args:
    tokens: the final tokens.
    before, cuts: {layer: TokenSet before, and after, the cut}, as the models return them.
    grid: (rows, columns) of patches.

  Returns:
    float[B, rows * columns, D], patches in raster order.
  """
  del before, cuts
  return _patches(jnp.where(_alive(tokens)[..., None], tk.restore(tokens, tokens.x), 0), grid)


def bypass(tokens: TokenSet, before: Cuts, cuts: Cuts, grid: tuple[int, int]) -> Array:
  """Restores all patches; a dropped one keeps the features that entered its last cut."""
  x = restore(tokens, before, cuts, grid)
  for layer in sorted(cuts):
    left = _patches(_alive(before[layer]) & ~_alive(cuts[layer]), grid)
    then = _patches(tk.restore(before[layer], before[layer].x), grid)
    x = jnp.where(left[..., None], then.astype(x.dtype), x)
  return x


def interpolate(tokens: TokenSet, before: Cuts, cuts: Cuts, grid: tuple[int, int]) -> Array:
  """Restores all patches; dropped ones are interpolated from the others by grid distance.

  Means over all patches that are still there, weighted by distance^-4: A two-dimensional
  interpolation function for irregularly-spaced data (Shepard, 1968), doi:10.1145/800186.810616,
  with more weight on near ones than its distance^-2.
  """
  x = restore(tokens, before, cuts, grid)
  alive = _patches(_alive(tokens), grid)
  # The weights depend on places alone: one [T, T] constant for the whole batch.
  weights = jnp.asarray(_nearness(grid), x.dtype)
  total = jnp.einsum('pt,bt->bp', weights, alive.astype(x.dtype))
  filled = jnp.einsum('pt,btd->bpd', weights, x) / jnp.maximum(total, 1e-12)[..., None]
  return jnp.where(alive[..., None], x, filled)


FILLS: dict[str, Callable[..., Array]] = {
    'restore': restore, 'bypass': bypass, 'interpolate': interpolate}
DECODERS = ('linear', 'conv')


def segmenter(vit: ViT, **settings: Any) -> SegmentViT:
  """A SegmentViT with the backbone of `vit`, its classifier left out.

  Raises:
    ValueError: settings that a SegmentViT does not add to a ViT, or no `pixel_classes`.
  """
  settings = renames.current('task', settings)
  fields, every = ({field.name for field in dataclasses.fields(kind)} - {'parent', 'name'}
                   for kind in (ViT, SegmentViT))
  own = sorted(every - fields)
  unknown = sorted(set(settings) - set(own))
  if unknown or 'pixel_classes' not in settings:
    raise ValueError(f'a segmentation model has {", ".join(own)} (pixel_classes must be set); got '
                     f'{", ".join(settings) or "none"}')
  backbone = {name: getattr(vit, name) for name in fields}
  return SegmentViT(**(backbone | {'num_classes': 0} | settings))


def _alive(tokens: TokenSet) -> Array:
  """bool[B, T]: original tokens that a slot still holds; size 0 is a token dropped in training."""
  return tk.restore(tokens, tokens.real & (tokens.sizes > 0))


def _patches(values: Array, grid: tuple[int, int]) -> Array:
  """[B, T, ...] -> [B, rows * columns, ...]: special tokens lead."""
  return values[:, values.shape[1] - grid[0] * grid[1]:]


def _nearness(grid: tuple[int, int]) -> np.ndarray:
  """float32[rows * columns, rows * columns]: distance^-4 of any two patches, 0 on the diagonal."""
  coordinates = np.stack(np.unravel_index(np.arange(grid[0] * grid[1]), grid), axis=1)
  squared = ((coordinates[:, None] - coordinates[None]) ** 2).sum(axis=-1)
  return np.where(squared > 0, 1.0 / np.maximum(squared, 1) ** 2, 0.0).astype(np.float32)


class SegmentViT(ViT):
  """A vision transformer that tells the class of every pixel, under any plan.

  The final features of all patches, brought back by `fill`, go through a linear head, or a 3 x 3
  convolution and a linear head, that makes cells x cells predictions a patch (a linear decoder is
  that of Segmenter, Strudel et al., 2021, Sec. 3.2, arXiv:2105.05633, with cells=1). They are
  resized to pixels bilinearly where cells are larger than pixels.

  Attributes:
    pixel_classes: C.
    fill: what a dropped patch gets, a name in `FILLS`.
    decoder: 'linear' or 'conv'.
    cells: predictions along the side of a patch; `patch` for one a pixel.
    num_classes: 0; there is no classifier.
  """

  num_classes: CountOrZero = 0
  pixel_classes: Count = dataclasses.field(kw_only=True)
  fill: Annotated[str, OneOf(FILLS)] = 'restore'
  decoder: Annotated[str, OneOf(DECODERS)] = 'linear'
  cells: Count = 1

  @property
  def classes(self) -> int:
    """C, number of classes of the logits."""
    return self.pixel_classes

  @nn.compact
  def __call__(self, images: Array | TokenSet) -> tuple[Array | TokenSet, Outputs]:
    """Segments images.

    Args:
      images: as for `ViT`.

    Returns:
      Logits float32[B, height, width, C] and the dict of `ViT`, with 'dense' float[B, rows *
      columns, D], the features of all patches.

    Raises:
      ValueError: as `ViT`; for an unknown fill or decoder, or a classifier beside the decoder.
    """
    self._check_decoder()
    pooled, out = super().__call__(images)
    if isinstance(pooled, TokenSet):
      return pooled, out
    before = out['before']
    if self.fill == 'bypass' and self.last_norm == 'tokens':
      before = {layer: cut.replace(x=self._normed(cut.x)) for layer, cut in before.items()}
    rows, columns = self.grid
    x = FILLS[self.fill](out['tokens'], before, out['cuts'], self.grid)
    out['dense'] = x
    x = x.reshape(-1, rows, columns, self.width)
    if self.decoder == 'conv':
      x = nn.gelu(nn.Conv(self.width, (3, 3), dtype=self.dtype, name='conv')(x))
    logits = nn.Dense(self.cells ** 2 * self.pixel_classes, dtype=jnp.float32, name='pixels')(x)
    logits = logits.reshape(-1, rows, columns, self.cells, self.cells, self.pixel_classes)
    logits = logits.transpose(0, 1, 3, 2, 4, 5)
    logits = logits.reshape(-1, rows * self.cells, columns * self.cells, self.pixel_classes)
    shape = (len(logits), *self.input_shape[:2], self.pixel_classes)
    return jax.image.resize(logits, shape, 'bilinear'), out

  def _normed(self, x: Array) -> Array:
    """Features of an earlier layer through the final norm, as those of the final tokens."""
    norm = nn.LayerNorm(epsilon=self.norm_eps, dtype=jnp.float32, use_fast_variance=False,
                        parent=None)
    return cast(Array, norm.apply({'params': self.get_variable('params', 'norm')}, x))

  def _check_decoder(self) -> None:
    if not 1 <= self.cells <= self.patch:
      raise ValueError(f'cells={self.cells} must be 1 to patch={self.patch}')
    if self.layers and self.fill == 'bypass':
      raise ValueError("fill='bypass' needs the tokens before every cut, and layers="
                       f'{self.layers} are a part: choose another fill, or layers=None')
    if self.num_classes:
      raise ValueError(f'num_classes={self.num_classes} makes a classifier, which a SegmentViT '
                       'lacks: set num_classes=0, and pixel_classes')
