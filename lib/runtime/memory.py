"""Refuses what the devices' memory could never hold; keeps what a CPU program has freed."""

from __future__ import annotations

import ctypes
import math
import os
from typing import Any

import jax
from jax.sharding import Mesh

FLOAT32 = 4
# Of glibc's mallopt: option and value. No result is a mapping of its own, nothing is given back,
# and all threads share one heap, since those of their own are of 64 MB.
_MALLOC = {'mmap_max': (-4, 0), 'trim_threshold': (-1, -1), 'arena_max': (-8, 1)}


def check_batch(rows: int, *, slots: int, width: int, mesh: Mesh) -> None:
  """Raises a ValueError if the tokens of one batch alone do not fit.

  Args:
    rows: of the batch, over all devices.
    slots: tokens of a row, before any reduction.
    width: features of a token.
    mesh: the devices.
  """
  _check(f'the tokens of a batch, data.batch_size={rows} times {slots} of width {width},',
         rows * slots * width * FLOAT32, mesh)


def check_state(shapes: Any, mesh: Mesh) -> None:
  """Raises a ValueError if a training state does not fit, were it spread over all devices.

  Args:
    shapes: a tree of ShapeDtypeStructs.
    mesh: the devices.
  """
  _check('the parameters, their average and the moments of the optimizer',
         sum(math.prod(leaf.shape) * FLOAT32 for leaf in jax.tree.leaves(shapes)), mesh)


def _check(what: str, needed: int, mesh: Mesh) -> None:
  there = available(mesh)
  if needed > there:
    raise ValueError(f'{what} take {needed / 1e9:,.1f} GB, and {mesh.size} devices have '
                     f'{there / 1e9:,.1f} GB: make the batch, the images or the model smaller')


def available(mesh: Mesh) -> int:
  """Returns the bytes that the devices of a mesh have; CPUs have those of their machine."""
  stats = mesh.local_devices[0].memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit'] * mesh.size
  return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') * jax.process_count()


def keep() -> None:
  """Has glibc keep what is freed: a large result would map, and clear, pages anew in every run.

  A page's first touch may cost more than all that is copied into it. Call it before any array is
  made; other C libraries are left as they are.
  """
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is not None:
    for option, value in _MALLOC.values():
      mallopt(option, value)
