"""Questions and answers as a task: its model, its loss, and its score.

Axes: B batch, T ids of a row, N slots, V vocabulary, C crops, n patches, G cells a side, K kinds.
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lib.cost import lm as lm_cost
from lib.cost import memory as memory_cost
from lib.cost import projector as projector_cost
from lib.cost import vit as vit_cost
from lib.cost.vlm import kv_bytes_of, macs_of
from lib.data import qa as qa_data
from lib.data.qa import Info
from lib.runtime import memory, sharding
from lib.tasks import anneal, distill, pretrained
from lib.tasks.base import Task
from models.backbones.images import Images
from models.backbones.lm import LM
from models.backbones.vit import ViT
from models.backbones.vlm import VLM
from models.build import DTYPES
from models.checkpoints.json_files import read_json
from models.plan import reduction_settings
from models.projectors import make_projector
from models.reduce_config import check_components, with_plans
from ops import choices
from ops.attention import pick
from ops.moves.rows import take
from ops.rope import Rope
from ops.tokens import TokenSet

Array = jax.Array
# (parameters, batch, key, teacher) -> what to lower, {name: scalar}.
Loss = Callable[..., tuple[Array, dict[str, Array]]]
# An image of a set is one crop in raster order (`models.backbones.images.Images.layout`).
LAYOUT = (1, 1, 0)


def build(model: Mapping[str, Any], reduce: Mapping[str, Any], info: Info, *, context: int,
          mesh: Mesh | None = None, platform: str = 'cpu') -> LM | VLM:
  """Builds the model of a config: a language model, with a tower where the set has images.

  Args:
    model: `config.model`: `lm`, fields of LM except those that the set decides, and 'theta' of its
      rotations; for images also `tower`, fields of ViT, `projection`, an activation, `side`, how
      many patches each way become one token, `compressor`, what projects instead and leaves fewer
      tokens ('name' and 'args', `models.projectors.make_projector`), and `patch_labels`,
      number of labels that patches are trained to predict (0 for none); and `dtype` by name. A
      pretrained `lm` or `tower` is the path of its folder or file, or of a run
      (lib/tasks/pretrained.py).
    reduce: `config.reduce`: reductions in 'vision' (the tower), at the 'projector', in 'language',
      and of the 'cache' that decoding reads.
    info: of the set.
    context: T.
    mesh: where the model will run.
    platform: of its devices.

  Raises:
    ValueError: as models/plans/ and the models do; a reduction of a component that it lacks.
  """
  check_components(reduce)
  model = pretrained.with_runs(model)
  choices.check('dtype ', model['dtype'], DTYPES)
  dtype = DTYPES[model['dtype']]
  shared = {'dtype': dtype, 'mesh': mesh, 'implementation': pick(platform, dtype)}
  if isinstance(model['lm'], str):
    lm = pretrained.language_model(model['lm'], **shared)
    if lm.vocabulary != info.vocabulary:
      raise ValueError(f'config.model.lm={model["lm"]} has {lm.vocabulary} token ids, and the set '
                       f'was made for {info.vocabulary}: use the set with its own model')
  else:
    settings = dict(model['lm'])
    rope = Rope(settings['head_width'], theta=settings.pop('theta', 1e4))
    lm = LM(**settings, vocabulary=info.vocabulary, rope=rope, **shared)
  if lm.mask == 'full' or lm.full_layers:
    raise ValueError(f'mask={lm.mask!r} and full_layers={lm.full_layers} show a token the answer '
                     "that it is to predict: train with mask='causal' or 'mutual', and no "
                     'full_layers')
  if info.image_shape is None:
    for name in ('vision', 'projector'):
      if reduction_settings(reduce.get(name)):
        raise ValueError(f'reduce.{name} acts on images, and this set has none: set its method to '
                         "'none'")
    return with_plans(lm, **reduce, macs=macs_of, kv_bytes=kv_bytes_of)(context)
  if isinstance(model['tower'], str):
    tower = pretrained.tower(model['tower'], image_size=info.image_shape[0], **shared)
  else:
    tower = ViT(**model['tower'], num_classes=0, image_size=info.image_shape[0], pool='mean',
                last_norm='pooled', **shared)
  compressor = make_projector(model.get('compressor'), width=lm.width, dtype=dtype)
  vlm = VLM(tower, lm, cast(int, info.image), '' if compressor else model['projection'],
            model.get('side') or 1, patch_labels=model['patch_labels'], compressor=compressor)
  return with_plans(vlm, **reduce, macs=macs_of, kv_bytes=kv_bytes_of)(context, LAYOUT)


def visual_tokens(vlm: VLM) -> int:
  """Visual tokens of an image that the language model reads."""
  return vlm.visual_slots(LAYOUT)


def make_task(config: ConfigDict, mesh: Mesh) -> Task:
  """Makes the task of a config for questions and answers.

  Raises:
    ValueError: where the config contradicts itself or its data.
  """
  info, context = qa_data.info(config.data), config.data.context

  def built(settings: Mapping[str, Any]) -> LM | VLM:
    return build(settings, config.reduce, info, context=context, mesh=mesh,
                 platform=mesh.devices.flat[0].platform)

  model = built(config.model)
  turns = tuple(map(built, in_turns(config.model))) or (model,)
  together = (config.model.get('compressor') or {}).get('train') == 'all'
  steps = [turns] if together else [(each,) for each in turns]
  phases = stages(config, lambda reduce: build(
      config.model, reduce, info, context=context, mesh=mesh,
      platform=mesh.devices.flat[0].platform))
  teacher = teacher_of(config, info, mesh)
  slots = context + (model.passed_on[0] if info.image_shape else 0)
  width = (model.lm if info.image_shape else model).width
  memory.check_batch(config.data.batch_size, slots=slots, width=width, mesh=mesh)
  kinds = info.kinds or ('all',)
  shapes = jax.eval_shape(functools.partial(init, model, info, context), jax.random.key(0))
  trained, frozen = (sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part))
                     for part in pretrained.split(shapes, pretrained.names(config)))
  size = f'{trained + frozen:,} parameters' + (f', of which {trained:,} train' if frozen else '')
  # With its end token.
  answer = 1 + info.answer_length
  # Where no other text is scored, logits of the answers are enough.
  places, tested = ((config.data.turns * answer, answer)
                    if config.optimizer.text_weight is None else (None, None))
  return Task(
      model=model, score='accuracy',
      phases=phases or tuple(anneal.Phase(0, each) for each in steps),
      init=functools.partial(init, model, info, context),
      pretrained=functools.partial(read_pretrained, config, model),
      unreduced=lambda _: shapes_of(cast(LM | VLM, teacher), info, config, mesh),
      loss=lambda models: mean_of([functools.partial(
          loss, each, config.optimizer, places=places, taught_by=teacher) for each in models]),
      count=functools.partial(count, model, len(kinds), places=tested),
      scores=functools.partial(scores, kinds=kinds),
      train_iterator=qa_data.train_iterator, eval_batches=qa_data.eval_batches,
      macs=lambda models: sum(training_macs(
          each, context=context, frozen=pretrained.names(config)) for each in models), slots=slots,
      turn=None if phases else lambda done: int(
          np.random.default_rng((config.seed, done)).integers(len(steps))),
      summary=f'{size}, {info.num_train:,} questions\n')


def stages(config: ConfigDict,
           built: Callable[[Mapping[str, Any]], LM | VLM]) -> tuple[anneal.Phase, ...]:
  """Returns the phases of `config.stages`, () for none; what is evaluated is config.reduce alone.

  LLaVolta (Chen et al., 2024), arXiv:2406.20092, trains with heavy compression first, later with
  less of it and in a later layer, and ends without.

  Args:
    config: of a training. A stage has `start_step` and `reduce`, as `config.reduce`.
    built: `config.reduce` -> model.

  Raises:
    ValueError: stages that do not begin with step 0 and go on from there, that the training ends
      before, or beside `model.compressor.turns`.
  """
  wanted = config.get('stages') or ()
  if not wanted:
    return ()
  if (config.model.get('compressor') or {}).get('turns'):
    raise ValueError('config.stages and model.compressor.turns both say what a step trains: leave '
                     'one of them out')
  starts = [stage['start_step'] for stage in wanted]
  if starts[0] or sorted(set(starts)) != starts or starts[-1] >= config.total_steps:
    raise ValueError(f'config.stages start at the steps {starts}: begin with 0, let each start '
                     f'after the one before, and all before total_steps={config.total_steps}')
  return tuple(anneal.Phase(stage['start_step'], (built(stage['reduce']),)) for stage in wanted)


def teacher_of(config: ConfigDict, info: Info, mesh: Mesh) -> LM | VLM | None:
  """Returns the model of the run that `optimizer.distill` names, unreduced; None for none.

  Raises:
    ValueError: a run that learned something else.
  """
  workdir = (config.optimizer.get('distill') or {}).get('teacher')
  if not workdir:
    return None
  theirs = read_json(pathlib.Path(workdir) / 'config.json')
  if 'lm' not in theirs['model'] or ('tower' in theirs['model']) != (info.image_shape is not None):
    raise ValueError(f'optimizer.distill.teacher={workdir} did not learn what this run is to: name '
                     'a run on such a set')
  return build(theirs['model'], {}, info, context=config.data.context, mesh=mesh,
               platform=mesh.devices.flat[0].platform)


def shapes_of(model: LM | VLM, info: Info, config: ConfigDict, mesh: Mesh) -> dict[str, Any]:
  """Returns shapes of a model's parameters, placed on a mesh as `config.sharding` says."""
  shapes = jax.eval_shape(functools.partial(init, model, info, config.data.context),
                          jax.random.key(0))
  return cast(dict[str, Any],
              sharding.shapes(shapes, sharding.make_shardings(shapes, config.sharding, mesh)))


