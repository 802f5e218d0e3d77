"""Vision-language models: a tower, a projector, and a language model that reads both.

LLaVA-1.5 (Liu et al., 2023), arXiv:2310.03744; LLaVA-NeXT, its crops and newlines as released;
LLaVA-OneVision (Li et al., 2024), arXiv:2408.03326; Qwen2-VL, arXiv:2409.12191; Qwen2.5-VL,
arXiv:2502.13923. What an image becomes before the tower is lib/data/preprocess.py's; where each
feature stands in the sequence is data (`Images`), made on the host by lib/data/anyres.py.

INTERFACE
  vlm = make_vlm('llava1.5_7b')                           # or from_config(config_json)
  vlm = vlm.clone(tower=vlm.tower.clone(plan=...), lm=vlm.lm.clone(plan=...))
  vlm = at_door(vlm, config.reduce.projector, slots=576)  # V, tokens of an image
  logits, out = vlm.apply({'params': p}, ids, valid, images)
  logits, cache = vlm.apply({'params': p}, ids, valid, images, room=64, method='prefill')
  logits, cache = vlm.apply({'params': p}, next_ids, cache, method='decode')
`ids` hold one `image_token` an image; ops.splice.collapse makes that of ids that repeat it.

Axes: B batch, T ids of a row, C rows of the tower (crops, frames) of a row of the batch, I images
of a row, V most tokens of an image, M after the door, K features that one token is made of, D width
of the language model, W of the tower, S side of a crop, H heads.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from models.backbones import lm as language
from models.backbones.lm import LM
from models.backbones.qwen_vision import QwenVision
from models.backbones.vit import ACTIVATIONS, ViT, dense
from models.families import VLMS
from models.plan import Host, Plan, make_plan
from ops import tokens as tk
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.splice import Visual, splice
from ops.tokens import TokenSet, take

Array = jax.Array

# What the door may ask of the tower's last layer; attention is stored with tokens in front.
FROM_TOWER = ('keys', 'queries', 'values', 'cls_attention', 'received_attention')
ACROSS = ('image', 'prompt')
ORDERS = ('raster', 'method')


@struct.dataclass
class Images:
  """The images of a batch.

  Attributes:
    pixels: float[B, C, S, S, 3], or patches float[B, C, R, C', P] for
      models/backbones/qwen_vision.py.
    sizes: int[B, C, 2], for patches alone.
    index: int32[B, I, V, K] or None: token v of image i is made of these features of the row,
      `c * n + p` for patch (or cell) p of crop c, n of which a crop has, and C * n for the newline.
      None for one image a crop, in raster order.
    weight: float32[B, I, V, K], the share of each, all zero where there is no token.
    axes, extent: positions, as in `ops.splice.Visual`; None where they have one axis.
  """

  pixels: Array
  sizes: Array | None = None
  index: Array | None = None
  weight: Array | None = None
  axes: Array | None = None
  extent: Array | None = None

  @property
  def layout(self) -> tuple[int, int, int]:
    """C, I and V: all that shapes say of what reads them; V is 0 for one image a crop."""
    crops = self.pixels.shape[1]
    return (crops, *self.index.shape[1:3]) if self.index is not None else (crops, crops, 0)


@dataclasses.dataclass(frozen=True)
class Listen(Reducer):
  """Cuts nothing: it keeps what a layer of the tower told for the door.

  Attributes:
    wanted: names in `FROM_TOWER`.
  """

  wanted: frozenset[str] = frozenset()

  @property
  def watch_needs(self) -> frozenset[str]:
    """What it keeps."""
    return self.wanted

  def watch(self, tokens: TokenSet, signals: Signals) -> dict[str, Array]:
    """{name: [B, N, ...]}."""
    del tokens
    found = {name: getattr(signals, name) for name in self.wanted}
    return {f'tower_{name}': jnp.swapaxes(value, 1, 2) if 'attention' in name else value
            for name, value in found.items()}


@dataclasses.dataclass(frozen=True)
class Door:
  """A reduction of visual tokens between the projector and the language model.

  Attributes:
    plan: with one cut, of 'layer' 0.
    across: 'image', every image for itself, or 'prompt', one pool of all images of a row.
    order: of what is left: 'raster', by the place of each token's anchor, or the 'method's own.
    grid: (rows, columns) of the tokens, None where they are no grid.
  """

  plan: Plan
  across: str = 'image'
  order: str = 'raster'
  grid: tuple[int, int] | None = None


class Projector(nn.Module):
  """Two products with an activation between them (arXiv:2310.03744, Sec. 3.2)."""

  width: int
  activation: str
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """float[..., W] -> float[..., D]."""
    x = dense(self.width, self.dtype, name='fc1')(x)
    return dense(self.width, self.dtype, name='fc2')(ACTIVATIONS[self.activation](x))


class VLM(nn.Module):
  """A vision-language model; see the head of this file for how it is used.

  Attributes:
    tower: a ViT, whose features are those after its last layer that runs (`layers`), normed by
      nothing; or a QwenVision, which has a projector of its own.
    lm: the language model.
    image_token: id of the placeholder.
    projection: activation of a `Projector`, '' for a tower that ends in the language model's width.
    newline: whether there is a learned feature that ends a row of patches.
    door: what to reduce after the projector, or None; `at_door` makes it.
    pad_side: where the padding of a sequence goes.
    patch_labels: labels of a patch that a product on the tower's features ('probe') tells apart, to
      train the tower beside the answers; 0 for none.
  """

  tower: ViT | QwenVision
  lm: LM
  image_token: int
  projection: str = 'gelu'
  newline: bool = False
  door: Door | None = None
  pad_side: str = 'right'
  patch_labels: int = 0

  def setup(self) -> None:
    """The projector and the newline."""
    if self.projection:
      self.projector = Projector(self.lm.width, self.projection, self.lm.dtype)
    if self.patch_labels:
      self.probe = dense(self.patch_labels, jnp.float32)
    if self.newline:
      self.end = self.param('newline', nn.initializers.normal(0.02), (self.lm.width,))

  @property
  def context(self) -> int:
    """The longest sequence, visual tokens included."""
    return self.lm.context

  @property
  def vocabulary(self) -> int:
    """V of the language model."""
    return self.lm.vocabulary

  def each_image(self, layout: tuple[int, int, int]) -> int:
    """Slots of an image behind the tower, before the door; of images laid out so (`Images`)."""
    crops, _, tokens = layout
    whole, left = passed_on(self.tower)
    if not tokens:
      return left
    return min(tokens, crops * left) if left < whole else tokens

  def visual_slots(self, layout: tuple[int, int, int]) -> int:
    """Slots of a sequence that are not for its ids, behind tower and door."""
    slots = layout[1] * self.each_image(layout)
    cut = self.door.plan.cut(0) if self.door else None
    if cut is None:
      return slots
    return cut.keep * (layout[1] if self.door.across == 'image' else 1)

  def __call__(self, ids: Array, valid: Array,
               images: Images | None) -> tuple[Array, dict[str, Any]]:
    """Scores the next token after every token that is left.

    Args:
      ids: int[B, T].
      valid: bool[B, T], False for padding.
      images: None for text alone.

    Returns:
      Logits float32[B, N, V], and what LM tells, with 'sequence' (the TokenSet that it read),
      'slot' int32[B, T] (where each id went, ops/splice.py), 'visual', 'tower' (what the tower
      tells), 'seen' (the TokenSet [B * C, n] that it passes on), 'laid' (index and weight of
      `Images`, but of those), 'door' (the TokenSet behind the door), and with `patch_labels`
      'patches' (logits float32[B * C, n, patch_labels] and their TokenSet).
    """
    tokens, beside = self.sequence(ids, valid, images)
    logits, out = self.lm(tokens)
    return logits, out | beside

  def prefill(self, ids: Array, valid: Array, images: Images | None, *, room: int) -> Any:
    """Reads a prompt, as LM's: logits float32[B, V] after its last token, and the cache."""
    return self.lm.prefill(self.sequence(ids, valid, images)[0], room=room)

  def decode(self, ids: Array, cache: Any) -> Any:
    """One more token a row, as LM's."""
    return self.lm.decode(ids, cache)

  def sequence(self, ids: Array, valid: Array,
               images: Images | None) -> tuple[TokenSet, dict[str, Any]]:
    """What the language model reads, and what is known of it beside."""
    embedded = self.lm.embed(ids).x
    out: dict[str, Any] = {}
    visual, slots = None, None
    if images is not None:
      visual, slots, out = self.see(images)
    slots = None if slots is None else ids.shape[1] + slots
    axes = len(self.lm.rope.sections)
    tokens, slot = splice(embedded, valid, ids == self.image_token, visual, side=self.pad_side,
                          slots=slots, axes=axes)
    return tokens, {**out, 'sequence': tokens, 'slot': slot, 'visual': visual}

  def see(self, images: Images) -> tuple[Visual, int | None, dict[str, Any]]:
    """Visual tokens, slots that all of a row take where not I * V, and what the tower tells."""
    batch, crops = images.pixels.shape[:2]

    def rows(values: Array) -> Array:
      return values.reshape(-1, *values.shape[2:])

    if isinstance(self.tower, QwenVision):
      tokens, out = self.tower(rows(images.pixels), rows(images.sizes))
    else:
      tokens, out = self.tower(rows(images.pixels))
      tokens = _patches(tokens if isinstance(tokens, TokenSet) else out['tokens'],
                        self.tower.special)
    beside = {'tower': out}
    if self.patch_labels:
      beside['patches'] = self.probe(tokens.x.astype(jnp.float32)), tokens
    x = self.projector(tokens.x) if self.projection else tokens.x
    tokens = tokens.replace(x=x)
    visual, beside['laid'] = self._laid_out(tokens, images, batch, crops)
    beside['seen'] = tokens
    if images.axes is not None:
      visual = visual.replace(stats=visual.stats | {'axes': images.axes})
    slots = None
    if self.door:
      visual, slots, beside['door'] = _through(self.door, visual)
    stats = {name: value for name, value in visual.stats.items() if not name.startswith('tower_')}
    axes = stats.pop('axes', None)
    stats.pop('cell', None)
    return visual.replace(stats=stats, axes=axes, extent=images.extent), slots, beside

  def _laid_out(self, tokens: TokenSet, images: Images, batch: int,
                crops: int) -> tuple[Visual, tuple[Array, Array] | None]:
    """The images' tokens in the order that they are read; index and weight of what was passed on.

    (As in `Images`, but of the slots that the tower left; None where each is one token.)
    """
    each, index = tokens.slots, images.index
    whole = tokens.owner.shape[1]
    stats = {name: value.reshape(batch, crops, each, *value.shape[2:])
             for name, value in tokens.stats.items()} | {
                 'cell': tokens.pos.reshape(batch, crops, each)}
    x = tokens.x.reshape(batch, crops, each, -1)
    valid = None if tokens.valid is None else tokens.valid.reshape(batch, crops, each)
    if index is None:
      return Visual(x, valid, stats=stats), None
    limit = index.shape[2]
    weight = images.weight
    if each < whole:
      index, weight = _left(tokens, index, weight, batch, crops)
      limit = min(limit, crops * each)
      order = jnp.argsort(weight[..., 0] == 0, axis=2, stable=True)[:, :, :limit]
      index, weight = (jnp.take_along_axis(a, order[..., None], axis=2) for a in (index, weight))
    end = jnp.broadcast_to(self.end.astype(x.dtype), (batch, 1, x.shape[-1])) if self.newline else (
        jnp.zeros((batch, 1, x.shape[-1]), x.dtype))

    def mixed(values: Array, last: Array) -> Array:
      flat = jnp.concatenate([values.reshape(batch, crops * each, *values.shape[3:]), last], axis=1)
      picked = take(flat, index.reshape(batch, -1)).reshape(*index.shape, *flat.shape[2:])
      share = weight.reshape(weight.shape + (1,) * (flat.ndim - 2))
      return jnp.sum(picked * share, axis=3).astype(values.dtype)

    # The newline is like no patch: it was attended by none.
    laid = {name: mixed(value, jnp.zeros((batch, 1, *value.shape[3:]), value.dtype))
            for name, value in stats.items() if name != 'cell'}
    laid['cell'] = jnp.broadcast_to(jnp.arange(limit, dtype=jnp.int32), index.shape[:3])
    there = (weight > 0).any(axis=-1)
    if valid is not None:
      there &= mixed(valid.astype(jnp.float32), jnp.ones((batch, 1))) > 0
    return Visual(mixed(x, end), there, stats=laid), (index, weight)


def image_counts(images: Images) -> np.ndarray:
  """int[B, I], tokens of each image before any reduction, -1 where there is none (splice.check).

  On the host. Without an index every crop is an image.
  """
  if images.index is None:
    return np.ones(images.pixels.shape[:2], np.int64)
  found = (np.asarray(images.weight) > 0).any(axis=-1).sum(axis=-1)
  return np.where(found == 0, -1, found)


def passed_on(tower: ViT | QwenVision) -> tuple[int, int]:
  """Tokens of a crop that a tower would pass on, and that it does under its plan."""
  if isinstance(tower, QwenVision):
    cells = tower.cells[0] * tower.cells[1]
    return cells, cells
  last = (tower.layers or (0, tower.depth))[1]
  plan = tower.plan if tower.plan and tower.plan.mode == 'gather' else None
  cuts = [cut for cut in plan.cuts if cut.layer < last] if plan else []
  whole = tower.host.slots - tower.special
  return whole, cuts[-1].keep - tower.special if cuts else whole


def _patches(tokens: TokenSet, special: int) -> TokenSet:
  """Without the special tokens, which lead."""
  if not special:
    return tokens
  index = jnp.broadcast_to(jnp.arange(special, tokens.slots, dtype=jnp.int32),
                           (len(tokens.x), tokens.slots - special))
  left = tk.reduce(tokens, tk.Gather(index, tokens.slots))
  return left.replace(owner=left.owner[:, special:], protected=0)


def _left(tokens: TokenSet, index: Array, weight: Array, batch: int,
          crops: int) -> tuple[Array, Array]:
  """A layout of all patches as one of the slots that a reduced tower left of them.

  A group stands where its anchor stood; newlines go, for their rows are no longer whole.

  Raises:
    ValueError: a layout that interpolates between patches.
  """
  each, whole = tokens.slots, tokens.owner.shape[1]
  if index.shape[-1] > 1:
    raise ValueError('these images are laid out by interpolating between patches, of which a '
                     'reduction in the tower leaves too few: reduce at the door '
                     '(config.reduce.projector), or lay them out in full')
  owner = tokens.owner.reshape(batch, crops * whole)
  flat = index.reshape(batch, -1)
  patch = jnp.minimum(flat, crops * whole - 1)
  slot = take(owner, patch)
  here = patch // whole * each + jnp.maximum(slot, 0)
  anchor = take(tokens.pos.reshape(batch, -1), here) == patch % whole
  there = (slot >= 0) & anchor & (flat < crops * whole)
  if tokens.valid is not None:
    there &= take(tokens.valid.reshape(batch, -1), here)
  weight = jnp.where(there.reshape(weight.shape), weight, 0.0)
  return here.reshape(index.shape), weight


def _through(door: Door, visual: Visual) -> tuple[Visual, int | None, TokenSet | None]:
  """Visual tokens after the door, slots of a pool of all, and who was joined with whom."""
  batch, images, each = visual.x.shape[:3]
  across = images if door.across == 'prompt' else 1
  slots = across * each
  cut = door.plan.cut(0)
  if cut is None:
    return visual, None, None
  if slots != cut.slots:
    raise ValueError(f'the door was made for {cut.slots} visual tokens and gets {slots}: make it '
                     'anew with at_door(..., slots=...)')

  def pooled(values: Array) -> Array:
    return values.reshape(-1, slots, *values.shape[3:])

  group = jnp.broadcast_to(jnp.arange(images, dtype=jnp.int32)[None, :, None],
                           (batch, images, each))
  told = {name.removeprefix('tower_'): pooled(value) for name, value in visual.stats.items()
          if name.startswith('tower_')}
  told = {name: jnp.swapaxes(value, 1, 2) if 'attention' in name else value
          for name, value in told.items()}
  stats = {name: pooled(value) for name, value in visual.stats.items()
           if not name.startswith('tower_')}
  tokens = TokenSet.create(pooled(visual.x), stats=stats | {'image': pooled(group)},
                           valid=None if visual.valid is None else pooled(visual.valid))
  method = door.plan.method
  known = Signals(layer=0, depth=1, slots=slots, grid=door.grid, **told)
  with jax.named_scope('reduction'):
    assignment = tk.decide(method, tokens, known, keep=cut.keep)
    reduced = tk.reduce(tokens, assignment)
  if door.order == 'raster':
    place = jnp.where(reduced.real, reduced.pos, slots)
    order = jnp.argsort(place, axis=1, stable=True).astype(jnp.int32)
    reduced = tk.reduce(reduced, tk.Gather(order, reduced.slots))
  left = reduced.slots
  stats = {name: value.reshape(batch, images // across, left, *value.shape[2:])
           for name, value in reduced.stats.items()}
  x = reduced.x.reshape(batch, images // across, left, -1)
  valid = None if reduced.valid is None else reduced.valid.reshape(x.shape[:3])
  number = stats.pop('image')
  if across == 1:
    return visual.replace(x=x, valid=valid, stats=stats), None, reduced
  # Every image gets all slots of the pool, and holds those that are its own.
  own = number == jnp.arange(images, dtype=jnp.int32)[None, :, None]
  own = own if valid is None else own & valid

  def spread(values: Array) -> Array:
    return jnp.broadcast_to(values, (batch, images, *values.shape[2:]))

  return visual.replace(x=spread(x), valid=own,
                        stats={name: spread(value) for name, value in stats.items()}), left, reduced


def at_door(vlm: VLM, config: Mapping[str, Any], *, slots: int) -> VLM:
  """A model that reduces its visual tokens between projector and language model.

  Args:
    vlm: the model.
    config: `config.reduce.projector`: as `models.plan.make_plan` reads it, without site and layers;
      and `across` and `order` of `Door`.
    slots: V, tokens of an image (of all images of a row under across='prompt').

  Raises:
    ValueError: as `make_plan`; a method that needs what a tower does not tell, or cannot beside a
      reduction of its own.
  """
  given = {name: value for name, value in config.items() if value is not None}
  across, order = given.pop('across', 'image'), given.pop('order', 'raster')
  for name, value, known in (('across', across, ACROSS), ('order', order, ORDERS)):
    if value not in known:
      raise ValueError(f'reduce.projector.{name}={value!r} is unknown: choose one of '
                       f'{", ".join(known)}')
  if given.get('method', 'none') == 'none':
    return vlm.clone(door=None)
  if given.get('site') or given.get('layers', 'all') not in ('all', (0,)):
    raise ValueError('the door has no layers and no sites: leave site and layers out of '
                     'reduce.projector')
  offers = frozenset(FROM_TOWER) & vlm.tower.host.offers | {'layer', 'depth', 'slots'}
  grid = None
  if isinstance(vlm.tower, ViT) and slots == math.prod(vlm.tower.grid) and not vlm.newline:
    # One crop, unreduced, in raster order; several crops and rows that end are no grid.
    offers, grid = offers | {'grid'}, vlm.tower.grid
  plan = make_plan(given | {'site': 'after', 'layers': (0,)}, Host(1, slots, 0, offers))
  wanted = plan.method.needs & set(FROM_TOWER)
  tower = vlm.tower
  if wanted:
    if tower.plan is not None and not isinstance(tower.plan.method, Listen):
      raise ValueError(f'{plan.name} at the door reads {", ".join(sorted(wanted))} of the tower, '
                       f'which {tower.plan.name} reduces: reduce at one of the two places')
    last = ((getattr(tower, 'layers', None) or (0, tower.depth))[1]) - 1
    tower = tower.clone(plan=Plan('listen', Listen(frozenset(wanted)), 'after', (), watch=(last,)))
  return vlm.clone(tower=tower, door=Door(plan, across, order, grid))


# Families.

# What a config.json may leave out.
_LLAMA = {'model_type': 'llama', 'hidden_size': 4096, 'intermediate_size': 11008,
          'num_hidden_layers': 32, 'num_attention_heads': 32, 'vocab_size': 32000}
_TOWERS = {
    'clip_vision_model': {'norm_eps': 1e-5, 'activation': 'quick_gelu', 'pre_norm': True,
                          'patch_bias': False},
    'siglip_vision_model': {'class_token': False, 'activation': 'gelu_tanh'},
}
_ACTS = {'quick_gelu': 'quick_gelu', 'gelu': 'gelu', 'gelu_pytorch_tanh': 'gelu_tanh',
         'silu': 'swiglu'}
LLAVAS = ('llava', 'llava_next', 'llava_onevision')
QWENS = ('qwen2_vl', 'qwen2_5_vl')


def from_config(config: Mapping[str, Any], *, grid: tuple[int, int] = (32, 32),
                tower: Mapping[str, Any] | None = None,
                lm: Mapping[str, Any] | None = None) -> VLM:
  """The model that a checkpoint's config.json describes (as the transformers library writes it).

  Args:
    config: the file's content.
    grid: for the Qwen families, rows and columns of patches that every image must fit into.
    tower, lm: fields of the tower and of LM that differ.

  Raises:
    ValueError: an architecture that is not known, or settings of a known one that are not.
  """
  kind = config.get('model_type')
  if kind in LLAVAS:
    return _llava(config, kind, dict(tower or {}), dict(lm or {}))
  if kind in QWENS:
    return _qwen(config, kind, grid, dict(tower or {}), dict(lm or {}))
  raise ValueError(f'model_type {kind!r} is unknown: known are {", ".join((*LLAVAS, *QWENS))}')


def make_vlm(variant: str, **settings: Any) -> VLM:
  """A vision-language model by name, one of `VLMS` in models/families.py.

  Args:
    variant: as 'llava1.5_7b'.
    **settings: what else `from_config` takes.

  Raises:
    ValueError: for an unknown name.
  """
  if variant not in VLMS:
    near = difflib.get_close_matches(variant, VLMS, n=1)
    hint = f' (did you mean {near[0]!r}?)' if near else ''
    raise ValueError(f'variant {variant!r} is unknown{hint}: choose one of {", ".join(VLMS)}, or '
                     "read a checkpoint's config.json with from_config")
  return from_config(VLMS[variant], **settings)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
  """The config.json of the language model in that of a vision-language model."""
  if not config:
    return {}
  text = dict(config.get('text_config') or {})
  if config.get('model_type') in QWENS:
    return (text or dict(config)) | {'model_type': 'qwen2'}
  return _LLAMA | text if text.get('model_type', 'llama') == 'llama' else text


def _llava(config: Mapping[str, Any], kind: str, tower: dict[str, Any],
           lm: dict[str, Any]) -> VLM:
  seen, text = config['vision_config'], text_config(config)
  family = seen.get('model_type', 'clip_vision_model')
  if family not in _TOWERS:
    raise ValueError(f'vision tower {family!r} is unknown: known are {", ".join(_TOWERS)}')
  depth = seen['num_hidden_layers']
  feature = config.get('vision_feature_layer', -1 if kind == 'llava_onevision' else -2)
  strategy = config.get('vision_feature_select_strategy',
                        'full' if kind == 'llava_onevision' else 'default')
  special = _TOWERS[family].get('class_token', True)
  if not isinstance(feature, int) or (strategy == 'default') != special:
    raise ValueError(f'vision_feature_layer={feature} with vision_feature_select_strategy='
                     f'{strategy!r} is unknown here: one layer, without its [CLS] token if any')
  last = depth + 1 + feature if feature < 0 else feature
  settings = {
      'width': seen['hidden_size'], 'depth': depth, 'mlp': seen['intermediate_size'],
      'heads': seen['num_attention_heads'], 'patch': seen['patch_size'],
      'image_size': seen['image_size'] // seen['patch_size'] * seen['patch_size'],
      'num_classes': 0, 'layers': (0, last), **_TOWERS[family]}
  if seen.get('hidden_act'):
    settings['activation'] = _ACTS[seen['hidden_act']]
  if last == depth:
    # The features are those before the last norm: it stands aside, over a mean that nobody reads.
    settings |= {'layers': None, 'pool': 'mean', 'last_norm': 'pooled'}
  token = config.get('image_token_id', config.get('image_token_index', 32000))
  return VLM(ViT(**(settings | tower)), language.from_config(text, **lm), token,
             _ACTS[config.get('projector_hidden_act', 'gelu')], newline=kind != 'llava')


def _qwen(config: Mapping[str, Any], kind: str, grid: tuple[int, int], tower: dict[str, Any],
          lm: dict[str, Any]) -> VLM:
  seen, text = config['vision_config'], text_config(config)
  settings = {'depth': seen.get('depth', 32), 'heads': seen.get('num_heads', 16), 'grid': grid,
              'patch': seen.get('patch_size', 14), 'temporal': seen.get('temporal_patch_size', 2),
              'merge': seen.get('spatial_merge_size', 2)}
  if kind == 'qwen2_vl':
    width = seen.get('embed_dim', 1280)
    settings |= {'width': width, 'mlp': int(width * seen.get('mlp_ratio', 4)),
                 'projection': seen.get('hidden_size', 3584),
                 'activation': _ACTS[seen.get('hidden_act', 'quick_gelu')]}
  else:
    settings |= {'width': seen.get('hidden_size', 1280), 'norm': 'rms', 'activation': 'swiglu',
                 'mlp': seen.get('intermediate_size', 3420),
                 'projection': seen.get('out_hidden_size', 3584),
                 'window': seen.get('window_size', 112) // settings['patch'],
                 'whole_layers': tuple(seen.get('fullatt_block_indexes', (7, 15, 23, 31)))}
  model = language.from_config(text, **lm)
  return VLM(QwenVision(**(settings | tower)), model, config.get('image_token_id', 151655),
             projection='')
