"""Resampling of position tables for images of another size, as each family's release does.

Cubic convolution from Keys (1981), IEEE Trans. ASSP 29(6). Libraries differ in its parameter a and
in whether the kernel is widened where the grid shrinks.

Axes: R, C rows and columns of a grid of patches, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ops.primitives.grids import matrix


def bicubic(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """Resamples float32[R, C, D] on another grid by torch's 'bicubic' (a = -0.75), not antialiased.

  Places beyond an edge have the edge's values. As DeiT, MAE and DINOv2 without registers do, and
  CLIP and SigLIP in the transformers library.
  """
  rows, columns = (matrix(old, new, 'bicubic')
                   for old, new in zip(table.shape, grid, strict=False))
  return np.einsum('ir,jc,rcd->ijd', rows, columns, table).astype(np.float32)


def bicubic_antialiased(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """Resamples float32[R, C, D] on another grid by a = -0.5, antialiased where the grid shrinks.

  As timm does, and DINOv2 with registers.
  """
  return _antialiased(table, grid, 'cubic')


def bilinear_antialiased(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """Resamples float32[R, C, D] on another grid linearly, antialiased where the grid shrinks.

  As SigLIP 2 does where images keep their aspect.
  """
  return _antialiased(table, grid, 'linear')


def _antialiased(table: np.ndarray, grid: tuple[int, int], method: str) -> np.ndarray:
  shape = (*grid, table.shape[-1])
  return np.asarray(jax.image.resize(jnp.asarray(table), shape, method, antialias=True,
                                     precision='highest'))


RESAMPLINGS = {'bicubic': bicubic, 'bicubic_antialiased': bicubic_antialiased,
               'bilinear_antialiased': bilinear_antialiased}
