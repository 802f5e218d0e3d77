"""Pictures that are none: other formats under a picture's name, damaged files, bombs."""

from __future__ import annotations

import functools
import io
import pathlib
import random
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from fuzz.case import DAMAGE, Case, Damage
from PIL import Image

FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP')
# What Pillow writes, and no picture here may be.
OTHERS = ('TIFF', 'EPS', 'PDF', 'PPM', 'TGA', 'ICO', 'PCX', 'SGI', 'JPEG2000', 'DDS', 'ICNS', 'XBM',
          'IM', 'MSP', 'SPIDER', 'AVIF', 'DIB', 'BLP')
# How files begin.
MAGIC = {
    'PNG': b'\x89PNG\r\n\x1a\n', 'JPEG': b'\xff\xd8\xff\xe0', 'GIF': b'GIF89a', 'BMP': b'BM',
    'WEBP': b'RIFF\x10\0\0\0WEBP', 'TIFF': b'II*\0', 'PostScript': b'%!PS-Adobe-3.0 EPSF-3.0\n',
    'PDF': b'%PDF-1.7\n', 'Photoshop': b'8BPS', 'SVG': b'<svg xmlns="http://www.w3.org/2000/svg">',
    'ZIP': b'PK\x03\x04', 'gzip': b'\x1f\x8b', 'HEIC': b'\0\0\0\x18ftypheic',
    'video': b'\0\0\0\x18ftypisom', 'JPEG XL': b'\xff\x0a', 'ELF': b'\x7fELF',
    'pickle': b'\x80\x04', 'sound': b'RIFF\x10\0\0\0WAVE'}


def encoded(kind: str, size: tuple[int, int] = (36, 24)) -> bytes:
  """Returns the bytes of a picture of noise."""
  pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
  image = Image.fromarray(pixels)
  if kind in ('XBM', 'MSP'):
    image = image.convert('1')
  elif kind == 'SPIDER':
    image = image.convert('F')
  elif kind == 'BLP':
    image = image.convert('P')
  stream = io.BytesIO()
  image.save(stream, kind)
  return stream.getvalue()


def read(content: bytes, folder: pathlib.Path, shared: pathlib.Path) -> None:
  """Reads bytes as a file called photo.png."""
  from lib.data.image_files import read_image
  del shared
  (folder / 'photo.png').write_bytes(content)
  read_image(folder / 'photo.png')


def read_encoded(kind: str, folder: pathlib.Path, shared: pathlib.Path) -> None:
  """Reads a picture of some format as a file called photo.png."""
  read(encoded(kind, (16, 16)), folder, shared)


def read_damaged(kind: str, damage: Damage, seed: int,
                 folder: pathlib.Path, shared: pathlib.Path) -> None:
  """Reads a damaged picture."""
  from lib.data.image_files import read_image
  del shared
  path = folder / f'photo.{kind.lower()}'
  path.write_bytes(encoded(kind))
  damage(path, random.Random(seed))
  read_image(path)


def chunk(name: bytes, content: bytes) -> bytes:
  """Returns a part of a PNG."""
  return (struct.pack('>I', len(content)) + name + content
          + struct.pack('>I', zlib.crc32(name + content)))


def png(width: int, height: int, *, depth: int = 8, colour: int = 2, data: bytes = b'') -> bytes:
  """Returns a PNG whose header says so, whatever its data hold."""
  header = struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)
  return (MAGIC['PNG'] + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(data))
          + chunk(b'IEND', b''))


def truncated_early(path: pathlib.Path, rng: random.Random) -> None:
  """Cuts a picture in its first nine tenths: some formats end with what nobody needs."""
  content = path.read_bytes()
  path.write_bytes(content[:rng.randrange(1, len(content) * 9 // 10)])


def writable(kind: str) -> bool:
  """Whether this Pillow writes a format."""
  Image.init()
  return kind in Image.SAVE


def images() -> Iterator[Case]:
  """Yields cases of files of pictures."""
  rng = random.Random(4)
  for kind in FORMATS:
    yield Case(kind, functools.partial(read_encoded, kind), fine=True)
    for seed in range(5):
      yield Case(f'{kind}: truncated, {seed}', functools.partial(
          read_damaged, kind, truncated_early, seed), says=('photo',))
    for how, damage in DAMAGE.items():
      if how != 'truncated':
        yield Case(f'{kind}: {how}', functools.partial(read_damaged, kind, damage, 0),
                   says=('photo',))
  for kind in filter(writable, OTHERS):
    yield Case(f'{kind} as PNG', functools.partial(read_encoded, kind), says=('photo',))
  for name, beginning in MAGIC.items():
    for size in (0, 3, 999):
      content = beginning + rng.randbytes(size)
      yield Case(f'{name}, then {size} bytes', functools.partial(read, content), says=('photo',))
  for size in (1, 7, 64, 4096):
    yield Case(f'{size} bytes', functools.partial(read, rng.randbytes(size)), says=('photo',))
  for width, height in ((0, 0), (0, 5), (5, 0), (2 ** 31 - 1, 1), (60_000, 60_000),
                        (2 ** 31, 2 ** 31), (2 ** 32 - 1, 2 ** 32 - 1)):
    yield Case(f'PNG of {width} x {height}', functools.partial(read, png(width, height)),
               says=('photo',))
  for depth, colour in ((7, 2), (8, 5), (3, 0), (0, 2), (255, 255)):
    yield Case(f'PNG of depth {depth} and colour {colour}', functools.partial(
        read, png(8, 8, depth=depth, colour=colour, data=bytes(999))), says=('photo',))
  yield Case('PNG of too little data', functools.partial(read, png(800, 800, data=bytes(99))),
             says=('photo',))


KINDS = {'images': images}
