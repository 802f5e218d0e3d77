"""Phrases hidden in real text, Python's standard library, and asked for at its end.

Axes: T tokens of a text, K phrases in it, Q tokens of a question.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import tensorflow_datasets as tfds

if TYPE_CHECKING:
  import tokenizers

SEED = 0
VOCABULARY = 1024  # Byte pairs, learned from the training split's text.
PAD, END = 0, 1
# Files of these folders are tests, or no part of the language.
SKIPPED = ('test', 'tests', 'idlelib', 'lib2to3', 'site-packages', 'dist-packages', 'turtledemo',
           '__pycache__', 'ensurepip')
TEST_SHARE = 5  # One module in five is for the test split.
DEPTHS = 10  # Depths are spread evenly: phrase n of the set is in tenth n % 10 of its text.
LENGTH = 3  # Words of a phrase after its first.
LEARNED = 8  # Every eighth line is enough to learn tokens from.
LONGEST = 16  # Characters of a token, on average, at most.
# Each of these words is one token, and so is 'Remember'. A phrase begins with one of the first.
FIRST = ('anchor', 'bridge', 'copper', 'desert', 'engine', 'forest', 'garden', 'harbor', 'island',
         'jungle', 'kettle', 'ladder', 'marble', 'needle', 'orange', 'pencil', 'quartz', 'ribbon',
         'silver', 'timber', 'urchin', 'violet', 'walnut', 'yellow')
WORDS = ('apple', 'arrow', 'badge', 'basin', 'berry', 'bloom', 'brick', 'candle', 'canyon', 'cedar',
         'chalk', 'cliff', 'cloud', 'comet', 'coral', 'crane', 'daisy', 'drift', 'eagle', 'ember',
         'fable', 'falcon', 'fern', 'flint', 'frost', 'glade', 'grape', 'hazel', 'heron', 'honey',
         'ivory', 'jewel', 'lemon', 'lilac', 'lotus', 'maple', 'meadow', 'melon', 'mint', 'moss',
         'nectar', 'oasis', 'olive', 'onyx', 'otter', 'pearl', 'pebble', 'plum', 'poppy', 'raven',
         'reef', 'river', 'robin', 'saddle', 'sage', 'shell', 'slate', 'spruce', 'storm', 'sugar',
         'thorn', 'tulip', 'velvet', 'willow')


@dataclasses.dataclass(kw_only=True)
class Config(tfds.core.BuilderConfig):
  """Config of one length of text.

  Attributes:
    context: most tokens of a text, one question and its answer.
    keys: K, phrases hidden in a text.
    train, test: number of texts.
    halvings: how many times at most a text is half as long, each number of times alike often.
  """

  context: int
  keys: int
  train: int
  test: int
  halvings: int = 0


class StdlibNeedle(tfds.core.GeneratorBasedBuilder):
  """Texts with phrases in them, and the question for each.

  text: uint16[T], tokens: whole lines of source with a line '# Remember: FIRST WORD WORD WORD.' for
  every phrase.
  question: uint16[K, Q], the beginning of each of those lines again, with the phrase's first word.
  answer: uint16[K, 3], the other words: no other phrase of the text has any of them.
  place: int32[K], where those words begin in `text`.
  depth: float32[K], that place as a share of the text.

  The two splits take different modules (a module is a file or a folder of the library). The text is
  that of the Python that prepares the set, so figures hold for one version of it. Tokens are byte
  pairs, learned from the training split's text; 'tokenizer' in the metadata is the tokenizer.json.
  """

  VERSION = tfds.core.Version('2.0.0')
  BUILDER_CONFIGS: ClassVar[list[Config]] = [
      Config(name='64', description='64 tokens', context=64, keys=3, train=40000, test=300),
      Config(name='256', description='256 tokens', context=256, keys=6, train=20000, test=200),
      Config(name='1k', description='1,024 tokens', context=1024, keys=8, train=8000, test=100),
      Config(name='1k_mixed', description='128, 256, 512 or 1,024 tokens', context=1024, keys=8,
             train=8000, test=100, halvings=3),
      Config(name='4k', description='4,096 tokens', context=4096, keys=8, train=1000, test=30),
      Config(name='16k', description='16,384 tokens', context=16384, keys=8, train=200, test=10),
  ]
  url_infos = None

  def _info(self) -> tfds.core.DatasetInfo:
    keys = self.builder_config.keys
    shapes = {'text': ((None,), np.uint16), 'question': ((keys, None), np.uint16),
              'answer': ((keys, LENGTH), np.uint16), 'place': ((keys,), np.int32),
              'depth': ((keys,), np.float32)}
    return tfds.core.DatasetInfo(
        builder=self,
        description=type(self).__doc__,
        features=tfds.features.FeaturesDict({
            name: tfds.features.Tensor(shape=shape, dtype=dtype)
            for name, (shape, dtype) in shapes.items()}),
        metadata=tfds.core.MetadataDict(vocabulary=VOCABULARY, pad=PAD, end=END),
        homepage='https://docs.python.org/3/library',
        disable_shuffling=True)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    del dl_manager
    config = self.builder_config
    train, test = (corpus(files) for files in split(sources()))
    tokens = tokenizer(train)
    self.info.metadata['tokenizer'] = tokens.to_str()
    return {'train': self._generate_examples(Text(train, tokens), 0, config.train),
            'test': self._generate_examples(Text(test, tokens), 1, config.test)}

  def _generate_examples(self, text: Text, stream: int, count: int) -> Iterator[tuple[int, dict]]:
    for key in range(count):
      yield key, example(text, key, stream, self.builder_config)


def sources() -> dict[str, list[pathlib.Path]]:
  """The files of every module of the standard library, by the module's name."""
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  by_module: dict[str, list[pathlib.Path]] = {}
  for path in sorted(root.rglob('*.py')):
    parts = path.relative_to(root).parts
    if not any(part in SKIPPED or part.startswith('config-') for part in parts):
      by_module.setdefault(parts[0].removesuffix('.py'), []).append(path)
  return by_module


