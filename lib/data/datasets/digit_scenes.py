"""Photographs with handwritten digits in the cells of a grid, and questions about them.

Axes: G cells a side, S image side, K kinds of questions, Q most words of a question.

Some answers need one cell, some a few, some all of them, and `evidence` says which: what a
reduction may throw away depends on the question.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from lib.data.datasets import digits

SEED = 0
DIGIT = 16  # Side in pixels of a cell, and of a digit of 8 x 8 pixels in it.
EMPTY, DISTRACTOR = 0, 11  # Labels of cells; 1 + d is the digit d.
# The part of a photograph's columns that training sees; the test split has the rest.
TRAIN_COLUMNS = 0.65
KINDS = ('count', 'present', 'cell', 'left', 'top_row', 'corner')
EACH_DIGIT = tuple(f'present_{digit}' for digit in range(10))
CORNERS = ('top left', 'top right', 'bottom left', 'bottom right')
PAD, END, IMAGE = 0, 1, 2
MOST = 80  # The largest number that is a word: a row of eight digits adds up to 72.
WORDS = ('<pad>', '<end>', '<image>', *map(str, range(MOST + 1)), *sorted({
    'how', 'many', 'digits', 'are', 'there', '?', 'is', 'a', 'which', 'digit', 'at', 'row',
    'column', 'directly', 'left', 'of', 'the', 'sum', 'top', 'what', 'in', 'corner', 'right',
    'bottom', 'yes', 'no', 'none'}))
LONGEST = 10  # Q.


@dataclasses.dataclass(kw_only=True)
class Config(tfds.core.BuilderConfig):
  """Config of one size of scenes.

  Attributes:
    cells: G, cells a side.
    digits, distractors: (fewest, most) in a scene.
    train, test: number of scenes.
    kinds: of the questions about each.
  """

  cells: int
  digits: tuple[int, int]
  distractors: tuple[int, int]
  train: int
  test: int
  kinds: tuple[str, ...] = KINDS


@dataclasses.dataclass(frozen=True)
class Question:
  """A question, its answer, and the cells that one must see to give it: bool[G, G]."""

  text: str
  answer: str
  evidence: np.ndarray


class DigitScenes(tfds.core.GeneratorBasedBuilder):
  """Scenes of handwritten digits on photographs, with six questions each, or ten.

  image: uint8[S, S, 3], S = 16 G: a crop of a photograph, dimmed by half, with digits and
  distractors (a digit's strokes, shuffled in blocks) in cells of their own.
  cells: uint8[G, G], 0 for no digit and no distractor, 1 + d for the digit d, 11 for a distractor.
  question: uint8[K, Q], places in `WORDS`, <image> first, padded on the right by <pad>.
  answer: uint8[K, 1], one word.
  evidence: uint8[K, G, G], 1 for the cells that the answer depends on.

  Question k is of kind k in the config's `kinds`: `KINDS`, or, to train on, whether each of the ten
  digits is there. Digits and photographs come with scikit-learn; the two splits
  have disjoint digits, those of `digits.Digits`, whose source they share, and disjoint parts of the
  photographs ('china.jpg' and 'flower.jpg' of `sklearn.datasets.load_sample_images`).
  """

  VERSION = tfds.core.Version('1.1.0')
  BUILDER_CONFIGS: ClassVar[list[Config]] = [
      Config(name='64', description='4 x 4 cells', cells=4, digits=(3, 6), distractors=(1, 3),
             train=24000, test=1000),
      Config(name='64_present', description='4 x 4 cells, each digit asked for', cells=4,
             digits=(3, 6), distractors=(1, 3), train=24000, test=200, kinds=EACH_DIGIT),
      Config(name='128', description='8 x 8 cells', cells=8, digits=(5, 14), distractors=(3, 10),
             train=2000, test=400),
  ]
  url_infos = None

  def _info(self) -> tfds.core.DatasetInfo:
    cells, kinds = self.builder_config.cells, len(self.builder_config.kinds)
    shapes = {'image': (cells * DIGIT, cells * DIGIT, 3), 'cells': (cells, cells),
              'question': (kinds, LONGEST), 'answer': (kinds, 1), 'evidence': (kinds, cells, cells)}
    return tfds.core.DatasetInfo(
        builder=self,
        description=type(self).__doc__,
        features=tfds.features.FeaturesDict({
            name: tfds.features.Tensor(shape=shape, dtype=np.uint8)
            for name, shape in shapes.items()}),
        metadata=tfds.core.MetadataDict(
            vocabulary=len(WORDS), pad=PAD, end=END, image=IMAGE,
            kinds=list(self.builder_config.kinds),
            words=list(WORDS)),
        homepage='https://archive.ics.uci.edu/dataset/80',
        disable_shuffling=True)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    del dl_manager
    config = self.builder_config
    return {'train': self._generate_examples(Sources.load('train'), config.train),
            'test': self._generate_examples(Sources.load('test'), config.test)}

  def _generate_examples(self, sources: Sources, count: int) -> Iterator[tuple[int, dict]]:
    for key in range(count):
      yield key, example(sources, key, self.builder_config)


@dataclasses.dataclass(frozen=True)
class Sources:
  """Holds the digits and photographs that the scenes of one split are made of.

  Attributes:
    stream: number of the split.
    images: uint8[N, 8, 8], handwritten digits.
    labels: int[N], what they are.
    photos: uint8[H, W, 3], parts of photographs.
  """

  stream: int
  images: np.ndarray
  labels: np.ndarray
  photos: tuple[np.ndarray, ...]

  @classmethod
  def load(cls, split: str) -> Sources:
    """Loads the digits and photographs of 'train' or 'test'."""
    # Here, because scikit-learn takes a second to import and only preparing needs it.
    from sklearn.datasets import load_digits
    dataset = load_digits()
    stream = ('train', 'test').index(split)
    chosen = digits.split(dataset.target)[stream]
    return cls(stream, (dataset.images[chosen] * digits.SCALE).astype(np.uint8),
               dataset.target[chosen], photographs(split))


def photographs(split: str) -> tuple[np.ndarray, ...]:
  """The parts of two photographs that 'train' or 'test' sees, uint8[H, W, 3]."""
  from sklearn.datasets import load_sample_images
  photos = []
  for photo in load_sample_images().images:
    edge = round(TRAIN_COLUMNS * photo.shape[1])
    photos.append(photo[:, :edge] if split == 'train' else photo[:, edge:])
  return tuple(photos)


def example(sources: Sources, index: int, config: Config) -> dict[str, np.ndarray]:
  """Scene `index` of a split, with its questions: the features of `DigitScenes`.

  All choices are raw Philox words of the split and the index, which numpy freezes.
  """
  random = np.random.Philox(key=SEED, counter=[0, 0, sources.stream, index])
  # More than any scene uses: the cells' order, the distractors' blocks, and a few choices more.
  words = iter(random.random_raw(64 + config.cells ** 2 + 24 * config.distractors[1]).tolist())
  cells, chosen = _place(sources, words, config)
  image = _draw(sources, words, cells, chosen)
  questions = [ask(kind, cells, words) for kind in config.kinds]
  question = np.full((len(questions), LONGEST), PAD, np.uint8)
  for row, each in zip(question, questions, strict=True):
    encoded = [IMAGE, *encode(each.text)]
    row[:len(encoded)] = encoded
  return {'image': image, 'cells': cells, 'question': question,
          'answer': np.array([encode(each.answer) for each in questions], np.uint8),
          'evidence': np.stack([each.evidence for each in questions]).astype(np.uint8)}


def encode(text: str) -> list[int]:
  """A text as places in `WORDS`."""
  return [WORDS.index(word) for word in text.split()]


def decode(ids: Sequence[int]) -> str:
  """The text of places in `WORDS`; <pad>, <end> and <image> are left out."""
  return ' '.join(WORDS[place] for place in ids if place > IMAGE)


def _between(words: Iterator[int], limits: tuple[int, int]) -> int:
  return limits[0] + next(words) % (limits[1] - limits[0] + 1)


def _place(sources: Sources, words: Iterator[int],
           config: Config) -> tuple[np.ndarray, dict[tuple[int, int], int]]:
  """Labels of the cells, and which handwritten digit is in each that has one.

  Of at least one digit there is only one in the scene, and mostly another is directly left of it,
  so that one can be asked for the other.
  """
  cells = np.zeros((config.cells, config.cells), np.uint8)
  count, distractors = _between(words, config.digits), _between(words, config.distractors)
  order = np.argsort([next(words) for _ in range(cells.size)])
  places = [divmod(int(place), config.cells) for place in order]
  if next(words) % 4:
    anchor = next(place for place in places if place[1] > 0)
    first = [anchor, (anchor[0], anchor[1] - 1)]
    places = first + [place for place in places if place not in first]
  single = next(words) % len(sources.labels)
  others = np.flatnonzero(sources.labels != sources.labels[single])
  chosen = [single] + [int(others[next(words) % len(others)]) for _ in range(count - 1)]
  for place, digit in zip(places, chosen, strict=False):
    cells[place] = 1 + sources.labels[digit]
  for place in places[count:count + distractors]:
    cells[place] = DISTRACTOR
  return cells, dict(zip(places, chosen, strict=False))


def _draw(sources: Sources, words: Iterator[int], cells: np.ndarray,
          chosen: dict[tuple[int, int], int]) -> np.ndarray:
  """The picture uint8[S, S, 3]."""
  side = len(cells) * DIGIT
  photo = sources.photos[next(words) % len(sources.photos)]
  top, left = (next(words) % (length - side + 1) for length in photo.shape[:2])
  # Dimmed, so that strokes are brighter than any background.
  image = photo[top:top + side, left:left + side] // 2
  for row, column in np.argwhere(cells != EMPTY).tolist():
    if cells[row, column] == DISTRACTOR:
      digit = _shuffled(sources.images[next(words) % len(sources.images)], words)
    else:
      digit = sources.images[chosen[row, column]]
    ink = digit.repeat(2, axis=0).repeat(2, axis=1)[..., None].astype(np.uint16)
    box = np.s_[row * DIGIT:(row + 1) * DIGIT, column * DIGIT:(column + 1) * DIGIT]
    image[box] = ((255 - ink) * image[box] + ink * 255) // 255
  return image


def _shuffled(digit: np.ndarray, words: Iterator[int]) -> np.ndarray:
  """uint8[8, 8] with its 16 blocks of 2 x 2 pixels in another order."""
  blocks = digit.reshape(4, 2, 4, 2).swapaxes(1, 2).reshape(16, 2, 2)
  blocks = blocks[np.argsort([next(words) for _ in range(16)])]
  return blocks.reshape(4, 4, 2, 2).swapaxes(1, 2).reshape(8, 8)


# Questions.


def ask(kind: str, cells: np.ndarray, words: Iterator[int]) -> Question:
  """A question of a kind about labels uint8[G, G]; `words` choose what it asks for.

  Rows and columns count from 1. A distractor is no digit.
  """
  return _ASK[kind](cells, words)


def _ask_count(cells: np.ndarray, words: Iterator[int]) -> Question:
  del words
  return Question('how many digits are there ?', str(int(is_digit(cells).sum())),
                  np.ones(cells.shape, bool))


def _ask_present(cells: np.ndarray, words: Iterator[int]) -> Question:
  present = np.unique(cells[is_digit(cells)]) - 1
  wanted = np.setdiff1d(np.arange(10), present) if next(words) % 2 else present
  if not len(wanted):  # All ten are there.
    wanted = present
  return _is_there(int(wanted[next(words) % len(wanted)]), cells)


def _ask_digit(digit: int, cells: np.ndarray, words: Iterator[int]) -> Question:
  del words
  return _is_there(digit, cells)


def _is_there(digit: int, cells: np.ndarray) -> Question:
  matches = cells == 1 + digit
  return Question(f'is there a {digit} ?', 'yes' if matches.any() else 'no',
                  matches if matches.any() else np.ones(cells.shape, bool))


def _ask_cell(cells: np.ndarray, words: Iterator[int]) -> Question:
  places = np.argwhere(is_digit(cells) if next(words) % 4 else ~is_digit(cells))
  row, column = places[next(words) % len(places)].tolist()
  return _at(f'which digit is at row {row + 1} column {column + 1} ?', cells, (row, column))


def _ask_left(cells: np.ndarray, words: Iterator[int]) -> Question:
  inked = is_digit(cells)
  single = [place for place in np.argwhere(inked).tolist()
            if (cells == cells[tuple(place)]).sum() == 1]
  beside = [(row, column) for row, column in single if column and inked[row, column - 1]]
  places = beside if beside and next(words) % 4 else single
  row, column = places[next(words) % len(places)]
  text = f'which digit is directly left of the {cells[row, column] - 1} ?'
  evidence = np.zeros(cells.shape, bool)
  evidence[row, max(0, column - 1):column + 1] = True
  answer = str(cells[row, column - 1] - 1) if column and inked[row, column - 1] else 'none'
  return Question(text, answer, evidence)


def _ask_top_row(cells: np.ndarray, words: Iterator[int]) -> Question:
  del words
  row = cells[0][is_digit(cells[0])]
  evidence = np.zeros(cells.shape, bool)
  evidence[0] = True
  return Question('what is the sum of the top row ?', str(int((row - 1).sum())), evidence)


def _ask_corner(cells: np.ndarray, words: Iterator[int]) -> Question:
  last = len(cells) - 1
  corners = dict(zip(CORNERS, ((0, 0), (0, last), (last, 0), (last, last)), strict=True))
  inked = [name for name, place in corners.items() if is_digit(cells)[place]]
  names = inked if inked and next(words) % 2 else CORNERS
  name = names[next(words) % len(names)]
  return _at(f'what is in the {name} corner ?', cells, corners[name])


_ASK: dict[str, Callable[[np.ndarray, Iterator[int]], Question]] = {
        'count': _ask_count, 'present': _ask_present, 'cell': _ask_cell, 'left': _ask_left,
        'top_row': _ask_top_row, 'corner': _ask_corner,
        **{kind: functools.partial(_ask_digit, digit) for digit, kind in enumerate(EACH_DIGIT)}}


def is_digit(cells: np.ndarray) -> np.ndarray:
  """Returns bool like `cells`: True at labels of digits."""
  return (cells != EMPTY) & (cells != DISTRACTOR)


def _at(text: str, cells: np.ndarray, place: tuple[int, int]) -> Question:
  evidence = np.zeros(cells.shape, bool)
  evidence[place] = True
  return Question(text, str(cells[place] - 1) if is_digit(cells)[place] else 'none', evidence)
