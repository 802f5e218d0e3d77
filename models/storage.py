"""How a stack of blocks is stored and read: one stacked tree, or a tuple of a tree a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from models.plan import Plan

Array = jax.Array


def unstack(stacked: Any, depth: int) -> tuple[Any, ...]:
  """A [L, ...] tree as a tuple of L trees."""
  return tuple(jax.tree.map(lambda leaf: leaf[layer], stacked) for layer in range(depth))


def restack(layers: tuple[Any, ...]) -> Any:
  """A tuple of L trees as one [L, ...] tree."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def to_storage(params: Any, form: str) -> Any:
  """A model's parameters with the blocks of each of its stacks in a form.

  Args:
    params: of the model or of several, such as a tower and a language model, the blocks stacked.
    form: 'stacked', which changes nothing, or 'unstacked': a tuple of layers. Decoding over a tuple
      copies no weights.
  """
  if form == 'stacked' or not isinstance(params, Mapping):
    return params
  if 'stack' not in params:
    return {name: to_storage(part, form) for name, part in params.items()}
  blocks = params['stack']['blocks']
  depth = jax.tree.leaves(blocks)[0].shape[0]
  blocks = jax.jit(unstack, static_argnums=1)(blocks, depth)
  return {**params, 'stack': {**params['stack'], 'blocks': blocks}}


def fastest_storage(plan: Plan | None, *, platform: str) -> str:
  """'stacked' or 'unstacked', whichever inference runs faster, as measured.

  On CPU a run over part of the stack, or a layer alone on a slice of it, copies its weights
  (ViT-S/16, batch 8: three cuts cost 258 ms with a tuple and 297 ms with the stack, twelve 237 and
  336 ms); without cuts the two are equal and the stack compiles faster. A GPU copies in a scan and
  not in static slices; a TPU in neither (read off the compiled programs).
  """
  if platform == 'cpu':
    return 'unstacked' if plan and plan.cuts else 'stacked'
  return 'stacked' if platform == 'tpu' else 'unstacked'


@struct.dataclass
class LayerSlice:
  """One layer's parameters, read from the stack, while their gradient goes to a slice of it.

  Attributes:
    stack: [L, ...].
    own: the slice.
    layer: index.
  """

  stack: Any
  own: Any
  layer: Any

  def picked(self) -> Any:
    """The layer's parameters."""
    found = layer_of(jax.lax.stop_gradient(self.stack), self.layer)
    return jax.tree.map(_as_if, found, self.own)


@jax.custom_jvp
def _as_if(value: Array, own: Array) -> Array:
  """A value, with the gradient of an equal one that is then never read."""
  del own
  return value


@_as_if.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
  return _as_if(*primals), tangents[1]


def layer_of(weights: Any, layer: int) -> Any:
  """One layer's parameters from either form."""
  if isinstance(weights, tuple):
    return weights[layer]
  # Outside jit the leaves may be numpy's, which no traced index can read.
  return jax.tree.map(lambda leaf: jnp.asarray(leaf)[layer], weights)
