"""Between tower and language model: the projector, and reductions behind it."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.blocks import ACTIVATIONS, dense
from models.plan import Plan
from ops import assignments
from ops import tokens as tk
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.splice import Visual
from ops.tokens import TokenSet

Array = jax.Array

# What the door may ask of the tower's last layer; attention is stored with tokens in front.
FROM_TOWER = ('keys', 'queries', 'values', 'cls_attention', 'received_attention')
ACROSS = ('image', 'prompt')
ORDERS = ('raster', 'method')


@dataclasses.dataclass(frozen=True)
class RecordSignals(Reducer):
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
class ProjectorReduction:
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


def reduce_visual(door: ProjectorReduction, visual: Visual) -> tuple[Visual, int | None,
                                                                     TokenSet | None]:
  """Visual tokens after the door, slots of a pool of all, and who was joined with whom."""
  batch, images, each = visual.x.shape[:3]
  across = images if door.across == 'prompt' else 1
  slots = across * each
  cut = door.plan.cut(0)
  if cut is None:
    return visual, None, None
  if slots != cut.slots_in:
    raise ValueError(f'the door was made for {cut.slots_in} visual tokens and gets {slots}: make '
                     'it anew with with_projector_reduction(..., slots=...)')

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
    assignment = tk.decide(method, tokens, known, num_slots=cut.slots_out)
    reduced = tk.reduce(tokens, assignment)
  if door.order == 'raster':
    place = jnp.where(reduced.real, reduced.pos, slots)
    order = jnp.argsort(place, axis=1, stable=True).astype(jnp.int32)
    reduced = tk.reduce(reduced, assignments.Gather(order, reduced.slots))
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
