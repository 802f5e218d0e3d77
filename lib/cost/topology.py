"""Meshes over accelerators that are not attached, for compiling without running.

The TPU and CUDA compilers are ordinary packages. Given a mesh of described devices,
`jax.jit(f).lower(abstract arguments).compile()` is the true program of those devices: its memory,
its collectives and its kernels, on any machine. Nothing can run on such a mesh.
"""

from __future__ import annotations

import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from jax.sharding import AxisType, Mesh

DESCRIPTIONS = pathlib.Path(__file__).parent / 'topologies'
EXAMPLES = ('v5e:2x4', 'v6e:4x4', 'v5p:4x4x4', 'h100:1', 'h100:8')
# GB (10^9 bytes) of memory a device, as its maker says.
MEMORY_GB = {'v5e': 16, 'v6e': 32, 'v5p': 95, 'h100': 80}


def topology_mesh(name: str, axis_sizes: Mapping[str, int]) -> Mesh:
  """A mesh over described devices.

  Args:
    name: a TPU slice as generation:AxB or AxBxC, or a GPU as card:count, all in one host. Cards
      are those with a file in lib/cost/topologies.
    axis_sizes: size of each mesh axis in order; their product is the number of devices.

  Raises:
    ValueError: an unknown name, or axes that do not fill the devices.
    ModuleNotFoundError: the compiler for those devices is not installed.
  """
  total, sizes = count(name), tuple(axis_sizes.values())
  if math.prod(sizes) != total:
    raise ValueError(f'{name} has {total} devices, the axes {dict(axis_sizes)} need '
                     f'{math.prod(sizes)}')
  reason = missing(name)
  if reason:
    raise ModuleNotFoundError(reason)
  # Imported here: only compiling for absent devices needs them.
  from jax.experimental import mesh_utils
  grid = mesh_utils.create_device_mesh(sizes, _devices(name), allow_split_physical_axes=True)
  return Mesh(grid, tuple(axis_sizes), axis_types=(AxisType.Auto,) * len(sizes))


def count(name: str) -> int:
  """Returns the number of devices of a topology; raises ValueError for an unknown name."""
  kind, _, shape = name.partition(':')
  if _is_tpu(name) and re.fullmatch(r'[1-9]\d*(x[1-9]\d*){1,2}', shape):
    return math.prod(map(int, shape.split('x')))
  if kind in _cards() and re.fullmatch(r'[1-9]\d*', shape):
    return int(shape)
  raise ValueError(f'unknown topology {name!r}; names look like {", ".join(EXAMPLES)}; described '
                   f'GPUs: {", ".join(_cards())}; add a file to lib/cost/topologies for another')


def missing(name: str) -> str | None:
  """Returns why `topology_mesh(name, ...)` cannot work here, None if its compiler is installed."""
  module = 'libtpu' if _is_tpu(name) else 'jax_cuda13_plugin'
  if importlib.util.find_spec(module) is not None:
    return None
  return f'compiling for {name} needs {module}; pip install -r requirements-targets.txt'


def _is_tpu(name: str) -> bool:
  return re.match(r'v\d\w*:', name) is not None


def _cards() -> list[str]:
  return sorted(path.stem for path in DESCRIPTIONS.glob('*.textproto'))


def _devices(name: str) -> Any:
  from jax.experimental import topologies
  if _is_tpu(name):
    # Keeps libtpu from asking the network which TPU this machine has.
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    return topologies.get_topology_desc(platform='tpu', topology_name=name).devices
  card, _, total = name.partition(':')
  return topologies.get_topology_desc(
      platform='cuda', topology_name=card, topology=f'1x{total}x1',
      target_config=(DESCRIPTIONS / f'{card}.textproto').read_text()).devices
