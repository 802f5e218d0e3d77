"""Image sets by TFDS name: read by grain from ArrayRecord, without TensorFlow.

A label is the class of the image, or of every pixel: a map of the image's size, stored as a uint8
Tensor, with the names of its classes under 'label_names' in the set's metadata.
A data config has the fields of `Settings`; `config.data` of an experiment is one.

Axes: B batch of this process, S image side, C channels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import math
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from lib.data.augment import AUGMENTS, FILTERS, whole
from lib.data.datasets import digit_scenes, digit_segments, digits, stdlib_needle
from ops import choices

# Sets that are prepared on first use: nothing is downloaded and it takes seconds.
# Some come in several configs, named behind a slash; lib/data/qa.py reads those with questions.
BUNDLED = {'digits': digits.Digits, 'digit_segments': digit_segments.DigitSegments,
           'digit_scenes': digit_scenes.DigitScenes, 'stdlib_needle': stdlib_needle.StdlibNeedle}
MODES = {1: 'L', 3: 'RGB'}
ON_CORRUPT = ('raise', 'skip')
# A damaged file has many bad records in a row; a run should not go on without all of them.
MAX_CORRUPT_IN_A_ROW = 100


class CorruptRecordError(ValueError):
  """A record that cannot be read, parsed or decoded; the message names its file and place."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """What to read and how.

  Attributes:
    name: a TFDS name: 'digits', 'cifar10', 'emnist/letters', 'imagenet2012:5.1.0'.
    image_size: side in pixels of the square images that come out, or (height, width).
    batch_size: images a step over all processes.
    train_split, test_split: TFDS splits; 'train[:90%]' works.
    channels: 1 or 3; must be what the set has.
    mean, std: one number a channel, for pixels in 0 to 1.
    augment: `method`, a name in `AUGMENTS`, and that function's keywords; {} for none.
    data_dir: where sets lie; '' is TFDS's own place ($TFDS_DATA_DIR or ~/tensorflow_datasets).
    test_crop: side of the centre square that evaluation sees, as a fraction of the shorter side.
    filter: how pixels are interpolated, a name in `FILTERS`; shrinking antialiases.
    on_corrupt: 'raise', or 'skip': training takes the next example, evaluation masks the row.
    threads, prefetch_batches: background threads, and batches they may run ahead.
  """

  name: str
  image_size: int | tuple[int, int]
  batch_size: int
  train_split: str
  test_split: str
  channels: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  augment: dict[str, Any] = dataclasses.field(default_factory=dict)
  data_dir: str = ''
  test_crop: float = 1.0
  filter: str = 'bilinear'
  on_corrupt: str = 'raise'
  threads: int = 2
  prefetch_batches: int = 4


@dataclasses.dataclass(frozen=True)
class DataInfo:
  """What a set is: counts, class names, and the stored shape (None where images differ)."""

  num_classes: int
  num_train: int
  num_test: int
  image_shape: tuple[int | None, int | None, int]
  class_names: tuple[str, ...]


def info(config: ml_collections.ConfigDict) -> DataInfo:
  """Counts and shapes of the set that `config` names, without reading an image.

  Raises:
    ValueError: an unknown field, name or split, or channels that the set does not have.
    FileNotFoundError: the set is not prepared.
  """
  settings = _settings(config)
  builder = _builder(settings)
  image_key, label_key = _keys(builder)
  names = _class_names(builder, label_key)
  return DataInfo(
      num_classes=len(names),
      num_train=len(_source(builder, settings, 'train_split')),
      num_test=len(_source(builder, settings, 'test_split')),
      image_shape=tuple(builder.info.features[image_key].shape),
      class_names=names)


def train_iterator(config: ml_collections.ConfigDict, *, seed: int, process_index: int = 0,
                   process_count: int = 1) -> TrainIterator:
  """Endless batches for training, read ahead by threads, that can stop and go on bit for bit.

  The stream is one seeded shuffle of the split after another, and batch k holds its places
  k * batch_size to (k + 1) * batch_size, whatever the number of processes: each takes every
  process_count-th of them. A batch may span two epochs, so no image is left out and every batch is
  full. Augmentation draws from (seed, place in the stream).

  Returns:
    An iterator of dict(image float32[B, S, S, C], label int32[B] or [B, S, S]) with get_state and
    set_state.

  Raises:
    ValueError, FileNotFoundError: as `info`; batches that cannot be divided over processes.
    CorruptRecordError: from next(), under on_corrupt='raise'.
  """
  settings = _settings(config)
  reader = _Reader(settings, 'train_split')
  return TrainIterator(reader, settings, seed, process_index, process_count)


def eval_batches(config: ml_collections.ConfigDict, *, process_index: int = 0,
                 process_count: int = 1) -> EvalBatches:
  """The test split once, in order, in batches of one shape; every process has equally many.

  Returns:
    A sized iterable of dict(image float32[B, S, S, C], label int32[B] or [B, S, S], mask
    float32[B]). Rows of mask 0 are padding (zeros, label 0): summing over mask 1 counts each
    example once.

  Raises:
    As `train_iterator`.
  """
  settings = _settings(config)
  return EvalBatches(_Reader(settings, 'test_split'), settings, process_index, process_count)


class Stored(Protocol):
  """What the two streams read: the examples of one split.

  Attributes:
    corrupt: examples that could not be read so far, and why.
  """

  corrupt: dict[int, str]

  def __len__(self) -> int:
    """How many examples there are."""

  def train_batch(self, examples: np.ndarray, places: np.ndarray,
                  seed: int) -> dict[str, np.ndarray]:
    """A batch of these examples, which stand at these places of a stream of this seed."""

  def eval_batch(self, examples: np.ndarray, rows: int) -> dict[str, np.ndarray]:
    """These examples as a batch of so many rows, with the 'mask' of `eval_batches`."""


class TrainIterator:
  """What `train_iterator` returns."""

  def __init__(self, reader: Stored, settings: Any, seed: int, process_index: int,
               process_count: int):
    rows = _rows(settings, process_index, process_count)
    self._reader = reader
    self._identity = {'name': settings.name, 'split': settings.train_split, 'seed': seed,
                      'batch_size': settings.batch_size, 'examples': len(reader)}

    def batch(step: int, examples: np.ndarray) -> dict[str, np.ndarray]:
      places = (step * rows + np.arange(rows)) * process_count + process_index
      return reader.train_batch(examples, places, seed)

    order = grain.MapDataset.range(len(self._reader)).seed(seed).shuffle().repeat()
    # Exact lengths need drop_remainder (else grain rounds through a float); nothing is dropped.
    mine = order[process_index::process_count].batch(rows, drop_remainder=True)
    self._batches = iter(_ahead(mine.map_with_index(batch), settings))

  @property
  def corrupt(self) -> dict[int, str]:
    """Examples that could not be read so far, and why."""
    return dict(self._reader.corrupt)

  def __iter__(self) -> TrainIterator:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    return next(self._batches)

  def get_state(self) -> dict[str, Any]:
    """Where the stream stands, JSON-like; the same in every process, however many there are."""
    return {**self._identity, 'position': self._batches.get_state()}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on from a `get_state`.

    Raises:
      ValueError: the state belongs to another stream (set, split, seed or batch size).
    """
    for key, value in self._identity.items():
      if state[key] != value:
        raise ValueError(f'the saved place in the data has {key}={state[key]!r}, but the config '
                         f'says {value!r}: set it back, or start in a new workdir')
    self._batches.set_state(state['position'])

  def close(self) -> None:
    """Ends the background threads."""
    self._batches.close()


