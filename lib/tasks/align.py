"""A projector's warm start: visual tokens are drawn to the embedding of what the picture shows.

No layer of the language model runs, so that a step costs what the tower costs. The word is the
first token of the first answer, so that the questions must ask for the name of what is there.
Training on answers goes on from such a run (`config.start`).

Axes: B batch, M visual tokens, D width of the language model, V its vocabulary, K kinds of
questions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lib.data import qa as qa_data
from lib.tasks import qa
from lib.tasks.base import Task
from models.backbones.images import Images
from models.backbones.vlm import VLM

Array = jax.Array
# Of the cosines' softmax.
SHARPNESS = 30.0


def make_task(config: ConfigDict, mesh: Mesh) -> Task:
  """Makes the task of a config for questions about images, as `lib.tasks.qa.make_task`.

  Raises:
    ValueError: as that; or a set without images.
  """
  task = qa.make_task(config, mesh)
  if not isinstance(task.model, VLM):
    raise ValueError(f"task.name='align' is for questions about images, and {config.data.name} has "
                     "none: set it to 'answers'")
  kinds = len(qa_data.info(config.data).kinds or ('all',))
  return dataclasses.replace(
      task, count=functools.partial(count, task.model, kinds),
      loss=lambda models: qa.mean_of([functools.partial(loss, each) for each in models]))


def loss(model: VLM, params: Mapping[str, Any], batch: Mapping[str, Array], key: Array,
         teacher: None) -> tuple[Array, dict[str, Array]]:
  """Returns how far visual tokens are from their word, and how ill they tell it from all others.

  The first is a mean squared distance in variances of all words, which keeps the tokens among what
  the language model knows; the second the cross entropy of cosines, times `SHARPNESS`.

  Args:
    model: the one that trains.
    params: of the model.
    batch: of lib/data/qa.py.
    key, teacher: of no use here.
  """
  del key, teacher
  tokens, table, wanted = _read(model, params, batch)
  distance = jnp.mean((tokens - table[wanted][:, None]) ** 2) / jnp.mean(table ** 2)
  logits = SHARPNESS * _cosines(tokens, table)
  told = optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()
  return distance + told, {'loss': distance + told, 'distance': distance, 'word_loss': told,
                           'kept_tokens': jnp.asarray(tokens.shape[1], jnp.float32)}


def count(model: VLM, kinds: int, params: Mapping[str, Any], batch: Mapping[str, Array]) -> Array:
  """Counts rows whose mean visual token is most like its word: right ones and all, [K, 2]."""
  tokens, table, wanted = _read(model, params, batch)
  right = _cosines(tokens, table).argmax(axis=1) == wanted
  kind = jax.nn.one_hot(batch['kind'], kinds)
  return jnp.stack([(right * batch['mask']) @ kind, batch['mask'] @ kind], axis=1)


def _cosines(tokens: Array, table: Array) -> Array:
  """Cosines of each row's mean token to all embeddings, [B, V], without what all words share.

  Two words of SmolLM2's table have a cosine of 0.45 on average.
  """
  shared = table.mean(axis=0, keepdims=True)
  vectors = (x - shared for x in (tokens.mean(axis=1), table))
  mean, table = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in vectors)
  return mean @ table.T


def _read(model: VLM, params: Mapping[str, Any],
          batch: Mapping[str, Array]) -> tuple[Array, Array, Array]:
  """Visual tokens float32[B, M, D], all embeddings float32[V, D], and the words' ids int32[B]."""
  visual, _, _ = cast(tuple[Any, ...], model.apply(
      {'params': params}, Images(batch['image'][:, None]), method='encode_images'))
  first = jnp.argmax(batch['answer'], axis=1)[:, None]
  wanted = jnp.take_along_axis(batch['ids'], first, axis=1)[:, 0]
  return (visual.x[:, 0].astype(jnp.float32), params['lm']['table'].astype(jnp.float32), wanted)
