"""The device mesh, and where arrays live on it.

Axes of the mesh: data (batch only), fsdp (batch, and parameters in slices), tensor (heads and MLP
columns), sequence (reserved for long inputs).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models.reduction import BATCH_AXES
from ops import choices

AXES = ('data', 'fsdp', 'tensor', 'sequence')


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """Makes a mesh over `devices` (all of them if None).

  Args:
    sizes: devices along each of `AXES`; a missing axis has one, and one axis may be -1: the rest.
    devices: in order; only as many as the sizes ask for are used.

  Raises:
    ValueError: for an unknown axis, sizes that do not divide, or too few devices.
  """
  devices = jax.devices() if devices is None else devices
  for axis in sizes:
    choices.check('mesh axis ', axis, AXES)
  shape = [sizes.get(axis, 1) for axis in AXES]
  if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
    raise ValueError(f'mesh {dict(sizes)} is impossible: sizes are positive, and one may be -1')
  fixed = math.prod(size for size in shape if size != -1)
  if -1 in shape:
    if len(devices) % fixed:
      raise ValueError(f'mesh {dict(sizes)} does not divide {len(devices)} devices: choose sizes '
                       'whose product does')
    shape[shape.index(-1)] = len(devices) // fixed
  count = math.prod(shape)
  if count > len(devices):
    raise ValueError(f'mesh {dict(sizes)} needs {count} devices and there are {len(devices)}: '
                     'make it smaller, or use -1 for the rest')
  # Auto, not the default Explicit axes: merging with a scatter has no explicit sharding rule.
  return Mesh(np.asarray(devices[:count]).reshape(shape), AXES,
              axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of a batch, divided over the batch axes."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, PartitionSpec())


def make_shardings(tree: Any, rules: Sequence[tuple[str, Sequence[str | None]]], mesh: Mesh, *,
                   min_size_to_shard: int = 2 ** 12) -> Any:
  """Shardings for parameters, and for optimizer state that mirrors them.

  The first rule whose pattern is found in a leaf's path gives the axes from the back ('tensor' or
  None a dimension, missing ones in front are None). With an fsdp axis, the largest other dimension
  that it divides is sliced too, never the layer axis of stacked blocks, never a small array.

  Args:
    tree: of arrays or ShapeDtypeStructs.
    rules: (regular expression, mesh axis or None for the last dimensions), in order.
    mesh: from `make_mesh`.
    min_size_to_shard: elements below which fsdp leaves an array whole.

  Returns:
    The tree with a NamedSharding in place of each leaf.

  Raises:
    ValueError: for a leaf that no rule matches, one that has fewer dimensions than its rule, and
      one that a rule's axis does not divide.
  """
  compiled = [(re.compile(pattern), tuple(axes)) for pattern, axes in rules]

  def one(path: Any, leaf: Any) -> NamedSharding:
    name = '/'.join(str(getattr(p, 'key', getattr(p, 'name', getattr(p, 'idx', p)))) for p in path)
    if leaf.ndim == 0:
      return replicated(mesh)
    axes = next((axes for pattern, axes in compiled if pattern.search(name)), None)
    if axes is None:
      raise ValueError(f'parameter {name!r} of shape {leaf.shape} matches no sharding rule: add '
                       f'one to config.sharding; the patterns are '
                       f'{", ".join(pattern.pattern for pattern, _ in compiled)}')
    if len(axes) > leaf.ndim:
      raise ValueError(f'parameter {name!r} of shape {leaf.shape} has fewer dimensions than the '
                       f'rule that it matches names axes, {axes}: put a rule for it before that '
                       'one in config.sharding')
    spec = [None] * (leaf.ndim - len(axes)) + list(axes)
    for size, axis in zip(leaf.shape, spec, strict=True):
      if axis is not None and size % mesh.shape[axis]:
        raise ValueError(f'parameter {name!r} of shape {leaf.shape} cannot be divided {spec}: '
                         f'{size} is not a multiple of the {mesh.shape[axis]} devices along '
                         f'{axis!r}; change the mesh or the rule')
    # Stacked blocks carry the layer axis in front: a scan reads it whole.
    first = 1 if 'blocks' in name.split('/') else 0
    sliceable = [d for d in range(first, leaf.ndim)
                 if spec[d] is None and leaf.shape[d] % mesh.shape['fsdp'] == 0]
    if mesh.shape['fsdp'] > 1 and leaf.size >= min_size_to_shard and sliceable:
      spec[max(sliceable, key=lambda d: leaf.shape[d])] = 'fsdp'
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree_util.tree_map_with_path(one, tree)


def shapes(tree: Any, shardings: Any) -> Any:
  """Returns the ShapeDtypeStructs of a tree of arrays, each with its sharding."""
  return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      tree, shardings)


def put(batch: Any, mesh: Mesh) -> Any:
  """Puts this process's rows of a batch into global arrays, sharded over the batch axes."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
