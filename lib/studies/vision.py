"""Measures what reductions cost a pretrained vision tower, by what its features are good for.

  python -m tools.real.study --config=configs/real_vision.py

The tower is frozen; each row reduces its tokens in one way and reads the final [CLS] features of
two sets of pictures. Writes a row of JSON a method and budget to `config.out`:
  probe, neighbours   share of clothes (Fashion-MNIST) named right by a linear probe, and by the
                      five nearest neighbours
  recall, reciprocal  emoji of one vendor found among those of another: share of firsts, and mean
                      of one over the rank
  cosine, cka         likeness of the features to the unreduced ones: mean cosine, and linear CKA
  kept, gmacs         tokens after the last layer, and 10^9 MACs of an image
  images_per_second   with what else runs on the machine; compile time apart
Shares have the half-width of their 95 % interval beside them (`probe_within`, ...).

Axes: B batch, D features, C classes.
"""

from __future__ import annotations

import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lib.cost import vit as vit_cost
from lib.data.real.emoji import emoji_pairs
from lib.data.real.fashion_mnist import fashion_mnist
from lib.report.rows import Row
from lib.runtime import timing
from models.backbones.vit import ViT
from models.checkpoints import files, load, resize_positions
from models.checkpoints.vit_config import from_config
from models.plan import make_plan
from models.storage import to_storage

NEIGHBOURS, RIDGE = 5, 10.0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Subject:
  """Holds a tower, the pictures, and the unreduced features of these."""

  def __init__(self, config: Any) -> None:
    folder = pathlib.Path(config.folder)
    vit = from_config(files.config(folder / 'vit'))
    if not (isinstance(vit, ViT) and vit.class_token):
      raise ValueError(f'{folder / "vit"} holds no vision transformer with a [CLS] token: '
                       '`python -m tools.real.vit` writes one')
    params = resize_positions(load(vit, folder / 'vit'), vit, image_size=config.image_size)
    self.vit = vit.clone(image_size=config.image_size, num_classes=0)
    self.params = to_storage({'params': params}, storage='unstacked')
    self.batch = config.batch
    rng = np.random.default_rng(config.seed)
    clothes, self.labels = fashion_mnist(folder / 'fashion_mnist', rng,
                                         (config.train_images, config.test_images))
    one, other = emoji_pairs(folder, rng, config.emoji)
    self.train, self.emoji = config.train_images, config.emoji
    self.images = [*clothes, *one, *other]
    self.whole: np.ndarray | None = None

  def measure(self, row: Row) -> Row:
    """Measures one row: its 'reduce' is what `config.reduce.vision` takes."""
    reduce = dict(row['reduce'])
    plan = make_plan(reduce, self.vit.host) if reduce else None
    vit = self.vit.clone(plan=plan)
    features, seconds, compiling = self._features(vit)
    if self.whole is None:
      self.whole = features if plan is None else self._features(self.vit)[0]
    cost, unreduced = vit_cost.of(vit), vit_cost.of(self.vit)
    found = {'kept': cost.layers[-1].left, 'gmacs': cost.macs / 1e9,
             'gmacs_ratio': cost.macs / unreduced.macs,
             'images_per_second': len(self.images) / seconds, 'compile_s': compiling,
             'cosine': float(np.mean(np.sum(unit(features) * unit(self.whole), axis=1))),
             'cka': cka(features, self.whole)}
    clothes, (one, other) = features[:-2 * self.emoji], np.split(features[-2 * self.emoji:], 2)
    parts = [np.split(each, [self.train]) for each in (clothes, self.labels)]
    (known, asked), (named, wanted) = parts
    shares = {'probe': probe(known, named, asked) == wanted,
              'neighbours': neighbours(known, named, asked) == wanted}
    ranks = ranks_of_pairs(one, other)
    shares['recall'] = ranks == 1
    for name, right in shares.items():
      share = float(np.mean(right))
      found |= {name: share, f'{name}_within': 1.96 * (share * (1 - share) / len(right)) ** 0.5}
    return {**found, 'reciprocal': float(np.mean(1 / ranks))}

  def _features(self, vit: ViT) -> tuple[np.ndarray, float, float]:
    """Features float32[images, D]; the seconds that they took, and those of compiling."""
    def features(params: Any, images: jax.Array) -> jax.Array:
      return vit.apply(params, normalised(images))[1]['tokens'].x[:, 0]

    side = vit.input_shape[0]
    shape = jax.ShapeDtypeStruct((self.batch, side, side, 3), jnp.uint8)
    program = timing.compile_seconds(jax.jit(features).lower(self.params, shape))
    found, start = [], time.perf_counter()
    for first in range(0, len(self.images), self.batch):
      chosen = self.images[first:first + self.batch]
      batch = np.zeros(shape.shape, np.uint8)
      batch[:len(chosen)] = [resized(image, side) for image in chosen]
      found.append(np.asarray(program.run(self.params, batch))[:len(chosen)])
    return np.concatenate(found), time.perf_counter() - start, program.seconds


def normalised(images: jax.Array) -> jax.Array:
  """Brings uint8[B, H, W, 3] to the mean and spread that the tower was trained with."""
  return (images / 255 - jnp.array(MEAN)[None, None, None]) / jnp.array(STD)[None, None, None]


def resized(image: Image.Image, side: int) -> np.ndarray:
  """Returns a picture as uint8[side, side, 3]."""
  return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def unit(x: np.ndarray) -> np.ndarray:
  """Divides each row of float[N, D] by its length."""
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def cka(one: np.ndarray, other: np.ndarray) -> float:
  """Computes the linear CKA of two sets of features (Kornblith et al., 2019, arXiv:1905.00414)."""
  one, other = (x - x.mean(axis=0) for x in (one.astype(np.float64), other.astype(np.float64)))
  cross = np.linalg.norm(one.T @ other) ** 2
  return float(cross / (np.linalg.norm(one.T @ one) * np.linalg.norm(other.T @ other)))


def probe(known: np.ndarray, named: np.ndarray, asked: np.ndarray) -> np.ndarray:
  """Names features by a linear probe: ridge regression to one-hot classes, features whitened.

  Args:
    known: float[N, D].
    named: int[N], their classes.
    asked: float[M, D].

  Returns:
    int[M].
  """
  mean, spread = known.mean(axis=0), known.std(axis=0) + 1e-6
  x, y = ((each - mean) / spread for each in (known.astype(np.float64), asked))
  targets = np.eye(named.max() + 1)[named]
  weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ (targets - targets.mean(0)))
  return np.argmax(y @ weights + targets.mean(0), axis=1)


def neighbours(known: np.ndarray, named: np.ndarray, asked: np.ndarray) -> np.ndarray:
  """Names features by their nearest neighbours by cosine; arguments as of `probe`."""
  nearest = np.argsort(-unit(asked) @ unit(known).T, axis=1)[:, :NEIGHBOURS]
  return np.array([np.bincount(each).argmax() for each in named[nearest]])


def ranks_of_pairs(one: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Ranks, for each row of one set, the same row of the other among all: int[N], from 1."""
  scores = unit(one) @ unit(other).T
  return 1 + np.sum(scores > np.diag(scores)[:, None], axis=1)
