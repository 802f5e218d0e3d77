"""Models that answer questions: how a config becomes one, its loss, and its score.

Axes: B batch, T ids of a row, N slots, V vocabulary, C crops, n patches, G cells a side, K kinds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lib.questions import Info
from models.build import DTYPES
from models.lm import LM
from models.plan import make_plan
from models.vit import ViT
from models.vlm import VLM, Images, at_door
from ops.attention import pick
from ops.positions import Rope
from ops.tokens import TokenSet, take

Array = jax.Array
PLACES = ('vision', 'projector', 'language')


def build(model: Mapping[str, Any], reduce: Mapping[str, Any], info: Info, *, context: int,
          mesh: Mesh | None = None, platform: str = 'cpu') -> LM | VLM:
  """The model that a config describes: a language model, with a tower where the set has images.

  Args:
    model: `config.model`: `lm`, fields of LM but for what the set decides, and 'theta' of its
      rotations; for images also `tower`, fields of ViT, `projection`, an activation, and
      `patch_labels`, the labels of a patch to predict beside (0 for none); and `dtype` by name.
    reduce: `config.reduce`: reductions in 'vision' (the tower), at the 'projector' and in
      'language'.
    info: of the set.
    context: T.
    mesh: where the model will run.
    platform: of its devices.

  Raises:
    ValueError: as models/plan.py and the models do; a reduction in a place that is not there.
  """
  for name in reduce:
    if name not in PLACES:
      raise ValueError(f'reduce.{name} is unknown: choose from {", ".join(PLACES)}')
  if model['dtype'] not in DTYPES:
    raise ValueError(f'dtype {model["dtype"]!r} is unknown: choose one of {", ".join(DTYPES)}')
  dtype = DTYPES[model['dtype']]
  shared = {'dtype': dtype, 'mesh': mesh, 'implementation': pick(platform, dtype)}
  settings = dict(model['lm'])
  rope = Rope(settings['head_width'], theta=settings.pop('theta', 1e4))
  cuts = {place: {key: value for key, value in config.items() if value is not None}
          for place, config in reduce.items() if config['method'] != 'none'}
  lm = LM(**settings, vocabulary=info.vocabulary, rope=rope, **shared)
  if info.image_shape is None:
    missing = [place for place in cuts if place != 'language']
    if missing:
      raise ValueError(f'reduce.{missing[0]} acts on images, and this set has none: set its method '
                       "to 'none'")
    return _reduced(lm, cuts.get('language'), context, 0)
  tower = ViT(**model['tower'], num_classes=0, image_size=info.image_shape[0], pool='mean',
              last_norm='pooled', **shared)
  slots = tower.grid[0] * tower.grid[1]
  if 'vision' in cuts:
    plan = make_plan(cuts['vision'], tower.host)
    tower = tower.clone(plan=plan)
    slots = (plan.cuts[-1].keep if plan.cuts else tower.host.slots) - tower.special
  vlm = VLM(tower, lm, info.image, model['projection'], patch_labels=model['patch_labels'])
  if 'projector' in cuts:
    vlm = at_door(vlm, cuts['projector'], slots=slots)
    slots = vlm.door.plan.cuts[-1].keep if vlm.door.plan.cuts else slots
  return vlm.clone(lm=_reduced(lm, cuts.get('language'), context + slots, slots))


def _reduced(lm: LM, config: Mapping[str, Any] | None, slots: int, visual: int) -> LM:
  counts = {'visual': visual} if visual else {}
  return lm.clone(plan=make_plan(config, lm.host(slots, **counts))) if config else lm


def apply(model: LM | VLM, params: Any, batch: Mapping[str, Array],
          **more: Any) -> tuple[Array, dict[str, Any]]:
  """Logits float32[B, N, V] of a batch of lib/questions.py, and what the model tells."""
  if isinstance(model, LM):
    logits, out = model.apply({'params': params}, batch['ids'], batch['valid'], **more)
    slot = jnp.broadcast_to(jnp.arange(batch['ids'].shape[1], dtype=jnp.int32),
                            batch['ids'].shape)
    return logits, out | {'slot': slot}
  images = Images(batch['image'][:, None])
  return model.apply({'params': params}, batch['ids'], batch['valid'], images, **more)


def predictions(logits: Array, out: Mapping[str, Any]) -> Array:
  """float32[B, T, V]: what was predicted for every id, from the slot of the token before it.

  A reduction of the language model moves slots; text that it drops predicts from its first slot.
  """
  tokens: TokenSet = out['tokens']
  before = jnp.clip(out['slot'] - 1, 0, tokens.owner.shape[1] - 1)
  now = jnp.take_along_axis(tokens.owner, before, axis=1)
  return take(logits, jnp.maximum(now, 0))


def losses(logits: Array, out: Mapping[str, Any], batch: Mapping[str, Array]) -> dict[str, Array]:
  """Cross-entropy of the answers' tokens ('loss'), and of the patches' labels ('patch_loss')."""
  asked = batch['answer'].astype(jnp.float32)
  each = optax.softmax_cross_entropy_with_integer_labels(predictions(logits, out), batch['ids'])
  found = {'loss': jnp.sum(each * asked) / jnp.maximum(jnp.sum(asked), 1.0)}
  if out.get('patches') is not None:
    logits, tokens = out['patches']
    labels = patch_labels(batch['cells'], tokens)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    real = tokens.real.astype(jnp.float32)
    found['patch_loss'] = jnp.sum(each * real) / jnp.maximum(jnp.sum(real), 1.0)
  return found


def patch_labels(cells: Array, tokens: TokenSet) -> Array:
  """int32[B, n]: the label of the cell int[B, G, G] that each patch token's anchor lies in."""
  side = round(tokens.owner.shape[1] ** 0.5)
  count = cells.shape[1]
  row, column = tokens.pos // side * count // side, tokens.pos % side * count // side
  return jnp.take_along_axis(cells.reshape(len(cells), -1), row * count + column, axis=1)


def right_and_all(logits: Array, out: Mapping[str, Any], batch: Mapping[str, Array],
                  kinds: int) -> Array:
  """float32[K, 2]: answers of each kind that are right to the last token, and all there are.

  That every token is the likeliest after the right ones before it is the same as that greedy
  decoding gives the answer.
  """
  right = (predictions(logits, out).argmax(axis=-1) == batch['ids']) | ~batch['answer']
  right = right.all(axis=1) * batch['mask']
  kind = jax.nn.one_hot(batch['kind'], kinds)
  return jnp.stack([right @ kind, batch['mask'] @ kind], axis=1)


def scores(counts: np.ndarray, kinds: tuple[str, ...]) -> dict[str, float]:
  """'accuracy' of all questions, and of each kind by name, from the sum of `right_and_all`."""
  right, count = counts.T
  found = {'accuracy': float(right.sum() / count.sum())}
  return found | {f'accuracy_{name}': float(r / max(c, 1))
                  for name, r, c in zip(kinds, right, count, strict=False)}
