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

import functools
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import optax
from absl import flags
from tqdm import tqdm

import train
from configs import digits
from lib.cost import hlo
from lib.cost import vit as vit_cost
from lib.cost.topology import EXAMPLES, count, missing, topology_mesh
from lib.report import tables
from lib.runtime import cli, sharding, timing
from lib.tasks.image import loss
from models.backbones.vit import make_vit
from models.build import build
from models.plan import make_method, methods
from models.storage import fastest_storage, to_storage

TARGETS = flags.DEFINE_list('targets', list(EXAMPLES), 'Which devices.')
METHODS = flags.DEFINE_list('methods', None, 'Which methods; all by default.')
OUT = flags.DEFINE_string('out', 'results/targets.json', 'Where the rows go.')

ROWS_A_DEVICE = 32
REDUCE = {'layers': (6,), 'keep_ratio': 0.6}
COLUMNS = ('target', 'step', 'method', 'peak_mb', 'output_mb', 'collectives', 'compile_s', 'fault')


def main(argv):
  """Compiles everything, shows it, and fails if a reduction made anything worse."""
  del argv
  found = {}
  for target in TARGETS.value:
    reason = missing(target)
    if reason:
      raise ValueError(reason)
  host = make_vit('B/16').host
  for target in TARGETS.value:
    rows = []
    wanted = [('train', None), ('train', 'tome'), ('eval', None)]
    wanted += [('eval', name) for name in METHODS.value or sorted(set(methods(host)) - {'none'})]
    wanted.insert(3, ('eval with a map', None))
    unreduced = {}
    for step, method in tqdm(wanted, desc=target, disable=not sys.stderr.isatty()):
      row = {'target': target, 'step': step, 'method': method or 'none'}
      row |= compiled(target, step, method)
      if method is None:
        unreduced[step] = row
      row['fault'] = fault(row, unreduced)
      rows.append(row)
      print(json.dumps(row), flush=True)
    found[target] = {'machine': timing.machine(), 'model': 'ViT-B/16, bfloat16, 224 px',
                     'rows_a_device': ROWS_A_DEVICE, 'rows': rows}
    rows.update_json(pathlib.Path(OUT.value), found)
  rows = [row for target in TARGETS.value for row in found[target]['rows']]
  print(tables.table(rows, COLUMNS))
  faults = [row for row in rows if row['fault']]
  if faults:
    raise ValueError(f'{len(faults)} programs are worse than the unreduced one: '
                     + ', '.join(f"{r['target']} {r['step']} {r['method']}" for r in faults))


def fault(row, unreduced):
  """What a reduction made worse, '' for nothing. Training may gather weights in another order."""
  if row['method'] == 'none':
    return ''
  inside = methods()[row['method']].site == 'inside'
  before = unreduced['eval with a map' if inside else row['step']]
  found = []
  if row['step'] == 'eval' and row['collectives'] != before['collectives']:
    found.append('adds a collective')
  own = row['argument_mb'] - before['argument_mb']  # Parameters of a learned method.
  for kind, allowed in (('peak_mb', own + allowance(row['method'])), ('output_mb', 0)):
    if row[kind] > before[kind] + allowed:
      found.append(f'raises {kind}')
  return '; '.join(found)


def allowance(method):
  """MB that a device may hold beside the unreduced step's peak, for what a method asks.

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


def compiled(target, step, method):
  """Compiles one step of one method for one target: bytes, collectives and seconds."""
  devices = count(target)
  sliced = min(8, devices) if step == 'train' else 1
  mesh = topology_mesh(target, {'data': devices // sliced, 'fsdp': sliced, 'tensor': 1,
                                'sequence': 1})
  model = {'variant': 'B/16', 'dtype': 'bfloat16', 'remat': 'none'}
  reduce = method and {'method': method, **REDUCE}
  platform = mesh.devices.flat[0].platform
  if step == 'eval with a map':
    model['implementation'] = 'xla'
  vit = build(model, reduce, macs=vit_cost.solver, mesh=mesh, platform=platform)
  batch = ROWS_A_DEVICE * devices
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  images = jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.float32, sharding=rows)
  run, arguments = (training if step == 'train' else evaluation)(vit, mesh, images, rows, whole)
  program, seconds = timing.compile_seconds(run.lower(*arguments),
                                            options=hlo.OPTIONS[platform])
  counts = hlo.operations(program.as_text())
  return {**hlo.memory(program),
          'collectives': ' '.join(f'{name} {count}' for name, count in sorted(counts.items()))
                         or 'none',
          'compile_s': round(seconds, 1)}


def evaluation(vit, mesh, images, rows, whole):
  """Logits of a batch; parameters whole on every device, so that nothing need be gathered."""
  shapes = jax.eval_shape(functools.partial(start, vit), jax.random.key(0))
  form = fastest_storage(vit.plan, platform=mesh.devices.flat[0].platform)
  shapes = jax.eval_shape(functools.partial(to_storage, form=form), shapes)
  places = jax.tree.map(lambda _: whole, shapes)
  run = jax.jit(lambda params, images: vit.apply({'params': params}, images)[0],
                out_shardings=rows)
  return run, (sharding.shapes(shapes, places), images)


def training(vit, mesh, images, rows, whole):
  """A step of train.py, parameters and optimizer sliced over fsdp."""
  settings = digits.get_config().optimizer
  schedule = optax.constant_schedule(1e-3)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

  def state(key):
    params = start(vit, key)
    return train.State(jnp.zeros((), jnp.int32), params, optimizer.init(params), params)

  shapes = jax.eval_shape(state, jax.random.key(0))
  places = sharding.make_shardings(shapes, digits.get_config().sharding, mesh)
  run = jax.jit(functools.partial(train.update, functools.partial(loss, vit, settings),
                                  optimizer, settings, schedule),
                out_shardings=(places, whole), donate_argnums=0)
  labels = jax.ShapeDtypeStruct(images.shape[:1], jnp.int32, sharding=rows)
  key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole)
  return run, (sharding.shapes(shapes, places), {'image': images, 'label': labels}, key, None)


def start(vit, key):
  """Fresh parameters; their shapes do not depend on the mesh or on the kernel."""
  plain = vit.clone(mesh=None, implementation='xla')
  return plain.init(key, jnp.zeros((1, *vit.input_shape)))['params']


if __name__ == '__main__':
  cli.run(main)
