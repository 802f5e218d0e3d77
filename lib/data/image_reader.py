"""Images and labels of one split by index: decoding, augmenting, and records that are damaged.

Axes: B batch of this process, S image side, C channels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from lib.data import augment, prepare
from lib.data.image_files import FORMATS, eight_bit
from lib.data.settings import MODES, ImageSettings

# A damaged file has many bad records in a row; a run should not go on without all of them.
MAX_CORRUPT_IN_A_ROW = 100
# An image, and its class or the map of its pixels' classes.
Example = tuple[Image.Image, int | Image.Image]


class CorruptRecordError(ValueError):
  """Reports a record that cannot be read, parsed or decoded, with its file and number."""


class ImageReader:
  """Reads images and labels of one split, and counts the records that cannot be read.

  Args:
    settings: of the set.
    field: 'train_split' or 'test_split'.

  Attributes:
    class_names: of the labels.
    image_shape: (height, width, channels) as stored, None where images differ.
    corrupt: examples that could not be read so far, and why.

  Raises:
    ValueError: an unknown name or split, a set without classes, or channels that it does not have.
    FileNotFoundError: the set is not prepared.
  """

  def __init__(self, settings: ImageSettings, field: str):
    builder = prepare.prepared(settings.name, settings.data_dir)
    self._image_key, self._label_key = _keys(builder)
    _check_images(builder.info.features[self._image_key], settings)
    self.class_names = _class_names(builder, self._label_key)
    self.image_shape = tuple(builder.info.features[self._image_key].shape)
    self.corrupt: dict[int, str] = {}
    self._settings = settings
    self._split = getattr(settings, field)
    label = builder.info.features[self._label_key]
    self._has_maps = not isinstance(label, tfds.features.ClassLabel)
    self._source = _source(builder, settings, field, self._image_key)
    self._files = builder.info.splits[self._split].file_instructions
    mean, std = (np.asarray(values, np.float32) for values in (settings.mean, settings.std))
    self._gain, self._bias = 1 / (255 * std), -mean / std
    self._augment = augment.make(settings.augment, filter=settings.filter)
    self._augment_label = augment.make(settings.augment, filter='nearest')

  def __len__(self) -> int:
    return len(self._source)

  def train_batch(self, examples: np.ndarray, positions: np.ndarray,
                  seed: int) -> dict[str, np.ndarray]:
    """Returns augmented images and labels; the next readable example replaces a damaged one.

    Args:
      examples: int[B].
      positions: int[B], of the examples in the stream.
      seed: of the stream; augmentation draws from (seed, position).

    Returns:
      image float32[B, S, S, C] and label int32[B] or [B, S, S].
    """
    images, labels = self._empty(len(examples))
    size = self._settings.image_size
    loaded = self._load_all(examples)
    label: int | Image.Image | np.ndarray
    for row, (example, pair) in enumerate(zip(examples, loaded, strict=True)):
      image, label = pair or self._next_after(example)
      images[row] = _array(self._augment(image, size, _random(seed, positions[row])))
      if isinstance(label, Image.Image):  # The same draws move the labels as the image.
        label = np.asarray(self._augment_label(label, size, _random(seed, positions[row])))
      labels[row] = label
    return {'image': self._normalise(images), 'label': labels}

  def eval_batch(self, examples: np.ndarray, rows: int) -> dict[str, np.ndarray]:
    """Returns uncropped images and labels; padding and damaged rows have mask 0.

    Args:
      examples: int[n], n <= rows.
      rows: B.

    Returns:
      image float32[B, S, S, C], label int32[B] or [B, S, S], mask float32[B].
    """
    images, labels = self._empty(rows)
    settings, mask = self._settings, np.zeros(rows, np.float32)
    label: int | Image.Image | np.ndarray
    for row, pair in enumerate(self._load_all(examples)):
      if pair:
        image, label = pair
        images[row] = _array(augment.whole(image, settings.image_size, filter=settings.filter,
                                           fraction=settings.test_crop))
        if isinstance(label, Image.Image):
          label = np.asarray(augment.whole(label, settings.image_size, filter='nearest',
                                           fraction=settings.test_crop))
        labels[row] = label
        mask[row] = 1
    images = self._normalise(images) * mask[:, None, None, None]
    return {'image': images, 'label': labels, 'mask': mask}

  def _empty(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images and labels of a batch, all zero."""
    size = self._settings.image_size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    labels = (rows, *sides) if self._has_maps else (rows,)
    return (np.zeros((rows, *sides, self._settings.channels), np.uint8),
            np.zeros(labels, np.int32))

  def _normalise(self, images: np.ndarray) -> np.ndarray:
    return images * self._gain + self._bias

  def _load_all(self, examples: np.ndarray) -> list[Example | None]:
    """Returns image and label of each example; None for those skipped."""
    indices = [int(example) for example in examples]
    try:
      records = self._source.__getitems__(indices)  # type: ignore[attr-defined]
    except Exception:  # One bad record fails the whole read: read them singly to find out which.
      records = [None] * len(indices)
    return [self._load(*pair) for pair in zip(indices, records, strict=True)]

  def _next_after(self, example: int) -> Example:
    """Returns the first readable example after one that cannot be read."""
    for step in range(1, MAX_CORRUPT_IN_A_ROW):
      if pair := self._load((int(example) + step) % len(self)):
        return pair
    raise CorruptRecordError(f'{MAX_CORRUPT_IN_A_ROW} records in a row cannot be read; the first: '
                             f'{self.corrupt[int(example)]}')

  def _load(self, example: int, record: dict[str, Any] | None = None) -> Example | None:
    """Returns image and label of one example, read already or not; None if it is skipped."""
    try:
      record = self._source[example] if record is None else record
      label = record[self._label_key]
      label = Image.fromarray(label[..., 0]) if self._has_maps else int(label)
      return self._decode(record[self._image_key]), label
    except Exception as error:  # ArrayRecord, protobuf and Pillow raise a dozen types between them.
      file, number = self._location(example)
      if not tfds.core.as_path(file).exists():
        raise FileNotFoundError(f'{file} is missing, and {self._settings.name} '
                                f'{self._split!r} needs it: prepare the set again') from error
      message = (f'example {example} of {self._settings.name} {self._split!r} cannot be read '
                 f'({file}, record {number}): {" ".join(str(error).split())}')
      if self._settings.on_corrupt == 'raise':
        raise CorruptRecordError(f'{message}; prepare the set again, or set '
                                 "data.on_corrupt='skip'") from error
      if example not in self.corrupt:
        self.corrupt[example] = message
        logging.warning('%s; skipped, %d so far', message, len(self.corrupt))
      return None

  def _decode(self, stored: bytes | np.ndarray) -> Image.Image:
    if isinstance(stored, bytes):
      with Image.open(io.BytesIO(stored), formats=FORMATS) as image:
        # Greyscale, palette and CMYK files lie among the colour images of ImageNet.
        return eight_bit(image).convert(MODES[self._settings.channels])
    return Image.fromarray(stored[..., 0] if self._settings.channels == 1 else stored)

  def _location(self, example: int) -> tuple[str, int]:
    """Returns the file of an example, and the number of its record there."""
    for file in self._files:
      if example < file.take:
        return file.filename, file.skip + example
      example -= file.take
    raise AssertionError(example)


