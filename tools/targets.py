"""Compiles ViT-B/16 for TPUs and GPUs that are not attached, with their real compilers.

  python -m tools.targets                        (results/targets.json and a table)
  python -m tools.targets --targets=v5e:2x4 --methods=tome,topk

For each target: the training step unreduced and reduced, and the evaluation step under every
method. Prints bytes a device, collectives and compile time, and fails where a reduction adds a
collective or raises the peak, the most bytes that live at once, above that of the unreduced step.
A method that acts inside attention sees its map, so it is held to the unreduced step with XLA's
attention, which has that map too. A step may hold what its method asks for: `allowance`.

A target's rows replace those that the file held for it; other targets keep theirs.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags
from jax.sharding import Mesh, NamedSharding

import train
from configs import digits
from lib.cost import hlo
from lib.cost import vit as vit_cost
from lib.cost.topology import EXAMPLES, count, missing, topology_mesh
from lib.report import measuring, tables
from lib.report.rows import Row, update_json
from lib.runtime import cli, sharding, timing
from lib.tasks.image import loss
from models.backbones.vit import ViT, make_vit
from models.build import build
from models.plan import make_method, methods
from models.storage import fastest_storage, to_storage
from ops import choices, platforms

# Tests import several tools at once, whose flags share their names.
TARGETS = flags.DEFINE_list('targets', list(EXAMPLES), 'Which devices.', allow_override=True)
METHODS = flags.DEFINE_list('methods', None, 'Which methods; all by default.', allow_override=True)
OUT = flags.DEFINE_string('out', 'results/targets.json', 'Where the rows go.', allow_override=True)

ROWS_A_DEVICE = 32
REDUCE = {'layers': (6,), 'keep_ratio': 0.6}
COLUMNS = ('target', 'step', 'method', 'peak_mb', 'output_mb', 'collectives', 'compile_s', 'fault')


HEAD = ('target', 'step', 'method')  # What tells a row from others.

# Something to compile, and the shapes that it takes.
Step = tuple[Any, tuple[Any, ...]]


class Compiler:
  """Compiles steps for one target, and holds each against unreduced ones, which must come first."""

  def __init__(self) -> None:
    self._unreduced: dict[str, Row] = {}

  def measure(self, head: Row) -> Row:
    """Returns the other keys of a row, which is printed as soon as it is there.

    Raises:
      ValueError: the unreduced step could not be compiled.
    """
    row = {**head, **compiled(head['target'], head['step'], head['method'])}
    if head['method'] == 'none':
      self._unreduced[head['step']] = row
    row['fault'] = fault(row, self._unreduced)
    print(json.dumps(row), flush=True)
    return row


def main(argv: Sequence[str]) -> None:
  """Compiles everything, shows it, and fails if a reduction made anything worse."""
  del argv
  for target in TARGETS.value:
    reason = missing(target)
    if reason:
      raise ValueError(reason)
  rows: list[Row] = []
  for target in TARGETS.value:
    own = measuring.measure_rows(heads(target), Compiler().measure)
    update_json(OUT.value, {target: {
        'machine': timing.machine(), 'model': 'ViT-B/16, bfloat16, 224 px',
        'rows_a_device': ROWS_A_DEVICE, 'rows': own}})
    rows += own
  good = measuring.measured(rows)
  if good:
    print(tables.table(good, COLUMNS))
  measuring.check_faults(rows, HEAD)


def heads(target: str) -> list[Row]:
  """Returns what to compile for a target, the unreduced steps before what is held against them.

  Raises:
    ValueError: a name that a ViT knows no method of.
  """
  offered = methods(make_vit('B/16').host)
  names = METHODS.value or sorted(set(offered) - {'none'})
  for name in names:
    choices.check('method ', name, offered)
  steps = [('train', 'none'), ('train', 'tome'), ('eval', 'none'), ('eval with a map', 'none'),
           *(('eval', name) for name in names)]
  return [{'target': target, 'step': step, 'method': method} for step, method in steps]


def fault(row: Row, unreduced: dict[str, Row]) -> str:
  """Names what a reduction made worse, '' for nothing.

  Training may gather weights in another order.

  Args:
    row: of a compiled step.
    unreduced: {step: row of the unreduced model}.

  Raises:
    ValueError: the step to compare with is not among them.
  """
  if row['method'] == 'none':
    return ''
  inside = methods()[row['method']].site == 'inside'
  step = 'eval with a map' if inside else row['step']
  if step not in unreduced:
    raise ValueError(f'there is no unreduced step {step!r} to compare with: see why it failed')
  before = unreduced[step]
  worse = []
  if row['step'] == 'eval' and row['collectives'] != before['collectives']:
    worse.append('adds a collective')
  own = row['argument_mb'] - before['argument_mb']  # Parameters of a learned method.
  for kind, allowed in (('peak_mb', own + allowance(row['method'])), ('output_mb', 0)):
    if row[kind] > before[kind] + allowed:
      worse.append(f'raises {kind}')
  return '; '.join(worse)


def allowance(method: str) -> float:
  """Computes the MB that a device may hold beside the unreduced step's peak, for a method.

  Bookkeeping for all: positions, kinds, owners, sizes, scores and indices, 256 bytes a token.
  Inside attention, the map after the cut beside the map before it. For received attention, two
  chunks of its rows (logits and shares). Rows of a map fill whole tiles of 128 numbers.
  """
  chosen = make_method(method, {})
  slots, heads, tiled = 197, 12, 256
  held = 256 * slots
  if chosen.site == 'inside':
    held += 4 * heads * tiled * math.ceil(REDUCE['keep_ratio'] * slots)
  elif 'received_attention' in chosen.needs:
    held += 4 * heads * tiled * 2 * 32
  return ROWS_A_DEVICE * held / 2 ** 20


def compiled(target: str, step: str, method: str) -> dict[str, Any]:
  """Compiles one step of one method for one target; returns bytes, collectives and seconds."""
  devices = count(target)
  sliced = min(8, devices) if step == 'train' else 1
  mesh = topology_mesh(target, {'data': devices // sliced, 'fsdp': sliced, 'tensor': 1,
                                'sequence': 1})
  model = {'variant': 'B/16', 'dtype': 'bfloat16', 'remat': 'none'}
  reduce = None if method == 'none' else {'method': method, **REDUCE}
  platform = mesh.devices.flat[0].platform
  if step == 'eval with a map':
    model['implementation'] = 'xla'
  vit = build(model, reduce, macs=vit_cost.solver, mesh=mesh, platform=platform)
  batch = ROWS_A_DEVICE * devices
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  images = jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.float32, sharding=rows)
  run: Any
  with platforms.made_for(platform):
    run, arguments = (training if step == 'train' else evaluation)(vit, mesh, images, rows, whole)
    program, seconds = timing.compile_seconds(run.lower(*arguments),
                                              options=hlo.OPTIONS[platform])
  counts = hlo.operations(program.as_text())
  return {**hlo.memory(program),
          'collectives': ' '.join(f'{name} {count}' for name, count in sorted(counts.items()))
                         or 'none',
          'compile_s': round(seconds, 1)}


def evaluation(vit: ViT, mesh: Mesh, images: jax.ShapeDtypeStruct, rows: NamedSharding,
               whole: NamedSharding) -> Step:
  """Returns the step that makes logits of a batch.

  Parameters are whole on every device, so that nothing need be gathered.

  Args:
    vit: the model.
    mesh: its devices.
    images: their shape.
    rows, whole: shardings of a batch, and of what every device holds.
  """
  shapes = jax.eval_shape(functools.partial(start, vit), jax.random.key(0))
  storage = fastest_storage(vit.plan, platform=mesh.devices.flat[0].platform)
  shapes = jax.eval_shape(functools.partial(to_storage, storage=storage), shapes)
  shardings = jax.tree.map(lambda _: whole, shapes)
  run = jax.jit(lambda params, images: vit.apply({'params': params}, images)[0],
                out_shardings=rows)
  return run, (sharding.shapes(shapes, shardings), images)


def training(vit: ViT, mesh: Mesh, images: jax.ShapeDtypeStruct, rows: NamedSharding,
             whole: NamedSharding) -> Step:
  """Returns a step of train.py, its state sliced over fsdp; takes what `evaluation` takes."""
  settings = digits.get_config().optimizer
  schedule = optax.constant_schedule(1e-3)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

  def state(key: jax.Array) -> train.TrainState:
    params = start(vit, key)
    return train.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), params)

  shapes = jax.eval_shape(state, jax.random.key(0))
  shardings = sharding.make_shardings(shapes, digits.get_config().sharding, mesh)
  run = jax.jit(functools.partial(train.update, functools.partial(loss, vit, settings),
                                  optimizer, settings, schedule),
                out_shardings=(shardings, whole), donate_argnums=0)
  labels = jax.ShapeDtypeStruct(images.shape[:1], jnp.int32, sharding=rows)
  key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole)
  return run, (sharding.shapes(shapes, shardings), {'image': images, 'label': labels}, key, None)


def start(vit: ViT, key: jax.Array) -> Any:
  """Makes fresh parameters, whose shapes do not depend on the mesh or on the kernel."""
  plain = vit.clone(mesh=None, implementation='xla')
  return plain.init(key, jnp.zeros((1, *vit.input_shape)))['params']


if __name__ == '__main__':
  cli.run(main)
