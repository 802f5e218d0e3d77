"""Models that answer questions: how a config becomes one, its loss, and its score.

Axes: B batch, T ids of a row, N slots, V vocabulary, C crops, n patches, G cells a side, K kinds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lib.cost import lm as lm_cost
from lib.cost import vit as vit_cost
from lib.data import qa as qa_data
from lib.data.qa import Info
from lib.tasks import anneal
from lib.tasks.base import Task
from models.backbones.lm import LM
from models.backbones.vit import ViT
from models.backbones.vlm import VLM, Images
from models.build import DTYPES
from models.plan import reduction_settings
from models.reduce_config import check_components, with_plans
from ops.assignments import take
from ops.attention import pick
from ops.rope import Rope
from ops.tokens import TokenSet

Array = jax.Array
# An image of a set is one crop in raster order (`models.backbones.vlm.Images.layout`).
LAYOUT = (1, 1, 0)


def build(model: Mapping[str, Any], reduce: Mapping[str, Any], info: Info, *, context: int,
          mesh: Mesh | None = None, platform: str = 'cpu') -> LM | VLM:
  """The model that a config describes: a language model, with a tower where the set has images.

  Args:
    model: `config.model`: `lm`, fields of LM but for what the set decides, and 'theta' of its
      rotations; for images also `tower`, fields of ViT, `projection`, an activation, and
      `patch_labels`, the labels of a patch to predict beside (0 for none); and `dtype` by name.
    reduce: `config.reduce`: reductions in 'vision' (the tower), at the 'projector', in 'language',
      and of the 'cache' that decoding reads.
    info: of the set.
    context: T.
    mesh: where the model will run.
    platform: of its devices.

  Raises:
    ValueError: as models/plan.py and the models do; a reduction in a place that is not there.
  """
  check_components(reduce)
  if model['dtype'] not in DTYPES:
    raise ValueError(f'dtype {model["dtype"]!r} is unknown: choose one of {", ".join(DTYPES)}')
  dtype = DTYPES[model['dtype']]
  shared = {'dtype': dtype, 'mesh': mesh, 'implementation': pick(platform, dtype)}
  settings = dict(model['lm'])
  rope = Rope(settings['head_width'], theta=settings.pop('theta', 1e4))
  lm = LM(**settings, vocabulary=info.vocabulary, rope=rope, **shared)
  if info.image_shape is None:
    for name in ('vision', 'projector'):
      if reduction_settings(reduce.get(name)):
        raise ValueError(f'reduce.{name} acts on images, and this set has none: set its method to '
                         "'none'")
    return with_plans(lm, **reduce)(context)
  tower = ViT(**model['tower'], num_classes=0, image_size=info.image_shape[0], pool='mean',
              last_norm='pooled', **shared)
  vlm = VLM(tower, lm, info.image, model['projection'], patch_labels=model['patch_labels'])
  return with_plans(vlm, **reduce)(context, LAYOUT)


def visual_tokens(vlm: VLM) -> int:
  """Visual tokens of an image that the language model reads."""
  if vlm.projector_reduction and vlm.projector_reduction.plan.cuts:
    return vlm.projector_reduction.plan.cuts[-1].slots_out
  return vit_cost.of(vlm.tower).layers[-1].left - vlm.tower.special


def learner(config: ConfigDict, mesh: Mesh) -> Task:
  """A config for questions and answers, made ready.

  Raises:
    ValueError: where the config contradicts itself or its data.
  """
  info, context = qa_data.info(config.data), config.data.context
  model = build(config.model, config.reduce, info, context=context, mesh=mesh,
                platform=mesh.devices.flat[0].platform)
  kinds = info.kinds or ('all',)
  size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(
      jax.eval_shape(functools.partial(init, model, info, context), jax.random.key(0))))
  slots = context + (model.tower.host.slots - model.tower.special if info.image_shape else 0)
  return Task(
      model=model, score='accuracy', phases=(anneal.Phase(0, model),),
      init=functools.partial(init, model, info, context), loaded=lambda: None,
      unreduced=dict,
      loss=lambda model: functools.partial(loss, model, config.optimizer),
      count=functools.partial(count, model, len(kinds)),
      scores=functools.partial(scores, kinds=kinds),
      train_iterator=qa_data.train_iterator, eval_batches=qa_data.eval_batches,
      macs=functools.partial(training_macs, context=context), slots=slots,
      about=f'{size:,} parameters, {info.num_train:,} questions\n')


def init(model: LM | VLM, info: Info, context: int, key: Array) -> dict[str, Any]:
  """Fresh parameters; shapes depend neither on the mesh nor on the batch."""
  ids = jnp.full((1, context), info.pad, jnp.int32)
  batch = {'ids': ids, 'valid': jnp.ones(ids.shape, bool)}
  # One row is too few to divide over a mesh.
  if isinstance(model, LM):
    return model.clone(mesh=None).init(key, *inputs(model, batch))['params']
  alone = model.clone(tower=model.tower.clone(mesh=None), lm=model.lm.clone(mesh=None))
  batch['image'] = jnp.zeros((1, *info.image_shape))
  return alone.init(key, *inputs(model, batch))['params']


def inputs(model: LM | VLM, batch: Mapping[str, Array]) -> tuple[Any, ...]:
  """A batch of lib/data/qa.py as the model's arguments."""
  if isinstance(model, LM):
    return batch['ids'], batch['valid']
  return batch['ids'], batch['valid'], Images(batch['image'][:, None])