def _keys(builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
  """Returns the names of the image and of the label among the features."""
  keys = builder.info.supervised_keys
  features = builder.info.features
  if (keys is None or len(keys) != 2 or any(key not in features for key in keys)
      or not _class_names(builder, keys[1])
      or not isinstance(features[keys[0]], (tfds.features.Image, tfds.features.Tensor))):
    raise ValueError(f'{builder.name} has no classes of images or of pixels: its supervised_keys '
                     f'are {keys}, and an (Image or Tensor, ClassLabel or map) pair is needed')
  return keys


def _class_names(builder: tfds.core.DatasetBuilder, label_key: str) -> tuple[str, ...]:
  """Returns the names of a set's classes, () where its labels are no classes."""
  feature = builder.info.features[label_key]
  if isinstance(feature, tfds.features.ClassLabel):
    return tuple(feature.names)
  return tuple((builder.info.metadata or {}).get('label_names', ()))


def _check_images(feature: Any, settings: ImageSettings) -> None:
  """Raises ValueError for images of another type, or with other channels than the config says."""
  if feature.np_dtype != np.uint8 or len(feature.shape) != 3:
    raise ValueError(f'{settings.name} has images of {np.dtype(feature.np_dtype).name}'
                     f'{list(feature.shape)}: this reads uint8[height, width, channels]')
  if feature.shape[-1] != settings.channels:
    raise ValueError(f'{settings.name} has images of {feature.shape[-1]} channels, but '
                     f'data.channels={settings.channels}: set it, mean, std and model.channels to '
                     "the set's")


def _source(builder: tfds.core.DatasetBuilder, settings: ImageSettings, field: str,
            image_key: str) -> Sequence[dict[str, Any]]:
  """Returns a split as a sequence of records whose encoded images are still bytes."""
  # TFDS would decode with OpenCV or Pillow, whichever is there, and keeps odd colour modes.
  encoded = isinstance(builder.info.features[image_key], tfds.features.Image)
  decoders = {image_key: tfds.decode.SkipDecoding()} if encoded else None
  split = getattr(settings, field)
  try:
    with prepare.quiet():
      return builder.as_data_source(split, decoders=decoders, file_format='array_record')
  except ValueError as error:
    raise ValueError(f'{settings.name} has no split {split!r}: it has '
                     f'{", ".join(sorted(builder.info.splits))}, and slices such as train[:90%]; '
                     f'set data.{field}') from error


def _random(seed: int, position: int) -> np.random.Generator:
  # The counter, not the key, holds the position: streams of different ones never overlap.
  return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, position]))


def _array(image: Image.Image) -> np.ndarray:
  """Returns uint8[S, S, C]."""
  array = np.asarray(image)
  return array[..., None] if array.ndim == 2 else array