class EvalBatches:
  """What `eval_batches` returns."""

  def __init__(self, reader: Stored, settings: Any, process_index: int, process_count: int):
    rows = _rows(settings, process_index, process_count)
    self._settings = settings
    self._reader = reader
    self._count = math.ceil(len(reader) / settings.batch_size)

    def batch(step: int) -> dict[str, np.ndarray]:
      places = step * settings.batch_size + np.arange(rows) * process_count + process_index
      return reader.eval_batch(places[places < len(reader)], rows)

    self._batches = grain.MapDataset.range(self._count).map(batch)

  @property
  def corrupt(self) -> dict[int, str]:
    """Examples that could not be read so far, and why."""
    return dict(self._reader.corrupt)

  def __len__(self) -> int:
    return self._count

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    batches = iter(_ahead(self._batches, self._settings))
    with contextlib.closing(batches):
      yield from batches


# Augmentations: (image, size, random, *, filter, …) -> image of size x size.


def prepare(name: str, *, data_dir: str = '', manual_dir: str = '') -> pathlib.Path:
  """Writes a set as ArrayRecord under `data_dir`, unless it is there; returns its folder.

  Args:
    name: a TFDS name.
    data_dir: as `Settings.data_dir`.
    manual_dir: where files lie that a person has to download; '' is data_dir/downloads/manual.

  Raises:
    ValueError: an unknown name; files that must be downloaded by hand; a package that TFDS needs to
      write this set and that is not installed, such as TensorFlow.
  """
  builder = _find(name, data_dir)
  final = pathlib.Path(builder.data_dir)
  if _is_prepared(builder):
    _check_format(name, builder)
    return final
  if _is_bundled(name):
    _prepare_bundled(name, builder)
    return final
  manual = pathlib.Path(manual_dir or builder.data_dir_root / 'downloads' / 'manual').expanduser()
  if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and not (manual.is_dir() and any(manual.iterdir())):
    wanted = ' '.join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
    raise ValueError(f'{name} has files that you must download yourself, and {manual} has none: '
                     f'put them there, or name their folder with --manual_dir. TFDS says: {wanted}')
  tfds.display_progress_bar(sys.stderr.isatty())
  settings = tfds.download.DownloadConfig(manual_dir=manual if manual.is_dir() else None)
  try:
    builder.download_and_prepare(file_format='array_record', download_config=settings)
  except ImportError as error:
    # TFDS puts a print of the whole example before the reason.
    missing = re.search(r"No module named '([\w.]+)'", str(error))
    if not missing:
      raise
    raise ValueError(
        f'TFDS needs the package {missing[1]} to write {name}, and it is not installed: `pip '
        f'install {missing[1]}`, here or in an environment of its own, and run this command there; '
        'reading the set does not need it') from error
  return final


