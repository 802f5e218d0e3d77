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

import numpy as np

from lib.data import prepare
from lib.data.settings import PAD_SIDES, Config, QASettings, qa_settings
from lib.data.stream import EvalBatches, TrainIterator
from ops import choices
from ops.values import Count, CountOrZero, Pixels, check_fields

# Features of a record that are one a question.
PER_QUESTION = ('question', 'answer', 'evidence', 'place', 'depth')


@dataclasses.dataclass(frozen=True)
class Info:
  """Describes a set.

  Attributes:
    vocabulary: number of ids.
    pad, end, image: ids of those tokens; image is None for text alone.
    kinds: names of the kinds of questions, () where there is one kind.
    num_train, num_test: questions of the splits.
    image_shape: (S, S, C), or None.
    words: the word of each id, () where `tokenizer` decodes them.
    answer_length: tokens of the longest answer, its end not counted.
    tokenizer: the content of a tokenizer.json, '' where ids are words, or a pretrained language
      model has its own.
    chat: the template of its questions, '' for none.

  Raises:
    ValueError: a value of another type, or an id that the vocabulary does not have.
  """

  vocabulary: Count
  pad: CountOrZero
  end: CountOrZero
  image: CountOrZero | None
  kinds: tuple[str, ...]
  num_train: CountOrZero
  num_test: CountOrZero
  image_shape: tuple[Pixels, Pixels, Count] | None
  words: tuple[str, ...]
  answer_length: Count
  tokenizer: str = ''
  chat: str = ''

  def __post_init__(self) -> None:
    check_fields(self)
    for name in ('pad', 'end', 'image'):
      if (getattr(self, name) or 0) >= self.vocabulary:
        raise ValueError(f'{name}={getattr(self, name)} is no id of a vocabulary of '
                         f'{self.vocabulary}')


def info(config: Config) -> Info:
  """Describes the set that `config` names, without reading a record.

  Raises:
    ValueError: an unknown field, name or split, or a set without questions.
  """
  settings = qa_settings(config)
  train, test = (QAReader(settings, field) for field in ('train_split', 'test_split'))
  meta, features = train.meta, train.features
  return Info(meta['vocabulary'], meta['pad'], meta['end'], meta.get('image'),
              tuple(meta.get('kinds', ())), len(train), len(test),
              tuple(features['image'].shape) if 'image' in features else None,
              tuple(meta.get('words', ())), features['answer'].shape[-1],
              meta.get('tokenizer', ''), meta.get('chat', ''))


