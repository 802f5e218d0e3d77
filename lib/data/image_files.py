"""Pictures as people have them: files of a few formats, in any colour mode, turned by EXIF."""

from __future__ import annotations

import contextlib
import pathlib
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# Pillow opens dozens more, some by other programs (PostScript by Ghostscript); of a damaged TIFF it
# may return a part, and libtiff prints.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP')
# How files begin that are pictures, or that people take for pictures.
_BEGINNINGS = {
    b'\x89PNG': 'PNG', b'\xff\xd8\xff': 'JPEG', b'GIF8': 'GIF', b'BM': 'BMP', b'II*\0': 'TIFF',
    b'MM\0*': 'TIFF', b'%!PS': 'PostScript', b'\xc5\xd0\xd3\xc6': 'PostScript', b'%PDF': 'PDF',
    b'8BPS': 'Photoshop', b'<svg': 'SVG', b'<?xml': 'SVG or other XML', b'<!DOCTYPE': 'a web page',
    b'<!doctype': 'a web page', b'<html': 'a web page', b'PK\x03\x04': 'ZIP',
    b'\x1f\x8b': 'gzip', b'\xff\x0a': 'JPEG XL', b'\0\0\0\x0cJXL': 'JPEG XL',
    b'\0\0\0\x0cjP': 'JPEG 2000', b'version https://git-lfs': 'a Git LFS pointer'}
# The same of containers, by what stands at the ninth byte.
_CONTENTS = {b'WEBP': 'WEBP', b'avif': 'AVIF', b'avis': 'AVIF', b'heic': 'HEIC', b'heix': 'HEIC',
             b'mif1': 'HEIC'}
# What shows a picture upright, by its orientation; Pillow's own way writes the other tags anew, and
# stops at those that it cannot write.
_TURNS = dict(zip(range(2, 9), (
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90), strict=True))


def read_image(path: str | pathlib.Path) -> Image.Image:
  """Reads a picture as `upright` returns it; of several frames the first.

  Raises:
    ValueError: no regular file, another format than `FORMATS`, a damaged file, one of more pixels
      than Pillow decodes, or as `eight_bit`.
    OSError: the file is not there, or may not be read.
  """
  path = pathlib.Path(path)
  # A pipe would wait for ever, and a device has no end.
  if path.exists() and not path.is_file():
    raise ValueError(f'{path} is no file: give the picture itself')
  with path.open('rb') as file, warnings.catch_warnings():
    # Pillow warns of what is read all the same, or of what the error then says.
    warnings.simplefilter('ignore')
    beginning = file.read(32)
    try:
      image = Image.open(file, formats=FORMATS)
      image.load()
    except Image.DecompressionBombError as error:
      size = str(error).partition(',')[0]
      raise ValueError(f'{path} is too large ({size}): scale it down') from error
    except Exception as error:  # Pillow's decoders raise a dozen types between them.
      raise ValueError(f'{path} {_fault(beginning, error)}') from error
    try:
      return upright(image)
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from error


def upright(image: Image.Image) -> Image.Image:
  """Returns an RGB image, turned as its EXIF says.

  Raises:
    ValueError: as `eight_bit`.
  """
  image.load()
  turn = None
  # EXIF that cannot be read turns nothing, in viewers neither; a dozen types are raised here too.
  with contextlib.suppress(Exception):
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
  image = rgb(image)
  if turn is not None:
    image = image.transpose(turn)
    image.info = {}  # The new image would be turned again.
  return image


def rgb(image: Image.Image) -> Image.Image:
  """Returns an RGB image of one of any mode; transparency is left out, as the references do.

  Raises:
    ValueError: as `eight_bit`.
  """
  if image.mode == 'RGB':
    return image
  if image.mode == 'P' and 'transparency' in image.info:
    # The same colours; Pillow warns where it goes straight to RGB.
    image = image.convert('RGBA')
  return eight_bit(image).convert('RGB')


def eight_bit(image: Image.Image) -> Image.Image:
  """Returns a greyscale image of 16 bits in 8, where Pillow would clip it to white; others as is.

  Keeps the upper byte, as Pillow does with colours of 16 bits.

  Raises:
    ValueError: numbers that 16 bits do not hold, or fractions: their black and white are unknown.
  """
  if image.mode != 'F' and not image.mode.startswith('I'):
    return image
  values = np.asarray(image)
  if image.mode == 'F' or values.min() < 0 or values.max() > 0xffff:
    raise ValueError(f'the picture has values of {values.min()} to {values.max()} in mode '
                     f'{image.mode}, and greyscale of 8 or 16 bits is read: save it as such')
  return Image.fromarray((values >> 8).astype(np.uint8))


def _fault(beginning: bytes, error: Exception) -> str:
  """Says why a file that begins so could not be read."""
  if not beginning:
    return 'is an empty file: save or download the picture again'
  if beginning[4:8] == b'ftyp' or beginning[:4] == b'RIFF':
    found = _CONTENTS.get(beginning[8:12], 'a video or sound')
  else:
    text = beginning.lstrip(b'\xef\xbb\xbf \t\r\n')
    found = next((name for start, name in _BEGINNINGS.items() if text.startswith(start)),
                 'an unknown format')
  if found in FORMATS:
    unread = isinstance(error, UnidentifiedImageError)
    reason = 'its header cannot be read' if unread else ' '.join(str(error).split())
    return f'is a damaged or incomplete {found} file ({reason}): save or download it again'
  return (f'holds {found} (it begins with {beginning[:8]!r}), and {", ".join(FORMATS)} are read: '
          'save it as PNG or JPEG')
