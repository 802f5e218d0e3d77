"""Parameters of released projectors (models/projectors/), by their names in the release.

Axes: B batch, N patches of a crop, W width of the tower, D width of the language model,
T ids of a prompt.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.checkpoints import files
from models.checkpoints.layout import Layout, Shape, flatten, leaves, nest
from models.memory import Memory, Reader
from models.projectors.base import Beside, Compressor
from ops.primitives.grids import Grid
from ops.tokens import TEXT, VISUAL, TokenSet

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


def reader_example(compressor: Compressor, grid: Grid, width: int, prompt: int = 1,
                   crops: int = 1) -> tuple[Memory, TokenSet]:
  """Returns what the reader of a compressor's memory accepts, of one row.

  Args:
    compressor, grid, width: as of `example`.
    prompt: ids of the row beside placeholders.
    crops: of the row.
  """
  inputs = jax.tree.map(lambda leaf: jnp.repeat(leaf, crops, axis=0),
                        example(compressor, grid, width))
  memory, _ = compressor.init_with_output(jax.random.key(0), *inputs)
  visual = crops * compressor.slots(grid)
  kind = np.asarray([[VISUAL] * visual + [TEXT] * prompt], np.int8)
  tokens = TokenSet.create(jnp.zeros((*kind.shape, compressor.width), compressor.dtype),
                           kind=jnp.asarray(kind))
  return memory.replace(tokens=None).of_rows(jnp.ones((1, crops), bool), visual), tokens


def reader_shapes(compressor: Compressor, reader: Reader, grid: Grid,
                  width: int) -> dict[str, Shape]:
  """Returns the shapes of the parameters of what reads a compressor's memory, by path.

  Args:
    compressor, grid, width: as of `example`.
    reader: in the language model.
  """
  tree = jax.eval_shape(lambda: reader.init(
      jax.random.key(0), *reader_example(compressor, grid, width)))
  return {path: tuple(leaf.shape) for path, leaf in flatten(tree.get('params', {})).items()}


class _Stored(Mapping[str, np.ndarray]):
  """Tensors of open files by name, each read when it is asked for."""

  def __init__(self, tensors: files.Tensors) -> None:
    self._tensors = tensors

  def __getitem__(self, name: str) -> np.ndarray:
    return np.asarray(self._tensors.read(name), np.float32)

  def __contains__(self, name: object) -> bool:
    return name in self._tensors.shapes

  def __iter__(self) -> Iterator[str]:
    return iter(self._tensors.shapes)

  def __len__(self) -> int:
    return len(self._tensors.shapes)


def load_release(compressor: Compressor, source: str | pathlib.Path, *, grid: Grid,
                 width: int) -> dict[str, Any]:
  """Reads a compressor's parameters from the files of its release, in float32.

  Args:
    compressor: the module.
    source: a .safetensors file, or a folder with such files; those of the whole model do.
    grid, width: as of `example`.

  Raises:
    ValueError: as `from_release`, or files that cannot be read.
  """
  with files.reading(files.tensor_files(files.locate(source))) as tensors:
    return from_release(compressor, _Stored(tensors), grid=grid, width=width)


def from_release(compressor: Compressor, tensors: Mapping[str, np.ndarray], *, grid: Grid,
                 width: int) -> dict[str, Any]:
  """Returns a compressor's parameters from the tensors of its release.

  Args:
    compressor: the module.
    tensors: by name; those of other modules may be among them.
    grid, width: as of `example`.

  Raises:
    ValueError: a tensor that is missing or of another shape, or a compressor of which no release is
      known; one line that names it.
  """
  if not compressor.released:
    raise ValueError(f'no release of {type(compressor).__name__} is known: train it, or choose '
                     'another compressor')
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
