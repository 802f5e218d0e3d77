"""The reduction of visual tokens behind the projector (models/projectors/).

models/reduce_config.py resolves `config.reduce.projector`, and `reduce_visual` applies it.

Axes: B batch, I images of a row, V visual tokens of an image, M visual tokens after the reduction,
S special tokens of the tower, W width of the tower, D width of the language model, H heads, T ids
of a prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from models.plans.events import Plan
from models.plans.row_budgets import row_budgets
from models.reduction import Place, Reduced, ReducerParameters, reduce
from ops import assignments
from ops import tokens as tk
from ops.moves.rows import take
from ops.primitives.grids import windows
from ops.reducers.base import Reducer
from ops.reducers.method import WatchingMethod
from ops.rope import member_positions
from ops.signals import AXES, CROP_SIGNALS, Signals
from ops.splice import Visual
from ops.tokens import SPECIAL, TokenSet

Array = jax.Array

# Signals of the tower's last layer that a method behind the projector may read. Most tell of each
# token by itself; queries mean something only beside all keys that the layer attended to.
PER_TOKEN = ('keys', 'plain_keys', 'values', 'cls_attention', 'cls_logits',
             'received_attention')
FROM_TOWER = (*PER_TOKEN, 'queries')
# They travel as stats of the visual tokens, under these names.
_PREFIX = 'tower_'
FEATURES, CROP, PATCH = (f'{_PREFIX}{name}' for name in ('vision_features', 'crop', 'patch'))
ACROSS = ('image', 'prompt')
ORDERS = ('raster', 'method')


@dataclasses.dataclass(frozen=True)
class RecordSignals(Reducer):
  """Removes nothing: it watches the tower for the reduction at the projector.

  Attributes:
    plan: of that reduction: its cut names the layer whose signals are kept, its `watch` the layers
      that its method watches.
  """

  plan: Plan

  @property
  def wanted(self) -> frozenset[str]:
    """Names of the signals that it keeps."""
    return self.plan.only.method.needs & set(FROM_TOWER)

  @property
  def watch_needs(self) -> frozenset[str]:
    """Names of the signals that it keeps, and that the method watches."""
    reduction = self.plan.only
    return self.wanted | (reduction.method.watch_needs if reduction.watch else frozenset())

  @property
  def layers(self) -> tuple[int, ...]:
    """Layers of the tower that it watches, () where the method reads none."""
    cuts = [event.layer for event in self.plan.events if self.wanted]
    return tuple(sorted({*self.plan.only.watch, *cuts}))

  def watch(self, tokens: TokenSet, signals: Signals) -> dict[str, Array]:
    """Returns the method's own stats, and in the cut's layer {'tower_<name>': [B, N, ...]}."""
    stats: dict[str, Array] = {}
    if self.plan.watching(signals.layer):
      stats |= cast(WatchingMethod, self.plan.only.method).watch(tokens, signals)
    if self.plan.at(signals.layer):
      stats |= {f'{_PREFIX}{name}': _swap_attention(name, getattr(signals, name))
                for name in self.wanted}
    return stats


@dataclasses.dataclass(frozen=True)
class Relevance(Reducer):
  """Removes nothing: it takes down how relevant a tower's last layer finds each token.

  Attributes:
    by: the signal that says so, 'cls_attention' or 'received_attention'; means over heads.
    layer: the last that runs.
  """

  by: str
  layer: int

  @property
  def watch_needs(self) -> frozenset[str]:
    """Names the signal."""
    return frozenset({self.by})

  def watch(self, tokens: TokenSet, signals: Signals) -> dict[str, Array]:
    """Returns {'relevance': float32[B, N]}."""
    del tokens
    attention: Array = getattr(signals, self.by)
    return {'relevance': attention.mean(axis=1)}


@dataclasses.dataclass(frozen=True)
class ProjectorReduction:
  """A reduction of visual tokens between the projector and the language model.

  Attributes:
    plan: with one cut, of the tower's last layer that runs, or none; its slots are visual tokens.
    across: 'image', every image for itself, or 'prompt', one pool of all images of a row.
    order: of the tokens after it: 'raster', by the position of each token's anchor, or the
      'method's own.
    grid: (rows, columns) of the tokens, None where they are no grid.
    crop_grid: (rows, columns) of the patches (or cells) of a crop.
    depth: layers of the tower.
    special: S, special tokens of the tower that lead every pool, so that signals have their rows;
      0 where the method reads none.
  """

  plan: Plan
  across: str = 'image'
  order: str = 'raster'
  grid: tuple[int, int] | None = None
  crop_grid: tuple[int, int] | None = None
  depth: int = 1
  special: int = 0

  @property
  def needs(self) -> frozenset[str]:
    """Names the signals that its method reads, none where nothing is cut."""
    return self.plan.only.method.needs if self.plan.events else frozenset()


def reduce_visual(reduction: ProjectorReduction, visual: Visual, special: Visual | None,
                  reducers: ReducerParameters, *, text: Mapping[str, Array] | None = None,
                  tiling: Array | None = None, num_crops: int = 1, project: Any = None,
                  rng: Array | None = None,
                  mesh: Mesh | None = None) -> tuple[Visual, int | None, Reduced | None]:
  """Reduces visual tokens after the projector.

  Args:
    reduction: made for as many tokens as an image (or a pool) has.
    visual: x float[B, I, V, D]; stats 'tower_<name>' are signals of the tower.
    special: x float[B, I, S, D], special tokens of each image with the same stats; None for S = 0.
    reducers: holds the parameters of a learned method.
    text: the signals of each row's prompt, [B, T, ...], by name: every image of the row gets them.
    tiling: int32[B, I, 2], how each image is cut into crops; None where no method asks.
    num_crops: the most that an image has.
    project: the projector, as in `Signals`.
    rng: turns its training on.
    mesh: the devices, or None.

  Returns:
    The visual tokens, x float[B, I, M, D]; the slots of a pool, which all images of a row share
    under across='prompt', else None; and what became of the tokens, a row an image or a pool, None
    where nothing is cut.

  Raises:
    ValueError: for another number of tokens; or a method that goes by crops, across images.
  """
  batch, images, each = visual.x.shape[:3]
  together = images if reduction.across == 'prompt' else 1
  slots = together * each
  if not reduction.plan.events:
    return visual, None, None
  event, = reduction.plan.events
  if slots != event.slots_in:
    raise ValueError(f'the reduction at the projector was made for {event.slots_in} visual tokens '
                     f'and gets {slots}: make it anew with with_projector_reduction(..., '
                     'slots=...)')
  if reduction.needs & CROP_SIGNALS and together > 1:
    raise ValueError(f'{reduction.plan.name} goes by the crops or frames of one image: set '
                     "across='image', or choose another method")
  tokens, from_tower = _pools(visual, special, slots)
  of_rows = _of_rows(reduction, tokens, images // together, text, tiling)
  lead, signals = tokens.protected, Signals().replace(**from_tower, **of_rows, project=project)
  event = dataclasses.replace(event, slots_in=lead + slots, slots_out=lead + event.slots_out)
  place = Place(reduction.depth, reduction.grid, mesh=mesh, crop_grid=reduction.crop_grid,
                num_crops=num_crops, one_sequence=reduction.grid is not None)
  params = reducers(event, tokens, signals, place)
  budget, = row_budgets((event,), tokens)
  handed = event.reduction.method.hands_on
  if handed:
    event = dataclasses.replace(event, slots_out=event.slots_out - handed)
  if handed and budget is not None:
    cut = budget[:, None] < tk.count(tokens.free)
    budget -= jnp.where(cut[:, 0], handed, 0)
  outcome = reduce(event, tokens, signals, place, budget=budget, params=params, rng=rng)
  reduced = outcome.tokens
  parts = event.reduction.method.member_positions
  if parts and 'axes' in tokens.stats:
    several = member_positions(tokens.stats['axes'], outcome.assignment.dst, groups=reduced.slots,
                               parts=parts)
    reduced = reduced.replace(stats=reduced.stats | {'axes': several})
  position = jnp.where(reduced.real, reduced.pos, slots) if reduction.order == 'raster' else 0
  position = jnp.where(reduced.kind == SPECIAL, -1, position)
  order = jnp.argsort(position, axis=1, stable=True).astype(jnp.int32)
  reduced = without_special(tk.reduce(reduced, assignments.Gather(order, reduced.slots)), lead,
                            handed)
  if handed and budget is not None:
    visual_slot = jnp.arange(reduced.slots)[None] >= handed
    reduced = reduced.replace(valid=reduced.real & (cut | visual_slot))
  outcome = dataclasses.replace(outcome, tokens=reduced)
  shape = (batch, images // together, reduced.slots)
  x = reduced.x.reshape(*shape, -1)
  stats = {name: value.reshape(*shape, *value.shape[2:]) for name, value in reduced.stats.items()}
  valid = None if reduced.valid is None else reduced.valid.reshape(shape)
  image = stats.pop('image')
  if together == 1:
    return visual.replace(x=x, valid=valid, stats=stats), None, outcome
  pooled = visual.replace(x=x, valid=valid, stats=stats)
  return _spread_pool(pooled, image, images), reduced.slots, outcome


def _of_rows(reduction: ProjectorReduction, tokens: TokenSet, pools: int,
             text: Mapping[str, Array] | None, tiling: Array | None) -> dict[str, Array]:
  """Returns the signals that tell of whole rows of tokens, by name.

  Args:
    reduction, text, tiling: as of `reduce_visual`.
    tokens: a row a pool.
    pools: of each row of the batch.
  """
  rows = {name: jnp.repeat(value, pools, axis=0) for name, value in (text or {}).items()}
  if 'grids' in reduction.needs:
    # Rows and columns are the last of a position's axes, counted from the image's first token.
    ends = jnp.where(tokens.real[:, :, None], tokens.stats['axes'][:, :, -2:], 0)
    rows['grids'] = jnp.max(ends, axis=1) + 1
  if tiling is not None:
    rows['tiling'] = tiling.reshape(-1, 2)
  return rows


def _spread_pool(pooled: Visual, image: Array, images: int) -> Visual:
  """Gives every image all slots of its row's pool, of which it holds its own.

  Args:
    pooled: x float[B, 1, M, D].
    image: int32[B, 1, M], the image of each slot.
    images: I.
  """
  own = image == jnp.arange(images, dtype=jnp.int32)[None, :, None]
  own = own if pooled.valid is None else own & pooled.valid

  def spread(values: Array) -> Array:
    return jnp.broadcast_to(values, (len(values), images, *values.shape[2:]))

  return pooled.replace(x=spread(pooled.x), valid=own, stats=jax.tree.map(spread, pooled.stats))


def _pools(visual: Visual, special: Visual | None,
           slots: int) -> tuple[TokenSet, dict[str, Array]]:
  """Returns a row for every `slots` visual tokens, with stats 'image', and the tower's signals.

  Special tokens of an image lead its row.
  """

  def rows(values: Array) -> Array:
    return values.reshape(-1, slots, *values.shape[3:])

  batch, images, each = visual.x.shape[:3]
  image = jnp.broadcast_to(jnp.arange(images, dtype=jnp.int32)[None, :, None],
                           (batch, images, each))
  tokens = TokenSet.create(
      rows(visual.x), valid=None if visual.valid is None else rows(visual.valid),
      stats={'image': rows(image)} | {name: rows(value) for name, value in visual.stats.items()})
  if special is not None:
    tokens = _behind(special, tokens)
  from_tower = {name for name in tokens.stats if name.startswith(_PREFIX)}
  signals = {}
  for name in from_tower:
    signal = name.removeprefix(_PREFIX)
    signals[signal] = _swap_attention(signal, tokens.stats[name])
  stats = {name: value for name, value in tokens.stats.items() if name not in from_tower}
  return tokens.replace(stats=stats), signals


def _behind(special: Visual, tokens: TokenSet) -> TokenSet:
  """Puts tokens [B * I, V] behind special ones [B, I, S], which have the tower's stats alone."""
  lead = special.x.shape[2]

  def join(first: Array, values: Array) -> Array:
    first = first.reshape(-1, lead, *first.shape[3:])
    return jnp.concatenate([first.astype(values.dtype), values], axis=1)

  def fill(value: int | bool, values: Array) -> Array:
    return jnp.pad(values, ((0, 0), (lead, 0), *[(0, 0)] * (values.ndim - 2)),
                   constant_values=value)

  stats = {name: join(special.stats[name], value) if name in special.stats else fill(-1, value)
           for name, value in tokens.stats.items()}
  return TokenSet.create(
      join(special.x, tokens.x), pos=fill(-1, tokens.pos), kind=fill(SPECIAL, tokens.kind),
      valid=None if tokens.valid is None else fill(True, tokens.valid), stats=stats, protected=lead)


