"""Canvases of several handwritten digits, and which digit every pixel belongs to.

Axes: N canvases, S side of a canvas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from lib.data.datasets import digits

SEED = 0
SIDE = 40
TRAIN, TEST = 6000, 500
DIGITS = 4  # Most digits on a canvas.
SCALE = 2  # A digit of 8 x 8 pixels becomes one of 16 x 16.
STEP = 4  # Places are multiples of it, each way.
TRIES = 8  # Places that a digit tries before it is left out, for want of room.
INK = 4 * digits.SCALE  # A pixel belongs to a digit from a quarter of full intensity on.
NAMES = ('background', *map(str, range(10)))


class DigitSegments(tfds.core.GeneratorBasedBuilder):
  """6,500 canvases, uint8[40, 40, 1], of one to four handwritten digits.

  A pixel's label, uint8[40, 40, 1], is 0 for the background, or 1 + the digit. 6,000 canvases train
  and 500 test; they are made of disjoint digits, those of the two splits of `digits.Digits`, whose
  source this set shares. Digits do not overlap.
  """

  VERSION = tfds.core.Version('1.0.0')
  url_infos = None

  def _info(self) -> tfds.core.DatasetInfo:
    pixels = {'shape': (SIDE, SIDE, 1), 'dtype': np.uint8}
    return tfds.core.DatasetInfo(
        builder=self,
        description=type(self).__doc__,
        # TFDS's `LabeledImage`, like `Image`, needs TensorFlow to encode an array: the names of the
        # classes lie beside the features.
        features=tfds.features.FeaturesDict({
            'image': tfds.features.Tensor(**pixels), 'label': tfds.features.Tensor(**pixels)}),
        metadata=tfds.core.MetadataDict(label_names=list(NAMES)),
        supervised_keys=('image', 'label'),
        homepage='https://archive.ics.uci.edu/dataset/80',
        disable_shuffling=True)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    del dl_manager
    from sklearn.datasets import load_digits
    dataset = load_digits()
    images = (dataset.images * digits.SCALE).astype(np.uint8)
    train, test = digits.split(dataset.target)
    return {'train': self._generate_examples(images, dataset.target, train, TRAIN, 0),
            'test': self._generate_examples(images, dataset.target, test, TEST, 1)}

  def _generate_examples(self, images: np.ndarray, labels: np.ndarray, chosen: np.ndarray,
                         count: int, stream: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for key in range(count):
      image, label = canvas(images[chosen], labels[chosen], key, stream)
      yield key, {'image': image[..., None], 'label': label[..., None]}


def canvas(images: np.ndarray, labels: Sequence[int], index: int,
           stream: int) -> tuple[np.ndarray, np.ndarray]:
  """Makes one canvas and its labels, uint8[40, 40] each.

  All choices are raw Philox words of (`index`, `stream`), which numpy freezes, as it does not its
  distributions; a remainder of 64 bits is even enough.

  Args:
    images: uint8[N, 8, 8], digits to choose from.
    labels: int[N], what they are.
    index: which canvas.
    stream: which series of canvases.
  """
  random = np.random.Philox(key=SEED, counter=[0, 0, stream, index])
  words = iter(random.random_raw(1 + DIGITS * (1 + 2 * TRIES)).tolist())
  image, label = np.zeros((2, SIDE, SIDE), np.uint8)
  taken = np.zeros((SIDE, SIDE), bool)
  for _ in range(1 + next(words) % DIGITS):
    chosen = next(words) % len(images)
    digit = images[chosen].repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    places = (SIDE - len(digit)) // STEP + 1
    corners = [(next(words) % places * STEP, next(words) % places * STEP) for _ in range(TRIES)]
    boxes = [np.s_[y:y + len(digit), x:x + len(digit)] for y, x in corners]
    box = next((box for box in boxes if not taken[box].any()), None)
    if box is not None:
      image[box], taken[box] = digit, True
      label[box] = np.where(digit >= INK, 1 + labels[chosen], 0)
  return image, label
