"""Files of pictures: how people's cameras, scanners and disks leave them, and what is refused."""

import io
import os
import re
import struct
import types
import warnings
import zlib

import numpy as np
import pytest
from helpers.errors import said
from PIL import Image, ImageOps, UnidentifiedImageError

from lib import notebook
from lib.data.image_files import FORMATS, read_image, rgb, upright
from lib.data.image_reader import ImageReader
from lib.data.preprocess import Preprocess

ORIENTATION = 0x0112
# The quarters of `quarters()` as each orientation shows them: upper left, upper right, lower left,
# lower right.
SHOWN = {1: 'abcd', 2: 'badc', 3: 'dcba', 4: 'cdab', 5: 'acbd', 6: 'cadb', 7: 'dbca', 8: 'bdac'}
COLOURS = {'a': (255, 0, 0), 'b': (0, 255, 0), 'c': (0, 0, 255), 'd': (255, 255, 255)}
FAITHFUL = {'PNG': {}, 'WEBP': {'lossless': True}, 'JPEG': {'quality': 100, 'subsampling': 0}}


def quarters():
  """A picture of 32 x 16 pixels whose quarters have the four colours."""
  pixels = np.zeros((16, 32, 3), np.uint8)
  for place, colour in enumerate(COLOURS.values()):
    y, x = divmod(place, 2)
    pixels[8 * y:8 * y + 8, 16 * x:16 * x + 16] = colour
  return Image.fromarray(pixels)