def split(modules: dict[str, list[pathlib.Path]]) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
  """The files of the modules of train and of test, by a checksum of the module's name."""
  train: list[pathlib.Path] = []
  test: list[pathlib.Path] = []
  for name, files in sorted(modules.items()):
    (train if zlib.crc32(name.encode()) % TEST_SHARE else test).extend(files)
  return train, test


def corpus(files: Sequence[pathlib.Path]) -> str:
  """Joins all files, with plain line ends; bytes that are not UTF-8 become U+FFFD."""
  return ''.join(path.read_bytes().decode(errors='replace').replace('\r\n', '\n') + '\n'
                 for path in files)


def tokenizer(text: str) -> tokenizers.Tokenizer:
  """Byte pairs (arXiv:1508.07909) of a text, and every word of phrases as one token.

  Lines are tokens of their own, so that a text is the tokens of its lines one after another.

  Raises:
    ValueError: the package that learns them is missing.
  """
  try:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
  except ImportError as error:
    raise ValueError('learning tokens needs a package that is not installed: `pip install -r '
                     'requirements-hub.txt`') from error
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split('\n', 'merged_with_previous'),
      pre_tokenizers.ByteLevel(add_prefix_space=False)])
  bpe.decoder = decoders.ByteLevel()
  whole = [f' {word}' for word in ('Remember', *FIRST, *WORDS)]
  bpe.train_from_iterator(text.splitlines(keepends=True)[::LEARNED], trainers.BpeTrainer(
      vocab_size=VOCABULARY - len(whole), special_tokens=['<pad>', '<end>'], show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  bpe.add_tokens(whole)
  assert bpe.get_vocab_size() == VOCABULARY
  return bpe


class Text:
  """Lines to take passages from.

  Args:
    text: all of them.
    tokens: what they become.

  Attributes:
    words: {word of a phrase: its token, with the space before it}.
    parts: tokens of what stands before a phrase and after it.
  """

  def __init__(self, text: str, tokens: tokenizers.Tokenizer):
    self._lines = text.splitlines(keepends=True)
    self._edges = np.cumsum([0, *map(len, self._lines)])
    self._tokens = tokens
    self.words = {
        word: cast(int, tokens.token_to_id(f' {word}')) for word in (*FIRST, *WORDS)}
    self.parts = tuple(tokens.encode(part).ids for part in ('# Remember:', '.\n'))

  def passage(self, start: int, room: int) -> list[list[int]]:
    """The tokens of whole lines from a line on, `room` at most.

    Raises:
      ValueError: the text is too short.
    """
    last = self._edges[-1] - LONGEST * room
    if last <= 0:
      raise ValueError(f'{self._edges[-1]} characters are too few for passages of {room} tokens: '
                       'choose a shorter context')
    lines: list[list[int]] = []
    first = start % int(np.searchsorted(self._edges, last))
    for number in range(first, len(self._lines)):
      ids = self._tokens.encode(self._lines[number]).ids
      room -= len(ids)
      if room < 0:
        break
      lines.append(ids)
    return lines


def example(text: Text, index: int, stream: int, config: Config) -> dict[str, Any]:
  """Text `index` of a split, with its questions: the features of `StdlibNeedle`.

  All choices are raw Philox words of the split and the index, which numpy freezes.

  Raises:
    ValueError: there is too little to take a text from.
  """
  random = np.random.Philox(key=SEED, counter=[0, 0, stream, index])

  def drawn(words: Sequence[str], count: int) -> list[int]:
    places = np.argsort(random.random_raw(len(words)), stable=True)[:count]
    return [text.words[words[place]] for place in places]

  keys, (before, after) = config.keys, text.parts
  first = drawn(FIRST, keys)
  words = np.asarray(drawn(WORDS, LENGTH * keys)).reshape(keys, LENGTH)
  asking = [[*before, word] for word in first]
  hidden = [[*begin, *own, *after] for begin, own in zip(asking, words.tolist(), strict=True)]
  start = int(random.random_raw())
  context = config.context
  if config.halvings:
    context >>= int(random.random_raw()) % (1 + config.halvings)
  lines = text.passage(start, context - LENGTH - len(asking[0]) - sum(map(len, hidden)))
  # Each at the edge of a line nearest to its depth, in any order where several are at one.
  edges = np.cumsum([0, *map(len, lines)])
  tenths = (index * keys + np.arange(keys)) % DEPTHS
  depths = (tenths + random.random_raw(keys) % 1000 / 1000) / DEPTHS
  at = np.abs(edges - depths[:, None] * edges[-1]).argmin(axis=1)
  body: list[int] = []
  place = np.zeros(keys, np.int32)
  for number in range(len(edges)):
    for key in np.flatnonzero(at == number).tolist():
      place[key] = len(body) + len(asking[key])
      body += hidden[key]
    body += lines[number] if number < len(lines) else []
  return {'text': np.asarray(body, np.uint16), 'question': np.asarray(asking, np.uint16),
          'answer': words.astype(np.uint16), 'place': place,
          'depth': (place / len(body)).astype(np.float32)}