def apply(model: LM | VLM, params: Any, batch: Mapping[str, Array],
          **more: Any) -> tuple[Array, dict[str, Any]]:
  """Logits float32[B, N, V] of a batch of lib/data/qa.py, and what the model tells."""
  logits, out = model.apply({'params': params}, *inputs(model, batch), **more)
  if isinstance(model, LM):
    slot = jnp.arange(batch['ids'].shape[1], dtype=jnp.int32)
    out = out | {'slot': jnp.broadcast_to(slot, batch['ids'].shape)}
  return logits, out


def training_macs(model: LM | VLM, *, context: int) -> float:
  """Multiply-accumulates of a row of T ids, forward and backward.

  The backward pass multiplies twice for every product of the forward pass (lib/cost/vit.py).
  """
  if isinstance(model, LM):
    read = lm_cost.of(model, context)
    # Every slot predicts, not the last one alone.
    return 3 * (read.macs + (context - 1) * read.head)
  seen = vit_cost.in_training(model.tower)
  through, width = seen.layers[-1].left - model.tower.special, model.lm.width
  projector = through * (model.tower.width + width) * width if model.projection else 0
  return (seen.training_macs + 3 * projector
          + training_macs(model.lm, context=context + visual_tokens(model)))


def loss(model: LM | VLM, settings: Mapping[str, Any], params: Mapping[str, Any],
         batch: Mapping[str, Array], key: Array,
         teacher: Mapping[str, Any] | None) -> tuple[Array, dict[str, Array]]:
  """What to lower, and scalars to watch.

  Args:
    model: that trains.
    settings: `config.optimizer`.
    params: of the model.
    batch: of lib/data/qa.py.
    key: of this step.
    teacher: None: there is no distillation of answers.
  """
  if teacher is not None:
    raise ValueError('optimizer.distill.teacher is set, but answers are learned from their own '
                     'tokens alone: leave it out')
  logits, out = apply(model, params, batch, rngs={'dropout': key})
  scalars = losses(logits, out, batch)
  total = (scalars['loss'] + settings.text_weight * scalars['text_loss']
           + settings.patch_weight * scalars.get('patch_loss', 0.0))
  kept = out['tokens'].real.sum(axis=1).mean()
  return total, scalars | {'kept_tokens': kept}


def count(model: LM | VLM, kinds: int, params: Mapping[str, Any],
          batch: Mapping[str, Array]) -> Array:
  """Answers of each kind that are right, and all there are: float32[K, 2]."""
  logits, out = apply(model, params, batch)
  return correct_and_total(logits, out, batch, kinds)


def predictions(logits: Array, out: Mapping[str, Any]) -> Array:
  """float32[B, T, V]: what was predicted for every id, from the slot of the token before it.

  A reduction of the language model moves slots; text that it drops predicts from its first slot.
  """
  tokens: TokenSet = out['tokens']
  before = jnp.clip(out['slot'] - 1, 0, tokens.owner.shape[1] - 1)
  now = jnp.take_along_axis(tokens.owner, before, axis=1)
  return take(logits, jnp.maximum(now, 0))


