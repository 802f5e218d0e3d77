"""Parameters of released projectors (models/projectors/), by their names in the release.

Axes: B batch, N patches of a crop, W width of the tower, D width of the language model,
T ids of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.checkpoints.layout import Layout, Shape, flatten, leaves, nest
from models.projectors.base import Beside, Compressor
from ops.primitives.grids import Grid
from ops.tokens import TokenSet

# What stands in front of the names, as LLaVA and what is built on it save them.
PREFIXES = ('model.mm_projector.', 'mm_projector.', 'model.', '')


def example(compressor: Compressor, grid: Grid, width: int,
            prompt: int = 1) -> tuple[TokenSet, Beside]:
  """Returns inputs of zeros that a compressor accepts, of one crop of a tower.

  Args:
    compressor: the module.
    grid: of the patches.
    width: W.
    prompt: T.
  """
  x = jnp.zeros((1, math.prod(grid), width))
  text = jnp.zeros((1, prompt, compressor.width))
  levels = (x,) * len(getattr(compressor, 'levels', ()))
  return TokenSet.create(x), Beside(
      grid, levels, text, jnp.ones((1, prompt), bool), text[:, 0], embed=x, guide=x[:, 0],
      guide_tokens=x[:, :1])


def shapes_of(compressor: Compressor, grid: Grid, width: int) -> dict[str, Shape]:
  """Returns the shapes of a compressor's parameters by path; arguments as of `example`."""
  tree = jax.eval_shape(compressor.init, jax.random.key(0), *example(compressor, grid, width))
  return {path: tuple(leaf.shape) for path, leaf in flatten(tree.get('params', {})).items()}


def from_release(compressor: Compressor, tensors: Mapping[str, np.ndarray], *, grid: Grid,
                 width: int) -> dict[str, Any]:
  """Returns a compressor's parameters from the tensors of its release.

  Args:
    compressor: the module.
    tensors: by name; those of other modules may be among them.
    grid, width: as of `example`.

  Raises:
    ValueError: a tensor that is missing or of another shape; one line that names it.
  """
  layout = Layout(type(compressor).__name__, compressor.released, PREFIXES)
  wanted = shapes_of(compressor, grid, width)
  prefix = max(PREFIXES, key=lambda start: sum(
      name in tensors for leaf in leaves(layout, start, wanted) for name in leaf.names))
  found = {}
  for leaf in leaves(layout, prefix, wanted):
    pieces = []
    for name, shape in zip(leaf.names, leaf.part_shapes, strict=True):
      if name not in tensors:
        raise ValueError(f'a release of {layout.name} has {name}, and these tensors do not: '
                         f'{", ".join(sorted(tensors)[:8])}; choose the compressor that they are '
                         'of')
      side = math.isqrt(shape[0] // tensors[name].shape[1]) if leaf.kind == 'conv' else 0
      theirs = leaf.foreign_shape(shape, side) if side or leaf.kind != 'conv' else None
      if tensors[name].shape != theirs:
        raise ValueError(f'{name} has shape {tensors[name].shape}, and this {layout.name} wants '
                         f'{theirs}: give it the sizes of the release')
      pieces.append(tensors[name])
    found[leaf.path] = leaf.inward(pieces)
  return nest(found)