def noise(size=(36, 24)):
  return Image.fromarray(
      np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def encoded(image, kind, **settings):
  stream = io.BytesIO()
  image.save(stream, kind, **settings)
  return stream.getvalue()


def turned(orientation):
  exif = Image.Exif()
  exif[ORIENTATION] = orientation
  return exif


@pytest.fixture
def read(tmp_path):
  """Reads bytes as a file called photo.png."""
  def read(content):
    (tmp_path / 'photo.png').write_bytes(content)
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      return read_image(tmp_path / 'photo.png')
  return read


# Orientation.


@pytest.mark.parametrize('orientation', SHOWN)
@pytest.mark.parametrize('kind', FAITHFUL)
def test_exif_turns_pictures_upright(kind, orientation, read):
  image = read(encoded(quarters(), kind, exif=turned(orientation), **FAITHFUL[kind]))
  assert image.size == ((32, 16) if orientation < 5 else (16, 32))
  width, height = image.size
  shown = [image.getpixel((x * width // 4, y * height // 4)) for y in (1, 3) for x in (1, 3)]
  wanted = [COLOURS[name] for name in SHOWN[orientation]]
  np.testing.assert_allclose(shown, wanted, atol=2)


@pytest.mark.parametrize('exif', [
    turned(0), turned(9), b'Exif\0\0garbage of a camera', b'xx',
    b'Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03'])
@pytest.mark.parametrize('kind', FAITHFUL)
def test_an_orientation_that_is_none_turns_nothing(kind, exif, read):
  image = read(encoded(quarters(), kind, exif=exif, **FAITHFUL[kind]))
  np.testing.assert_allclose(np.asarray(image, int), np.asarray(quarters(), int), atol=2)


@pytest.mark.parametrize('kind', FAITHFUL)
def test_odd_tags_beside_the_orientation_do_no_harm(kind, read):
  # A resolution that is text: Pillow reads it and cannot write it.
  exif = (b'Exif\0\0MM\0*' + struct.pack('>IH', 8, 2)
          + struct.pack('>HHIHH', ORIENTATION, 3, 1, 6, 0)
          + struct.pack('>HHI4s', 0x011a, 2, 4, b'abc') + struct.pack('>I', 0))
  content = encoded(quarters(), kind, **FAITHFUL[kind], exif=exif)
  with Image.open(io.BytesIO(content)) as opened, pytest.raises((TypeError, AttributeError)):
    ImageOps.exif_transpose(opened)
  image = read(content)
  assert image.size == (16, 32)
  np.testing.assert_allclose(image.getpixel((4, 8)), COLOURS['c'], atol=2)


def test_xmp_tells_the_orientation_too(read):
  content = encoded(quarters(), 'JPEG', xmp=b'<x tiff:Orientation="6"/>')
  assert read(content).size == (16, 32)


def test_grey_of_16_bits_is_turned_too(read):
  values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 10_000
  image = read(encoded(Image.fromarray(values), 'PNG', exif=turned(6)))
  np.testing.assert_array_equal(np.asarray(image)[..., 0], np.rot90(values >> 8, -1))


def test_notebooks_turn_files_and_open_images(tmp_path):
  path = tmp_path / 'phone.jpg'
  quarters().save(path, exif=turned(6), quality=100, subsampling=0)
  with Image.open(path) as image:
    for opened in (notebook._opened(path), notebook._opened(str(path)), notebook._opened(image)):
      assert opened.size == (16, 32)
      np.testing.assert_allclose(opened.getpixel((4, 8)), COLOURS['c'], atol=2)


# Modes.


def test_grey_of_16_bits_is_scaled(read):
  values = np.linspace(0, 0xffff, 48, dtype=np.uint16).reshape(6, 8)
  small, big = (Image.fromarray(values.astype(dtype)) for dtype in ('<u2', '>u2'))
  assert (small.mode, big.mode) == ('I;16', 'I;16B')
  for image in (read(encoded(small, 'PNG')), rgb(small), rgb(big), upright(big)):
    assert image.mode == 'RGB'
    for channel in np.moveaxis(np.asarray(image), -1, 0):
      np.testing.assert_allclose(channel, values / 257, atol=1)
      assert (channel[0, 0], channel[-1, -1]) == (0, 255)


def test_grey_and_colours_of_16_bits_are_scaled_alike(read):
  values = np.random.default_rng(0).integers(0, 1 << 16, (5, 7)).astype('>u2')
  rows = np.repeat(values[..., None], 3, axis=-1)
  content = b''.join(b'\0' + row.tobytes() for row in rows)
  colours = read(png(7, 5, content, bits=16))
  np.testing.assert_array_equal(np.asarray(read(encoded(Image.fromarray(values.astype('<u2')),
                                                        'PNG'))), np.asarray(colours))


def test_integers_are_grey_of_16_bits():
  values = np.asarray([[0, 257, 0x8000], [0x8080, 0xff00, 0xffff]], np.int32)
  image = Image.fromarray(values)
  assert image.mode == 'I'
  wanted = [[0, 1, 128], [128, 255, 255]]
  for shown in (rgb(image), upright(image)):
    np.testing.assert_array_equal(np.asarray(shown)[..., 2], wanted)


@pytest.mark.parametrize('values', [
    np.asarray([[0.0, 0.5]], np.float32), np.asarray([[-1, 5]], np.int32),
    np.asarray([[0, 1 << 16]], np.int32)])
def test_other_numbers_are_refused(values):
  image = Image.fromarray(values)
  for call in (rgb, upright):
    assert said(call, image) == (
        f'the picture has values of {values.min()} to {values.max()} in mode {image.mode}, and '
        'greyscale of 8 or 16 bits is read: save it as such')


def transparent(mode):
  """A picture of noise of a mode, with every transparency, and its colours."""
  image = noise((16, 16))
  alpha = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
  if mode == 'LA':
    grey = image.convert('L')
    return Image.merge('LA', (grey, alpha)), np.repeat(np.asarray(grey)[..., None], 3, axis=-1)
  return Image.merge('RGBA', (*image.split(), alpha)), np.asarray(image)


@pytest.mark.parametrize('mode', ['LA', 'RGBA'])
def test_transparency_is_left_out(mode, read):
  image, colours = transparent(mode)
  np.testing.assert_array_equal(np.asarray(read(encoded(image, 'PNG'))), colours)


@pytest.mark.parametrize('transparency', [3, bytes(range(256))])
def test_palettes_give_their_colours(transparency, read):
  image = noise((16, 16)).convert('P', palette=Image.Palette.ADAPTIVE)
  wanted = np.asarray(image.convert('RGB'))
  content = encoded(image, 'PNG', transparency=transparency)
  with Image.open(io.BytesIO(content)) as opened:
    assert (opened.mode, opened.info['transparency']) == ('P', transparency)
  np.testing.assert_array_equal(np.asarray(read(content)), wanted)


def test_ink_becomes_colours(read):
  ink = Image.new('CMYK', (8, 8), (255, 0, 0, 0))
  ink.paste((0, 0, 0, 255), (4, 0, 8, 8))
  for image in (read(encoded(ink, 'JPEG', quality=100)), rgb(ink)):
    np.testing.assert_allclose(image.getpixel((1, 4)), (0, 255, 255), atol=3)
    np.testing.assert_allclose(image.getpixel((6, 4)), (0, 0, 0), atol=3)


@pytest.mark.parametrize('kind', ['PNG', 'BMP', 'GIF'])
def test_one_bit_is_black_and_white(kind, read):
  values = np.eye(8, dtype=bool)
  image = read(encoded(Image.fromarray(values), kind))
  np.testing.assert_array_equal(np.asarray(image)[..., 0], np.where(values, 255, 0))


def test_the_steps_of_models_read_all_modes():
  steps = Preprocess(None, 3, None, None, None, None)
  values = np.asarray([[0, 0x7fff, 0xffff]], np.uint16)
  np.testing.assert_array_equal(steps(Image.fromarray(values))[..., 0], [[0, 127, 255]])


# Formats.


@pytest.mark.parametrize('kind', FORMATS)
def test_formats_are_told_by_their_content(kind, read):
  image = noise()
  with Image.open(io.BytesIO(encoded(image, kind))) as opened:
    wanted = np.asarray(opened.convert('RGB'))
  np.testing.assert_array_equal(np.asarray(read(encoded(image, kind))), wanted)


@pytest.mark.parametrize('kind', ['GIF', 'WEBP', 'PNG'])
def test_of_several_frames_the_first_is_read(kind, read):
  frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue')]
  settings = {'lossless': True} if kind == 'WEBP' else {}
  content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **settings)
  with Image.open(io.BytesIO(content)) as opened:
    assert opened.n_frames == 2
  assert read(content).getcolors() == [(64, (255, 0, 0))]


def test_a_phone_keeps_a_second_picture_behind_the_first(read):
  content = encoded(quarters(), 'MPO', save_all=True, append_images=[noise()], quality=100,
                    subsampling=0, exif=turned(8))
  image = read(content)
  assert image.size == (16, 32)
  np.testing.assert_allclose(image.getpixel((4, 8)), COLOURS['b'], atol=2)


@pytest.mark.parametrize(('content', 'found'), [
    (encoded(noise(), 'EPS'), "PostScript (it begins with b'%!PS-Ado')"),
    (encoded(noise(), 'TIFF'), 'TIFF ('), (encoded(noise(), 'PDF'), 'PDF ('),
    (encoded(noise(), 'JPEG2000'), 'JPEG 2000 ('),
    (encoded(noise(), 'TGA'), 'an unknown format ('),
    (encoded(noise(), 'PPM'), 'an unknown format ('),
    (b'\0\0\0\x18ftypheic\0\0\0\0mif1heic', 'HEIC ('), (b'\0\0\0\x20ftypavif\0\0\0\0', 'AVIF ('),
    (b'\0\0\0\x20ftypisom\0\0\0\0', 'a video or sound ('),
    (b'RIFF\x10\0\0\0AVI LIST', 'a video or sound ('),
    (b'\n<!DOCTYPE html><title>404</title>', 'a web page ('), (b'<svg xmlns=""/>', 'SVG ('),
    (b'version https://git-lfs.github.com/spec/v1\n', 'a Git LFS pointer ('),
    (b'a photo of a cat\n', "an unknown format (it begins with b'a photo ')")])
def test_other_files_are_refused_by_what_they_are(content, found, read, tmp_path):
  text = said(read, content)
  assert text.startswith(f'{tmp_path / "photo.png"} holds {found}')
  assert text.endswith(', and PNG, JPEG, WEBP, GIF, BMP are read: save it as PNG or JPEG')


# Damage.


@pytest.mark.parametrize('kind', FORMATS)
@pytest.mark.parametrize('share', [0.05, 0.5, 0.9])
def test_files_that_are_cut_short_are_refused(kind, share, read, tmp_path):
  content = encoded(noise(), kind)
  text = said(read, content[:int(share * len(content))])
  assert text.startswith(f'{tmp_path / "photo.png"} is a damaged or incomplete {kind} file (')
  assert text.endswith('): save or download it again')


@pytest.mark.parametrize('kind', FORMATS)
def test_wrong_bytes_give_a_picture_or_one_line(kind, read):
  random, content = np.random.default_rng(0), encoded(noise(), kind)
  faults = []
  for trial in range(60):
    wrong = np.frombuffer(content, np.uint8).copy()
    # Headers are where most can go wrong.
    places = random.integers(0, (40, 200, len(wrong))[trial % 3], size=1 + trial % 4)
    wrong[places] = random.integers(0, 256, len(places))
    try:
      assert read(wrong.tobytes()).mode == 'RGB'
    except ValueError as error:
      faults.append(str(error))
  assert len(faults) > 5
  for fault in faults:
    assert re.fullmatch(r'\S*photo\.png (holds|is (a damaged|too large)).*: \w.*', fault)


def test_an_empty_file_is_called_one(read):
  assert said(read, b'').endswith('is an empty file: save or download the picture again')


def png(width, height, content, *, bits=8, more=b''):
  """The bytes of an RGB PNG with a header of one's own."""
  def chunk(name, data):
    return (struct.pack('>I', len(data)) + name + data
            + struct.pack('>I', zlib.crc32(name + data)))
  header = struct.pack('>IIBBBBB', width, height, bits, 2, 0, 0, 0)
  return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + (chunk(b'zTXt', more) if more else b'')
          + chunk(b'IDAT', zlib.compress(content)) + chunk(b'IEND', b''))


def test_bombs_are_refused_before_they_are_decoded(read):
  text = said(read, png(50_000, 50_000, b'\0' * 10_000))
  assert text.endswith('photo.png is too large (Image size (2500000000 pixels) exceeds limit of '
                       '178956970 pixels): scale it down')
  text = b'a\0\0' + zlib.compress(b'\0' * 10_000_000)
  assert 'Decompressed data too large' in said(read, png(1, 1, b'\0' * 4, more=text))
  assert 'photo.png is too large (' in said(read, png(2 ** 31, 2 ** 31, b'\0'))


def test_what_is_no_file_is_not_opened(tmp_path):
  os.mkfifo(tmp_path / 'pipe.png')
  for path in (tmp_path, tmp_path / 'pipe.png', '/dev/zero'):
    assert said(read_image, path) == f'{path} is no file: give the picture itself'
  with pytest.raises(FileNotFoundError, match=r'gone\.png'):
    read_image(tmp_path / 'gone.png')


def test_images_in_memory_are_turned_once():
  image = quarters()
  image.info['exif'] = turned(6).tobytes()
  assert upright(image).size == upright(upright(image)).size == (16, 32)


# Records of sets.


@pytest.mark.parametrize('channels', [1, 3])
def test_records_of_sets_are_scaled_and_of_the_same_formats(channels):
  reader = object.__new__(ImageReader)
  reader._settings = types.SimpleNamespace(channels=channels)
  values = np.linspace(0, 0xffff, 48, dtype=np.uint16).reshape(6, 8)
  image = np.asarray(reader._decode(encoded(Image.fromarray(values), 'PNG')))
  np.testing.assert_array_equal(image.reshape(6, 8, -1)[..., 0], values >> 8)
  with pytest.raises(UnidentifiedImageError):
    reader._decode(encoded(noise(), 'EPS'))
