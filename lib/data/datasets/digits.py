"""scikit-learn's bundled handwritten digits as a TFDS data set, without TensorFlow.

Axes: N images.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

SEED = 0
TEST_FRACTION = 0.2
# The scans count the dark pixels of 4 x 4 cells: 0 to 16. Times 15 fills a byte and stays exact.
SCALE = 15


class Digits(tfds.core.GeneratorBasedBuilder):
  """1,797 real handwritten digits: uint8[8, 8, 1] that are `SCALE` times the original 0 to 16.

  1,438 images train and 359 test, both in a fixed order: see `split`. Stored as a TFDS `Tensor`,
  because the `Image` feature needs TensorFlow to encode an array.
  Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
  Repository, 1998, doi:10.24432/C50P49; its test part, as shipped in `sklearn.datasets`.
  """

  VERSION = tfds.core.Version('1.0.0')
  # No downloads, so no checksums: TFDS 4.9.10 needs a package to look for them that it does not
  # require.
  url_infos = None

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self,
        description=type(self).__doc__,
        features=tfds.features.FeaturesDict({
            'image': tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
            'label': tfds.features.ClassLabel(num_classes=10),
        }),
        supervised_keys=('image', 'label'),
        homepage='https://archive.ics.uci.edu/dataset/80',
        disable_shuffling=True)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    del dl_manager
    # Here, because scikit-learn takes a second to import and only preparing needs it.
    from sklearn.datasets import load_digits
    digits = load_digits()
    train, test = split(digits.target)
    images = (digits.images * SCALE).astype(np.uint8)[..., None]
    return {'train': self._generate_examples(images, digits.target, train),
            'test': self._generate_examples(images, digits.target, test)}

  def _generate_examples(self, images: np.ndarray, labels: np.ndarray,
                         chosen: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
    for key, index in enumerate(chosen):
      yield key, {'image': images[index], 'label': int(labels[index])}


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Divides int[N] labels 80/20 class by class: the indices of train and of test, in order.

  All images are put in the order of N raw Philox words with seed 0 (numpy freezes that stream, and
  not the one of its permutations). Of each class the first 20 %, rounded, are the test set.
  """
  order = np.argsort(np.random.Philox(SEED).random_raw(len(labels)), kind='stable')
  shuffled = labels[order]
  test = np.zeros(len(labels), bool)
  for label in np.unique(labels):
    places = np.flatnonzero(shuffled == label)
    test[places[:round(TEST_FRACTION * len(places))]] = True
  return order[~test], order[test]
