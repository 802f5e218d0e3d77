"""A sweep: one trained model measured under many reductions and budgets, a row of results each."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lib.report.rows import Row
from lib.runtime import timing

# Keys of `config.data` and `config.model` that no row depends on: where things lie, how they are
# read, how the model was trained.
READING = ('data_dir', 'threads', 'prefetch_batches', 'train_split', 'augment', 'turns')
TRAINING = ('weights', 'weights_image_size', 'fresh', 'unused', 'training_patches', 'remat')


@dataclasses.dataclass(frozen=True)
class Candidate:
  """Holds a model under one reduction, compiled.

  Attributes:
    model: with its plans.
    params: in the storage that runs fastest here.
    run: (params, inputs) -> outputs.
    compile_s: seconds that compiling took.
  """

  model: Any
  params: Any
  run: Callable[[Any, Any], Any]
  compile_s: float


class Sweep(abc.ABC):
  """Measures a trained model under the reductions and budgets of `config.sweep`.

  eval.py asks for `rows`, measures each that its file of results lacks, and shows them all. A row
  without a reduction has method 'none'; the others' costs and latencies are told beside it.

  Args:
    config: the experiment, with `config.sweep`.
    workdir: of the run whose best checkpoint is measured.
    mesh: the devices.

  Attributes:
    config, mesh: the same.
    step: of the checkpoint; subclasses set it.
    weights: the `fingerprint` of its parameters, likewise.

  Raises:
    FileNotFoundError: the workdir has no checkpoint.
    ValueError: the checkpoint is another model's.
  """

  step: int
  weights: str

  def __init__(self, config: ConfigDict, workdir: pathlib.Path, mesh: Mesh):
    del workdir
    self.config, self.mesh = config, mesh

  @abc.abstractmethod
  def rows(self) -> Iterator[Row]:
    """Yields the rows to measure, the unreduced model first: the keys that identify each.

    The last one, 'made_of', is of `made_of`.
    """

  @abc.abstractmethod
  def measure(self, row: Row) -> Row:
    """Returns the other keys of a row: score, tokens, cost, latency, and 'note' ('' if none).

    Args:
      row: of `rows`.

    Raises:
      ValueError: a budget that this method cannot meet.
    """

  @abc.abstractmethod
  def show(self, rows: Sequence[Row], workdir: pathlib.Path) -> None:
    """Prints a table of measured rows, and draws them into the workdir."""

  def made_of(self, data: Mapping[str, Any], **more: Any) -> Row:
    """Returns all that a row depends on beside the keys that name it.

    Its rounds are not in it: more of them only time it more exactly.

    Args:
      data: the `config.data` of the row.
      more: of a task.
    """
    config, mesh = self.config, self.mesh
    return {
        'weights': self.weights, 'data': without(data, READING),
        'model': without(config.model, TRAINING), 'task': dict(config.get('task') or {}), **more,
        'device': mesh.devices.flat[0].device_kind,
        'mesh': {axis: size for axis, size in mesh.shape.items() if size > 1}}

  def latency(self, base: Callable[[], Any], candidate: Callable[[], Any]) -> Row:
    """Times a candidate in turns with the unreduced model, so that drift hits both alike.

    Args:
      base: runs the unreduced model on a batch.
      candidate: runs the reduced model on the same batch.

    Returns:
      median_ms, low_ms, high_ms of the candidate; speedup, speedup_low, speedup_high over the base.
      Nothing where the config asks for no rounds.
    """
    if not self.config.sweep.rounds:
      return {}
    times = timing.interleave({'base': base, 'candidate': candidate},
                              rounds=self.config.sweep.rounds)
    speedup = timing.speedup(times['base'], times['candidate'])
    own = times['candidate']
    return {'median_ms': own.median_ms, 'low_ms': own.low_ms, 'high_ms': own.high_ms,
            'speedup': speedup.ratio, 'speedup_low': speedup.low, 'speedup_high': speedup.high}


def without(settings: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
  """Returns the settings of a config that are set, but for some keys."""
  plain = ConfigDict(settings).to_dict()
  return {key: value for key, value in plain.items() if key not in keys and value is not None}


def fingerprint(params: Any) -> str:
  """Returns 12 hexadecimal digits that tell parameters from others, wherever they are placed.

  Sums of integers modulo 2^32 are the same in any order, so that devices and meshes agree, and
  every process has them.

  Args:
    params: a tree of arrays.
  """
  sums = jax.device_get(_mixed_sums(params))
  leaves = [(jax.tree_util.keystr(path), str(leaf.dtype), leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
  return digest([leaves, [int(each) for each in jax.tree.leaves(sums)]])


def digest(content: Any) -> str:
  """Returns 12 hexadecimal digits that tell content of JSON's types from other content."""
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


@jax.jit
def _mixed_sums(tree: Any) -> Any:
  return jax.tree.map(_mixed_sum, tree)


def _mixed_sum(leaf: jax.Array) -> jax.Array:
  """Sums the bits of all elements, each hashed with its index by MurmurHash3's last steps: uint32.

  https://github.com/aappleby/smhasher/blob/master/src/MurmurHash3.cpp
  """
  bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f'uint{8 * leaf.dtype.itemsize}'))
  index = jnp.zeros(leaf.shape, jnp.uint32)
  for axis, size in enumerate(leaf.shape):
    index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
  x = bits.astype(jnp.uint32) + index * jnp.uint32(0x9e3779b9)
  x = (x ^ (x >> 16)) * jnp.uint32(0x85ebca6b)
  x = (x ^ (x >> 13)) * jnp.uint32(0xc2b2ae35)
  return jnp.sum(x ^ (x >> 16), dtype=jnp.uint32)