def _prepare_bundled(name: str, builder: tfds.core.DatasetBuilder) -> None:
  """Writes into a folder of its own and renames it, so that processes may start together."""
  final = pathlib.Path(builder.data_dir)
  final.parent.mkdir(parents=True, exist_ok=True)
  tfds.display_progress_bar(sys.stderr.isatty())
  with tempfile.TemporaryDirectory(prefix='.incomplete-', dir=final.parent) as scratch:
    writer = _bundled(name, scratch)
    with _quiet():
      writer.download_and_prepare()
    try:
      os.rename(writer.data_dir, final)
    except OSError:
      # Somebody else was first, with the same bytes; anything else is an error.
      if not _is_prepared(builder):
        raise


def read_settings(config: ml_collections.ConfigDict, kind: type) -> Any:
  """A data config as the dataclass `kind`.

  Raises:
    ValueError: a field that it does not have, or lacks.
  """
  given = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
  fields = {field.name: field for field in dataclasses.fields(kind)}
  for key in given:
    if key not in fields:
      raise ValueError(f'data has no field {key!r}: it has {", ".join(fields)}')
  missing = [key for key, field in fields.items() if key not in given
             and field.default is field.default_factory is dataclasses.MISSING]
  if missing:
    raise ValueError(f'data lacks {", ".join(missing)}: set them in the config')
  return kind(**given)


def _settings(config: ml_collections.ConfigDict) -> Settings:
  """Reads and checks a config."""
  settings = read_settings(config, Settings)
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
  if not (isinstance(size, int) or (isinstance(size, (tuple, list)) and len(size) == 2)):
    raise ValueError(f'data.image_size={size!r} is no size: give a side in pixels, or '
                     '(height, width)')
  _augment(settings, settings.filter)
  return settings


