"""What a step of decoding reads and holds under methods on the cache, on devices not attached.

  python -m lib.cost.decode_step --targets=cpu,v5e:2x4,h100:1 --methods=none,snapkv,adakv

Compiles a step of two layers of a model (Llama 3.1 8B unless told otherwise) behind a long prompt,
for one device, and writes a row of JSON each: MB (2^20 bytes) of what the heads hold by the budget,
of the cache as it is allocated, of weights, of temporaries, and of what the step moves
(`lib.cost.hlo.moved`), with its ratio to weights and what the heads hold. Compilers for devices
come with requirements-targets.txt.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from lib.cost import hlo, topology
from lib.runtime import cli
from models.backbones.lm import LM
from models.checkpoints.lm_config import make_lm
from models.plan import make_cache_plan
from models.storage import to_storage

DEPTH = 2
# Logits cost what they cost, whatever the cache.
VOCABULARY = 1024


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_list('targets', ['cpu'], 'Devices, as lib/cost/topology.py names them, and cpu.')
  flags.DEFINE_list('methods', ['none'], 'Methods on the cache; none for a whole one.')
  flags.DEFINE_string('model', 'llama3.1_8b', 'A name in models/families.py.')
  flags.DEFINE_integer('rows', 1, 'Rows of the batch.', lower_bound=1)
  flags.DEFINE_integer('slots', 32768, 'Tokens of the prompt.', lower_bound=1)
  flags.DEFINE_integer('room', 256, 'Tokens that may be decoded.', lower_bound=1)
  flags.DEFINE_float('keep_ratio', 0.25, 'Share of the entries that stay.')


def main(argv: Sequence[str]) -> None:
  """Prints a row for each target and method."""
  del argv
  given = flags.FLAGS
  lm = make_lm(given.model, depth=DEPTH, vocabulary=VOCABULARY, dtype=jnp.bfloat16)
  for target in given.targets:
    for method in given.methods:
      print(json.dumps(measure(lm, target, method, rows=given.rows, slots=given.slots,
                               room=given.room, ratio=given.keep_ratio)), flush=True)


def measure(lm: LM, target: str, method: str, *, rows: int, slots: int, room: int,
            ratio: float) -> dict[str, Any]:
  """Returns the row of a target and a method.

  Args:
    lm: without plans.
    target: devices, of which one is compiled for.
    method: on the cache, 'none' for a whole one.
    rows: B.
    slots: tokens of the prompt.
    room: tokens that may be decoded.
    ratio: share of the entries that stay.

  Raises:
    ValueError: an unknown target or method; ModuleNotFoundError: a compiler that is missing.
  """
  device, kept = _device(target), slots
  if method != 'none':
    plan = make_cache_plan({'method': method, 'keep_ratio': ratio}, lm.host(slots))
    lm, kept = lm.clone(cache_plan=plan), plan.events[0].slots_out
  sharding = jax.sharding.SingleDeviceSharding(device)

  def on_device(tree: Any, dtype: Any = None) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, dtype or leaf.dtype, sharding=sharding), tree)

  weights = jax.eval_shape(lambda key: to_storage(lm.clone(cache_plan=None).init(
      key, jnp.zeros((1, 4), jnp.int32))['params'], storage='unstacked'), jax.random.key(0))
  weights = {'params': on_device(weights, lm.dtype)}
  _, cache = jax.eval_shape(functools.partial(lm.apply, room=room, method='prefill'), weights,
                            jax.ShapeDtypeStruct((rows, slots), jnp.int32))
  program = jax.jit(functools.partial(lm.apply, method='decode'), donate_argnums=2).lower(
      weights, jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=sharding),
      on_device(cache)).compile(compiler_options=hlo.OPTIONS.get(device.platform, {}))
  entry = 2 * lm.kv_heads * lm.head_width * jnp.dtype(lm.dtype).itemsize
  held, read = rows * lm.depth * kept * entry, _bytes(weights['params']['stack'])
  memory = program.memory_analysis()
  assert memory is not None
  moved = hlo.moved(str(program.as_text()))
  return {'target': target, 'method': method, 'rows': rows, 'held_mb': _mb(held),
          'room_mb': _mb(rows * lm.depth * room * entry), 'allocated_mb': _mb(_bytes(cache.layers)),
          'updated_in_place_mb': _mb(memory.alias_size_in_bytes), 'weights_mb': _mb(read),
          'temporary_mb': _mb(memory.temp_size_in_bytes), 'moved_mb': _mb(moved),
          'ratio': round(moved / (read + held), 3)}


def _device(target: str) -> Any:
  if target == 'cpu':
    return jax.devices('cpu')[0]
  return topology.topology_mesh(target, {'data': topology.count(target)}).devices.flat[0]


def _bytes(tree: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _mb(size: int) -> float:
  return round(size / 2 ** 20, 1)


if __name__ == '__main__':
  define_flags()
  cli.run(main)
