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

from jax.sharding import AxisType, Mesh

DESCRIPTIONS = pathlib.Path(__file__).parent / 'topologies'
EXAMPLES = ('v5e:2x4', 'v6e:4x4', 'v5p:4x4x4', 'h100:1', 'h100:8')


def topology_mesh(name: str, axis_sizes: Mapping[str, int]) -> Mesh:
  """A mesh over described devices.

  Args:
    name: a TPU slice as generation:AxB or AxBxC, or a GPU as card:count in one host. Cards are
      those with a file in lib/topologies.
    axis_sizes: size of each mesh axis in order; their product is the number of devices.

  Raises:
    ValueError: an unknown name, or axes that do not fill the devices.
    ModuleNotFoundError: the compiler for those devices is not installed.
  """
  kind, _, shape = name.partition(':')
  if re.fullmatch(r'v\d\w*', kind) and re.fullmatch(r'\d+(x\d+){1,2}', shape):
    devices = _tpu(name)
  elif _description(kind).exists() and re.fullmatch(r'[1-9]\d*', shape):
    devices = _gpu(kind, int(shape))
  else:
    raise ValueError(f'unknown topology {name!r}; names look like {", ".join(EXAMPLES)}, and GPUs '
                     f'need a file in lib/topologies')
  sizes = tuple(axis_sizes.values())
  if math.prod(sizes) != len(devices):
    raise ValueError(f'{name} has {len(devices)} devices, the axes {dict(axis_sizes)} need '
                     f'{math.prod(sizes)}')
  from jax.experimental import mesh_utils
  grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return Mesh(grid, tuple(axis_sizes), axis_types=(AxisType.Auto,) * len(sizes))


def missing(name: str) -> str | None:
  """Why `topology_mesh(name, ...)` cannot work here, or None when its packages are installed."""
  module = 'libtpu' if name.startswith('v') else 'jax_cuda13_plugin'
  if importlib.util.find_spec(module) is not None:
    return None
  return f'compiling for {name} needs {module}: pip install -r requirements-targets.txt'


def _description(card: str) -> pathlib.Path:
  return DESCRIPTIONS / f'{card}.textproto'


def _require(name: str) -> None:
  reason = missing(name)
  if reason:
    raise ModuleNotFoundError(reason)


def _tpu(name: str) -> list:
  _require(name)
  # Keeps libtpu from asking the network which TPU this machine has.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  from jax.experimental import topologies
  return topologies.get_topology_desc(platform='tpu', topology_name=name).devices


def _gpu(card: str, count: int) -> list:
  _require(card)
  from jax.experimental import topologies
  return topologies.get_topology_desc(
      platform='cuda', topology_name=card, target_config=_description(card).read_text(),
      topology=f'1x{count}x1').devices
