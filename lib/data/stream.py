"""Batches of a split: an endless shuffled stream for training, one pass in order for evaluation.

A reader turns indices of examples into batches; lib/data/image_reader.py and lib/data/qa.py have
one each. Axis: B batch of this process.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Protocol

import grain
import numpy as np

from lib.data.settings import Settings


class Reader(Protocol):
  """Reads the examples of one split by index.

  Attributes:
    corrupt: examples that could not be read so far, and why.
  """

  corrupt: dict[int, str]

  def __len__(self) -> int:
    """Returns the number of examples."""

  def train_batch(self, examples: np.ndarray, positions: np.ndarray,
                  seed: int) -> dict[str, np.ndarray]:
    """Returns a batch of these examples, which stand at these positions of a stream of this seed.

    Args:
      examples: int[B].
      positions: int[B].
      seed: of the stream.
    """

  def eval_batch(self, examples: np.ndarray, rows: int) -> dict[str, np.ndarray]:
    """Returns these examples as a batch of so many rows, with the 'mask' of `EvalBatches`.

    Args:
      examples: int[n], n <= rows.
      rows: B.
    """


class TrainIterator:
  """Iterates over endless batches, read ahead by threads; stops and goes on bit for bit.

  The stream is one seeded shuffle of the split after another, and batch k holds its positions
  k * batch_size to (k + 1) * batch_size, whatever the number of processes: each takes every
  process_count-th of them. A batch may span two epochs, so no example is left out and every batch
  is full.

  Args:
    reader: of the train split.
    settings: the set's.
    seed: of the shuffles.
    process_index, process_count: this process, and how many share a batch.

  Raises:
    ValueError: batches that cannot be divided over processes.
  """

  def __init__(self, reader: Reader, settings: Settings, seed: int, process_index: int,
               process_count: int):
    rows = _rows(settings, process_index, process_count)
    self._reader = reader
    self._identity = {'name': settings.name, 'split': settings.train_split, 'seed': seed,
                      'batch_size': settings.batch_size, 'examples': len(reader)}

    def batch(step: int, examples: np.ndarray) -> dict[str, np.ndarray]:
      positions = (step * rows + np.arange(rows)) * process_count + process_index
      return reader.train_batch(examples, positions, seed)

    order = grain.MapDataset.range(len(self._reader)).seed(seed).shuffle().repeat()
    # Exact lengths need drop_remainder (else grain rounds through a float); nothing is dropped.
    mine = order[process_index::process_count].batch(rows, drop_remainder=True)
    self._batches = iter(_prefetched(mine.map_with_index(batch), settings))

  @property
  def corrupt(self) -> dict[int, str]:
    """Examples that could not be read so far, and why."""
    return dict(self._reader.corrupt)

  def __iter__(self) -> TrainIterator:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    return next(self._batches)

  def get_state(self) -> dict[str, Any]:
    """Returns the position in the stream, JSON-like; the same in every process."""
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
  """Holds a split once, in order, in batches of one shape; every process has equally many.

  Each batch has mask float32[B]: rows of mask 0 are padding, so summing over mask 1 counts each
  example once.

  Args:
    reader: of the test split.
    settings: the set's.
    process_index, process_count: this process, and how many share a batch.

  Raises:
    ValueError: batches that cannot be divided over processes.
  """

  def __init__(self, reader: Reader, settings: Settings, process_index: int, process_count: int):
    rows = _rows(settings, process_index, process_count)
    self._settings = settings
    self._reader = reader
    self._count = math.ceil(len(reader) / settings.batch_size)

    def batch(step: int) -> dict[str, np.ndarray]:
      examples = step * settings.batch_size + np.arange(rows) * process_count + process_index
      return reader.eval_batch(examples[examples < len(reader)], rows)

    self._batches = grain.MapDataset.range(self._count).map(batch)

  @property
  def corrupt(self) -> dict[int, str]:
    """Examples that could not be read so far, and why."""
    return dict(self._reader.corrupt)

  def __len__(self) -> int:
    return self._count

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    batches = iter(_prefetched(self._batches, self._settings))
    with contextlib.closing(batches):
      yield from batches


def _rows(settings: Settings, process_index: int, process_count: int) -> int:
  """Returns B, the rows of a batch that this process reads."""
  assert 0 <= process_index < process_count
  if settings.batch_size < 1 or settings.batch_size % process_count:
    raise ValueError(f'data.batch_size={settings.batch_size} cannot be divided over '
                     f'{process_count} processes: make it a multiple of {process_count}')
  return settings.batch_size // process_count


def _prefetched(batches: grain.MapDataset, settings: Settings) -> grain.IterDataset:
  return batches.to_iter_dataset(grain.ReadOptions(
      num_threads=settings.threads, prefetch_buffer_size=settings.prefetch_batches))
