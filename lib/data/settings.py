"""The fields of `config.data`, for sets of images and for sets of questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias, TypeVar

import ml_collections

from lib.data import augment
from lib.data.augment import FILTERS
from ops import choices

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

  name: str
  batch_size: int
  train_split: str
  test_split: str
  data_dir: str = ''
  threads: int = 2
  prefetch_batches: int = 4


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

  image_size: int | tuple[int, int]
  channels: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  augment: dict[str, Any] = dataclasses.field(default_factory=dict)
  test_crop: float = 1.0
  filter: str = 'bilinear'
  on_corrupt: str = 'raise'


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

  context: int
  train_split: str = 'train'
  test_split: str = 'test'
  pad_side: str = 'right'
  turns: int = 1
  kinds: tuple[str, ...] = ()
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  std: tuple[float, ...] = (0.5, 0.5, 0.5)


AnySettings = TypeVar('AnySettings', bound=Settings)


def image_settings(config: Config) -> ImageSettings:
  """Reads and checks the data config of a set of images.

  Raises:
    ValueError: a field that is unknown, missing, or has an impossible value.
  """
  settings = _read(config, ImageSettings)
  choices.check('data.filter=', settings.filter, FILTERS)
  choices.check('data.on_corrupt=', settings.on_corrupt, ON_CORRUPT)
  choices.check('data.channels=', settings.channels, MODES)
  for key in ('mean', 'std'):
    if len(getattr(settings, key)) != settings.channels:
      raise ValueError(f'data.{key} has {len(getattr(settings, key))} numbers for '
                       f'{settings.channels} channels: give one a channel')
  if not 0 < settings.test_crop <= 1:
    raise ValueError(f'data.test_crop={settings.test_crop} must be above 0 and at most 1')
  size = settings.image_size
  if not (isinstance(size, int) or (isinstance(size, tuple | list) and len(size) == 2)):
    raise ValueError(f'data.image_size={size!r} is no size: give a side in pixels, or '
                     '(height, width)')
  augment.make(settings.augment, filter=settings.filter)
  return settings


def qa_settings(config: Config) -> QASettings:
  """Reads and checks the data config of a set of questions.

  Raises:
    ValueError: a field that is unknown, missing, or has an impossible value.
  """
  settings = _read(config, QASettings)
  choices.check('data.pad_side=', settings.pad_side, PAD_SIDES)
  return settings


def _read(config: Config, kind: type[AnySettings]) -> AnySettings:
  """Returns a data config as the dataclass `kind`."""
  values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
  fields = {field.name: field for field in dataclasses.fields(kind)}
  for key in values:
    choices.check_key('data has no field ', key, fields)
  missing = [key for key, field in fields.items() if key not in values
             and field.default is field.default_factory is dataclasses.MISSING]
  if missing:
    raise ValueError(f'data lacks {", ".join(missing)}: set them in the config')
  return kind(**values)
