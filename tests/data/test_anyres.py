"""Image processors of vision-language models, pixel by pixel, and where their tokens go."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from lib.data import anyres, token_layout
from lib.data.pictures import batch_pictures, row_of
from models.backbones.images import image_counts

FOLDER = pathlib.Path(__file__).parents[1] / 'fixtures' / 'parity_vlm'
IMAGES = ('wide', 'tall', 'small', 'long')
STEPS = json.loads((FOLDER / 'preprocess.json').read_text())
GRID = (12, 12)


@pytest.fixture(scope='module')
def arrays():
  with np.load(FOLDER / 'preprocess.npz') as found:
    return dict(found)


def processor(name, kind, vision=None, grid=GRID):
  config = {'model_type': kind, 'vision_config': vision or {'image_size': 16, 'patch_size': 4}}
  return anyres.from_config(STEPS[name], config, grid=grid)


@pytest.mark.parametrize('image', IMAGES)
@pytest.mark.parametrize(('name', 'kind'), [
    ('llava_pad', 'llava'), ('llava_next', 'llava_next'), ('llava_onevision', 'llava_onevision')])
def test_crops_equal_the_reference(name, kind, image, arrays):
  picture = processor(name, kind)(Image.fromarray(arrays[image]))
  wanted = np.moveaxis(arrays[f'{name}_{image}_pixel_values'][0], -3, -1)
  wanted = wanted[None] if wanted.ndim == 3 else wanted
  assert picture.pixels.shape == wanted.shape
  np.testing.assert_allclose(picture.pixels, wanted, atol=1e-6)


@pytest.mark.parametrize('image', IMAGES)
def test_patches_equal_the_reference(image, arrays):
  picture = processor('qwen2_vl', 'qwen2_vl', grid=(40, 40))(Image.fromarray(arrays[image]))
  _, rows, columns = arrays[f'qwen2_vl_{image}_image_grid_thw'][0]
  assert picture.sizes.tolist() == [[rows, columns]]
  wanted = arrays[f'qwen2_vl_{image}_pixel_values'].reshape(rows // 2, columns // 2, 2, 2, -1)
  wanted = wanted.swapaxes(1, 2).reshape(rows, columns, -1)
  np.testing.assert_allclose(picture.pixels[0, :rows, :columns], wanted, atol=1e-6)
  assert not picture.pixels[0, rows:].any()
  assert not picture.pixels[0, :, columns:].any()
  # Tokens are the cells in raster order, and their places are rows and columns.
  assert picture.axes.tolist() == [[0, y, x] for y in range(rows // 2) for x in range(columns // 2)]
  assert picture.index[:, 0].tolist() == [y * 20 + x for _, y, x in picture.axes]
  assert picture.extent == max(rows, columns) // 2


ONEVISION_VISION = {'image_size': 384, 'patch_size': 14}
ONEVISION_PINPOINTS = [[384 * r, 384 * c] for r in range(1, 7) for c in range(1, 7)]


def onevision():
  """The processor of the released LLaVA-OneVision."""
  steps = STEPS['llava_onevision'] | {
      'image_mean': [0.5] * 3, 'image_std': [0.5] * 3, 'size': {'height': 384, 'width': 384},
      'image_grid_pinpoints': ONEVISION_PINPOINTS}
  config = {'model_type': 'llava_onevision', 'vision_aspect_ratio': 'anyres_max_9',
            'vision_config': ONEVISION_VISION}
  return anyres.from_config(steps, config)


def noise(seed, size):
  """An image of (height, width)."""
  return Image.fromarray(
      np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def test_several_images_of_onevision_are_one_padded_square_each():
  """As the reference since its pull request 38084: patching is for a single image."""
  look, images = onevision(), [noise(0, (768, 1024)), noise(1, (600, 600))]
  pictures = [look(image) for image in images]
  rows = batch_pictures([pictures, pictures[:1], []], patches=27 * 27)
  # 729 tokens of a square of 384, of which patches of 14 leave the last 6 pixels out; a newline.
  assert image_counts(rows)[0].tolist() == [730, 730]
  assert (rows.index[0, 0, :730, 0] == [*range(729), 7 * 729]).all()
  assert (rows.index[0, 1, :730, 0] == [*range(729, 2 * 729), 7 * 729]).all()
  # Alone, the first has 2 x 3 crops beside the whole.
  assert rows.pixels.shape[1] == 7
  assert rows.pixels[1].any(axis=(1, 2, 3)).all()
  assert not rows.pixels[0, 2:].any()
  assert batch_pictures([pictures], patches=27 * 27).pixels.shape[1] == 2
  # The square is filled up with the mean, above and below: 127 of 0.5 * 255.
  canvas = np.full((1024, 1024, 3), 127, np.uint8)
  canvas[128:896] = images[0]
  for crop, square in zip(rows.pixels[0], (Image.fromarray(canvas), images[1]), strict=False):
    wanted = np.asarray(square.resize((384, 384), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(crop, ((wanted - 0.5) / 0.5)[:378, :378], atol=1e-6)


def test_several_images_equal_the_reference(arrays):
  look = processor('llava_onevision', 'llava_onevision')
  row = row_of([look(Image.fromarray(arrays[image])) for image in IMAGES])
  with np.load(FOLDER / 'preprocess_row.npz') as found:
    wanted = np.moveaxis(found['llava_onevision'], -3, -1)
  assert wanted.shape == (4, 1, 16, 16, 3)
  for picture, pixels in zip(row, wanted, strict=True):
    np.testing.assert_allclose(picture.pixels, pixels, atol=1e-6)
    assert picture.index[:, 0].tolist() == [*range(16), token_layout.NEWLINE]


@pytest.mark.parametrize(('name', 'kind'), [
    ('llava_pad', 'llava'), ('llava_next', 'llava_next'), ('qwen2_vl', 'qwen2_vl')])
def test_several_images_of_other_families_are_read_as_each_alone(name, kind, arrays):
  look = processor(name, kind)
  pictures = [look(Image.fromarray(arrays[image]).resize((32, 16))) for image in IMAGES[:2]]
  assert row_of(pictures) == pictures


@pytest.mark.parametrize(('name', 'kind'), [
    ('llava_pad', 'llava'), ('llava_next', 'llava_next'), ('llava_onevision', 'llava_onevision')])
@pytest.mark.parametrize('size', [(1, 1), (1, 500), (500, 1), (3, 40)])
def test_thin_images_have_the_whole_at_least(name, kind, size):
  picture = processor(name, kind)(noise(0, size))
  assert np.isfinite(picture.pixels).all()
  assert picture.index[:16, 0].tolist() == list(range(16))
  assert -1 <= picture.index.min() <= picture.index.max() < 16 * len(picture.pixels)


def test_bilinear_weights_reproduce_a_plane():
  grid = np.arange(30).reshape(5, 6)
  index, weight = token_layout.bilinear(grid, (3, 4))
  np.testing.assert_allclose(weight.sum(axis=-1), 1, atol=1e-6)
  # A function linear in the place is interpolated exactly: here 6 y + x itself.
  rows, columns = (np.arange(3) + 0.5) * 5 / 3 - 0.5, (np.arange(4) + 0.5) * 6 / 4 - 0.5
  np.testing.assert_allclose((index * weight).sum(axis=-1), 6 * rows[:, None] + columns[None],
                             atol=1e-4)


def test_layouts_leave_out_padding_and_end_rows():
  # 16 x 32 pixels of an image half as high: rows 1 and 2 of 4 hold it.
  index, weight = token_layout.anyres_layout((10, 40), (16, 32), tile=16, side=4)
  assert (weight == 1).all()
  small, grid = index[:16, 0], index[16:, 0].reshape(2, 9)
  assert small.tolist() == list(range(16))
  assert (grid[:, -1] == token_layout.NEWLINE).all()
  # Left crop, then right crop, of the same row.
  assert grid[0].tolist() == [20, 21, 22, 23, 36, 37, 38, 39, -1]
  every, _ = token_layout.anyres_layout((10, 40), (16, 32), tile=16, side=4, unpad=False,
                                        newline=False)
  assert sorted(every[:, 0]) == list(range(48))


def test_videos_are_pooled_frame_by_frame():
  index, weight = token_layout.video_layout(3, 4)
  assert index.shape == weight.shape == (3 * 4 + 1, 4)
  assert sorted(index[4]) == [16, 17, 20, 21]
  np.testing.assert_array_equal(weight[:12], 0.25)
  assert index[-1].tolist() == [token_layout.NEWLINE] * 4
  assert weight[-1].tolist() == [1, 0, 0, 0]


def test_two_frames_share_patches(arrays):
  make = processor('qwen2_vl', 'qwen2_vl')
  frames = np.random.default_rng(0).normal(size=(4, 16, 24, 3)).astype(np.float32)
  picture = make.of_pixels(frames, interval=2.0)
  assert picture.pixels.shape == (2, *GRID, 96)
  # By channel, frame, row and column of a patch.
  np.testing.assert_array_equal(
      picture.pixels[1, 2, 3].reshape(3, 2, 4, 4),
      np.moveaxis(frames[2:4, 8:12, 12:16], -1, 0))
  assert picture.axes[:, 0].tolist() == [0] * 6 + [2] * 6
  assert picture.extent == 3
  assert make.of_pixels(frames, interval=9.0).extent == 10
  assert picture.index[6, 0] == 36


@pytest.mark.parametrize(('size', 'wanted'), [
    ((28, 28), (56, 56)), ((100, 200), (112, 196)), ((4000, 3000), (1148, 840)),
    ((10, 900), (28, 532))])
def test_sizes_are_multiples_within_two_areas(size, wanted):
  found = anyres.smart_resize(size, factor=28, min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
  assert found == wanted


def test_errors_say_what_to_change(arrays):
  make = processor('qwen2_vl', 'qwen2_vl')
  with pytest.raises(ValueError, match='does not fit into the grid of 12 x 12'):
    make.of_pixels(np.zeros((2, 56, 8, 3), np.float32))
  with pytest.raises(ValueError, match='200 times'):
    anyres.smart_resize((1, 300), factor=28, min_pixels=1, max_pixels=100)
  with pytest.raises(ValueError, match="'blip' is unknown: choose one of llava"):
    processor('llava_pad', 'blip')
  for ratio in ('anyres', 'pad', 'anyres_max_0', 'anyres_max_', 9):
    with pytest.raises(ValueError, match=f'vision_aspect_ratio={ratio!r} is unknown: anyres_max_N'):
      anyres.from_config(STEPS['llava_onevision'],
                         {'model_type': 'llava_onevision', 'vision_aspect_ratio': ratio,
                          'vision_config': {'image_size': 16, 'patch_size': 4}})
  square = processor('llava_pad', 'llava')(Image.fromarray(arrays['wide']))
  with pytest.raises(ValueError, match='tokens=9 are too few: a row has 16'):
    batch_pictures([[square]], patches=16, tokens=9)
  assert batch_pictures([[], []], patches=16) is None


def test_pixels_behind_the_last_whole_patch_are_not_read(arrays):
  vision = {'image_size': 16, 'patch_size': 5}
  for name, kind in (('llava_pad', 'llava'), ('llava_next', 'llava_next')):
    picture = processor(name, kind, vision)(Image.fromarray(arrays['wide']))
    whole = processor(name, kind)(Image.fromarray(arrays['wide']))
    np.testing.assert_array_equal(picture.pixels, whole.pixels[:, :15, :15])
    assert picture.index.max() < len(picture.pixels) * 9
