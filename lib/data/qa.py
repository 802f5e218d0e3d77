"""Sets of questions and answers, with or without an image: ragged rows padded to one length.

The sets are those whose features hold 'question' and 'answer', integers up to a vocabulary that the
set's metadata tells, with the ids of its padding, end and image tokens. A record holds several
questions, each an example of its own, about an image, or about a 'text' that stands in front; they
are one of each kind, if the metadata name 'kinds'.

Axes: B batch of this process, T tokens of a row, G cells a side, S image side, C channels.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from lib.data import images as image_data
from lib.data.images import EvalBatches, TrainIterator

SIDES = ('left', 'right')
# Features of a record that are one a question.
PER_QUESTION = ('question', 'answer', 'evidence', 'place', 'depth')


@dataclasses.dataclass(frozen=True)
class Settings:
  """What to read and how.

  Attributes:
    name: as 'digit_scenes/64' or 'stdlib_needle/4k'.
    context: T, tokens of every row: question, answer and end token; shorter rows are padded.
    batch_size: rows a step over all processes.
    train_split, test_split: TFDS splits.
    pad_side: 'left' or 'right'.
    turns: questions of a record that a row of training asks, one after another, each seeing those
      before it and their answers. The test split asks one.
    kinds: names of the kinds of questions that are asked, () for all.
    mean, std: one number a channel, for pixels in 0 to 1; of no use to text alone.
    data_dir, threads, prefetch_batches: as in `lib.data.images.Settings`.
  """

  name: str
  context: int
  batch_size: int
  train_split: str = 'train'
  test_split: str = 'test'
  pad_side: str = 'right'
  turns: int = 1
  kinds: tuple[str, ...] = ()
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  std: tuple[float, ...] = (0.5, 0.5, 0.5)
  data_dir: str = ''
  threads: int = 2
  prefetch_batches: int = 4


@dataclasses.dataclass(frozen=True)
class Info:
  """What a set is.

  Attributes:
    vocabulary: number of ids.
    pad, end, image: ids of those tokens; image is None for text alone.
    kinds: names of the kinds of questions, () where there is one kind.
    num_train, num_test: questions of the splits.
    image_shape: (S, S, C), or None.
    words: what the ids stand for, () where `tokenizer` says.
    answer_length: tokens of the longest answer, its end not counted.
    tokenizer: the content of a tokenizer.json, '' where ids are words.
  """

  vocabulary: int
  pad: int
  end: int
  image: int | None
  kinds: tuple[str, ...]
  num_train: int
  num_test: int
  image_shape: tuple[int, int, int] | None
  words: tuple[str, ...]
  answer_length: int
  tokenizer: str = ''


def info(config: ml_collections.ConfigDict) -> Info:
  """What the set that `config` names is, without reading a record.

  Raises:
    ValueError: an unknown field, name or split, or a set without questions.
  """
  settings = _settings(config)
  train, test = (Reader(settings, field) for field in ('train_split', 'test_split'))
  meta, features = train.meta, train.features
  return Info(meta['vocabulary'], meta['pad'], meta['end'], meta.get('image'),
              tuple(meta.get('kinds', ())), len(train), len(test),
              tuple(features['image'].shape) if 'image' in features else None,
              tuple(meta.get('words', ())), features['answer'].shape[-1],
              meta.get('tokenizer', ''))


def train_iterator(config: ml_collections.ConfigDict, *, seed: int, process_index: int = 0,
                   process_count: int = 1) -> TrainIterator:
  """Endless batches, as `lib.data.images.train_iterator`.

  Returns:
    An iterator, with get_state and set_state, of dict(ids int32[B, T]: question, answer and end
    token of every turn, padded; valid bool[B, T]: False for padding; answer bool[B, T]: the tokens
    of the answers and their end tokens, which are to be predicted from those before them; kind
    int32[B], of the first question; and, where the set has them, image float32[B, S, S, C], cells
    int32[B, G, G], evidence bool[B, G, G], of the first question, depth float32[B], place int32[B]:
    in `ids`).

  Raises:
    ValueError, FileNotFoundError: as `info`; batches that cannot be divided over processes; a row
      longer than the context (from next()).
  """
  settings = _settings(config)
  reader = Reader(settings, 'train_split')
  return TrainIterator(reader, settings, seed, process_index, process_count)


def eval_batches(config: ml_collections.ConfigDict, *, process_index: int = 0,
                 process_count: int = 1) -> EvalBatches:
  """The test split once, in order, as `lib.data.images.eval_batches`.

  Returns:
    A sized iterable of what `train_iterator` gives, and mask float32[B], 0 for rows of padding.
  """
  settings = _settings(config)
  return EvalBatches(Reader(settings, 'test_split'), settings, process_index, process_count)


def example(config: ml_collections.ConfigDict, number: int) -> dict[str, np.ndarray]:
  """One question of the test split: a row of `eval_batches`, by itself.

  Args:
    config: as of the others.
    number: from 0 on.

  Raises:
    ValueError, FileNotFoundError: as `info`; no such question.
  """
  reader = Reader(_settings(config), 'test_split')
  if not 0 <= number < len(reader):
    raise ValueError(f'example {number} is out of range: the test split has {len(reader)}, from 0 '
                     'on')
  return {name: value[0] for name, value in reader.eval_batch(np.asarray([number]), 1).items()}


def pad_rows(rows: Sequence[Sequence[int]], length: int, *, side: str,
             fill: int) -> tuple[np.ndarray, np.ndarray]:
  """Rows of several lengths as ids int32[B, length] and valid bool[B, length].

  Raises:
    ValueError: a row is longer, or an unknown side.
  """
  if side not in SIDES:
    raise ValueError(f'pad_side={side!r} is unknown: choose one of {", ".join(SIDES)}')
  ids = np.full((len(rows), length), fill, np.int32)
  valid = np.zeros(ids.shape, bool)
  for number, row in enumerate(rows):
    if len(row) > length:
      raise ValueError(f'row {number} has {len(row)} tokens and a row of the batch {length}: raise '
                       'data.context, or shorten it')
    place = slice(length - len(row), None) if side == 'left' else slice(len(row))
    ids[number, place], valid[number, place] = row, True
  return ids, valid


class Reader:
  """The questions of one split by index (lib/data/images.py streams them)."""

  def __init__(self, settings: Settings, field: str):
    builder = image_data.prepared(settings.name, settings.data_dir)
    self.features = builder.info.features
    self.meta = dict(builder.info.metadata or {})
    if not {'question', 'answer'} <= set(self.features) or 'vocabulary' not in self.meta:
      raise ValueError(f'{settings.name} has no questions: its features are '
                       f'{", ".join(self.features)}; lib/data/images.py reads classes of images')
    self.corrupt: dict[int, str] = {}
    self._settings = settings
    known = self.meta.get('kinds', ())
    for kind in settings.kinds:
      if kind not in known:
        raise ValueError(f'data.kinds has {kind!r}: {settings.name} has '
                         f'{", ".join(known) or "one kind of question"}')
    numbers = range(self.features['answer'].shape[0])
    # Of a record's questions, those that are asked.
    self._numbers = [each for each in numbers if not settings.kinds
                          or known[each] in settings.kinds]
    self._each = len(self._numbers)
    if not 1 <= settings.turns <= self._each:
      raise ValueError(f'data.turns={settings.turns} is impossible: {settings.name} asks '
                       f'{self._each} questions a record')
    self._source = builder.as_data_source(getattr(settings, field), file_format='array_record')
    mean, std = (np.asarray(values, np.float32) for values in (settings.mean, settings.std))
    self._gain, self._bias = 1 / (255 * std), -mean / std

  def __len__(self) -> int:
    return len(self._source) * self._each

  def train_batch(self, examples: np.ndarray, places: np.ndarray,
                  seed: int) -> dict[str, np.ndarray]:
    """See `train_iterator`."""
    # The same rows whatever the number of processes.
    others = [np.random.default_rng((seed, int(place))).permutation(self._each)
              for place in places]
    asked = [[first, *(other for other in more.tolist() if other != first)][:self._settings.turns]
             for first, more in zip(examples % self._each, others, strict=True)]
    return self._batch(self._load(examples, asked), len(examples))

  def eval_batch(self, examples: np.ndarray, rows: int) -> dict[str, np.ndarray]:
    """See `eval_batches`."""
    mask = (np.arange(rows) < len(examples)).astype(np.float32)
    asked = (examples % self._each)[:, None].tolist()
    return self._batch(self._load(examples, asked), rows) | {'mask': mask}

  def _load(self, examples: np.ndarray, asked: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """What is beside each row's first question, and 'turns': (question, answer) of all."""
    found, pad = [], self.meta['pad']
    records = self._source.__getitems__([int(each) // self._each for each in examples])
    for record, places in zip(records, asked, strict=True):
      numbers = [self._numbers[place] for place in places]
      turns = [([int(token) for token in record['question'][number] if token != pad],
                [*map(int, record['answer'][number]), self.meta['end']]) for number in numbers]
      # The image stands in front of the first, as a text does.
      turns[1:] = [([token for token in question if token != self.meta.get('image')], answer)
                   for question, answer in turns[1:]]
      if 'text' in record:
        turns[0] = [*map(int, record['text']), *turns[0][0]], turns[0][1]
      first = {name: record[name][numbers[0]] for name in PER_QUESTION if name in record}
      kind = numbers[0] if self.meta.get('kinds') else 0
      found.append(record | first | {'kind': kind, 'turns': turns})
    return found

  def _batch(self, records: list[dict[str, Any]], rows: int) -> dict[str, np.ndarray]:
    settings = self._settings
    parts = [[part for turn in record['turns'] for part in turn] for record in records]
    whole = [list(itertools.chain(*row)) for row in parts]
    ids, valid = pad_rows(whole + [[]] * (rows - len(records)), settings.context,
                          side=settings.pad_side, fill=self.meta['pad'])
    answer = np.zeros(ids.shape, bool)
    batch = {'ids': ids, 'valid': valid, 'answer': answer}
    for name in ('kind', *self.features):
      if name not in ('question', 'answer', 'text'):
        batch[name] = self._column(name, [record[name] for record in records], rows)
    for row, row_parts in enumerate(parts):
      first = settings.context - len(whole[row]) if settings.pad_side == 'left' else 0
      edges = first + np.cumsum([0, *map(len, row_parts)])
      for start, end in zip(edges[1::2], edges[2::2], strict=True):
        answer[row, start:end] = True
      if 'place' in batch:
        batch['place'][row] += first
    return batch

  def _column(self, name: str, values: list[Any], rows: int) -> np.ndarray:
    """One feature of all rows; zeros where there is no record."""
    # A batch of padding alone has no record to tell the shape.
    shape = tuple(self.features[name].shape) if name in self.features else ()
    shape = shape[1:] if name in PER_QUESTION else shape
    given = np.zeros((rows, *shape), np.asarray(values).dtype if values else np.int32)
    given[:len(values)] = values
    if name == 'image':
      images = given * self._gain + self._bias
      images[len(values):] = 0
      return images.astype(np.float32)
    if name == 'evidence':
      return given.astype(bool)
    return given.astype(np.float32 if given.dtype.kind == 'f' else np.int32)


def _settings(config: ml_collections.ConfigDict) -> Settings:
  settings = image_data.read_settings(config, Settings)
  if settings.pad_side not in SIDES:
    raise ValueError(f'data.pad_side={settings.pad_side!r} is unknown: choose one of '
                     f'{", ".join(SIDES)}')
  return settings
