"""Tiny vision-language models with the weights, inputs and outputs of the transformers library."""

import functools
import json
import pathlib

import numpy as np

from lib.data import anyres
from lib.data.pictures import Picture, batch_pictures
from lib.data.token_layout import anyres_layout, cell_layout, raster_layout
from models import checkpoints
from models.backbones.images import image_counts
from models.checkpoints.vlm_config import from_config
from ops.splice import check, collapse

FOLDER = pathlib.Path(__file__).parents[1] / 'fixtures' / 'parity_vlm'
FAMILIES = ('llava', 'llava_next', 'llava_onevision', 'qwen2_vl', 'qwen2_5_vl')
BATCHES = {'one': (1,), 'three': (1, 0, 2)}  # Images of each row.
GRID = (12, 12)  # Of a Qwen tower.


@functools.cache
def expected(family, batch):
  with np.load(FOLDER / f'{family}.npz') as arrays:
    return {key.removeprefix(f'{batch}_'): value for key, value in arrays.items()
            if key.startswith(f'{batch}_')}


@functools.cache
def config_of(family):
  return json.loads((FOLDER / f'{family}.json').read_text())


def image_token(family):
  """The placeholder's id."""
  return config_of(family).get('image_token_id') or config_of(family)['image_token_index']


@functools.cache
def model(family):
  vlm = from_config(config_of(family), grid=GRID)
  vlm = vlm.clone(tower=vlm.tower.clone(capture=True), lm=vlm.lm.clone(capture=True))
  return vlm, checkpoints.load(vlm, FOLDER / f'{family}.safetensors')


def pictures(family, found):
  """The images of a batch as the reference got them."""
  if 'image_grid_thw' in found:
    made, first = [], 0
    for _, rows, columns in found['image_grid_thw']:
      flat = found['pixel_values'][first:first + rows * columns]
      first += rows * columns
      patches = np.zeros((1, *GRID, flat.shape[-1]), np.float32)
      for place, (row, column) in enumerate(read_order(rows, columns, 2)):
        patches[0, row, column] = flat[place]
      index, axes, extent = cell_layout(1, (rows // 2, columns // 2), GRID[1] // 2,
                                         GRID[0] * GRID[1] // 4)
      made.append(Picture(patches, index, np.ones(index.shape, np.float32),
                                 np.int32([[rows, columns]]), axes, extent))
    return made
  pixels = np.moveaxis(found['pixel_values'], -3, -1)
  if family == 'llava':
    return [Picture(image[None], *raster_layout(16)) for image in pixels]
  pinpoints = [tuple(each) for each in config_of(family)['image_grid_pinpoints']]
  made = []
  for image, size in zip(pixels, found['image_sizes'], strict=True):
    target = anyres.best_resolution(tuple(size), pinpoints)
    crops = 1 + target[0] * target[1] // 16 ** 2
    made.append(Picture(image[:crops], *anyres_layout(
        tuple(size), target, tile=16, side=4, max_crops=2 if 'onevision' in family else 0)))
  return made


def read_order(rows, columns, window):
  """(row, column) of patches as the Qwen towers hold them: windows, then cells of 2 x 2."""
  for top in range(0, rows, window):
    for left in range(0, columns, window):
      for y in range(top, min(top + window, rows), 2):
        for x in range(left, min(left + window, columns), 2):
          yield from ((y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1))


def inputs(family, batch):
  """ids, valid, Images."""
  found, left = expected(family, batch), pictures(family, expected(family, batch))
  lengths, rows, counts = list(found['lengths']), [], []
  for number in BATCHES[batch]:
    rows.append([left.pop(0) for _ in range(number)])
    counts.append([int(lengths.pop(0)) for _ in range(number)])
  assert [[len(each.index) for each in row] for row in rows] == counts
  image = image_token(family)
  ids, valid = collapse(found['ids'], found['mask'] > 0, image=image, counts=counts)
  patches = GRID[0] * GRID[1] // 4 if 'image_grid_thw' in found else 16
  images = batch_pictures(rows, patches=patches)
  check(ids, valid, image_counts(images), image=image)
  return ids, valid, images
