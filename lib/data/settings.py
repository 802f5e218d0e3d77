"""The fields of `config.data`, for sets of images and for sets of questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias, TypeVar

import ml_collections

from lib.data import augment
from lib.data.augment import FILTERS
from ops.values import Count, NotEmpty, OneOf, Pixels, Positive, Range, check_keys

# Modes of Pillow, by number of channels.
MODES = {1: 'L', 3: 'RGB'}
ON_CORRUPT = ('raise', 'skip')
PAD_SIDES = ('left', 'right')
Config: TypeAlias = ml_collections.ConfigDict | Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Names a set and says how it is read; both kinds of sets have these fields.

  Attributes:
    name: a TFDS name: 'digits', 'cifar10', 'imagenet2012:5.1.0', 'digit_scenes/64'.
    batch_size: examples a step over all processes.
    train_split, test_split: TFDS splits; 'train[:90%]' works.
    data_dir: where sets lie; '' is TFDS's own place ($TFDS_DATA_DIR or ~/tensorflow_datasets).
    threads, prefetch_batches: background threads, and batches they may run ahead.
  """

  name: Annotated[str, NotEmpty()]
  batch_size: Count
  train_split: str
  test_split: str
  data_dir: str = ''
  threads: Annotated[int, Range(0, 1024)] = 2
  prefetch_batches: Annotated[int, Range(0, 1024)] = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSettings(Settings):
  """Says how images with labels are read (lib/data/images.py).

  Attributes:
    image_size: side in pixels of the square images that come out, or (height, width).
    channels: 1 or 3; must be what the set has.
    mean, std: one number a channel, for pixels in 0 to 1.
    augment: `method`, a name in `AUGMENTS`, and that function's keywords; {} for none.
    test_crop: side of the centre square that evaluation sees, as a fraction of the shorter side.
    filter: how pixels are interpolated, a name in `FILTERS`; shrinking antialiases.
    on_corrupt: 'raise', or 'skip': training takes the next example, evaluation masks the row.
  """

  image_size: Pixels | tuple[Pixels, Pixels]
  channels: Annotated[int, OneOf(MODES)]
  mean: tuple[float, ...]
  std: tuple[Positive, ...]
  augment: dict[str, Any] = dataclasses.field(default_factory=dict)
  test_crop: Annotated[float, Range(high=1, above=0)] = 1.0
  filter: Annotated[str, OneOf(FILTERS)] = 'bilinear'
  on_corrupt: Annotated[str, OneOf(ON_CORRUPT)] = 'raise'


@dataclasses.dataclass(frozen=True, kw_only=True)
class QASettings(Settings):
  """Says how questions and answers are read (lib/data/qa.py).

  Attributes:
    context: T, tokens of every row: question, answer and end token; shorter rows are padded.
    pad_side: 'left' or 'right'.
    turns: questions of a record that a row of training asks, one after another, each seeing those
      before it and their answers. The test split asks one.
    kinds: names of the kinds of questions that are asked, () for all.
    mean, std: one number a channel, for pixels in 0 to 1; of no use to text alone.
  """

  context: Annotated[int, Range(1, 2 ** 24, unit='tokens')]
  train_split: str = 'train'
  test_split: str = 'test'
  pad_side: Annotated[str, OneOf(PAD_SIDES)] = 'right'
  turns: Count = 1
  kinds: tuple[str, ...] = ()
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  std: tuple[Positive, ...] = (0.5, 0.5, 0.5)


AnySettings = TypeVar('AnySettings', bound=Settings)


def image_settings(config: Config) -> ImageSettings:
  """Reads and checks the data config of a set of images.

  Raises:
    ValueError: a field that is unknown, missing, or has an impossible value.
  """
  settings = _read(config, ImageSettings)
  for key in ('mean', 'std'):
    if len(getattr(settings, key)) != settings.channels:
      raise ValueError(f'data.{key} has {len(getattr(settings, key))} numbers for '
                       f'{settings.channels} channels: give one a channel')
  augment.make(settings.augment, filter=settings.filter)
  return settings


def qa_settings(config: Config) -> QASettings:
  """Reads and checks the data config of a set of questions.

  Raises:
    ValueError: a field that is unknown, missing, or has an impossible value.
  """
  return _read(config, QASettings)


def _read(config: Config, kind: type[AnySettings]) -> AnySettings:
  """Returns a data config as the dataclass `kind`."""
  fields = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
  check_keys('data', fields, kind, unknown='data has no field ')
  return kind(**{key: value for key, value in fields.items() if value is not None})