def train_iterator(config: Config, *, seed: int, process_index: int = 0,
                   process_count: int = 1) -> TrainIterator:
  """Returns endless batches for training (`TrainIterator`).

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
  settings = qa_settings(config)
  reader = QAReader(settings, 'train_split')
  return TrainIterator(reader, settings, seed, process_index, process_count)


def eval_batches(config: Config, *, process_index: int = 0,
                 process_count: int = 1) -> EvalBatches:
  """Returns the test split once, in order (`EvalBatches`).

  Returns:
    A sized iterable of dicts as of `train_iterator`, and mask float32[B], 0 for rows that only fill
    a batch up: they repeat the question before them.
  """
  settings = qa_settings(config)
  reader = QAReader(settings, 'test_split')
  return EvalBatches(reader, settings, process_index, process_count)


def example(config: Config, number: int) -> dict[str, np.ndarray]:
  """Returns one question of the test split: a row of `eval_batches`, without its batch axis.

  Args:
    config: of the set.
    number: of the question, from 0 on.

  Raises:
    ValueError, FileNotFoundError: as `info`; no such question.
  """
  reader = QAReader(qa_settings(config), 'test_split')
  if not 0 <= number < len(reader):
    raise ValueError(f'example {number} is out of range: the test split has {len(reader)}, from 0 '
                     'on')
  return {name: value[0] for name, value in reader.eval_batch(np.asarray([number]), 1).items()}


def pad_rows(rows: Sequence[Sequence[int]], length: int, *, side: str,
             fill: int) -> tuple[np.ndarray, np.ndarray]:
  """Pads rows of several lengths: ids int32[B, length] and valid bool[B, length].

  Raises:
    ValueError: a row is longer, or an unknown side.
  """
  choices.check('pad_side=', side, PAD_SIDES)
  ids = np.full((len(rows), length), fill, np.int32)
  valid = np.zeros(ids.shape, bool)
  for number, row in enumerate(rows):
    if len(row) > length:
      raise ValueError(f'row {number} has {len(row)} tokens and a row of the batch {length}: raise '
                       'data.context, or shorten it')
    slots = slice(length - len(row), None) if side == 'left' else slice(len(row))
    ids[number, slots], valid[number, slots] = row, True
  return ids, valid


class QAReader:
  """Reads the questions of one split by index (lib/data/stream.py).

  Args:
    settings: of the set.
    field: 'train_split' or 'test_split'.

  Attributes:
    features, meta: of the set.
    corrupt: stays empty: a question that cannot be read raises.

  Raises:
    ValueError: an unknown name or split, a set without questions, or kinds that it does not have.
    FileNotFoundError: the set is not prepared.
  """

  def __init__(self, settings: QASettings, field: str):
    builder = prepare.prepared(settings.name, settings.data_dir)
    self.features = builder.info.features
    self.meta = dict(builder.info.metadata or {})
    if not {'question', 'answer'} <= set(self.features) or 'vocabulary' not in self.meta:
      raise ValueError(f'{settings.name} has no questions: its features are '
                       f'{", ".join(self.features)}; lib/data/images.py reads classes of images')
    self.corrupt: dict[int, str] = {}
    self._settings = settings
    # Of a record's questions, those that are asked.
    self._asked = self._numbers_of(settings.kinds)
    if not 1 <= settings.turns <= len(self._asked):
      raise ValueError(f'data.turns={settings.turns} is impossible: {settings.name} asks '
                       f'{len(self._asked)} questions a record')
    self._source = builder.as_data_source(getattr(settings, field), file_format='array_record')
    mean, std = (np.asarray(values, np.float32) for values in (settings.mean, settings.std))
    self._gain, self._bias = 1 / (255 * std), -mean / std

  def __len__(self) -> int:
    return len(self._source) * len(self._asked)

  def train_batch(self, examples: np.ndarray, positions: np.ndarray,
                  seed: int) -> dict[str, np.ndarray]:
    """Returns a batch of `train_iterator`: each row asks `turns` questions of its record."""
    count = len(self._asked)
    # The same rows whatever the number of processes.
    orders = [np.random.default_rng((seed, int(position))).permutation(count)
              for position in positions]
    turns = [[first, *(other for other in order.tolist() if other != first)][:self._settings.turns]
             for first, order in zip(examples % count, orders, strict=True)]
    return self._batch(self._load(examples, turns), len(examples))

  def eval_batch(self, examples: np.ndarray, rows: int) -> dict[str, np.ndarray]:
    """Returns a batch of `eval_batches`."""
    mask = (np.arange(rows) < len(examples)).astype(np.float32)
    turns = (examples % len(self._asked))[:, None].tolist()
    records = self._load(examples, turns)
    # What fills a batch up is a question like any other: a row of padding alone is none.
    records += records[-1:] * (rows - len(records))
    return self._batch(records, rows) | {'mask': mask}

  def _numbers_of(self, wanted: Sequence[str]) -> list[int]:
    """Returns the numbers, within a record, of the questions of some kinds, () for all."""
    kinds = self.meta.get('kinds', ())
    for kind in wanted:
      if kind not in kinds:
        raise ValueError(f'data.kinds has {kind!r}{choices.near(kind, kinds)}: '
                         f'{self._settings.name} has '
                         f'{", ".join(kinds) or "one kind of question"}')
    numbers = range(self.features['answer'].shape[0])
    return [number for number in numbers if not wanted or kinds[number] in wanted]

  def _load(self, examples: np.ndarray, turns: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Returns a record a row: the features of its first question, and 'turns'.

    Args:
      examples: int[B].
      turns: of each row, the questions to ask, as indices of those that are asked.

    Returns:
      Dicts; 'turns' holds (question, answer) of each turn, as ids.
    """
    rows, pad = [], self.meta['pad']
    records = self._source.__getitems__([int(each) // len(self._asked) for each in examples])
    for record, indices in zip(records, turns, strict=True):
      numbers = [self._asked[index] for index in indices]
      pairs = [([int(token) for token in record['question'][number] if token != pad],
                [*(int(token) for token in record['answer'][number] if token != pad),
                 self.meta['end']]) for number in numbers]
      # The image stands in front of the first, as a text does.
      pairs[1:] = [([token for token in question if token != self.meta.get('image')], answer)
                   for question, answer in pairs[1:]]
      if 'text' in record:
        pairs[0] = [*map(int, record['text']), *pairs[0][0]], pairs[0][1]
      first = {name: record[name][numbers[0]] for name in PER_QUESTION if name in record}
      kind = numbers[0] if self.meta.get('kinds') else 0
      rows.append(record | first | {'kind': kind, 'turns': pairs})
    return rows

  def _batch(self, records: list[dict[str, Any]], rows: int) -> dict[str, np.ndarray]:
    """Pads records of `_load` into a batch of so many rows."""
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
    """Returns one feature of all rows; zeros where there is no record."""
    # A batch of padding alone has no record to tell the shape.
    shape = tuple(self.features[name].shape) if name in self.features else ()
    shape = shape[1:] if name in PER_QUESTION else shape
    column = np.zeros((rows, *shape), np.asarray(values).dtype if values else np.int32)
    column[:len(values)] = values
    if name == 'image':
      images = column * self._gain + self._bias
      images[len(values):] = 0
      return images.astype(np.float32)
    if name == 'evidence':
      return column.astype(bool)
    return column.astype(np.float32 if column.dtype.kind == 'f' else np.int32)
