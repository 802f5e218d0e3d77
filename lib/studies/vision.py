"""Measures what reductions cost a pretrained vision tower, by what its features are good for.

  python -m tools.real.study --config=configs/real_vision.py

The tower is frozen; each row reduces its tokens in one way and reads the final features of clothes
(Fashion-MNIST), of emoji as two vendors draw them, and of photographs. A row has:
  probe, neighbours   share of clothes named right by a linear probe, and by the five nearest
                      neighbours
  recall, reciprocal  emoji of one vendor found among those of another: share of firsts, and mean
                      of one over the rank
  each                what these are means of: for every picture 1 or 0, and ranks
  cosine, cka         likeness of the [CLS] features to the unreduced ones: mean cosine, linear CKA
  saliency, saliency_error
                      map of saliency on photographs, patches brought back: mean correlation with
                      the unreduced map, and mean absolute difference
  kept, gmacs         tokens after the last layer, a mean over pictures, and 10^9 MACs of an image
                      with all slots full
  speedup             over the unreduced tower, in turns with it; compile time apart

Axes: B batch, N pictures, D features, C classes.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lib.cost import vit as vit_cost
from lib.data.real.emoji import emoji_pairs
from lib.data.real.fashion_mnist import fashion_mnist
from lib.data.real.photographs import crops
from lib.report.rows import Row
from lib.runtime import timing
from lib.studies.saliency import load_decoder, saliency
from models.backbones.segmenter import interpolate
from models.backbones.vit import ViT
from models.checkpoints import files, load, resize_positions
from models.checkpoints.vit_config import from_config
from models.plan import make_plan
from models.storage import to_storage

NEIGHBOURS, RIDGE = 5, 10.0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Subject:
  """Holds a tower, pictures, and the unreduced features of these."""

  def __init__(self, config: Any) -> None:
    folder = pathlib.Path(config.folder)
    if not (folder / 'vit' / 'model.safetensors').exists():
      raise ValueError(f'there is no {folder / "vit" / "model.safetensors"}: `python -m '
                       'tools.real.fetch` fetches what `python -m tools.real.vit` makes it of')
    vit = from_config(files.config(folder / 'vit'))
    if not (isinstance(vit, ViT) and vit.class_token):
      raise ValueError(f'{folder / "vit"} holds no vision transformer with a [CLS] token: '
                       '`python -m tools.real.vit` writes one')
    params = resize_positions(load(vit, folder / 'vit'), vit, image_size=config.image_size)
    self.vit = vit.clone(image_size=config.image_size, num_classes=0)
    self.params = to_storage({'params': params}, storage='unstacked')
    self.map = jax.jit(functools.partial(saliency, load_decoder(folder / 'vit')))
    rng = np.random.default_rng(config.seed)
    clothes, self.labels = fashion_mnist(folder / 'fashion_mnist', rng,
                                         (config.train_images, config.test_images))
    one, other = emoji_pairs(folder, rng, config.emoji)
    self.train, self.emoji, self.rounds = config.train_images, config.emoji, config.rounds
    photographs = crops()
    # Whole batches: the last one is of photographs.
    rest = -(len(clothes) + 2 * len(one)) % len(photographs)
    if rest:
      raise ValueError(f'{len(clothes)} clothes and 2 x {len(one)} emoji must be a multiple of '
                       f'{len(photographs)} pictures: add {rest} to test_images')
    images = [resized(image, config.image_size) for image in (*clothes, *one, *other, *photographs)]
    self.batches = np.stack(images).reshape(-1, len(photographs), *images[0].shape)

  def measure(self, row: Row) -> Row:
    """Measures one row: its 'reduce' is what `config.reduce.vision` takes."""
    reduce = dict(row['reduce'])
    plan = make_plan(reduce, self.vit.host) if reduce else None
    vit = self.vit.clone(plan=plan)
    full, whole, whole_map, _ = self._unreduced
    program, features, own_map, kept = self._unreduced if plan is None else self._run(vit)
    times = timing.interleave(
        {name: functools.partial(each.run, self.params, self.batches[0])
         for name, each in (('full', full), ('own', program))}, rounds=self.rounds, warmup=1)
    cost, unreduced = vit_cost.of(vit), vit_cost.of(self.vit)
    clothes, (one, other) = features[:-2 * self.emoji], np.split(features[-2 * self.emoji:], 2)
    (known, asked), (named, wanted) = (np.split(part, [self.train])
                                       for part in (clothes, self.labels))
    ranks = ranks_of_pairs(one, other)
    each = {'probe': probe(known, named, asked) == wanted,
            'neighbours': neighbours(known, named, asked) == wanted}
    return {
        'kept': kept, 'gmacs': cost.macs / 1e9,
        'gmacs_ratio': cost.macs / unreduced.macs,
        **timing.speedup(times['full'], times['own']).fields(), 'batch': len(self.batches[0]),
        'compile_s': program.seconds,
        'cosine': float(np.mean(np.sum(unit(features) * unit(whole), axis=1))),
        'cka': cka(features, whole),
        'saliency': float(np.mean(correlations(own_map, whole_map))),
        'saliency_error': float(np.mean(np.abs(own_map - whole_map))),
        **{name: float(np.mean(right)) for name, right in each.items()},
        'recall': float(np.mean(ranks == 1)), 'reciprocal': float(np.mean(1 / ranks)),
        'each': {**{name: right.astype(int) for name, right in each.items()}, 'ranks': ranks}}

  @functools.cached_property
  def _unreduced(self) -> tuple[timing.Compiled, np.ndarray, np.ndarray, float]:
    return self._run(self.vit)

  def _run(self, vit: ViT) -> tuple[timing.Compiled, np.ndarray, np.ndarray, float]:
    """Returns a program, its features float32[N, D], the photographs' maps, and tokens left."""
    def features(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
      out = vit.apply(params, normalised(images))[1]
      tokens, grid = out['tokens'], vit.grid
      patches = interpolate(tokens, {}, out['cuts'], grid).reshape(len(images), *grid, -1)
      return tokens.x[:, 0], patches, tokens.real.sum(axis=1)

    program = timing.compile_seconds(jax.jit(features).lower(self.params, self.batches[0]))
    found, left = [], []
    for batch in self.batches:
      own, patches, count = program.run(self.params, batch)
      found.append(np.asarray(own))
      left.append(np.asarray(count))
    # The last batch is the photographs.
    return (program, np.concatenate(found[:-1]), np.asarray(self.map(patches)),
            float(np.mean(left)))


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


def correlations(one: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Computes the correlation of each picture's map with the other's: float[N]."""
  flat = [each.reshape(len(each), -1).astype(np.float64) for each in (one, other)]
  first, second = (unit(each - each.mean(axis=1, keepdims=True)) for each in flat)
  return np.sum(first * second, axis=1)


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
