"""Vision-language models: a tower, a projector, and a language model that reads both.

LLaVA-1.5 (Liu et al., 2023), arXiv:2310.03744; LLaVA-NeXT, its crops and newlines as released;
LLaVA-OneVision (Li et al., 2024), arXiv:2408.03326; Qwen2-VL, arXiv:2409.12191; Qwen2.5-VL,
arXiv:2502.13923. What an image becomes before the tower is lib/data/preprocess.py's; where each
feature stands in the sequence is data (`Images`), made on the host by lib/data/pictures.py.

INTERFACE
  vlm = make_vlm('llava1.5_7b')                           # or from_config(config_json)
  vlm = vlm.clone(tower=vlm.tower.clone(plan=...), lm=vlm.lm.clone(plan=...))
  vlm = with_projector_reduction(vlm, config.reduce.projector, slots=576)  # V, tokens of an image
  logits, out = vlm.apply({'params': p}, ids, valid, images)
  logits, cache = vlm.apply({'params': p}, ids, valid, images, room=64, method='prefill')
  logits, cache = vlm.apply({'params': p}, next_ids, cache, method='decode')
`ids` hold one `image_token` an image; ops.splice.collapse makes that of ids that repeat it.

Axes: B batch, T ids of a row, C rows of the tower (crops, frames) of a row of the batch, I images
of a row, V most tokens of an image, M after the door, K features that one token is made of, D width
of the language model, W of the tower, S side of a crop, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from models.backbones.lm import LM
from models.backbones.qwen_vision import QwenVision
from models.backbones.vit import ViT
from models.blocks import dense
from models.plan import Host, Plan, make_plan
from models.projector import (
  ACROSS,
  FROM_TOWER,
  ORDERS,
  Projector,
  ProjectorReduction,
  RecordSignals,
  reduce_visual,
)
from ops import assignments
from ops import tokens as tk
from ops.assignments import take
from ops.splice import Visual, splice
from ops.tokens import TokenSet

Array = jax.Array


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


class VLM(nn.Module):
  """A vision-language model; see the head of this file for how it is used.

  Attributes:
    tower: a ViT, whose features are those after its last layer that runs (`layers`), normed by
      nothing; or a QwenVision, which has a projector of its own.
    lm: the language model.
    image_token: id of the placeholder.
    projection: activation of a `Projector`, '' for a tower that ends in the language model's width.
    newline: whether there is a learned feature that ends a row of patches.
    door: what to reduce after the projector, or None; `with_projector_reduction` makes it.
    pad_side: where the padding of a sequence goes.
    patch_labels: labels of a patch that a product on the tower's features ('probe') tells apart, to
      train the tower beside the answers; 0 for none.
  """

  tower: ViT | QwenVision
  lm: LM
  image_token: int
  projection: str = 'gelu'
  newline: bool = False
  door: ProjectorReduction | None = None
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
    return cut.slots_out * (layout[1] if self.door.across == 'image' else 1)

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
      visual, slots, beside['door'] = reduce_visual(self.door, visual)
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
  return whole, cuts[-1].slots_out - tower.special if cuts else whole


def _patches(tokens: TokenSet, special: int) -> TokenSet:
  """Without the special tokens, which lead."""
  if not special:
    return tokens
  index = jnp.broadcast_to(jnp.arange(special, tokens.slots, dtype=jnp.int32),
                           (len(tokens.x), tokens.slots - special))
  left = tk.reduce(tokens, assignments.Gather(index, tokens.slots))
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


def with_projector_reduction(vlm: VLM, config: Mapping[str, Any], *, slots: int) -> VLM:
  """A model that reduces its visual tokens between projector and language model.

  Args:
    vlm: the model.
    config: `config.reduce.projector`: as `models.plan.make_plan` reads it, without site and layers;
      and `across` and `order` of `ProjectorReduction`.
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
    if tower.plan is not None and not isinstance(tower.plan.method, RecordSignals):
      raise ValueError(f'{plan.name} at the door reads {", ".join(sorted(wanted))} of the tower, '
                       f'which {tower.plan.name} reduces: reduce at one of the two places')
    last = ((getattr(tower, 'layers', None) or (0, tower.depth))[1]) - 1
    tower = tower.clone(plan=Plan('listen', RecordSignals(frozenset(wanted)), 'after', (),
                                  watch=(last,)))
  return vlm.clone(tower=tower, door=ProjectorReduction(plan, across, order, grid))


# Families.


