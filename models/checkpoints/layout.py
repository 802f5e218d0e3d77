"""Layouts: the names and storage of our trees' leaves in foreign checkpoints.

A `Layout` is data: a name for every module and loose leaf. What a leaf needs to get from one form
to the other follows from what it is: a product is stored [out, in], a convolution [out, channels,
side, side], queries, keys and values in one, two or three pieces, blocks one by one. All of that is
transposing, reshaping and cutting, so a round trip gives back every bit.

Axes: L layers, D width, H heads, d width of a head, P patch side, C channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

Shape = tuple[int, ...]
# Of modules and loose leaves, as `Layout.names`.
Names = dict[str, str | tuple[str, ...]]
BLOCKS = 'stack/blocks/'
# A module's own leaves, and what every source calls them.
ENDINGS = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}
# Into how many of (q, k, v) each piece goes, by the number of pieces.
PIECES = {1: (3,), 2: (1, 2), 3: (1, 1, 1)}
FRAMES = 2  # That a patch of a video spans (models/backbones/qwen_vision.py).


@dataclasses.dataclass(frozen=True)
class Layout:
  """Names of one kind of checkpoint.

  Attributes:
    name: of the layout, for messages and `save`.
    names: from a module ('stack/blocks/norm1') or a loose leaf ('cls') to its foreign name, or
      names where it is stored in pieces. '*' is where 'weight' or 'bias' goes, '{}' the number of
      the block. A name that starts with '^' takes no prefix.
    prefixes: what may stand before the names; `save` writes the first.
    ranks: leaves that are stored with another number of axes; those of length one in front differ.
    patch: how the patch embedding is stored: 'conv', 'conv3d' (of two frames) or 'linear'.
    ignorable: patterns of names (as in fnmatch) of other tensors that such checkpoints hold, which
      are not read: buffers, mask tokens, decoders.
  """

  name: str
  names: Mapping[str, str | tuple[str, ...]]
  prefixes: tuple[str, ...] = ('',)
  ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
  patch: str = 'conv'
  ignorable: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One leaf of our tree, or one block's part of it.

  Attributes:
    path: of the leaf, as 'stack/blocks/qkv/kernel'.
    layer: which block's part this is, or None for a whole leaf.
    shape: of that part in our form.
    names: of its foreign pieces.
    kind: 'conv', 'conv3d', 'matrix', 'vector' (stored with one axis) or 'plain' (`rank` axes).
    inputs: leading axes that a matrix sums over.
    pieces: lengths of each foreign piece along `axis`, empty for a single one.
    axis: that of (q, k, v), or of the two halves of a gated product.
    rank: axes of a foreign plain leaf.
  """

  path: str
  layer: int | None
  shape: Shape
  names: tuple[str, ...]
  kind: str
  inputs: int = 1
  pieces: tuple[int, ...] = ()
  rank: int = 1
  axis: int = -3

  @property
  def stacked(self) -> bool:
    """True if this is one of several parts of a leaf."""
    return self.layer is not None

  @property
  def part_shapes(self) -> tuple[Shape, ...]:
    """Shapes of the pieces in our form."""
    if not self.pieces:
      return (self.shape,)
    return tuple((*self.shape[:self.axis], piece, *self.shape[self.axis + 1:])
                 for piece in self.pieces)

  def foreign_shape(self, shape: Shape, side: int = 0) -> Shape:
    """The foreign shape of a piece of a shape of ours; `side` is of the patch."""
    if self.kind == 'conv':
      return (shape[1], shape[0] // side ** 2, side, side)
    if self.kind == 'conv3d':
      return (shape[1], shape[0] // (FRAMES * side ** 2), FRAMES, side, side)
    if self.kind == 'matrix':
      return (math.prod(shape[self.inputs:]), math.prod(shape[:self.inputs]))
    if self.kind == 'vector':
      return (math.prod(shape),)
    return (1,) * (self.rank - len(shape)) + shape[len(shape) - min(self.rank, len(shape)):]

  def inward(self, pieces: list[np.ndarray]) -> np.ndarray:
    """Converts foreign arrays to ours."""
    parts = []
    for piece, shape in zip(pieces, self.part_shapes, strict=True):
      if self.kind == 'conv':
        piece = piece.transpose(2, 3, 1, 0)
      elif self.kind == 'conv3d':
        piece = piece.reshape(len(piece), -1).T
      elif self.kind == 'matrix':
        piece = piece.T
      parts.append(piece.reshape(shape))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=self.axis)

  def outward(self, array: np.ndarray, side: int = 0) -> list[np.ndarray]:
    """Converts our array to foreign ones."""
    parts = [array]
    if self.pieces:
      parts = np.split(array, np.cumsum(self.pieces)[:-1], axis=self.axis)
    foreign = []
    for part in parts:
      shape = self.foreign_shape(part.shape, side)
      if self.kind == 'conv':
        part = part.reshape(side, side, -1, part.shape[-1]).transpose(3, 2, 0, 1)
      elif self.kind == 'conv3d':
        part = part.T
      elif self.kind == 'matrix':
        part = part.reshape(shape[::-1]).T
      foreign.append(np.asarray(part.reshape(shape), order='C'))
    return foreign


def leaves(layout: Layout, prefix: str, shapes: Mapping[str, Shape]) -> Iterator[Leaf]:
  """Yields each of a model's leaves with its name and storage in a checkpoint.

  Args:
    layout: of the checkpoint.
    prefix: one of its prefixes.
    shapes: of our leaves by path, blocks stacked [L, ...].

  Raises:
    LookupError: the layout has no name for a leaf; its only argument is the path.
  """
  for path, shape in shapes.items():
    module, _, ending = path.rpartition('/')
    if path in layout.names:
      names = layout.names[path]
    elif ending in ENDINGS and module in layout.names:
      names = layout.names[module]
    else:
      raise LookupError(path)
    names = (names,) if isinstance(names, str) else names
    names = tuple(name[1:] if name.startswith('^') else prefix + name for name in names)
    names = tuple(name.replace('*', ENDINGS.get(ending, '*')) for name in names)
    if BLOCKS in path:
      for layer in range(shape[0]):
        yield _leaf(layout, path, layer, shape[1:], tuple(name.format(layer) for name in names))
    else:
      yield _leaf(layout, path, None, shape, names)


def _leaf(layout: Layout, path: str, layer: int | None, shape: Shape,
          names: tuple[str, ...]) -> Leaf:
  module, _, ending = path.rpartition('/')
  kind, inputs = 'plain', 1
  if ending == 'kernel':
    own = module.rpartition('/')[2]
    kind = layout.patch if own == 'patch' else 'matrix'
    kind = 'matrix' if kind == 'linear' else kind
    inputs = 2 if own == 'out' else 1
  elif ending in ENDINGS:
    kind = 'vector'
  pieces: Shape = ()
  axis = -3
  if 'qkv' in module.split('/'):
    pieces = PIECES[len(names)]
  elif len(names) > 1:
    pieces, axis = (1,) * len(names), -2
  return Leaf(path, layer, shape, names, kind, inputs, pieces,
              layout.ranks.get(path, len(shape)), axis)


def flatten(tree: Mapping[str, Any], start: str = '') -> dict[str, Any]:
  """Returns a nested dict as {path: leaf}."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    path = start + key
    flat |= flatten(value, f'{path}/') if isinstance(value, Mapping) else {path: value}
  return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {path: leaf} as a nested dict."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *above, last = path.split('/')
    node = tree
    for key in above:
      node = node.setdefault(key, {})
    node[last] = value
  return tree