def _augment(settings: Settings, filter: str) -> Callable[..., Image.Image]:
  """The augmentation with its keywords filled in."""
  arguments = {'method': 'none', **settings.augment}
  method = arguments.pop('method')
  choices.check('data.augment.method=', method, AUGMENTS)
  known = [name for name, parameter in inspect.signature(AUGMENTS[method]).parameters.items()
           if parameter.kind is parameter.KEYWORD_ONLY and name != 'filter']
  for key in arguments:
    if key not in known:
      raise ValueError(f'data.augment.{key} is not known to {method!r}: it takes '
                       f'{", ".join(known) or "nothing"}')

  def run(image: Image.Image, size: int, random: np.random.Generator) -> Image.Image:
    return AUGMENTS[method](image, size, random, filter=filter, **arguments)

  return run


def _rows(settings: Settings, process_index: int, process_count: int) -> int:
  assert 0 <= process_index < process_count
  if settings.batch_size < 1 or settings.batch_size % process_count:
    raise ValueError(f'data.batch_size={settings.batch_size} cannot be divided over '
                     f'{process_count} processes: make it a multiple of {process_count}')
  return settings.batch_size // process_count


def _ahead(batches: grain.MapDataset, settings: Settings) -> grain.IterDataset:
  return batches.to_iter_dataset(grain.ReadOptions(
      num_threads=settings.threads, prefetch_buffer_size=settings.prefetch_batches))


