"""Augmentations of a training image: (image, size, random, *, filter, ...) -> size x size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from ops import choices
from ops.values import NotNegative, Positive, Share, check_keys, keys_of

# The side of a square in pixels, or (height, width).
Size = int | tuple[int, int]
FILTERS = {'bilinear': Image.Resampling.BILINEAR, 'bicubic': Image.Resampling.BICUBIC,
           'nearest': Image.Resampling.NEAREST}


def none(image: Image.Image, size: Size, random: np.random.Generator, *,
         filter: str) -> Image.Image:
  """Returns the whole image, as in evaluation with test_crop=1."""
  del random
  return whole(image, size, filter=filter)


def crop(image: Image.Image, size: Size, random: np.random.Generator, *, filter: str,
         area: tuple[Positive, Positive] = (0.08, 1.0),
         aspect: tuple[Positive, Positive] = (3 / 4, 4 / 3), flip: Share = 0.5) -> Image.Image:
  """Returns a random part of the image, resized: the crop of Inception training.

  `area` is a fraction of the image's area, `aspect` width over height (relative to that of `size`),
  `flip` the probability of a mirror image. Ten tries to fit, else the centre.
  Going Deeper with Convolutions (Szegedy et al., 2014), Sec. 6, arXiv:1409.4842.
  """
  wide, high = _sides(size)
  width, height = image.size
  areas = random.uniform(*area, size=10) * width * height
  ratios = np.exp(random.uniform(*np.log(aspect), size=10)) * (wide / high)  # type: ignore[call-overload]
  left, top, mirror = random.random(3)
  widths, heights = np.sqrt(areas * ratios), np.sqrt(areas / ratios)
  fits = (widths <= width) & (heights <= height)
  if fits.any():
    first = fits.argmax()
    w, h = widths[first], heights[first]
    x, y = left * (width - w), top * (height - h)
    image = image.resize((wide, high), FILTERS[filter], box=(x, y, x + w, y + h))
  else:
    image = whole(image, size, filter=filter)
  return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror < flip else image


def affine(image: Image.Image, size: Size, random: np.random.Generator, *, filter: str,
           shift: Share = 0.0, degrees: NotNegative = 0.0,
           scale: tuple[Positive, Positive] = (1.0, 1.0), flip: Share = 0.0) -> Image.Image:
  """Shifts, rotates and scales by small random amounts in one resampling; the outside is black.

  `shift` is at most this fraction of the side, each way; `degrees` at most this angle; `scale`
  above 1 enlarges; `flip` is the probability of a mirror image.
  """
  wide, high = _sides(size)
  if image.width > wide or image.height > high:
    # Resampling by a matrix does not antialias, so an image that shrinks does so first.
    image = whole(image, size, filter=filter)
  right, down = random.uniform(-shift, shift, size=2)
  angle = np.radians(random.uniform(-degrees, degrees))
  zoom = random.uniform(*scale)
  mirror = -1 if random.random() < flip else 1
  # From a pixel of the result to a point of the image, both measured from their centres.
  width, height = image.size
  step_x, step_y = width / wide / zoom, height / high / zoom
  a, b = mirror * step_x * np.cos(angle), step_x * np.sin(angle)
  d, e = -mirror * step_y * np.sin(angle), step_y * np.cos(angle)
  c = width * (0.5 + right) - (a * wide + b * high) / 2
  f = height * (0.5 + down) - (d * wide + e * high) / 2
  return image.transform((wide, high), Image.Transform.AFFINE, (a, b, c, d, e, f),
                         resample=FILTERS[filter])


AUGMENTS: dict[str, Callable[..., Image.Image]] = {'none': none, 'crop': crop, 'affine': affine}


def whole(image: Image.Image, size: Size, *, filter: str, fraction: float = 1.0) -> Image.Image:
  """Resizes the largest centre rectangle of the size's shape, `fraction` of its sides, to it."""
  wide, high = _sides(size)
  width, height = image.size
  across = min(width, height * (wide / high)) * fraction
  down = across * (high / wide)
  left, top = (width - across) / 2, (height - down) / 2
  return image.resize((wide, high), FILTERS[filter], box=(left, top, left + across, top + down))


def _sides(size: Size) -> tuple[int, int]:
  """Returns (width, height), as Pillow has them."""
  return (size, size) if isinstance(size, int) else (size[1], size[0])


def make(arguments: Mapping[str, Any], *, filter: str) -> Callable[..., Image.Image]:
  """Returns the augmentation of a config, with its keywords filled in.

  Args:
    arguments: `data.augment`: `method`, a name in `AUGMENTS` ('none' if absent), and that
      function's keywords.
    filter: a name in `FILTERS`.

  Returns:
    (image, size, random) -> image of that size.

  Raises:
    ValueError: an unknown method, or a keyword that it does not take.
  """
  keywords = dict(arguments)
  method = keywords.pop('method', 'none')
  choices.check('data.augment.method=', method, AUGMENTS)
  accepted = keys_of(AUGMENTS[method]).without('filter')
  if keywords and not accepted.kinds:
    raise ValueError(f'data.augment.method={method!r} takes no arguments, and data.augment has '
                     f'{", ".join(keywords)}: take them out, or choose another method')
  check_keys('data.augment', keywords, accepted,
             unknown=f'data.augment: {method!r} has no argument ')

  def run(image: Image.Image, size: Size, random: np.random.Generator) -> Image.Image:
    return AUGMENTS[method](image, size, random, filter=filter, **keywords)

  return run
