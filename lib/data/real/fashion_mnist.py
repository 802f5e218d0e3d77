"""Fashion-MNIST: pictures of clothes in ten classes."""

from __future__ import annotations

import gzip
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image


def fashion_mnist(folder: pathlib.Path, rng: np.random.Generator,
                  counts: Sequence[int]) -> tuple[list[Image.Image], np.ndarray]:
  """Reads pictures of clothes, so many to train and so many to test, and their classes.

  Raises:
    ValueError: it is not there.
  """
  pictures, labels = [], []
  for part, count in zip(('train', 't10k'), counts, strict=True):
    raw = []
    for kind, skip in (('images-idx3', 16), ('labels-idx1', 8)):
      path = folder / f'{part}-{kind}-ubyte.gz'
      if not path.exists():
        raise ValueError(f'there is no {path}: `python -m tools.real.fetch` fetches it')
      raw.append(np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=skip))
    shapes, classes = raw[0].reshape(-1, 28, 28), raw[1]
    chosen = rng.permutation(len(classes))[:count]
    pictures += [Image.fromarray(shapes[index]).convert('RGB') for index in chosen]
    labels.append(classes[chosen])
  return pictures, np.concatenate(labels)