def in_turns(model: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns `config.model` under each of its compressor's `turns`, none where there are none."""
  compressor = dict(model.get('compressor') or {})
  return [{**model, 'compressor': {**compressor, 'args': {**compressor.get('args', {}), **turn}}}
          for turn in compressor.get('turns', ())]


def read_pretrained(config: ConfigDict, model: LM | VLM) -> dict[str, Any] | None:
  """Reads the pretrained parts of a model, as `pretrained.load`.

  Where a projector begins with a norm, its scale and bias bring each feature of a pretrained tower
  to mean 0 and spread 1 over a batch of training images.
  """
  loaded = pretrained.load(config.model, model)
  if not loaded or 'tower' not in loaded or not isinstance(model, VLM) or model.side == 1:
    return loaded
  batches = qa_data.train_iterator(config.data, seed=config.seed)
  image = next(batches)['image']
  batches.close()
  shifts = pretrained.standardising(model, loaded['tower'], image)
  return loaded | {'projector': {'norm': shifts}}


def init(model: LM | VLM, info: Info, context: int, key: Array) -> dict[str, Any]:
  """Makes fresh parameters; shapes depend neither on the mesh nor on the batch."""
  ids = jnp.full((1, context), info.pad, jnp.int32)
  batch = {'ids': ids, 'valid': jnp.ones(ids.shape, bool)}
  # One row is too few to divide over a mesh.
  if isinstance(model, LM):
    return model.clone(mesh=None).init(key, *inputs(model, batch))['params']
  alone = model.clone(tower=model.tower.clone(mesh=None), lm=model.lm.clone(mesh=None))
  assert info.image_shape is not None
  batch['image'] = jnp.zeros((1, *info.image_shape))
  return alone.init(key, *inputs(model, batch))['params']


def inputs(model: LM | VLM, batch: Mapping[str, Array]) -> tuple[Any, ...]:
  """Turns a batch of lib/data/qa.py into the model's arguments."""
  if isinstance(model, LM):
    return batch['ids'], batch['valid']
  marks = None
  if model.lm.mask == 'mutual' and 'answer' in batch:
    marks = {'question': ~batch['answer']}
  return batch['ids'], batch['valid'], Images(batch['image'][:, None]), marks


def apply(model: LM | VLM, params: Any, batch: Mapping[str, Array],
          places: int | None = None, **more: Any) -> tuple[Array, dict[str, Any]]:
  """Returns logits of a batch of lib/data/qa.py, and auxiliary outputs.

  Args:
    model, params, batch: as of `loss`.
    places: P, the most ids of answers that a row may have; None for logits of every slot.
    **more: of the model's `apply`.

  Returns:
    Logits float32[B, N, V] after every slot; with `places` those that predict the answers alone,
    float32[B, P, V], and as 'predicts' int32[B, P], of which ids they are. And the model's dict.
  """
  method = '__call__' if places is None else 'read'
  made, out = cast(tuple[Any, dict[str, Any]], model.apply(
      {'params': params}, *inputs(model, batch), method=method, **more))
  if isinstance(model, LM):
    slot = jnp.arange(batch['ids'].shape[1], dtype=jnp.int32)
    out = out | {'slot': jnp.broadcast_to(slot, batch['ids'].shape)}
  if places is None:
    return made, out
  predicts = jnp.argsort(~batch['answer'], axis=1, stable=True)[:, :places]
  features = take(made.x, _slots_before(out, predicts))
  logits = model.apply({'params': params}, features, method='logits')
  return cast(Array, logits), out | {'predicts': predicts}


def training_macs(model: LM | VLM, *, context: int, frozen: Sequence[str] = ()) -> float:
  """Counts the multiply-accumulates of a row of T ids, forward and backward.

  The backward pass multiplies twice for every product of the forward pass (lib/cost/vit.py), once
  where its factor is a parameter that is frozen, and not at all in a tower that is: nothing that
  trains is in front of it.

  Args:
    model: with its plans.
    context: T.
    frozen: of `config.optimizer`; what counts is 'tower' and 'lm', whole.
  """
  if isinstance(model, LM):
    cost = lm_cost.of(model, context)
    # Every slot predicts, not the last one alone.
    heads = context * cost.head
    whole = 3 * (sum(layer.macs for layer in cost.layers) + heads)
    fixed = sum(layer.weight_macs for layer in cost.layers) + heads if 'lm' in frozen else 0
    return whole - fixed
  tower = vit_cost.in_training(cast(ViT, model.tower))
  if model.compressor:
    projector = projector_cost.of(model, context).training_macs
  else:
    through, width = tower.layers[-1].left - model.tower.special, model.lm.width
    through, joined = through // model.side ** 2, model.tower.width * model.side ** 2
    projector = 3 * through * (joined + width) * width if model.projection else 0
  return ((tower.macs if 'tower' in frozen else tower.training_macs)
          + projector + 3 * memory_cost.of(model, context).macs
          + training_macs(model.lm, context=context + visual_tokens(model), frozen=frozen))


def mean_of(losses: Sequence[Loss]) -> Loss:
  """Returns what lowers the losses of several models that share their parameters: their mean."""

  def mean(*args: Any) -> tuple[Array, dict[str, Array]]:
    parts = [each(*args) for each in losses]
    return cast(tuple[Array, dict[str, Array]],
                jax.tree.map(lambda *each: sum(each) / len(each), *parts))

  return mean


def loss(model: LM | VLM, settings: ConfigDict, params: Mapping[str, Any],
         batch: Mapping[str, Array], key: Array,
         teacher: Mapping[str, Any] | None, *, places: int | None = None,
         taught_by: LM | VLM | None = None) -> tuple[Array, dict[str, Array]]:
  """Returns the scalar to lower, and scalars to watch.

  Losses of learned methods are added as they are, those of all layers.

  Args:
    model: the one that trains.
    settings: `config.optimizer`.
    params: of the model.
    batch: of lib/data/qa.py.
    key: of this step.
    teacher: parameters of `taught_by`, or None: answers are then learned from their tokens alone.
    places: as of `apply`.
    taught_by: the model whose distribution of the next token is learned from too, wherever an
      answer's is predicted.
  """
  logits, out = apply(model, params, batch, places=places, rngs={'dropout': key})
  scalars = losses(logits, out, batch)
  total = (scalars['loss'] + (settings.text_weight or 0.0) * scalars.get('text_loss', 0.0)
           + settings.patch_weight * scalars.get('patch_loss', 0.0))
  of_methods = {name: value.mean() for name, value in out['losses'].items()}
  if teacher is not None:
    theirs = apply(cast(LM | VLM, taught_by), teacher, batch, places=places)
    of_methods['distill_logits'] = settings.distill.logit_weight * divergence(
        (logits, out), theirs, batch)
  kept = out['tokens'].real.sum(axis=1).mean()
  return sum(of_methods.values(), total), scalars | of_methods | {'kept_tokens': kept}


def divergence(ours: tuple[Array, Mapping[str, Any]], theirs: tuple[Array, Mapping[str, Any]],
               batch: Mapping[str, Array]) -> Array:
  """Returns the KL divergence of a model's answers from another's, a mean over their tokens.

  Args:
    ours, theirs: what `apply` returned of each; no gradient flows to the second.
    batch: of lib/data/qa.py.
  """
  logits, _, answer = _predicted(*ours, batch)
  return _mean(distill.logit_loss(logits, _predicted(*theirs, batch)[0]), answer)


def count(model: LM | VLM, kinds: int, params: Mapping[str, Any],
          batch: Mapping[str, Array], *, places: int | None = None) -> Array:
  """Counts the answers of each kind that are right, and all answers: float32[K, 2]."""
  logits, out = apply(model, params, batch, places=places)
  return correct_and_total(logits, out, batch, kinds)


def predictions(logits: Array, out: Mapping[str, Any]) -> Array:
  """Returns the logits float32[B, T, V] of every id, from the slot of the token before it.

  A reduction of the language model moves slots; text that it drops predicts from its first slot.
  """
  return take(logits, _slots_before(out, None))


def _predicted(logits: Array, out: Mapping[str, Any],
               batch: Mapping[str, Array]) -> tuple[Array, Array, Array]:
  """Logits of ids, those ids, and whether they are of an answer: all, or as `apply` has chosen."""
  if 'predicts' not in out:
    return predictions(logits, out), batch['ids'], batch['answer']
  ids, answer = (jnp.take_along_axis(batch[name], out['predicts'], axis=1)
                 for name in ('ids', 'answer'))
  return logits, ids, answer


def _slots_before(out: Mapping[str, Any], ids: Array | None) -> Array:
  """int32[B, T]: where the token before each id went; or [B, P], of some ids int32[B, P]."""
  tokens: TokenSet = out['tokens']
  own = out['slot'] if ids is None else jnp.take_along_axis(out['slot'], ids, axis=1)
  before = jnp.clip(own - 1, 0, tokens.owner.shape[1] - 1)
  slot = jnp.take_along_axis(tokens.owner, before, axis=1)
  return jnp.maximum(slot, 0)


def losses(logits: Array, out: Mapping[str, Any], batch: Mapping[str, Array]) -> dict[str, Array]:
  """Returns cross-entropies of the answers' tokens, of other text, and of the patches' labels.

  Returns:
    'loss', 'text_loss' and, where the model predicts them, 'patch_loss': scalars. Logits of the
    answers alone (`apply`) tell nothing of the other text.
  """
  logits, ids, answer = _predicted(logits, out, batch)
  each = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
  if 'predicts' in out:
    return {'loss': _mean(each, answer)}
  # Nothing predicts a row's first token.
  begins = batch['valid'] & (jnp.cumsum(batch['valid'], axis=1) == 1)
  text = batch['valid'] & ~batch['answer'] & ~begins
  scalars = {'loss': _mean(each, batch['answer']), 'text_loss': _mean(each, text)}
  if out.get('patches') is not None:
    logits, tokens = out['patches']
    labels = patch_labels(batch['cells'], tokens)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    scalars['patch_loss'] = _mean(each, tokens.real)
  return scalars


def _mean(values: Array, mask: Array) -> Array:
  mask = mask.astype(jnp.float32)
  return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def patch_labels(cells: Array, tokens: TokenSet) -> Array:
  """Returns int32[B, n]: the label of the cell int[B, G, G] of each patch token's anchor."""
  side = round(tokens.owner.shape[1] ** 0.5)
  count = cells.shape[1]
  row, column = tokens.pos // side * count // side, tokens.pos % side * count // side
  return jnp.take_along_axis(cells.reshape(len(cells), -1), row * count + column, axis=1)


def correct_and_total(logits: Array, out: Mapping[str, Any], batch: Mapping[str, Array],
                      kinds: int) -> Array:
  """Counts the answers of each kind that are right to the last token, and all: float32[K, 2].

  Greedy decoding gives an answer exactly if each of its tokens is the likeliest after the right
  ones before it.
  """
  logits, ids, answer = _predicted(logits, out, batch)
  correct = (logits.argmax(axis=-1) == ids) | ~answer
  correct = correct.all(axis=1) * batch['mask']
  kind = jax.nn.one_hot(batch['kind'], kinds)
  return jnp.stack([correct @ kind, batch['mask'] @ kind], axis=1)


def exact_match(model: LM | VLM, params: Any, batch: Mapping[str, Array], *,
                longest: int, behind: int = 0) -> Array:
  """Returns 1 where greedy decoding after the prompt gives the whole answer: float32[B], 0 or 1."""
  return answers(model, params, batch, longest=longest, behind=behind)[1]


def answers(model: LM | VLM, params: Any, batch: Mapping[str, Array], *,
            longest: int, behind: int = 0) -> tuple[Array, Array]:
  """Answers by greedy decoding after the prompt.

  Each step reads the right token before it, which changes nothing: an answer that went wrong stays
  wrong. Reductions see the prompt alone, as they do in use.

  Args:
    model, params: as of `apply`.
    batch: of lib/data/qa.py; a row's answer stands at the end of it.
    longest: A, tokens of the longest answer, its end token among them.
    behind: tokens at the end of each question that are decoded as the answer is: what reductions
      have left of the prompt before them answers.

  Returns:
    float32[B, V], the logits behind what is read at once (of an answer's first token, where nothing
    is behind), and 1 where the whole answer is right, 0 elsewhere, float32[B].
  """
  ids, in_answer = batch['ids'], batch['answer']
  start = jnp.argmax(in_answer, axis=1)[:, None] - behind
  read = batch['valid'] & (jnp.arange(ids.shape[1])[None] < start)
  prompt = {**batch, 'valid': read}
  number = jnp.arange(behind + longest)[None]
  has_token = (number >= behind) & (
      number < behind + jnp.sum(in_answer, axis=1, keepdims=True))
  answer = jnp.take_along_axis(ids, jnp.minimum(start + number, ids.shape[1] - 1), axis=1)
  first, cache = model.apply({'params': params}, *inputs(model, prompt), room=behind + longest,
                             method='prefill')

  def step(cache: Any, tokens: Array) -> tuple[Any, Array]:
    logits, cache = model.apply({'params': params}, tokens, cache, method='decode')
    return cache, logits.argmax(axis=-1)

  _, later = jax.lax.scan(step, cache, answer[:, :-1].T)
  predicted = jnp.concatenate([first.argmax(axis=-1)[:, None], later.T], axis=1)
  return first, ((predicted == answer) | ~has_token).all(axis=1).astype(jnp.float32)


def scores(counts: np.ndarray, kinds: tuple[str, ...]) -> dict[str, float]:
  """Returns 'accuracy' of all questions, and 'accuracy_<kind>', from summed `correct_and_total`."""
  correct, total = counts.T
  by_kind = {f'accuracy_{name}': float(own / max(count, 1))
             for name, own, count in zip(kinds, correct, total, strict=False)}
  return {'accuracy': float(correct.sum() / total.sum()), **by_kind}
