"""Storage of a stack's blocks, one stacked tree [L, ...] or a tuple of one tree a layer; and of
parameters over devices.

Axes: L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.plans.events import Plan
from ops import choices

Array = jax.Array
# Parameters of a module; and of a stack's blocks, in either storage.
Params = Mapping[str, Any]
Weights = Params | tuple[Params, ...]
STORAGES = ('stacked', 'unstacked')


def unstack(stacked: Any, depth: int) -> tuple[Any, ...]:
  """Splits a [L, ...] tree into a tuple of L trees."""
  return tuple(jax.tree.map(lambda leaf: leaf[layer], stacked) for layer in range(depth))


def restack(layers: tuple[Any, ...]) -> Any:
  """Stacks a tuple of L trees as one [L, ...] tree."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def to_storage(params: Any, storage: str) -> Any:
  """Returns a model's parameters with the blocks of each of its stacks in a storage.

  Args:
    params: of one model or several, such as a tower and a language model, the blocks stacked, or
      those of some a tuple already.
    storage: 'stacked', which changes nothing, or 'unstacked', a tuple of layers, over which
      decoding copies no weights.

  Raises:
    ValueError: for another storage.
  """
  choices.check('storage=', storage, STORAGES)
  if storage == 'stacked' or not isinstance(params, Mapping):
    return params
  if 'stack' not in params:
    return {name: to_storage(part, storage) for name, part in params.items()}
  blocks = params['stack'].get('blocks')
  if blocks is None or isinstance(blocks, tuple):  # Of a frozen stack only what it learned is here.
    return params
  depth = jax.tree.leaves(blocks)[0].shape[0]
  blocks = jax.jit(unstack, static_argnums=1)(blocks, depth)
  return {**params, 'stack': {**params['stack'], 'blocks': blocks}}


def fastest_storage(plan: Plan | None, *, platform: str) -> str:
  """Returns the storage from which inference runs fastest, as measured.

  Args:
    plan: of the model, or None.
    platform: 'cpu', 'gpu' or 'tpu'.

  On CPU a run over part of the stack, or a layer alone on a slice of it, copies its weights
  (ViT-S/16, batch 8: three cuts cost 258 ms with a tuple and 297 ms with the stack, twelve 237 and
  336 ms); without cuts the two are equal and the stack compiles faster. A GPU copies in a scan and
  not in static slices; a TPU in neither (read off the compiled programs).
  """
  if platform == 'cpu':
    return 'unstacked' if plan and plan.events else 'stacked'
  return 'stacked' if platform == 'tpu' else 'unstacked'


def training_storage(platform: str) -> str:
  """Returns the storage from which training runs fastest, read off compiled programs.

  Args:
    platform: 'cpu', 'gpu' or 'tpu'.

  A GPU's scan over layers stacks what the backward pass needs of each, copies weights and stacks
  gradients: without remat a step of ViT-L, batch 64, on an H100 takes at least 11.7 ms a stack of
  four layers and 4.7 GB, and 8.0 ms and 2.9 GB where each layer has a tree of its own. A TPU gains
  a tenth, at several times the compile time.
  """
  return 'unstacked' if platform == 'gpu' else 'stacked'


def all_to_storage(tree: Any, storage: str) -> Any:
  """Returns any tree, such as an optimizer's state, with all parameters in it in a storage.

  Args:
    tree: whose dicts are trees of parameters, in either storage.
    storage: one of `STORAGES`.
  """
  change = functools.partial(to_storage, storage=storage) if storage == 'unstacked' else to_stacked
  return jax.tree.map(change, tree, is_leaf=lambda node: isinstance(node, Mapping))


def to_stacked(params: Any) -> Any:
  """Returns a model's parameters with the blocks of each of its stacks as one tree."""
  if not isinstance(params, Mapping):
    return params
  if 'stack' not in params:
    return {name: to_stacked(part) for name, part in params.items()}
  blocks = params['stack'].get('blocks')
  if not isinstance(blocks, tuple):
    return params
  return {**params, 'stack': {**params['stack'], 'blocks': jax.jit(restack)(blocks)}}


def layer_of(weights: Weights, layer: int | Array) -> Params:
  """Returns one layer's parameters, from either storage.

  Args:
    weights: [L, ...], or a tuple of L trees.
    layer: index; of a stack it may be traced.
  """
  if isinstance(weights, tuple):
    return weights[layer]
  # Outside jit the leaves may be numpy's, which no traced index can read.
  return jax.tree.map(lambda leaf: jnp.asarray(leaf)[layer], weights)


@struct.dataclass
class LayerSlice:
  """Reads one layer's parameters from the stack; gradients go to a slice of it.

  Attributes:
    stack: [L, ...].
    own: the slice, whose values are never read.
    layer: index.
  """

  stack: Weights
  own: Params
  layer: int | Array

  def read(self) -> Params:
    """Returns the layer's parameters."""
    values = layer_of(jax.lax.stop_gradient(self.stack), self.layer)
    return jax.tree.map(_with_gradient_of, values, self.own)


@jax.custom_jvp
def _with_gradient_of(value: Array, own: Array) -> Array:
  """`value` in the forward pass; its gradient goes to `own`, whose values are never read."""
  del own
  return value


@_with_gradient_of.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
  return _with_gradient_of(*primals), tangents[1]


def gathered(weights: Array, mesh: Mesh | None, *axes: str | tuple[str, ...] | None) -> Array:
  """Returns parameters divided along these axes of a mesh alone, for a product with rows.

  Where they are sliced over the axes that divide the batch, the partitioner would otherwise gather
  the batch of all devices. Their gradient is not constrained.
  """
  if mesh is None:
    return weights
  return _constrain_forward(weights, NamedSharding(mesh, PartitionSpec(*axes)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _constrain_forward(x: Array, sharding: NamedSharding) -> Array:
  """A sharding constraint on the forward pass alone."""
  return jax.lax.with_sharding_constraint(x, sharding)


_constrain_forward.defvjp(lambda x, sharding: (_constrain_forward(x, sharding), None),
                          lambda sharding, _, grad: (grad,))
