"""Pictures of one to four emoji, and questions in plain English about them.

The emoji are those that four vendors draw, fetched by tools/real/fetch.py; three vendors are for
training, and the fourth is only tested on. Texts are ids of the tokenizer of the language model
that is fetched with them, in its chat template.

Axes: S picture side, K questions of a picture, Q ids of a question, A ids of an answer.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageEnhance, ImageOps

from lib.data import gguf_tokenizer
from lib.data.datasets import digit_scenes
from lib.data.real import FOLDER, emoji, language_model

SEED = 0
# Vendors.
TRAIN, TEST = ('google', 'apple', 'facebook'), ('twitter',)
# The first ids of no two are the same: that of an answer tells which it is.
NAMES = (
    'ant', 'avocado', 'bacon', 'balloon', 'banana', 'bear', 'bee', 'bell', 'bike', 'bomb', 'bread',
    'broccoli', 'broom', 'burrito', 'bus', 'butterfly', 'cactus', 'camel', 'camera', 'candle',
    'candy', 'carrot', 'cat', 'chair', 'cookie', 'corn', 'cow', 'crab', 'crocodile', 'croissant',
    'crown', 'deer', 'dog', 'dolphin', 'door', 'doughnut', 'dress', 'duck', 'eagle', 'egg',
    'eggplant', 'elephant', 'feather', 'fire', 'flamingo', 'frog', 'garlic', 'goat', 'gorilla',
    'guitar', 'hammer', 'hamster', 'helicopter', 'horse', 'kangaroo', 'key', 'kite', 'koala',
    'ladder', 'ladybug', 'lemon', 'lizard', 'lobster', 'lollipop', 'magnet', 'microscope',
    'monkey', 'mosquito', 'mushroom', 'octopus', 'onion', 'owl', 'parrot', 'peacock', 'pear',
    'penguin', 'pig', 'pineapple', 'pizza', 'popcorn', 'pretzel', 'rabbit', 'raccoon', 'radio',
    'rainbow', 'rocket', 'rooster', 'rose', 'sandwich', 'scorpion', 'shark', 'sheep', 'ship',
    'shrimp', 'snail', 'snake', 'snowflake', 'snowman', 'spider', 'squid', 'strawberry',
    'sunflower', 'sushi', 'swan', 'taco', 'teapot', 'telescope', 'tent', 'tiger', 'toothbrush',
    'tractor', 'trophy', 'truck', 'trumpet', 'tulip', 'turtle', 'umbrella', 'violin', 'volcano',
    'watermelon', 'whale')
COUNTS = ('one', 'two', 'three', 'four')
CORNERS = ('upper left', 'upper right', 'lower left', 'lower right')
# Of the tokenizer: the size of its vocabulary, and special tokens, of which no text here has the
# one that stands for the image.
VOCABULARY = 49152
SPECIAL = {'pad': (0, '<|endoftext|>'), 'end': (2, '<|im_end|>'), 'image': (5, '<file_sep>')}
BEGIN, ANSWER = '<|im_start|>user\n', '<|im_end|>\n<|im_start|>assistant\nAnswer:'
# The same for questions that somebody asks a trained model.
CHAT = (BEGIN + "{% for part in messages[0].content %}"
        "{{ part.text if part.type == 'text' else '<file_sep>' }}{% endfor %}" + ANSWER)
LONGEST = 4  # A.
TURN = 15  # Degrees, in training alone, as mirroring and other brightness.


@dataclasses.dataclass(kw_only=True)
class Config(tfds.core.BuilderConfig):
  """Config of one kind of pictures.

  Attributes:
    side: S.
    several: share of the pictures that have two to four emoji, each in a quarter of its own; the
      others have one, as large as the picture.
    kinds: of the questions about each, keys of `_ASK`; what follows a '-' only tells two of a kind
      apart.
    train, test: number of pictures.
  """

  side: int
  several: float
  kinds: tuple[str, ...]
  train: int
  test: int


@dataclasses.dataclass(frozen=True)
class Question:
  """A question and its answer."""

  text: str
  answer: str


class EmojiScenes(tfds.core.GeneratorBasedBuilder):
  """Emoji on photographs or plain colours, with questions.

  image: uint8[S, S, 3].
  question: uint16[K, Q], ids of the whole turn up to where its answer begins, padded.
  answer: uint16[K, A], ids, padded.

  Of the questions 'name' asks what the picture, or one of its corners, shows; 'present' whether a
  thing is there, which is so in half of the cases; 'count' how many there are. The test split's
  picture k shows name k, and others beside it. The photographs are scikit-learn's; the test split
  has parts of them that training does not see.
  """

  VERSION = tfds.core.Version('1.0.0')
  BUILDER_CONFIGS: ClassVar[list[Config]] = [
      Config(name='small', description='one emoji, 112 pixels', side=112, several=0.0,
             kinds=('name',), train=6000, test=len(NAMES)),
      Config(name='mixed', description='one emoji or several, 224 pixels', side=224, several=0.75,
             kinds=('name', 'name-2', 'present', 'count'), train=3600, test=len(NAMES)),
      Config(name='one', description='one emoji, 224 pixels', side=224, several=0.0,
             kinds=('name', 'present'), train=4 * len(NAMES), test=2 * len(NAMES)),
      Config(name='grid', description='two to four emoji, 224 pixels', side=224, several=1.0,
             kinds=('name', 'present', 'count'), train=4 * len(NAMES), test=2 * len(NAMES)),
  ]
  url_infos = None

  def _info(self) -> tfds.core.DatasetInfo:
    config = self.builder_config
    kinds = len(config.kinds)
    return tfds.core.DatasetInfo(
        builder=self,
        description=type(self).__doc__,
        features=tfds.features.FeaturesDict({
            'image': tfds.features.Tensor(shape=(config.side, config.side, 3), dtype=np.uint8),
            'question': tfds.features.Tensor(shape=(kinds, None), dtype=np.uint16),
            'answer': tfds.features.Tensor(shape=(kinds, LONGEST), dtype=np.uint16)}),
        metadata=tfds.core.MetadataDict(
            vocabulary=VOCABULARY, kinds=list(config.kinds), chat=CHAT,
            **{name: number for name, (number, _) in SPECIAL.items()}),
        homepage='https://github.com/iamcal/emoji-data',
        disable_shuffling=True)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    del dl_manager
    config, encode = self.builder_config, _encoder()
    return {'train': self._generate_examples(Sources.load('train', encode), config.train),
            'test': self._generate_examples(Sources.load('test', encode), config.test)}

  def _generate_examples(self, sources: Sources, count: int) -> Iterator[tuple[int, dict]]:
    for key in range(count):
      yield key, example(sources, key, self.builder_config)


def _encoder() -> Callable[[str], list[int]]:
  """Text to ids, by the tokenizer of the language model that was fetched.

  Raises:
    ValueError: it is not there, or is another one.
  """
  tokens = gguf_tokenizer.tokenizer(language_model(pathlib.Path(FOLDER)))
  if any(tokens.token(number) != token for number, token in SPECIAL.values()):
    raise ValueError(f'the tokenizer in {FOLDER} is not the one that these texts are made for: '
                     '`python -m tools.real.fetch` fetches it')
  return functools.partial(tokens.encode, special=False)


@dataclasses.dataclass(frozen=True)
class Sources:
  """Holds what the pictures of one split are made of.

  Attributes:
    stream: number of the split.
    drawings: of each vendor, a picture with transparency of each name.
    photos: uint8[H, W, 3], parts of photographs.
    encode: text to ids.
  """

  stream: int
  drawings: Sequence[Sequence[Image.Image]]
  photos: tuple[np.ndarray, ...]
  encode: Callable[[str], list[int]]

  @classmethod
  def load(cls, split: str, encode: Callable[[str], list[int]]) -> Sources:
    """Loads the emoji and photographs of 'train' or 'test'."""
    stream = ('train', 'test').index(split)
    drawings = [emoji.drawings(pathlib.Path(FOLDER), vendor, NAMES)
                for vendor in (TRAIN, TEST)[stream]]
    return cls(stream, drawings, digit_scenes.photographs(split), encode)


def example(sources: Sources, index: int, config: Config) -> dict[str, Any]:
  """Picture `index` of a split, with its questions: the features of `EmojiScenes`.

  All choices are raw Philox words of the split and the index, which numpy freezes.
  """
  random = np.random.Philox(key=SEED, counter=[0, 0, sources.stream, index])
  words = iter(random.random_raw(128).tolist())
  count = 2 + next(words) % 3 if _share(words) < config.several else 1
  # Each name comes first once in so many pictures.
  order = np.argsort([next(words) for _ in range(4)])
  shown = [index % len(NAMES)]
  while len(shown) < count:
    other = next(words) % len(NAMES)
    shown += [other] * (other not in shown)
  places = dict(zip(order.tolist(), shown, strict=False))
  image = _draw(sources, words, places, config.side)
  questions = [_ASK[kind.split('-')[0]](places, words, number)
               for number, kind in enumerate(config.kinds)]
  asked = [sources.encode(f'{BEGIN}<file_sep>{each.text}{ANSWER}') for each in questions]
  answers = [sources.encode(f' {each.answer}') for each in questions]
  pad = SPECIAL['pad'][0]
  return {'image': image,
          'question': np.array([ids + [pad] * (max(map(len, asked)) - len(ids)) for ids in asked],
                               np.uint16),
          'answer': np.array([ids + [pad] * (LONGEST - len(ids)) for ids in answers], np.uint16)}


def _share(words: Iterator[int]) -> float:
  """A number in [0, 1)."""
  return next(words) / 2 ** 64


def _draw(sources: Sources, words: Iterator[int], places: dict[int, int], side: int) -> np.ndarray:
  """The picture uint8[S, S, 3] of names by the quarter that each is in; one alone fills all."""
  if next(words) % 2:
    photo = sources.photos[next(words) % len(sources.photos)]
    top, left = (next(words) % (length - side + 1) for length in photo.shape[:2])
    picture = Image.fromarray(photo[top:top + side, left:left + side])
  else:
    picture = Image.new('RGB', (side, side), tuple(next(words) % 256 for _ in range(3)))
  room = side if len(places) == 1 else side // 2
  for place, name in places.items():
    vendor = sources.drawings[next(words) % len(sources.drawings)]
    drawing = vendor[name]
    if sources.stream == 0:
      drawing = _varied(drawing, words)
    size = round(room * (0.65 + 0.3 * _share(words)))
    drawing = drawing.resize((size, size), Image.Resampling.BICUBIC)
    row, column = divmod(place, 2) if len(places) > 1 else (0, 0)
    left, top = (room * cell + next(words) % (room - size + 1) for cell in (column, row))
    picture.paste(drawing, (left, top), drawing)
  return np.asarray(picture)


def _varied(drawing: Image.Image, words: Iterator[int]) -> Image.Image:
  """A drawing mirrored or not, turned a little, and brighter or darker."""
  if next(words) % 2:
    drawing = ImageOps.mirror(drawing)
  drawing = drawing.rotate(TURN * (2 * _share(words) - 1), Image.Resampling.BICUBIC)
  alpha = drawing.getchannel('A')
  drawing = ImageEnhance.Brightness(drawing).enhance(0.75 + 0.5 * _share(words))
  drawing = ImageEnhance.Color(drawing).enhance(0.5 + _share(words))
  drawing.putalpha(alpha)
  return drawing


def _ask_name(places: dict[int, int], words: Iterator[int], number: int) -> Question:
  if len(places) == 1:
    return Question('What is this?', NAMES[next(iter(places.values()))])
  # The first name, or another where two are asked for.
  place, name = list(places.items())[number and 1 + next(words) % (len(places) - 1)]
  return Question(f'What is in the {CORNERS[place]} corner?', NAMES[name])


def _ask_present(places: dict[int, int], words: Iterator[int], number: int) -> Question:
  del number
  shown = list(places.values())
  there = next(words) % 2
  absent = [name for name in range(len(NAMES)) if name not in shown]
  name = NAMES[(shown if there else absent)[next(words) % len(shown if there else absent)]]
  article = 'an' if name[0] in 'aeiou' else 'a'
  return Question(f'Is there {article} {name}?', 'yes' if there else 'no')


def _ask_count(places: dict[int, int], words: Iterator[int], number: int) -> Question:
  del words, number
  return Question('How many things are there?', COUNTS[len(places) - 1])


_ASK: dict[str, Callable[[dict[int, int], Iterator[int], int], Question]] = {
    'name': _ask_name, 'present': _ask_present, 'count': _ask_count}
