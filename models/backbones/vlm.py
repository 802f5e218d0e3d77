"""Vision-language models: a tower, a projector, and a language model that reads both.

LLaVA-1.5 (Liu et al., 2023), arXiv:2310.03744; LLaVA-NeXT, its crops and newlines as released;
LLaVA-OneVision (Li et al., 2024), arXiv:2408.03326; Qwen2-VL, arXiv:2409.12191; Qwen2.5-VL,
arXiv:2502.13923. What an image becomes before the tower is lib/data/preprocess.py's; where each
feature stands in the sequence is data (models/backbones/images.py), made on the host by
lib/data/pictures.py.

INTERFACE
  vlm = make_vlm('llava1.5_7b')        # models/checkpoints/vlm_config.py; or from_config(json)
  vlm = vlm.clone(tower=vlm.tower.clone(plan=...), lm=vlm.lm.clone(plan=...))
  vlm = with_projector_reduction(vlm, config.reduce.projector, slots=576)  # models/plans/
  vlm = with_plans(vlm, **config.reduce)(slots, images.layout)             # there too: all of them
  logits, out = vlm.apply({'params': p}, ids, valid, images)
  logits, cache = vlm.apply({'params': p}, ids, valid, images, room=64, method='prefill')
  logits, cache = vlm.apply({'params': p}, next_ids, cache, method='decode')
  answers = Generator(vlm, params)(prompts, images, new_tokens=64)  # models/decoding/generator.py
`ids` hold one `image_token` an image; ops.splice.collapse makes that of ids that repeat it.

Axes: B batch, T ids of a row, C rows of the tower (crops, frames) of a row of the batch, I images
of a row, V most tokens of an image, M tokens of an image after the reduction at the projector, K
features that one token is made of, D width of the language model, W of the tower, S side of a crop,
H heads, n tokens of a crop that the tower passes on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.backbones import spans
from models.backbones.images import Images, arrange, tiling_of
from models.backbones.lm import LM
from models.backbones.qwen_vision import QwenVision
from models.backbones.vit import ViT
from models.blocks import ACTIVATIONS, dense
from models.memory import Memory
from models.plans.events import Plan
from models.plans.hosts import Host
from models.projector import (
  CROP,
  FEATURES,
  FROM_TOWER,
  PATCH,
  PER_TOKEN,
  ProjectorReduction,
  Relevance,
  neighbours_as_one,
  put_back,
  reduce_visual,
  without_special,
)
from models.projectors.base import GUIDE, IMAGE, LEVELS, QUESTION, Beside, Compressor
from models.projectors.base import TEXT as PROMPT
from models.projectors.mlp import Projector
from models.reduction import ReducerParameters, Reduction
from models.stack import Outputs
from models.storage import gathered
from ops.kv_cache import Cache
from ops.masks import FRAME, SUMMARY
from ops.moves.rows import put, take
from ops.primitives import grids
from ops.signals import CROP_SIGNALS, TEXT_SIGNALS
from ops.splice import Visual, splice, unmerged
from ops.temporal import TTF, fuse_frames
from ops.tokens import TEXT, TokenSet
from ops.values import Count, CountOrZero, OneOf, check_fields

Array = jax.Array


class VLM(nn.Module):
  """A vision-language model; see the head of this file for how it is used.

  Attributes:
    tower: a ViT, whose features after its last layer that runs (`layers`) are read without a norm;
      or a QwenVision, which has a projector of its own.
    lm: the language model.
    image_token: id of the placeholder.
    projection: activation of a `Projector`, '' for a tower that ends in the language model's width.
    side: so many patches each way become one token before the projector, which then begins with a
      norm (InternVL 1.5, arXiv:2404.16821); 1 for none. Patches that a tower merged or dropped are
      put back where they were, so that the number of tokens stays.
    newline: whether there is a learned feature that ends a row of patches.
    projector_reduction: how to reduce visual tokens after the projector, or None; made by
      `models.reduce_config.with_projector_reduction`.
    pad_side: where the padding of a sequence goes.
    deepstack: (layer of the tower, layer of the language model) pairs: what the first makes goes
      through the projector, and is added to the visual tokens that are there before the second
      (as in Qwen3-VL, whose projectors of their own are not here, after DeepStack,
      arXiv:2406.04334).
    frames: the rule by which tokens of a frame are those of the frame before (TTF-VLA), where the
      crops of a row are frames of one stream, in the order of time; None for images. It reads the
      attention of the tower's last layer, and saves nothing in the tower.
    patch_labels: number of labels of a patch, which a linear probe on the tower's features
      predicts, to train the tower beside the answers; 0 for none.
    compressor: what stands in the place of the MLP and leaves fewer tokens of each crop, or of all
      crops of an image (models/backbones/spans.py); None for `projection`. It reads patches that a
      tower merged or dropped where they were. The language model has the `reader` of what it leaves
      beside tokens.
  """

  tower: ViT | QwenVision
  lm: LM
  image_token: CountOrZero
  projection: Annotated[str, OneOf(('', *ACTIVATIONS))] = 'gelu'
  side: Count = 1
  newline: bool = False
  projector_reduction: ProjectorReduction | None = None
  pad_side: str = 'right'
  deepstack: tuple[tuple[CountOrZero, CountOrZero], ...] = ()
  frames: TTF | None = None
  patch_labels: CountOrZero = 0
  compressor: Compressor | None = None

  def __post_init__(self) -> None:
    check_fields(self)
    if self.compressor:
      self._check_compressor(self.compressor)
    reader = self.compressor.reader(self.lm) if self.compressor else None
    if reader != self.lm.reader:
      self.lm = self.lm.clone(reader=reader)
    if self.frames:
      self.tower = _with_relevance(self.tower)
    if self.side > 1:
      self._check_side()
    if self.deepstack:
      self._check_deepstack()
    if self.deepstack or self._reads(LEVELS):
      self.tower = self.tower.clone(capture=True)
    super().__post_init__()

  def setup(self) -> None:
    """Makes the projector, the probe and the newline."""
    self.reducers = ReducerParameters()
    if self.projection:
      self.projector = Projector(self.lm.width, self.projection, self.lm.dtype,
                                 norm=self.side > 1)
    if self.patch_labels:
      self.probe = dense(self.patch_labels, jnp.float32)
    if self.newline:
      self.end = self.param('newline', nn.initializers.normal(0.02), (self.lm.width,))

  @property
  def context(self) -> int:
    """Returns the length of the longest sequence, visual tokens included."""
    return self.lm.context

  @property
  def is_causal(self) -> bool:
    """Returns whether no token of a prompt sees a later one, in any layer."""
    return self.lm.is_causal

  @property
  def vocabulary(self) -> int:
    """Returns the number of token ids of the language model."""
    return self.lm.vocabulary

  @property
  def special(self) -> int:
    """Returns S, the special tokens of a crop in the tower."""
    return self.tower.special if isinstance(self.tower, ViT) else 0

  @property
  def tower_depth(self) -> int:
    """Returns the number of the tower's layers that run."""
    return depth_of(self.tower)

  @property
  def joins_crops(self) -> bool:
    """Returns whether the compressor reads all crops of an image at once."""
    return self.compressor is not None and self.compressor.span == IMAGE

  def projector_grid(self, slots: int) -> tuple[int, int] | None:
    """Returns (rows, columns) of the `slots` tokens behind the projector, None for no grid.

    One unreduced crop in raster order is a grid; several crops, and rows that end in a newline, are
    none.
    """
    tower = self.tower
    if isinstance(tower, QwenVision) or self.newline or tower.window or (
        self.compressor and (self.joins_crops or not self.compressor.grid_after(tower.grid))):
      return None
    rows, columns = self.crop_grid
    return (rows, columns) if slots == rows * columns else None

  @property
  def crop_grid(self) -> tuple[int, int]:
    """Returns (rows, columns) of the patches of a crop, or of cells of those that are merged."""
    if isinstance(self.tower, QwenVision):
      return self.tower.cells
    if self.compressor:
      # Tokens that are no grid lie in one row.
      left = self.compressor.grid_after(self.tower.grid)
      rows, columns = left or (1, self.compressor.slots(self.tower.grid))
      return rows, columns
    rows, columns = self.tower.grid
    return rows // self.side, columns // self.side

  @property
  def passed_on(self) -> tuple[int, int]:
    """Returns the tokens of a crop behind the projector, without the tower's plan and with it.

    Where a compressor reads all crops of an image at once, of an image of one crop.
    """
    if self.compressor:
      return (self.compressor.slots(self.tower.grid),) * 2
    return passed_on(self.tower, self.side)

  def projector_host(self, slots: int) -> Host:
    """Returns what a plan of a reduction behind the projector needs to know of this model.

    Signals of several crops, or of merged patches, tell of each token by itself (a mean of its
    parts), and not what tokens are to each other.

    Args:
      slots: V, tokens of an image, or of all images that share a pool.
    """
    own, of_patches = frozenset({'layer', 'depth', 'slots'}), frozenset(PER_TOKEN)
    if self.projector_grid(slots):
      own |= {'grid', 'one_sequence'}
      of_patches |= {*FROM_TOWER} if self.side == 1 else set()
    # What a compressor makes is no patch of the tower's.
    own |= frozenset() if self.compressor else of_patches
    offers = own & self.tower.host.offers | TEXT_SIGNALS
    if isinstance(self.tower, QwenVision):
      offers |= {'grids'}
    whole, left = self.passed_on
    # A cell that a reduced tower left empty would shift the places of those behind it.
    empties = isinstance(self.tower, QwenVision) and self.tower.plan and self.tower.plan.events
    if whole == left and not empties and not self.joins_crops:
      tiled = isinstance(self.tower, ViT) and self.side == 1 and not self.compressor
      offers |= CROP_SIGNALS if tiled else CROP_SIGNALS - {'tiling'}
    # A tower that ends in the language model's width has its projector inside.
    if self.projection:
      offers |= {'vision_features', 'project'}
    watches = frozenset() if self.compressor else self.tower.host.offers
    return Host(1, slots, 0, offers, watches=watches)

  def each_image(self, layout: tuple[int, int, int]) -> int:
    """Returns the slots of an image behind the tower, before the projector's reduction.

    Args:
      layout: (C, I, V) of `Images`.

    Raises:
      ValueError: as `models.backbones.spans.grids_read`.
    """
    crops, _, tokens = layout
    if self.compressor and self.joins_crops:
      return self.compressor.slots(spans.grids_read(self.compressor, self.tower.grid, layout)[1])
    whole, left = self.passed_on
    if not tokens:
      return left
    return min(tokens, crops * left) if left < whole else tokens

  def visual_slots(self, layout: tuple[int, int, int]) -> int:
    """Returns the slots of a sequence that are not for its ids, after tower and projector.

    Args:
      layout: (C, I, V) of `Images`.
    """
    images, reduction = layout[1], self.projector_reduction
    if reduction is None or not reduction.plan.events:
      return images * self.each_image(layout)
    return reduction.plan.events[-1].slots_out * (images if reduction.across == 'image' else 1)

  def __call__(self, ids: Array, valid: Array, images: Images | None,
               marks: Mapping[str, Array] | None = None) -> tuple[Array, Outputs]:
    """Returns scores of the next token after every token that is left.

    Args:
      ids: int[B, T].
      valid: bool[B, T], False for padding.
      images: None for text alone.
      marks: {name: bool[B, T]}, ids that something singles out, by the name of the stat that they
        become: 'question', what images see of the text where the language model has mask='mutual'
        (else all text behind them), and what methods behind the projector read of it (else all
        text), so give it where the ids hold an answer; 'salient', the words that `duet_vlm` asks.

    Returns:
      Logits float32[B, N, vocabulary], and the dict of LM, with 'sequence' (the TokenSet that LM
      read), 'slot' int32[B, T] (where each id went, ops/splice.py), and with images those of
      `encode_images`.
    """
    tokens, out = self.read(ids, valid, images, marks)
    return self.logits(tokens.x), out

  def read(self, ids: Array, valid: Array, images: Images | None,
           marks: Mapping[str, Array] | None = None) -> tuple[TokenSet, Outputs]:
    """Returns what `__call__` makes logits of, and its dict."""
    tokens, aux = self.sequence(ids, valid, images, marks)
    read, out = self.lm.read(tokens, memory=aux.pop('memory'))
    for name in ('losses', 'overflow'):
      out[name] = out[name] | aux.pop(name, {})
    return read, out | aux

  def logits(self, x: Array) -> Array:
    """Returns float32[..., vocabulary] of features that `read` gave."""
    return self.lm.logits(x)

  def prefill(self, ids: Array, valid: Array, images: Images | None,
              marks: Mapping[str, Array] | None = None, *, room: int) -> tuple[Array, Cache]:
    """Reads a prompt as LM does: logits float32[B, vocabulary] after its last token, and the cache.
    """
    tokens, aux = self.sequence(ids, valid, images, marks)
    return self.lm.prefill(tokens, room=room, memory=aux['memory'])

  def decode(self, ids: Array, cache: Cache) -> tuple[Array, Cache]:
    """Reads one more token a row, as LM does."""
    return self.lm.decode(ids, cache)

  def extend(self, ids: Array, cache: Cache, valid: Array, images: Images | None = None, *,
             room: int | None = None) -> tuple[Array, Cache]:
    """Reads a chunk of text, or of text and images, into a cache as LM does.

    Raises:
      ValueError: as LM does; or images of which layers read a memory.
    """
    if images is not None and self.lm.reader:
      raise ValueError(f'{type(self.compressor).__name__} leaves a memory beside tokens, which all '
                       'chunks of a prompt read: give images to prefill')
    return self.lm.extend(self.sequence(ids, valid, images)[0], cache, room=room)

  def sequence(self, ids: Array, valid: Array, images: Images | None,
               marks: Mapping[str, Array] | None = None) -> tuple[TokenSet, Outputs]:
    """Returns the tokens that the language model reads, and auxiliary outputs (`__call__`)."""
    embedded = self.lm.embed(ids).x
    aux: Outputs = {}
    visual, slots, memory = None, None, None
    if images is not None:
      visual, visual_slots, aux = self.encode_images(
          images, self._text(ids, valid, embedded, marks))
      memory = self._of_rows(aux.pop('memory', None), (ids == self.image_token) & valid, images)
      slots = None if visual_slots is None else ids.shape[1] + visual_slots
    axes = len(self.lm.rope.sections)
    spliced = visual if visual and visual.x.shape[2] else None
    tokens, slot = splice(embedded, valid, ids == self.image_token, spliced, side=self.pad_side,
                          slots=slots, axes=axes)
    if self.lm.unmerging != 'none' and images is not None:
      tokens = self._unmerged(tokens, slot, ids, valid, images, aux['tower_tokens'])
    if images is not None and FRAME in tokens.stats:
      group = tokens.stats['group']
      frame = group * images.pixels.shape[1] + tokens.stats[FRAME]
      tokens = tokens.replace(stats=tokens.stats | {FRAME: jnp.where(group >= 0, frame, -1)})
    if self.lm.mask == 'summary':
      marks = {SUMMARY: ids == jnp.asarray(self.lm.summary_token), **(marks or {})}
    for name, marked in (marks or {}).items():
      stat = put(jnp.zeros(tokens.kind.shape, bool), slot, marked & valid)
      tokens = tokens.replace(stats=tokens.stats | {name: stat & (tokens.kind == TEXT)})
    told = {**aux, 'sequence': tokens, 'slot': slot, 'visual': visual, 'memory': memory}
    if images is not None and self.deepstack:
      tokens = tokens.replace(added={read: self._added(seen, ids, valid, images, aux)
                                     for seen, read in self.deepstack})
    return tokens, told

  def _of_rows(self, memory: Memory | None, placeholders: Array, images: Images) -> Memory | None:
    """Returns what rows have of a memory of crops, of which those without a placeholder tell none.

    Raises:
      ValueError: images of several crops, or laid out otherwise than in raster order.
    """
    if memory is None:
      return None
    if images.index is not None:
      raise ValueError(f'{type(self.compressor).__name__} leaves a memory of images of one crop '
                       'each in raster order: leave index and weight out of Images')
    there = jnp.arange(images.pixels.shape[1])[None] < placeholders.sum(axis=1, keepdims=True)
    return memory.of_rows(there, self.visual_slots(images.layout))

  def _check_deepstack(self) -> None:
    """Raises unless the tower's layers can be added to the language model's."""
    tower, plan = self.tower, self.tower.plan
    reduced = (plan is not None and plan.events) or self.projector_reduction is not None
    if not isinstance(tower, ViT) or tower.window or reduced or self.lm.unmerging != 'none':
      raise ValueError(f'deepstack={self.deepstack} adds features token by token, so the tower '
                       'must be a ViT without windows, nothing may be reduced before the language '
                       "model, and unmerging be 'none': leave deepstack out, or the others")
    for seen, read in self.deepstack:
      if seen >= self.tower_depth or read >= self.lm.depth:
        raise ValueError(f'deepstack has layers ({seen}, {read}), and the tower has layers 0 to '
                         f'{self.tower_depth - 1}, the language model 0 to {self.lm.depth - 1}')

  def _check_side(self) -> None:
    """Raises unless the tower's patches are a grid that can be divided."""
    tower = self.tower
    if not isinstance(tower, ViT) or tower.window or self.deepstack or self.newline or any(
        length % self.side for length in tower.grid):
      raise ValueError(f'side={self.side} joins patches of a grid of {tower.grid}, so it must '
                       'divide both, and the tower be a ViT without windows, deepstack and '
                       'newline: change it')

  def _check_compressor(self, compressor: Compressor) -> None:
    """Raises unless the compressor can read what the tower gives."""
    tower = self.tower
    if not isinstance(tower, ViT) or tower.window or self.newline or self.deepstack or (
        self.projection or self.side > 1 or self.frames or self.lm.unmerging != 'none'):
      raise ValueError(f'{type(compressor).__name__} projects crops of a ViT without windows, and '
                       "goes with no other projection: set projection='' and side=1, and leave "
                       'newline, deepstack, frames and unmerging out')
    compressor.slots(tower.grid)
    spans.check(compressor, self.lm)
    if self._reads(GUIDE):
      raise ValueError(f'{type(compressor).__name__} reads what is asked from a text tower beside '
                       'the vision tower, which this model does not have: set '
                       "compressor.args.guide='none'")
    if self.projector_reduction and compressor.reader(self.lm):
      raise ValueError(f'{type(compressor).__name__} leaves a memory that goes with all of its '
                       'tokens: leave reduce.projector out')
    if not self._reads(LEVELS):
      return
    levels: tuple[int, ...] = getattr(compressor, LEVELS)
    if max(levels) >= self.tower_depth:
      raise ValueError(f'{type(compressor).__name__} has levels={levels}, and the tower runs '
                       f'layers 0 to {self.tower_depth - 1}: set compressor.args.levels')
    if tower.plan and tower.plan.events:
      raise ValueError(f'{type(compressor).__name__} reads layers of all patches, of which '
                       f'{tower.plan.name} leaves fewer in the tower: choose one of the two')

  def _reads(self, what: str) -> bool:
    """Returns whether the compressor reads this beside the tower's last features."""
    return self.compressor is not None and what in self.compressor.reads

  def _added(self, layer: int, ids: Array, valid: Array, images: Images, aux: Outputs) -> Array:
    """Returns what a layer of the tower adds to each slot of a sequence, float[B, N, D]."""
    tokens = aux['tower_tokens']
    x = aux['tower']['hidden'][layer][:, self.special:]
    deep, _ = arrange(tokens.replace(x=self.projector(x) if self.projection else x), images,
                      self.end if self.newline else None)
    blank = jnp.zeros((*ids.shape, self.lm.width), deep.x.dtype)
    kept = Visual(deep.x, deep.valid)
    return splice(blank, valid, ids == self.image_token, kept, side=self.pad_side)[0].x

  def _unmerged(self, tokens: TokenSet, slot: Array, ids: Array, valid: Array, images: Images,
                crops: TokenSet) -> TokenSet:
    """The sequence with the patches that its visual tokens were merged of in the tower."""
    if images.index is not None or self.projector_reduction is not None:
      raise ValueError(f'unmerging={self.lm.unmerging!r} knows patches that a tower merged, of '
                       'images of one crop in raster order: leave out the reduction at the '
                       "projector and other layouts, or set unmerging='none'")
    shape = images.pixels.shape[:2]
    return unmerged(tokens, slot, valid, ids == self.image_token,
                    crops.owner.reshape(*shape, -1), crops.real.reshape(*shape, -1),
                    side=self.pad_side)

  def _text(self, ids: Array, valid: Array, embedded: Array,
            marks: Mapping[str, Array] | None) -> dict[str, Array] | None:
    """Returns what is read of the prompt before the language model runs, None for nothing.

    By name: signals that the projector's reduction reads, and fields of `Beside`.
    """
    reduction = self.projector_reduction
    names = set(reduction.needs & TEXT_SIGNALS if reduction else ())
    names |= {'text', 'text_valid'} if self._reads(PROMPT) else set()
    if not names and not self._reads(QUESTION):
      return None
    asked = valid & (ids != self.image_token) & (marks or {}).get('question', True)
    text = {'text': jnp.where(asked[..., None], embedded, 0), 'text_valid': asked}
    text = {name: text[name] for name in names}
    if self._reads(QUESTION):
      text[QUESTION] = self._question(ids, asked)
    return text

  def _question(self, ids: Array, asked: Array) -> Array:
    """Returns what the language model makes of a question's last id, read alone: float[B, D]."""
    if self.is_initializing():
      return jnp.zeros((len(ids), self.lm.width))
    # Text alone, so its plans, which count visual tokens, are not for it; no gradient, so nothing
    # to make again.
    reader = self.lm.clone(parent=None, name=None, plan=None, cache_plan=None, remat='none')
    variables = jax.lax.stop_gradient(self.lm.variables)
    order = jnp.argsort(~asked, axis=1, stable=True)
    question = reader.apply(variables, jnp.take_along_axis(ids, order, axis=1),
                            jnp.take_along_axis(asked, order, axis=1), method='embed')
    alone = reader.apply(variables,
                         cast(TokenSet, question).replace(padding='last'), method='read')
    last = jnp.maximum(asked.sum(axis=1) - 1, 0)
    x = cast(tuple[TokenSet, Outputs], alone)[0].x
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]

  def encode_images(self, images: Images, text: Mapping[str, Array] | None = None
                    ) -> tuple[Visual, int | None, Outputs]:
    """Runs tower, projector and the projector's reduction.

    Args:
      images: of B rows.
      text: what the reduction reads of each row's prompt, [B, T, ...], by the names of `Signals`;
        None where it reads none.

    Returns:
      The visual tokens [B, I, M, D]; the slots that all images of a row take together where they
      are not I * M, else None; and a dict: 'tower' (the tower's own dict), 'tower_tokens' (the
      TokenSet [B * C, n] that the tower passes on, projected; of a compressor that leaves a grid
      the owner of a patch is its cell's token; [B, M] of one that reads a row's crops at once),
      'layout' (index and weight as in `Images`, but of those tokens; None where each is one visual
      token), with a reduction at the projector 'projector' (the TokenSet behind it, None where it
      cuts nothing), with `patch_labels` 'patches' (logits float32[B * C, n, patch_labels] and their
      TokenSet), and 'memory', what a compressor leaves of each crop beside tokens.

    Raises:
      ValueError: no text where the reduction reads some.
    """
    needs = self.projector_reduction.needs if self.projector_reduction else frozenset()
    if text is None and (needs & TEXT_SIGNALS or self._reads(PROMPT) or self._reads(QUESTION)):
      reader = (self.projector_reduction.plan.name if self.projector_reduction else
                type(self.compressor).__name__)
      raise ValueError(f'{reader} at the projector reads the prompt, which is not here: encode '
                       'images and ids together')
    whole, tower_out = self._run_tower(images)
    if self.frames:
      stats = dict(whole.stats)
      relevance = stats.pop('relevance')
      whole, tower_out['reused'] = fuse_frames(
          self.frames, whole.replace(stats=stats), images.pixels, relevance, grid=self.tower.grid)
    tokens = without_special(whole, self.special)
    aux: Outputs = {'tower': tower_out}
    if self.patch_labels:
      aux['patches'] = self.probe(tokens.x.astype(jnp.float32)), tokens
    if self.side > 1:
      tokens = neighbours_as_one(tokens, self.tower.grid, self.side)
    if 'vision_features' in needs:
      tokens = tokens.replace(stats=tokens.stats | {FEATURES: tokens.x})
    if self.projection:
      tokens = tokens.replace(x=self.projector(tokens.x))
    if self.compressor:
      made = self._compressed(self.compressor, tokens, tower_out, text or {}, images)
      if isinstance(made, Memory):
        assert made.tokens is not None
        aux['memory'], made = made.replace(tokens=None), made.tokens
      tokens, images = made, spans.as_crops(self.compressor, images)
    aux['tower_tokens'] = tokens
    if self.compressor and len(tokens.x) == len(whole.x) and (
        after := self.compressor.grid_after(self.tower.grid)):
      cell = jnp.asarray(grids.nearest_cell(self.tower.grid, after), jnp.int32)
      aux['tower_tokens'] = tokens.replace(
          owner=jnp.broadcast_to(cell[None], (len(tokens.x), len(cell))))
    visual, aux['layout'] = arrange(tokens, images, self.end if self.newline else None)
    tiling = None
    if needs & CROP_SIGNALS:
      visual = visual.replace(stats=visual.stats | self._crops(images))
      tiling = tiling_of(images) if 'tiling' in needs else None
    if images.axes is not None:
      # A section in several parts turns each of them with a position of its own.
      parts = max(len(self.lm.rope.sections) // images.axes.shape[-1], 1)
      places = jnp.repeat(images.axes, parts, axis=-1) if parts > 1 else images.axes
      visual = visual.replace(stats=visual.stats | {'axes': places})
    if self.lm.reads_frames and images.index is not None:
      # What ends a row is of the frame before it.
      frame = jax.lax.cummax(self._crops(images)[CROP], axis=2)
      visual = visual.replace(stats=visual.stats | {FRAME: frame})
    slots = None
    if self.projector_reduction:
      special = self._special_of(whole, images) if self.projector_reduction.special else None
      rng = self.make_rng('dropout') if self.has_rng('dropout') else None
      visual, slots, outcome = reduce_visual(
          self.projector_reduction, visual, special, self.reducers,
          text={name: (text or {})[name] for name in needs & TEXT_SIGNALS}, tiling=tiling,
          num_crops=images.pixels.shape[1] if images.index is not None else 1,
          project=self._project() if 'project' in needs else None, rng=rng, mesh=self.lm.mesh)
      aux['projector'] = outcome and outcome.tokens
      if outcome:
        aux['losses'] = {f'{name}_projector': value for name, value in outcome.losses.items()}
        if outcome.overflow is not None:
          aux['overflow'] = {'projector': outcome.overflow}
    stats = {name: value for name, value in visual.stats.items() if not name.startswith('tower_')}
    axes = stats.pop('axes', None)
    stats.pop('cell', None)
    return visual.replace(stats=stats, axes=axes, extent=images.extent), slots, aux

  def _compressed(self, compressor: Compressor, tokens: TokenSet, tower_out: Outputs,
                  text: Mapping[str, Array], images: Images) -> TokenSet | Memory:
    """Returns the tokens that a compressor makes of all patches that it reads at once."""
    number, grid = spans.grids_read(compressor, self.tower.grid, images.layout)

    def read(x: Array) -> Array:
      return x.reshape(number * len(images.pixels), -1, x.shape[-1])

    levels: tuple[int, ...] = getattr(compressor, LEVELS) if self._reads(LEVELS) else ()
    rows = {name: jnp.repeat(value, number, axis=0) for name, value in text.items()}
    whole = TokenSet.create(read(put_back(tokens.x, tokens.owner)))
    return self._gathered(compressor)(whole, Beside(
        grid, tuple(read(tower_out['hidden'][level][:, self.special:]) for level in levels),
        rows.get('text'), rows.get('text_valid'), rows.get(QUESTION),
        frames=spans.crops_there(images, self.passed_on[0]) if len(grid) > 2 else None))

  def _gathered(self, compressor: Compressor) -> Callable[..., TokenSet | Memory]:
    """A compressor whose parameters each device has whole while it multiplies rows of its own."""
    mesh = self.lm.mesh
    if mesh is None or self.is_initializing():
      return compressor
    weights = jax.tree.map(lambda leaf: gathered(leaf, mesh), compressor.variables['params'])
    rngs = {'dropout': self.make_rng('dropout')} if self.has_rng('dropout') else {}
    alone = compressor.clone(parent=None, name=None)
    return cast(Callable[..., TokenSet | Memory],
                functools.partial(alone.apply, {'params': weights}, rngs=rngs))

  def _crops(self, images: Images) -> dict[str, Array]:
    """Returns the crop of its image that each visual token is of, and which patch of it."""
    each = self.passed_on[0]
    shape = images.pixels.shape[:2]
    if images.index is None:
      own = jnp.broadcast_to(jnp.arange(each, dtype=jnp.int32), (*shape, each))
      return {CROP: jnp.zeros_like(own), PATCH: own}
    assert images.weight is not None
    # Of what a token is made of, most.
    most = jnp.argmax(images.weight, axis=3, keepdims=True)
    source = jnp.take_along_axis(images.index, most, axis=3)[..., 0]
    crop = source // each - source[:, :, :1] // each
    newline = source >= shape[1] * each
    return {CROP: jnp.where(newline, -1, crop), PATCH: jnp.where(newline, -1, source % each)}

  def _project(self) -> Any:
    """The projector as a function; in float32, so that its derivative is no noise of rounding."""
    module = self.projector.clone(parent=None, name=None, dtype=jnp.float32)
    return jax.tree_util.Partial(module.apply, self.projector.variables)

  def _run_tower(self, images: Images) -> tuple[TokenSet, Outputs]:
    """Tokens [B * C, S + n], S special ones in front, and the tower's dict."""

    def crops(values: Array) -> Array:
      return values.reshape(-1, *values.shape[2:])

    if isinstance(self.tower, QwenVision):
      assert images.sizes is not None
      return self.tower(crops(images.pixels), crops(images.sizes))
    tokens, out = self.tower(crops(images.pixels))
    return tokens if isinstance(tokens, TokenSet) else out['tokens'], out

  def _special_of(self, tokens: TokenSet, images: Images) -> Visual:
    """Special tokens [B, I, S, D] of the crop that each image begins with, and their stats."""
    (batch, crops), special = images.pixels.shape[:2], self.special
    crop = jnp.broadcast_to(jnp.arange(crops)[None], (batch, crops))
    if images.index is not None:
      # Images that are not there begin anywhere.
      crop = jnp.minimum(images.index[:, :, 0, 0] // (tokens.slots - special), crops - 1)

    def pick(values: Array) -> Array:
      return take(values[:, :special].reshape(batch, crops, special, *values.shape[2:]), crop)

    with jax.named_scope('reduction'):
      x = jnp.tile(pick(tokens.x), self.side ** 2)
      stats = {name: pick(value) for name, value in tokens.stats.items()} | {FEATURES: x}
      return Visual(self.projector(x) if self.projection else x, stats=stats)


def _with_relevance(tower: ViT | QwenVision) -> ViT:
  """A tower that tells how relevant each token is to its last layer.

  Raises:
    ValueError: a tower without a grid of pixels, or with reductions.
  """
  plan = tower.plan or Plan((), ())
  if not isinstance(tower, ViT) or tower.window or plan.events:
    raise ValueError('frames are compared patch by patch, so the tower must be a ViT without '
                     'windows that keeps all tokens: leave frames out, or reduce.vision')
  if any(isinstance(reduction.method, Relevance) for reduction in plan.reductions):
    return tower
  last = depth_of(tower) - 1
  by = 'cls_attention' if tower.class_token else 'received_attention'
  # It watches alone: without events nothing calls it.
  record = Reduction('relevance', Relevance(by, last), watch=(last,))  # type: ignore[arg-type]
  return tower.clone(plan=Plan((), (*plan.reductions, record)))


def depth_of(tower: ViT | QwenVision) -> int:
  """Returns the number of a tower's layers that run."""
  layers = tower.layers if isinstance(tower, ViT) else None
  return layers[1] if layers else tower.depth


def passed_on(tower: ViT | QwenVision, side: int = 1) -> tuple[int, int]:
  """Returns the tokens of a crop that a tower passes on without its plan, and with it.

  Args:
    tower: with its plan.
    side: as of `VLM`.
  """
  if isinstance(tower, QwenVision):
    cells = tower.cells[0] * tower.cells[1]
    return cells, cells
  slots, special = tower.host.slots, tower.special
  if side > 1:
    return ((slots - special) // side ** 2,) * 2
  left = tower.plan.profile(tower.depth, slots)[depth_of(tower) - 1].left if tower.plan else slots
  return slots - special, left - special