def _find(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
  """The builder of a name, prepared or not."""
  place = os.path.expanduser(data_dir) or None
  if _is_bundled(name):
    return _bundled(name, place)
  try:
    with _quiet():
      return tfds.builder(name, data_dir=place)
  except tfds.core.DatasetNotFoundError:
    known = sorted({*BUNDLED, *tfds.list_builders(with_community_datasets=False)})
    close = difflib.get_close_matches(name, known, n=5) or ['digits', 'cifar10', 'imagenet2012']
    raise ValueError(
        f'data set {name!r} is not known to TFDS and not under {data_dir or "its data_dir"}: did '
        f'you mean {", ".join(close)}? tfds.list_builders() lists all {len(known)}') from None


def _is_bundled(name: str) -> bool:
  return name.partition('/')[0] in BUNDLED


def _bundled(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  base, _, config = name.partition('/')
  known = [known.name for known in BUNDLED[base].BUILDER_CONFIGS]
  if config not in known and (known or config):
    raise ValueError(f'data set {name!r} is not known: choose one of '
                     f'{", ".join(f"{base}/{each}" for each in known) or base}')
  return BUNDLED[base](data_dir=data_dir, file_format='array_record', config=config or None)


def _is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
  # TFDS's own is_prepared() logs a warning where the answer is no.
  return (builder.data_path / 'dataset_info.json').exists()


def _check_format(name: str, builder: tfds.core.DatasetBuilder) -> None:
  formats = {entry.value for entry in builder.info.available_file_formats()}
  if 'array_record' not in formats:
    raise ValueError(
        f'{name} in {builder.data_dir} is stored as {", ".join(sorted(formats))}, but random '
        'access needs array_record: write it into another data_dir with '
        f'`python -m tools.prepare --name={name} --data_dir=...`')


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps TFDS from telling, on stdout and in absl's log, what our own messages say better."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.WARNING)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(before)


def prepared(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
  """The builder of a set that is stored; a bundled one is stored now where it is not.

  Raises:
    ValueError: an unknown name, or stored in another format than ArrayRecord.
    FileNotFoundError: the set is not prepared.
  """
  builder = _find(name, data_dir)
  if not _is_prepared(builder):
    if not _is_bundled(name):
      where = f' --data_dir={data_dir}' if data_dir else ''
      others = sorted(builder.data_path.parent.glob('*/dataset_info.json'))
      other = ''
      if others:
        other = f', or set data.name={name}:{others[-1].parent.name}, which is there'
      raise FileNotFoundError(f'{name} is not prepared in {builder.data_dir}: run '
                              f'`python -m tools.prepare --name={name}{where}`{other}')
    _prepare_bundled(name, builder)
    builder = _find(name, data_dir)
  _check_format(name, builder)
  return builder


def _builder(settings: Settings) -> tfds.core.DatasetBuilder:
  """The builder of a prepared set that has the images `settings` asks for."""
  name = settings.name
  builder = prepared(name, settings.data_dir)
  feature = builder.info.features[_keys(builder)[0]]
  if feature.np_dtype != np.uint8 or len(feature.shape) != 3:
    raise ValueError(f'{name} has images of {np.dtype(feature.np_dtype).name}'
                     f'{list(feature.shape)}: this reads uint8[height, width, channels]')
  if feature.shape[-1] != settings.channels:
    raise ValueError(f'{name} has images of {feature.shape[-1]} channels, but data.channels='
                     f'{settings.channels}: set it, mean, std and model.channels to the set\'s')
  return builder


def _keys(builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
  """Names of the image and of the label among the features."""
  keys = builder.info.supervised_keys
  features = builder.info.features
  if (keys is None or len(keys) != 2 or any(key not in features for key in keys)
      or not _class_names(builder, keys[1])
      or not isinstance(features[keys[0]], (tfds.features.Image, tfds.features.Tensor))):
    raise ValueError(f'{builder.name} has no classes of images or of pixels: its supervised_keys '
                     f'are {keys}, and an (Image or Tensor, ClassLabel or map) pair is needed')
  return keys


def _class_names(builder: tfds.core.DatasetBuilder, label_key: str) -> tuple[str, ...]:
  """What the labels of a set mean, () where they are no classes."""
  feature = builder.info.features[label_key]
  if isinstance(feature, tfds.features.ClassLabel):
    return tuple(feature.names)
  return tuple((builder.info.metadata or {}).get('label_names', ()))


def _source(builder: tfds.core.DatasetBuilder, settings: Settings,
            field: str) -> Sequence[dict[str, Any]]:
  """A split of a set as a sequence of records whose encoded images are still bytes."""
  image_key, _ = _keys(builder)
  # TFDS would decode with OpenCV or Pillow, whichever is there, and keeps odd colour modes.
  encoded = isinstance(builder.info.features[image_key], tfds.features.Image)
  decoders = {image_key: tfds.decode.SkipDecoding()} if encoded else None
  split = getattr(settings, field)
  try:
    with _quiet():
      return builder.as_data_source(split, decoders=decoders, file_format='array_record')
  except ValueError as error:
    raise ValueError(f'{settings.name} has no split {split!r}: it has '
                     f'{", ".join(sorted(builder.info.splits))}, and slices such as train[:90%]; '
                     f'set data.{field}') from error


class _Reader:
  """Pictures and labels of one split by index, and the account of those that cannot be read."""

  def __init__(self, settings: Settings, field: str):
    builder = _builder(settings)
    self.corrupt: dict[int, str] = {}
    self._settings = settings
    self._split = getattr(settings, field)
    self._image_key, self._label_key = _keys(builder)
    label = builder.info.features[self._label_key]
    self._has_maps = not isinstance(label, tfds.features.ClassLabel)
    self._source = _source(builder, settings, field)
    self._files = builder.info.splits[self._split].file_instructions
    mean, std = (np.asarray(values, np.float32) for values in (settings.mean, settings.std))
    self._gain, self._bias = 1 / (255 * std), -mean / std
    self._augment = _augment(settings, settings.filter)
    self._augment_label = _augment(settings, 'nearest')

  def __len__(self) -> int:
    return len(self._source)

  def train_batch(self, examples: np.ndarray, places: np.ndarray,
                  seed: int) -> dict[str, np.ndarray]:
    """Augmented images and labels; an example that cannot be read is the next one that can."""
    images, labels = self._empty(len(examples))
    size = self._settings.image_size
    loaded = self.load(examples)
    for row, (example, found) in enumerate(zip(examples, loaded, strict=True)):
      picture, label = found or self.next_after(example)
      images[row] = _array(self._augment(picture, size, _random(seed, places[row])))
      if isinstance(label, Image.Image):  # The same draws move the labels as the picture.
        label = np.asarray(self._augment_label(label, size, _random(seed, places[row])))
      labels[row] = label
    return {'image': self._normalise(images), 'label': labels}

  def eval_batch(self, examples: np.ndarray, rows: int) -> dict[str, np.ndarray]:
    """Whole images and labels; rows beyond the examples, or that cannot be read, have mask 0."""
    images, labels = self._empty(rows)
    settings, mask = self._settings, np.zeros(rows, np.float32)
    for row, found in enumerate(self.load(examples)):
      if found:
        picture, label = found
        images[row] = _array(whole(picture, settings.image_size, filter=settings.filter,
                                   fraction=settings.test_crop))
        if isinstance(label, Image.Image):
          label = np.asarray(whole(label, settings.image_size, filter='nearest',
                                   fraction=settings.test_crop))
        labels[row] = label
        mask[row] = 1
    images = self._normalise(images) * mask[:, None, None, None]
    return {'image': images, 'label': labels, 'mask': mask}

  def _empty(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a batch, all zero."""
    size = self._settings.image_size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    labels = (rows, *sides) if self._has_maps else (rows,)
    return (np.zeros((rows, *sides, self._settings.channels), np.uint8),
            np.zeros(labels, np.int32))

  def _normalise(self, images: np.ndarray) -> np.ndarray:
    return images * self._gain + self._bias

  def load(self, examples: np.ndarray) -> list[tuple[Image.Image, int | Image.Image] | None]:
    """Image and label of each example; None for those skipped."""
    examples = [int(example) for example in examples]
    try:
      records = self._source.__getitems__(examples)
    except Exception:  # One bad record fails the whole read: read them singly to find out which.
      records = [None] * len(examples)
    return [self._load(*pair) for pair in zip(examples, records, strict=True)]

  def next_after(self, example: int) -> tuple[Image.Image, int | Image.Image]:
    """The first example after one that cannot be read."""
    for step in range(1, MAX_CORRUPT_IN_A_ROW):
      if found := self._load((int(example) + step) % len(self)):
        return found
    raise CorruptRecordError(f'{MAX_CORRUPT_IN_A_ROW} records in a row cannot be read; the first: '
                             f'{self.corrupt[int(example)]}')

  def _load(self, example: int, record: dict[str, Any] | None = None):
    try:
      record = self._source[example] if record is None else record
      label = record[self._label_key]
      label = Image.fromarray(label[..., 0]) if self._has_maps else int(label)
      return self._picture(record[self._image_key]), label
    except Exception as error:  # ArrayRecord, protobuf and Pillow raise a dozen types between them.
      file, record = self._place(example)
      if not tfds.core.as_path(file).exists():
        raise FileNotFoundError(f'{file} is missing, and {self._settings.name} '
                                f'{self._split!r} needs it: prepare the set again') from error
      message = (f'example {example} of {self._settings.name} {self._split!r} cannot be read '
                 f'({file}, record {record}): {" ".join(str(error).split())}')
      if self._settings.on_corrupt == 'raise':
        raise CorruptRecordError(f'{message}; prepare the set again, or set '
                                 "data.on_corrupt='skip'") from error
      if example not in self.corrupt:
        self.corrupt[example] = message
        logging.warning('%s; skipped, %d so far', message, len(self.corrupt))
      return None

  def _picture(self, stored: bytes | np.ndarray) -> Image.Image:
    if isinstance(stored, bytes):
      with Image.open(io.BytesIO(stored)) as image:
        # Greyscale, palette and CMYK files lie among the colour images of ImageNet.
        return image.convert(MODES[self._settings.channels])
    return Image.fromarray(stored[..., 0] if self._settings.channels == 1 else stored)

  def _place(self, example: int) -> tuple[str, int]:
    for file in self._files:
      if example < file.take:
        return file.filename, file.skip + example
      example -= file.take
    raise AssertionError(example)


def _random(seed: int, place: int) -> np.random.Generator:
  # The counter, not the key, holds the place: streams of different places never overlap.
  return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, place]))


def _array(image: Image.Image) -> np.ndarray:
  """uint8[S, S, C]."""
  array = np.asarray(image)
  return array[..., None] if array.ndim == 2 else array
