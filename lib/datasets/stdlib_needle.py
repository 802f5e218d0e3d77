"""Keys hidden in real text, the sources of Python's standard library, and asked for at its end.

Axes: T bytes of an example.
"""

from __future__ import annotations

import dataclasses
import pathlib
import string
import sysconfig
import zlib
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

SEED = 0
BYTES = 256  # Tokens are bytes.
PAD, END = BYTES, BYTES + 1
# Files of these folders are tests, or no part of the language.
SKIPPED = ('test', 'tests', 'idlelib', 'lib2to3', 'site-packages', 'dist-packages', 'turtledemo',
           '__pycache__', 'ensurepip')
TEST_SHARE = 5  # One module in five is for the test split.
DEPTHS = 10  # Depths are spread evenly: example i is in tenth i % 10 of its text.
DIGITS = 6  # Of a key.
# Names of keys: a letter, which may well stand elsewhere in the text.
NAMES = string.ascii_uppercase


@dataclasses.dataclass(kw_only=True)
class Config(tfds.core.BuilderConfig):
  """One length of text.

  Attributes:
    context: most bytes of text, question and answer.
    keys: keys hidden in a text; one is asked for.
    train, test: number of examples.
  """

  context: int
  keys: int
  train: int
  test: int


class StdlibNeedle(tfds.core.GeneratorBasedBuilder):
  """Text with keys in it and the question for one of them.

  question: uint8[T], bytes: whole lines of source with a line '# The key of NAME is DDDDDD.' for
  every key, and as the last line the beginning of the asked one again.
  answer: uint8[6], the digits of the key: they occur once in the text.
  place: int32, where those digits begin in `question`.
  depth: float32, that place as a share of the text before the last line.

  The two splits take different modules (a module is a file or a folder of the library). The text is
  that of the Python that prepares the set, so figures hold for one version of it.
  """

  VERSION = tfds.core.Version('2.0.0')
  BUILDER_CONFIGS: ClassVar[list[Config]] = [
      Config(name='256', description='256 bytes', context=256, keys=4, train=40000, test=1000),
      Config(name='128', description='128 bytes', context=128, keys=3, train=40000, test=1000),
      Config(name='1k', description='1,024 bytes', context=1024, keys=4, train=8000, test=500),
      Config(name='4k', description='4,096 bytes', context=4096, keys=4, train=2000, test=200),
      Config(name='16k', description='16,384 bytes', context=16384, keys=4, train=500, test=100),
  ]
  url_infos = None

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self,
        description=type(self).__doc__,
        features=tfds.features.FeaturesDict({
            'question': tfds.features.Tensor(shape=(None,), dtype=np.uint8),
            'answer': tfds.features.Tensor(shape=(DIGITS,), dtype=np.uint8),
            'place': tfds.features.Scalar(dtype=np.int32),
            'depth': tfds.features.Scalar(dtype=np.float32)}),
        metadata=tfds.core.MetadataDict(vocabulary=END + 1, pad=PAD, end=END),
        homepage='https://docs.python.org/3/library',
        disable_shuffling=True)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    del dl_manager
    config = self.builder_config
    train, test = (corpus(files) for files in split(sources()))
    return {'train': self._generate_examples(train, 0, config.train),
            'test': self._generate_examples(test, 1, config.test)}

  def _generate_examples(self, text: bytes, stream: int,
                         count: int) -> Iterator[tuple[int, dict]]:
    for key in range(count):
      yield key, example(text, key, stream, self.builder_config)


def sources() -> dict[str, list[pathlib.Path]]:
  """The files of every module of the standard library, by the module's name."""
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  found: dict[str, list[pathlib.Path]] = {}
  for path in sorted(root.rglob('*.py')):
    parts = path.relative_to(root).parts
    if not any(part in SKIPPED or part.startswith('config-') for part in parts):
      found.setdefault(parts[0].removesuffix('.py'), []).append(path)
  return found


def split(modules: dict[str, list[pathlib.Path]]) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
  """The files of the modules of train and of test, by a checksum of the module's name."""
  train, test = [], []
  for name, files in sorted(modules.items()):
    (train if zlib.crc32(name.encode()) % TEST_SHARE else test).extend(files)
  return train, test


def corpus(files: list[pathlib.Path]) -> bytes:
  """All files one after another, with plain line ends."""
  return b''.join(path.read_bytes().replace(b'\r\n', b'\n') + b'\n' for path in files)


def example(text: bytes, index: int, stream: int, config: Config) -> dict[str, object]:
  """Example `index` of a split, made from its text: the features of `StdlibNeedle`.

  All choices are raw Philox words of the split and the index, which numpy freezes.

  Raises:
    ValueError: the text is shorter than an example.
  """
  random = np.random.Philox(key=SEED, counter=[0, 0, stream, index])

  def word() -> int:
    return int(random.random_raw())

  names = [NAMES[place] for place in np.argsort(random.random_raw(len(NAMES)))[:config.keys]]
  begins = [f'# The key of {name} is '.encode() for name in names]
  room = config.context - DIGITS - len(begins[0]) - sum(len(b) + DIGITS + 2 for b in begins)
  passage = _passage(text, word(), room)
  keys: list[bytes] = []
  while len(keys) < config.keys:
    key = f'{word() % 10 ** DIGITS:0{DIGITS}}'.encode()
    if key not in passage and key not in keys:
      keys.append(key)
  lines = passage.splitlines(keepends=True)
  edges = np.cumsum([0] + [len(line) for line in lines])
  # The asked key at the edge of a line nearest to its depth, the others at any edge.
  depth = (index % DEPTHS + word() % 1000 / 1000) / DEPTHS
  at = [int(np.argmin(np.abs(edges - depth * edges[-1])))]
  at += [word() % len(edges) for _ in keys[1:]]
  # Where several are at one edge, the asked one is anywhere among them.
  turns = np.argsort(random.random_raw(config.keys)).tolist()
  filled, place = [], 0
  for line in range(len(edges)):
    for number in turns:
      if at[number] == line:
        filled.append(begins[number] + keys[number] + b'.\n')
        if number == 0:
          place = sum(map(len, filled)) - DIGITS - 2
    filled += lines[line:line + 1]
  body = b''.join(filled)
  return {'question': np.frombuffer(body + begins[0], np.uint8),
          'answer': np.frombuffer(keys[0], np.uint8),
          'place': np.int32(place), 'depth': np.float32(place / len(body))}


def _passage(text: bytes, start: int, room: int) -> bytes:
  """Whole lines of the text, `room` bytes at most, that begin somewhere in it."""
  if len(text) <= 2 * room:
    raise ValueError(f'{len(text)} bytes of text are too few for passages of {room}: choose a '
                     'shorter context')
  start %= len(text) - 2 * room
  start = text.index(b'\n', start) + 1
  return text[start:text.rindex(b'\n', start - 1, start + room) + 1]
