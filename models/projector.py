"""The projector between a vision tower and a language model, and the reduction of its tokens.

models/reduce_config.py resolves `config.reduce.projector`, and `reduce_visual` applies it.

Axes: B batch, I images of a row, V visual tokens of an image, M visual tokens after the reduction,
W width of the tower, D width of the language model, H heads.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from models.blocks import ACTIVATIONS, dense
from models.plan import Plan
from models.reduction import Place, Reduced, Reducers, reduce
from ops import assignments
from ops import tokens as tk
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.splice import Visual
from ops.tokens import TokenSet

Array = jax.Array

# Signals of the tower's last layer that a method behind the projector may read.
FROM_TOWER = ('keys', 'queries', 'values', 'cls_attention', 'received_attention')
# They travel as stats of the visual tokens, under these names.
_PREFIX = 'tower_'
ACROSS = ('image', 'prompt')
ORDERS = ('raster', 'method')


class Projector(nn.Module):
  """Two products with an activation between them (arXiv:2310.03744, Sec. 3.2).

  Attributes:
    width: D.
    activation: a name in `ACTIVATIONS`.
    dtype: of the products.
  """

  width: int
  activation: str
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Projects features: float[..., W] -> float[..., D]."""
    x = dense(self.width, self.dtype, name='fc1')(x)
    return dense(self.width, self.dtype, name='fc2')(ACTIVATIONS[self.activation](x))


@dataclasses.dataclass(frozen=True)
class RecordSignals(Reducer):
  """Removes nothing: it keeps signals of a layer of the tower for the reduction at the projector.

  Attributes:
    wanted: names in `FROM_TOWER`.
  """

  wanted: frozenset[str] = frozenset()

  @property
  def watch_needs(self) -> frozenset[str]:
    """Names of the signals that it keeps."""
    return self.wanted

  def watch(self, tokens: TokenSet, signals: Signals) -> dict[str, Array]:
    """Returns the signals as stats, {'tower_<name>': [B, N, ...]}."""
    del tokens
    return {f'{_PREFIX}{name}': _swap_attention(name, getattr(signals, name))
            for name in self.wanted}


@dataclasses.dataclass(frozen=True)
class ProjectorReduction:
  """A reduction of visual tokens between the projector and the language model.

  Attributes:
    plan: with one cut, of 'layer' 0.
    across: 'image', every image for itself, or 'prompt', one pool of all images of a row.
    order: of the tokens after it: 'raster', by the position of each token's anchor, or the
      'method's own.
    grid: (rows, columns) of the tokens, None where they are no grid.
  """

  plan: Plan
  across: str = 'image'
  order: str = 'raster'
  grid: tuple[int, int] | None = None


def reduce_visual(reduction: ProjectorReduction, visual: Visual, reducers: Reducers, *,
                  rng: Array | None = None,
                  mesh: Mesh | None = None) -> tuple[Visual, int | None, Reduced | None]:
  """Reduces visual tokens after the projector.

  Args:
    reduction: made for as many tokens as an image (or a pool) has.
    visual: x float[B, I, V, D]; stats 'tower_<name>' are signals of the tower.
    reducers: holds the parameters of a learned method.
    rng: turns its training on.
    mesh: the devices, or None.

  Returns:
    The visual tokens, x float[B, I, M, D]; the slots of a pool, which all images of a row share
    under across='prompt', else None; and what became of the tokens, a row an image or a pool, None
    where nothing is cut.

  Raises:
    ValueError: for another number of tokens.
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
  tokens, from_tower = _pools(visual, slots)
  signals, place = Signals().replace(**from_tower), Place(1, reduction.grid, mesh=mesh)
  params = reducers(event, tokens, signals, place)
  outcome = reduce(event, tokens, signals, place, params=params, rng=rng)
  reduced = outcome.tokens
  if reduction.order == 'raster':
    position = jnp.where(reduced.real, reduced.pos, slots)
    order = jnp.argsort(position, axis=1, stable=True).astype(jnp.int32)
    reduced = tk.reduce(reduced, assignments.Gather(order, reduced.slots))
    outcome = dataclasses.replace(outcome, tokens=reduced)
  shape = (batch, images // together, reduced.slots)
  x = reduced.x.reshape(*shape, -1)
  stats = {name: value.reshape(*shape, *value.shape[2:]) for name, value in reduced.stats.items()}
  valid = None if reduced.valid is None else reduced.valid.reshape(shape)
  image = stats.pop('image')
  if together == 1:
    return visual.replace(x=x, valid=valid, stats=stats), None, outcome
  # Every image gets all slots of the pool, and holds those that are its own.
  own = image == jnp.arange(images, dtype=jnp.int32)[None, :, None]
  own = own if valid is None else own & valid

  def spread(values: Array) -> Array:
    return jnp.broadcast_to(values, (batch, images, *values.shape[2:]))

  spread_visual = visual.replace(x=spread(x), valid=own, stats=jax.tree.map(spread, stats))
  return spread_visual, reduced.slots, outcome


def _pools(visual: Visual, slots: int) -> tuple[TokenSet, dict[str, Array]]:
  """Visual tokens, a row for every `slots` of them, with stats 'image'; and the tower's signals."""

  def rows(values: Array) -> Array:
    return values.reshape(-1, slots, *values.shape[3:])

  batch, images, each = visual.x.shape[:3]
  image = jnp.broadcast_to(jnp.arange(images, dtype=jnp.int32)[None, :, None],
                           (batch, images, each))
  stats, signals = {'image': rows(image)}, {}
  for name, value in visual.stats.items():
    if name.startswith(_PREFIX):
      signal = name.removeprefix(_PREFIX)
      signals[signal] = _swap_attention(signal, rows(value))
    else:
      stats[name] = rows(value)
  valid = None if visual.valid is None else rows(visual.valid)
  return TokenSet.create(rows(visual.x), stats=stats, valid=valid), signals


def _swap_attention(name: str, value: Array) -> Array:
  """Attention [B, H, N] as stats [B, N, H], and back; other signals have tokens in front anyway."""
  return jnp.swapaxes(value, 1, 2) if 'attention' in name else value
