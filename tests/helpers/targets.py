"""Meshes of devices that are not attached."""

import pytest

from lib.cost import topology


def mesh_of(name, **axes):
  reason = topology.missing(name)
  if reason:
    pytest.skip(reason)
  return topology.topology_mesh(name, axes)