def without_special(tokens: TokenSet, special: int, keep: int = 0) -> TokenSet:
  """Returns tokens [B, N] without the first `special`: neither as slots nor as original tokens.

  The first `keep` of these stay as slots.
  """
  if not special:
    return tokens
  index = jnp.arange(special, tokens.slots, dtype=jnp.int32)
  index = jnp.concatenate([jnp.arange(keep, dtype=jnp.int32), index]) if keep else index
  index = jnp.broadcast_to(index, (len(tokens.x), *index.shape))
  patches = tk.reduce(tokens, assignments.Gather(index, tokens.slots))
  return patches.replace(owner=patches.owner[:, special:], protected=0)


def neighbours_as_one(tokens: TokenSet, grid: tuple[int, int], side: int) -> TokenSet:
  """Makes one token of every `side` x `side` patches, their features one after another.

  InternVL 1.5 (Chen et al., 2024), arXiv:2404.16821, Sec. 3.2. A patch that was merged has the
  features of its group, and one that was dropped has zeros.

  Args:
    tokens: x float[B, n, W] of patches in raster order, with stats.
    grid: (rows, columns) of the patches.
    side: divides both.

  Returns:
    x float[B, V, side * side * W], V = rows * columns / side^2; of each stat the mean.
  """

  def grouped(values: Array) -> Array:
    return windows(put_back(values, tokens.owner), grid, (side, side))

  x = grouped(tokens.x)
  x = x.reshape(*x.shape[:2], -1)
  return TokenSet.create(x, stats={name: grouped(value).mean(axis=2)
                                   for name, value in tokens.stats.items()})


def put_back(values: Array, owner: Array) -> Array:
  """Gives every patch what its token has: [B, n, ...] -> [B, N, ...].

  A patch that was merged has what its group has, and one that was dropped has zeros.

  Args:
    values: of tokens.
    owner: int32[B, N], the token that holds each patch, -1 for none.
  """
  there = (owner >= 0).reshape(*owner.shape, *(1,) * (values.ndim - 2))
  return jnp.where(there, take(values, jnp.maximum(owner, 0)), 0)


def _swap_attention(name: str, value: Array) -> Array:
  """Attention [B, H, N] as stats [B, N, H], and back; other signals have tokens in front anyway."""
  return jnp.swapaxes(value, 1, 2) if AXES[name] == tuple('BHN') else value
