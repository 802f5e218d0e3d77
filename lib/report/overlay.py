"""Draws the tokens that a reduction kept, merged and dropped, layer by layer.

Axes: B batch, N slots, T original tokens, C colour channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from ops.tokens import TokenSet

Array = np.ndarray

DPI = 200
SIDE = 440  # pixels of the longer side of an image in a figure, about: images grow by whole numbers
GAP = 26
COLUMNS = 6
LUMA = np.array([0.299, 0.587, 0.114])
DROPPED = -1
LINE = 2
TITLE, HEADER, CAPTION = 17, 14, 13  # font sizes in points
MEANINGS = {'kept': 'kept as it is', 'merged': 'merged: mean colour of its group',
            'dropped': 'dropped'}


@dataclasses.dataclass(frozen=True)
class Groups:
  """Holds what became of the patches of one image.

  Attributes:
    labels: int[rows, columns], the slot that holds each patch, -1 where none does any more.
    merged: bool[rows, columns], whether that slot stands for more than this patch.
    tokens: real slots left, special tokens included.
  """

  labels: Array
  merged: Array
  tokens: int


def groups(tokens: TokenSet, index: int, grid: tuple[int, int]) -> Groups:
  """Reads provenance of image `index` of a batch.

  A patch is merged where its slot holds other original tokens too, or has a size above 1 (soft
  mixing gives each patch to the output that it weighs most in). Special tokens lead the T
  original ones; the rest are the grid's patches in raster order.

  Raises:
    ValueError: the batch has no such image, or fewer tokens than the grid has patches.
  """
  if not 0 <= index < len(tokens.owner):
    raise ValueError(f'image {index} is out of range: the cuts hold a batch of '
                     f'{len(tokens.owner)}')
  owner = np.asarray(tokens.owner[index])
  rows, columns = grid
  special = owner.size - rows * columns
  if special < 0:
    raise ValueError(f'a grid of {rows} x {columns} patches does not fit {owner.size} tokens: pass '
                     "the model's own grid")
  real, sizes = np.asarray(tokens.real[index]), np.asarray(tokens.sizes[index])
  owner = np.where((owner >= 0) & real[np.maximum(owner, 0)], owner, DROPPED)
  members = np.bincount(owner[owner >= 0], minlength=real.size)
  # Sizes are float sums; a thousandth is far above their rounding.
  several = (members > 1) | (sizes > 1.001)
  patches = owner[special:].reshape(grid)
  return Groups(patches, (patches >= 0) & several[np.maximum(patches, 0)], int(real.sum()))


def untouched(tokens: int, grid: tuple[int, int]) -> Groups:
  """Returns the groups before any reduction, of `tokens` original tokens."""
  return Groups(np.arange(grid[0] * grid[1]).reshape(grid), np.zeros(grid, bool), tokens)


def composite(image: Array, labels: Array, merged: Array, *, scale: int = 1, line: int = 1,
              hatch: int = 12) -> Array:
  """Draws one image as its tokens.

  Patches alone in their slot stay as they are, to the pixel. Merged ones are filled with the mean
  colour of all pixels of their group and outlined, in black or white, where a neighbour is of
  another group. Dropped ones fade to a light grey under a diagonal hatch.

  Args:
    image: uint8 or float in [0, 1], [height, width], with 1 channel or with 3; both sides
      multiples of the grid's.
    labels, merged: as in `Groups`.
    scale: enlarges every pixel to a square of so many.
    line: width of an outline in pixels of the result; two meet where both sides are merged.
    hatch: distance of hatch lines along a row, in pixels of the result; each is a sixth as wide.

  Returns:
    uint8[scale * height, scale * width, 3].

  Raises:
    ValueError: an image out of range or not divisible by the grid.
  """
  pixels = _rgb(image)
  (rows, columns), (height, width) = labels.shape, pixels.shape[:2]
  if height % rows or width % columns:
    raise ValueError(f'an image of {height} x {width} pixels does not divide into {rows} x '
                     f'{columns} patches: pass the image as the model saw it')
  cell = (height // rows, width // columns)
  label_of, is_merged = _enlarge(labels, *cell), _enlarge(merged, *cell)
  for label in np.unique(labels[merged]):
    members = (label_of == label) & is_merged
    pixels[members] = pixels[members].mean(axis=0)
  pixels, gone = _enlarge(pixels, scale, scale), _enlarge(label_of == DROPPED, scale, scale)
  pixels[gone] = 0.8 + 0.15 * (pixels[gone] @ LUMA)[:, None]
  diagonal = np.add.outer(np.arange(height * scale), np.arange(width * scale)) % hatch
  pixels[gone & (diagonal < max(1, hatch // 6))] = 0.66
  edges = outline(labels, merged, cell=(cell[0] * scale, cell[1] * scale), line=line)
  dark = pixels[edges] @ LUMA < 0.5
  pixels[edges] = np.where(dark[:, None], 1.0, 0.0)
  return np.round(255 * pixels).astype(np.uint8)


def outline(labels: Array, merged: Array, *, cell: tuple[int, int], line: int = 1) -> Array:
  """Marks outlines of merged groups: bool[rows * cell height, columns * cell width].

  True for pixels of merged patches with a pixel of another group less than or just `line` pixels
  away, diagonals included. The line lies inside its group, so patches kept as they are stay whole.
  The image's own edge is no border.
  """
  label_of = _enlarge(labels, *cell)
  around = np.pad(label_of, line, mode='edge')
  height, width = label_of.shape
  border = np.zeros(label_of.shape, bool)
  for down in (0, line, 2 * line):
    for right in (0, line, 2 * line):
      border |= around[down:down + height, right:right + width] != label_of
  return border & _enlarge(merged, *cell)


def paint(image: Array, classes: Array, *, strength: float = 0.7) -> Array:
  """Tints every pixel by its class; those of class 0, the background, stay as they are.

  Args:
    image: [height, width] or [height, width, C], as for `composite`.
    classes: int[height, width]; colours repeat after ten classes.
    strength: share of the class's colour in the result.

  Returns:
    uint8[height, width, 3].
  """
  pixels, classes = _rgb(image), np.asarray(classes)
  if pixels.shape[:2] != classes.shape:
    raise ValueError(f'classes of {classes.shape} pixels do not lie on an image of '
                     f'{pixels.shape[:2]}: give one a pixel')
  colours = colormaps['tab10'](np.arange(10))[:, :3][(classes - 1) % 10]
  tinted = np.where((classes > 0)[..., None], (1 - strength) * pixels + strength * colours, pixels)
  return np.round(255 * tinted).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Row:
  """Holds a row of a figure.

  Attributes:
    name: written left of it.
    image: the input, [height, width] or [height, width, C].
    cuts: {layer: tokens after the cut}.
    index: which row of the cuts' batch the image is.
    beside: {heading: picture}, shown after the input.
    ground: what the groups are drawn on; None for the input.
  """

  name: str
  image: Array
  cuts: Mapping[int, TokenSet]
  index: int
  beside: Mapping[str, Array] = dataclasses.field(default_factory=dict)
  ground: Array | None = None


def overlay(images: Array, cuts: Mapping[int, TokenSet], grid: tuple[int, int], path: str | Path, *,
            names: Sequence[str] = (), layers: Sequence[int] | None = None,
            title: str = '') -> Path:
  """Draws a row an image: the input, then its tokens after each cut.

  Args:
    images: [B, height, width, C] or [B, height, width], as for `composite`: what a person would
      look at, not the normalised input.
    cuts: {layer: tokens after the cut}, as the models return under 'cuts'.
    grid: (rows, columns) of patches.
    path: where to write; the ending picks the format, such as .png.
    names: one an image, written left of its row.
    layers: which cuts to draw; None for all, or six spread evenly where there are more.
    title: above the figure.

  Raises:
    ValueError: no such layer, or numbers of images and names that differ.
  """
  images = np.asarray(images)
  if names and len(names) != len(images):
    raise ValueError(f'{len(names)} names for {len(images)} images: give one each, or none')
  names = list(names) or [''] * len(images)
  rows = [Row(name, image, cuts, index) for index, (name, image) in
          enumerate(zip(names, images, strict=True))]
  return _draw(rows, _columns(cuts, layers), grid, path, title)


def compare(image: Array, cuts: Mapping[str, Mapping[int, TokenSet]], grid: tuple[int, int],
            path: str | Path, *, index: int = 0, layers: Sequence[int] | None = None,
            title: str = '') -> Path:
  """Draws a row a method, all on one image: the input, then its tokens after each layer.

  A method that does not cut in a layer shows what its last cut before that layer left.

  Args:
    image: [height, width, C] or [height, width], as in `overlay`.
    cuts: {method: {layer: tokens after the cut}}.
    grid, path, layers, title: as in `overlay`; layers default to those where any method cuts.
    index: which row of the batch the image is.
  """
  where = sorted({layer for method in cuts.values() for layer in method})
  rows = [Row(name, np.asarray(image), method, index) for name, method in cuts.items()]
  return _draw(rows, _columns(dict.fromkeys(where), layers), grid, path, title)


def stages(images: Array, groups: Mapping[str, Sequence[Groups]], path: str | Path, *,
           names: Sequence[str] = (), title: str = '') -> Path:
  """Draws a row an image: the input, then its groups after each of several reductions.

  Args:
    images, path, names, title: as in `overlay`.
    groups: {heading: groups of each image}, all of one grid.

  Raises:
    ValueError: numbers of images, names and groups that differ.
  """
  images = np.asarray(images)
  counts = {len(images), len(names) or len(images), *map(len, groups.values())}
  if len(counts) > 1 or not groups:
    raise ValueError(f'{len(images)} images with {len(names)} names and groups of '
                     f'{[len(each) for each in groups.values()]} cannot be drawn: give one each')
  names = list(names) or [''] * len(images)
  rows = [Row(name, image, {}, 0) for name, image in zip(names, images, strict=True)]
  shape = next(iter(groups.values()))[0].labels.shape
  table = [list(row) for row in zip(*groups.values(), strict=True)]
  return _figure(rows, table, untouched(shape[0] * shape[1], shape), list(groups), path, title)


def segments(images: Array, truth: Array, predicted: Array, cuts: Mapping[int, TokenSet],
             grid: tuple[int, int], path: str | Path, *, names: Sequence[str] = (),
             layers: Sequence[int] | None = None, title: str = '') -> Path:
  """Draws a row an image: input, true and predicted classes, then the groups as outlined regions.

  The groups after each cut lie on the predicted classes: a region of mixed colour joined pixels of
  several.

  Args:
    images, cuts, grid, path, names, layers, title: as in `overlay`.
    truth, predicted: int[B, height, width], classes as in `paint`.
  """
  images = np.asarray(images)
  names = list(names) or [''] * len(images)
  rows = []
  for index, (name, image) in enumerate(zip(names, images, strict=True)):
    painted = paint(image, predicted[index])
    beside = {'true': paint(image, truth[index]), 'predicted': painted}
    rows.append(Row(name, image, cuts, index, beside, painted))
  return _draw(rows, _columns(cuts, layers), grid, path, title)


def _rgb(image: Array) -> Array:
  """Converts any picture to a fresh float64[height, width, 3] in [0, 1]."""
  pixels = np.asarray(image)
  whole = pixels.dtype == np.uint8
  pixels = pixels.astype(np.float64) / (255 if whole else 1)
  if pixels.ndim == 2:
    pixels = pixels[:, :, None]
  if pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
    raise ValueError(f'an image of shape {np.shape(image)} cannot be drawn: expected [height, '
                     'width], with 1 or 3 channels last')
  if pixels.min() < -1e-6 or pixels.max() > 1 + 1e-6:
    raise ValueError(f'pixels from {pixels.min():.3g} to {pixels.max():.3g} cannot be drawn: pass '
                     'uint8, or floats in [0, 1] before any normalising')
  return np.repeat(pixels.clip(0, 1), 3 // pixels.shape[2], axis=2)


def _enlarge(values: Array, high: int, wide: int) -> Array:
  """Repeats [rows, columns, ...] to [rows * high, columns * wide, ...]."""
  return values.repeat(high, axis=0).repeat(wide, axis=1)


def _columns(cuts: Mapping[int, Any], layers: Sequence[int] | None) -> list[int]:
  """Returns the layers to draw."""
  reduced = sorted(cuts)
  if layers is None:
    if len(reduced) <= COLUMNS:
      return reduced
    picks = np.linspace(0, len(reduced) - 1, COLUMNS).round().astype(int)
    return [reduced[pick] for pick in picks]
  for layer in layers:
    if layer not in cuts:
      raise ValueError(f'nothing was cut in layer {layer}: choose from '
                       f'{", ".join(map(str, reduced)) or "none"}')
  return list(layers)


def _after(cuts: Mapping[int, TokenSet], layer: int, index: int,
           grid: tuple[int, int]) -> Groups | None:
  """Returns the groups that the last cut up to `layer` left, None before the first."""
  done = [cut for cut in cuts if cut <= layer]
  return groups(cuts[max(done)], index, grid) if done else None


def _draw(rows: Sequence[Row], layers: Sequence[int], grid: tuple[int, int], path: str | Path,
          title: str) -> Path:
  """Draws a figure of rows after cuts."""
  start = next((tokens.owner.shape[1] for row in rows for tokens in row.cuts.values()),
               grid[0] * grid[1])
  before = untouched(start, grid)
  table = [[_after(row.cuts, layer, row.index, grid) or before for layer in layers]
           for row in rows]
  return _figure(rows, table, before, [f'layer {layer}' for layer in layers], path, title)


def _figure(rows: Sequence[Row], table: Sequence[Sequence[Groups]], before: Groups,
            headings: Sequence[str], path: str | Path, title: str) -> Path:
  """Lays out rows in pixels, so that every cell is the same and nothing is resampled or cut off."""
  height, width = _image_size(rows)
  figure = Figure(dpi=DPI)
  FigureCanvasAgg(figure)
  scale = max(1, round(SIDE / max(height, width)))
  high, wide = height * scale, width * scale

  head = figure.text(0, 0, title, fontsize=TITLE, fontweight='bold', va='top')
  names = [figure.text(0, 0, row.name, fontsize=HEADER, fontweight='bold', ha='right', va='center')
           for row in rows]
  left = GAP + (max(map(_width, names)) + GAP if any(row.name for row in rows) else 0)
  seen = _seen([*table, [before]])
  headings = ('input', *rows[0].beside, *headings)
  total_wide = max(left + len(headings) * (wide + GAP), left + _width(head) + GAP,
                   left + _legend_width(figure, seen))
  top = GAP + (_points(TITLE) + GAP if title else 0)
  header, caption, legend = _points(HEADER + 4), _points(CAPTION + 6), 48 + 2 * GAP
  total_high = top + header + len(rows) * (caption + high + GAP) + legend
  figure.set_size_inches(total_wide / DPI, total_high / DPI)

  def place(x: float, y: float) -> tuple[float, float]:
    return x / total_wide, 1 - y / total_high

  head.set_position(place(left, GAP))
  for column, words in enumerate(headings):
    figure.text(*place(left + column * (wide + GAP), top), words, fontsize=HEADER,
                fontweight='bold', va='top')
  for number, (row, states) in enumerate(zip(rows, table, strict=True)):
    y = top + header + number * (caption + high + GAP)
    names[number].set_position(place(left - GAP, y + caption + high / 2))
    for column, (words, picture) in enumerate(_cells(row, before, states, scale)):
      x = left + column * (wide + GAP)
      figure.text(*place(x, y + caption - _points(5)), words, fontsize=CAPTION, color='#444444')
      _show(figure, picture, x / total_wide, 1 - (y + caption + high) / total_high,
            wide / total_wide, high / total_high)
  _legend(figure, seen, left, total_wide, total_high)
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)
  return path


def _image_size(rows: Sequence[Row]) -> tuple[int, int]:
  """Returns (height, width) of the images.

  Raises:
    ValueError: there are none, or they differ in size.
  """
  if not rows:
    raise ValueError('nothing to draw: give at least one image and one method')
  shapes = {row.image.shape[:2] for row in rows}
  if len(shapes) > 1:
    raise ValueError(f'images of different sizes {sorted(shapes)} cannot share a figure')
  return shapes.pop()


def _cells(row: Row, before: Groups, states: Sequence[Groups],
           scale: int) -> list[tuple[str, Array]]:
  """Draws the cells of a row, each under its caption: the image, others of it, and its states."""
  ground = row.image if row.ground is None else row.ground
  cells = [(f'{before.tokens} tokens',
            composite(row.image, before.labels, before.merged, scale=scale))]
  cells += [('', composite(picture, before.labels, before.merged, scale=scale))
            for picture in row.beside.values()]
  cells += [(f'{state.tokens} tokens',
             composite(ground, state.labels, state.merged, scale=scale, line=LINE))
            for state in states]
  return cells


def _points(size: float) -> int:
  """Converts typographic points to pixels."""
  return round(size * DPI / 72)


def _width(text: Text) -> float:
  return text.get_window_extent().width


def _show(figure: Figure, picture: Array, left: float, bottom: float, width: float,
          height: float) -> None:
  axes = figure.add_axes((left, bottom, width, height))
  axes.imshow(picture, interpolation='none', aspect='auto')
  axes.set(xticks=[], yticks=[])
  axes.spines[:].set(color='#999999', linewidth=0.5)


def _seen(table: Sequence[Sequence[Groups]]) -> list[str]:
  """Returns the fates that appear in a figure, in the order of `MEANINGS`."""
  states = [state for row in table for state in row]
  appears = {'kept': any(((s.labels >= 0) & ~s.merged).any() for s in states),
             'merged': any(s.merged.any() for s in states),
             'dropped': any((s.labels == DROPPED).any() for s in states)}
  return [name for name in MEANINGS if appears[name]]


def _swatch(name: str) -> Array:
  """Draws a sample of one fate as in the figure: uint8[48, 72, 3]."""
  ramp = np.add.outer(np.linspace(0.1, 0.35, 4), np.linspace(0.0, 0.4, 6))
  picture = np.stack([ramp, ramp + 0.12, ramp + 0.25], axis=2)
  labels = {'kept': [[0, 1, 2], [3, 4, 5]], 'merged': [[0, 0, 1], [0, 1, 1]],
            'dropped': [[DROPPED] * 3] * 2}[name]
  merged = np.full((2, 3), name == 'merged')
  return composite(picture, np.array(labels), merged, scale=12, line=LINE)


def _legend_width(figure: Figure, seen: Sequence[str]) -> float:
  return sum(72 + 2 * GAP + _text_width(figure, MEANINGS[name]) for name in seen)


def _text_width(figure: Figure, words: str) -> float:
  text = figure.text(0, 0, words, fontsize=CAPTION)
  width = _width(text)
  text.remove()
  return width


def _legend(figure: Figure, seen: Sequence[str], left: float, wide: float, high: float) -> None:
  """Draws swatches and words in the lower margin."""
  x, bottom = left, GAP
  for name in seen:
    _show(figure, _swatch(name), x / wide, bottom / high, 72 / wide, 48 / high)
    x += 72 + GAP / 2
    figure.text(x / wide, (bottom + 24) / high, MEANINGS[name], fontsize=CAPTION,
                va='center')
    x += _text_width(figure, MEANINGS[name]) + 1.5 * GAP