def losses(logits: Array, out: Mapping[str, Any], batch: Mapping[str, Array]) -> dict[str, Array]:
  """Cross-entropy of the answers' tokens, of what stands before them, and of the patches' labels.

  Returns:
    'loss', 'text_loss' and, where the model predicts them, 'patch_loss': scalars.
  """
  each = optax.softmax_cross_entropy_with_integer_labels(predictions(logits, out), batch['ids'])
  # Nothing predicts a row's first token.
  begins = batch['valid'] & (jnp.cumsum(batch['valid'], axis=1) == 1)
  told = batch['valid'] & ~batch['answer'] & ~begins
  found = {'loss': _mean(each, batch['answer']), 'text_loss': _mean(each, told)}
  if out.get('patches') is not None:
    logits, tokens = out['patches']
    labels = patch_labels(batch['cells'], tokens)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    found['patch_loss'] = _mean(each, tokens.real)
  return found


def _mean(values: Array, mask: Array) -> Array:
  mask = mask.astype(jnp.float32)
  return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def patch_labels(cells: Array, tokens: TokenSet) -> Array:
  """int32[B, n]: the label of the cell int[B, G, G] that each patch token's anchor lies in."""
  side = round(tokens.owner.shape[1] ** 0.5)
  count = cells.shape[1]
  row, column = tokens.pos // side * count // side, tokens.pos % side * count // side
  return jnp.take_along_axis(cells.reshape(len(cells), -1), row * count + column, axis=1)


def correct_and_total(logits: Array, out: Mapping[str, Any], batch: Mapping[str, Array],
                      kinds: int) -> Array:
  """float32[K, 2]: answers of each kind that are right to the last token, and all there are.

  That every token is the likeliest after the right ones before it is the same as that greedy
  decoding gives the answer.
  """
  right = (predictions(logits, out).argmax(axis=-1) == batch['ids']) | ~batch['answer']
  right = right.all(axis=1) * batch['mask']
  kind = jax.nn.one_hot(batch['kind'], kinds)
  return jnp.stack([right @ kind, batch['mask'] @ kind], axis=1)


def decoded(model: LM | VLM, params: Any, batch: Mapping[str, Array], *, longest: int) -> Array:
  """Whether greedy decoding after the prompt alone gives the whole answer: float32[B], 0 or 1.

  Each step reads the right token before it, which changes nothing: an answer that went wrong stays
  wrong. Reductions see the prompt, as they do where nobody knows the answer.

  Args:
    model, params: as of `apply`.
    batch: of lib/data/qa.py; a row's answer stands at the end of it.
    longest: A, tokens of the longest answer, its end token among them.
  """
  ids, asked = batch['ids'], batch['answer']
  prompt = {**batch, 'valid': batch['valid'] & ~asked}
  number = jnp.arange(longest)[None]
  place = jnp.argmax(asked, axis=1)[:, None] + number
  there = number < jnp.sum(asked, axis=1, keepdims=True)
  right = jnp.take_along_axis(ids, jnp.minimum(place, ids.shape[1] - 1), axis=1)
  first, cache = model.apply({'params': params}, *inputs(model, prompt), room=longest,
                             method='prefill')

  def step(cache: Any, tokens: Array) -> tuple[Any, Array]:
    logits, cache = model.apply({'params': params}, tokens, cache, method='decode')
    return cache, logits.argmax(axis=-1)

  _, later = jax.lax.scan(step, cache, right[:, :-1].T)
  made = jnp.concatenate([first.argmax(axis=-1)[:, None], later.T], axis=1)
  return ((made == right) | ~there).all(axis=1).astype(jnp.float32)


def scores(counts: np.ndarray, kinds: tuple[str, ...]) -> dict[str, float]:
  """'accuracy' of all questions, and of each kind by name, from the sum of `correct_and_total`."""
  right, count = counts.T
  found = {'accuracy': float(right.sum() / count.sum())}
  return found | {f'accuracy_{name}': float(r / max(c, 1))
                  for name, r, c in zip(kinds, right, count, strict=False)}
