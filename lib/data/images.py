"""Image sets by TFDS name: read by grain from ArrayRecord, without TensorFlow.

A label is the class of the image, or of every pixel: a map of the image's size, stored as a uint8
Tensor, with the names of its classes under 'label_names' in the set's metadata.
A data config has the fields of `lib.data.settings.ImageSettings`; `config.data` of an experiment is
one.

Axes: B batch of this process, S image side, C channels.
"""

from __future__ import annotations

import dataclasses

from lib.data.image_reader import ImageReader
from lib.data.settings import Config, image_settings
from lib.data.stream import EvalBatches, TrainIterator


@dataclasses.dataclass(frozen=True)
class DataInfo:
  """Describes a set.

  Attributes:
    num_classes, num_train, num_test: of classes, and of examples of both splits.
    image_shape: (height, width, channels) as stored, None where images differ.
    class_names: of the labels.
  """

  num_classes: int
  num_train: int
  num_test: int
  image_shape: tuple[int | None, int | None, int]
  class_names: tuple[str, ...]


def info(config: Config) -> DataInfo:
  """Returns counts and shapes of the set that `config` names, without reading an image.

  Raises:
    ValueError: an unknown field, name or split, or channels that the set does not have.
    FileNotFoundError: the set is not prepared.
  """
  settings = image_settings(config)
  train, test = (ImageReader(settings, field) for field in ('train_split', 'test_split'))
  return DataInfo(num_classes=len(train.class_names), num_train=len(train), num_test=len(test),
                  image_shape=train.image_shape, class_names=train.class_names)


def train_iterator(config: Config, *, seed: int, process_index: int = 0,
                   process_count: int = 1) -> TrainIterator:
  """Returns endless batches for training (`TrainIterator`); augmentation draws from the seed too.

  Returns:
    An iterator of dict(image float32[B, S, S, C], label int32[B] or [B, S, S]) with get_state and
    set_state.

  Raises:
    ValueError, FileNotFoundError: as `info`; batches that cannot be divided over processes.
    CorruptRecordError: from next(), under on_corrupt='raise'.
  """
  settings = image_settings(config)
  reader = ImageReader(settings, 'train_split')
  return TrainIterator(reader, settings, seed, process_index, process_count)


def eval_batches(config: Config, *, process_index: int = 0,
                 process_count: int = 1) -> EvalBatches:
  """Returns the test split once, in order, in batches of one shape (`EvalBatches`).

  Returns:
    A sized iterable of dict(image float32[B, S, S, C], label int32[B] or [B, S, S], mask
    float32[B]). Rows of mask 0 are padding (zeros, label 0).

  Raises:
    As `train_iterator`.
  """
  settings = image_settings(config)
  reader = ImageReader(settings, 'test_split')
  return EvalBatches(reader, settings, process_index, process_count)
