"""Compiles LLaVA-1.5-7B for TPUs and GPUs that are not attached, with their real compilers.

  python -m tools.targets_lm                     (results/targets_lm.json and a table)
  python -m tools.targets_lm --targets=h100:8 --steps=train
  python -m tools.targets_lm --targets=h100:8 --plans=none,tokenpacker,quecc_16,quecc_1 \\
      --steps=prefill,train --out=results/targets_compressors.json

For each target, in bfloat16: reading a prompt of 640 slots, 576 of them visual, unreduced, with one
cut and with three; decoding over the caches that these leave; and a step of training, AdamW on
float32 parameters, unreduced and with one cut. Asked for by --plans: the same with a learned
compressor between tower and language model, which leaves 144, 16 or 1 visual tokens. Nothing is
allocated: a program is compiled from shapes. Parameters are divided over 'tensor' alone to read and
decode, where they would otherwise be gathered for every token; to train they, their moments and
their average are sliced over 'fsdp' too, and the blocks are computed again in the backward pass.

Prints bytes a device and collectives, counted as often as they run, with what they carry:

  parameters           one layer's, one of a lone product, or one of the tower's layers, gathered
  stacked parameters   those of several layers at once
  gradients            of parameters, as above
  tokens               what heads or columns on several devices made, added up
  scores               a method's, over heads on several devices: 4 bytes a slot and cut
  slices               of parameters or gradients, handed from device to device while the product
                       that needs them runs: what a TPU makes of some gathers
  others

and fails where a program does not fit; where it gathers stacked parameters, or the rows of other
devices; where a cut adds collectives, or bytes to them (scores apart; a compressor may add those of
its own parameters in training, and sums of tokens, but no bytes to reading); or where it saves
fewer bytes than what it cuts away holds (`saved`), the parameters that a compressor adds apart.
"""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.parts import VLM_SHARDING
from lib.cost import hlo
from lib.cost import lm as lm_cost
from lib.cost.topology import MEMORY_GB, count, missing, topology_mesh
from lib.report import measuring, tables
from lib.report.rows import Row, update_json
from lib.runtime import cli, sharding, timing
from lib.tasks import qa as qa_task
from models.backbones.images import Images
from models.backbones.vlm import VLM
from models.checkpoints.vlm_config import make_vlm
from models.plan import make_plan
from models.projectors import make_projector
from models.storage import to_storage
from ops import choices, platforms
from ops.attention import pick
from train import TrainState, decayed

STEPS = ('prefill', 'decode', 'train')
# How each target is divided, (data, fsdp, tensor), and the rows of a batch that each device, or the
# devices of one 'tensor' axis together, have: few where a chip has 16 GB, as a v5e.
SERVING = {'v5e:4x4': ((4, 1, 4), 8), 'v5p:4x4x4': ((16, 1, 4), 16),
           'v5p:8x8x8': ((128, 1, 4), 16), 'h100:8': ((2, 1, 4), 16)}
TRAINING = {'v5e:4x4': ((1, 16, 1), 2), 'v5p:4x4x4': ((1, 16, 4), 8),
            'v5p:8x8x8': ((8, 64, 1), 4), 'h100:8': ((1, 8, 1), 8)}
PLANS = {'none': None,
         'fastv': {'method': 'fastv', 'token_kinds': 'visual', 'layers': 2, 'keep_ratio': 0.5},
         'pyramiddrop': {'method': 'pyramiddrop', 'token_kinds': 'visual', 'layers': (8, 16, 24),
                         'keep_ratio': 0.5}}
COMPRESSORS = {'tokenpacker': {'name': 'tokenpacker', 'args': {'side': 2}},
               'quecc_16': {'name': 'quecc', 'args': {'side': 6}},
               'quecc_1': {'name': 'quecc', 'args': {'side': 24}}}
WANTED = (('prefill', 'none'), ('prefill', 'fastv'), ('prefill', 'pyramiddrop'),
          ('decode', 'none'), ('decode', 'pyramiddrop'), ('train', 'none'), ('train', 'fastv'),
          *((step, name) for name in COMPRESSORS for step in ('prefill', 'train')))
# XLA for GPUs merges the products for q, k and v where these are small, and puts the weights of all
# layers side by side for it, as copies: what a cut makes small would need more memory.
UNMERGED = {'xla_gpu_dot_merger_threshold_mb': 0}
# What a compressor may add.
OWN = ('of parameters', 'of gradients', 'of slices', 'all-reduce of tokens')
IDS, VISUAL, ROOM = 64, 576, 64
SLOTS = IDS + VISUAL
COLUMNS = ('target', 'step', 'plan', 'mesh', 'rows', 'peak_mb', 'argument_mb', 'output_mb',
           'saved_mb', 'collectives', 'compile_s', 'fault')

# Tests import several tools at once, whose flags share their names.
TARGETS = flags.DEFINE_list('targets', list(SERVING), 'Which devices.', allow_override=True)
STEPS_WANTED = flags.DEFINE_list('steps', list(STEPS), 'Which steps.')
PLANS_WANTED = flags.DEFINE_list('plans', list(PLANS), 'What reduces, among cuts and compressors; '
                                 '`none` to compare with.')
OUT = flags.DEFINE_string('out', 'results/targets_lm.json', 'Where the rows go.',
                          allow_override=True)


HEAD = ('target', 'step', 'plan')  # What tells a row from others.

# A jitted function, its arguments as shapes, and shapes of the parameters.
Step = tuple[Any, tuple[Any, ...], Any]


class Compiler:
  """Compiles steps for one target, and holds each against the unreduced one, which comes first."""

  def __init__(self) -> None:
    self._unreduced: dict[str, Row] = {}

  def measure(self, head: Row) -> Row:
    """Returns the other keys of a row, which is printed as soon as it is there.

    Raises:
      ValueError: the unreduced step could not be compiled.
    """
    row = {**head, **compiled(head['target'], head['step'], head['plan'])}
    if head['plan'] == 'none':
      self._unreduced[head['step']] = row
    if head['step'] not in self._unreduced:
      raise ValueError(f'there is no unreduced step {head["step"]!r} to compare with: see why it '
                       'failed')
    full = self._unreduced[head['step']]
    row['saved_mb'] = round(full['peak_mb'] - row['peak_mb'], 1)
    row['fault'] = fault(row, full)
    print(json.dumps(row), flush=True)
    return row


def main(argv: Sequence[str]) -> None:
  """Compiles everything, shows it, and fails if anything is not as it should be."""
  del argv
  for step in STEPS_WANTED.value:
    choices.check('step ', step, STEPS)
  for plan in PLANS_WANTED.value:
    choices.check('plan ', plan, [*PLANS, *COMPRESSORS])
  for target in TARGETS.value:
    reason = missing(target)
    if reason:
      raise ValueError(reason)
  rows: list[Row] = []
  for target in TARGETS.value:
    own = measuring.measure_rows(
        [{'target': target, 'step': step, 'plan': plan} for step, plan in WANTED
         if step in STEPS_WANTED.value and plan in PLANS_WANTED.value
         and (step != 'train' or target in TRAINING)],
        Compiler().measure)
    update_json(OUT.value, {target: {
        'machine': timing.machine(), 'model': 'LLaVA-1.5-7B, bfloat16', 'slots': SLOTS,
        'visual': VISUAL, 'room': ROOM, 'rows': own}})
    rows += own
  good = [{**row, 'collectives': _short(row['collectives'])} for row in measuring.measured(rows)]
  if good:
    print(tables.table(good, COLUMNS))
  measuring.check_faults(rows, HEAD)


def fault(row: Row, full: Row) -> str:
  """Names what is wrong with a program, beside that of the unreduced model; '' for nothing."""
  limit = 1e9 * MEMORY_GB[row['target'].partition(':')[0]] / 2 ** 20
  wrong = [f'does not fit {limit:.0f} MB'] if row['peak_mb'] > limit else []
  wrong += traffic_faults(row, full)
  # What a compressor has more of parameters is no part of what it saves.
  own = max(row['argument_mb'] - full['argument_mb'], 0) if row['plan'] in COMPRESSORS else 0
  for name, least in row['expected_mb'].items():
    less = full[f'{name}_mb'] - row[f'{name}_mb'] + own * (name == 'peak')
    if less < 0.98 * least:
      wrong.append(f'saves {less:.1f} MB of {name}, not {least:.1f}')
  return '; '.join(wrong)


def traffic_faults(row: Row, full: Row) -> list[str]:
  """Names collectives that should not be, or that a cut adds to those of the unreduced model."""
  wrong = []
  for name, (times, mb) in row['collectives'].items():
    if name == 'all-gather of stacked parameters':
      wrong.append('gathers the parameters of several layers')
    if name == 'all-gather of others':
      wrong.append('gathers what are no parameters')
    if name.endswith('of scores'):
      continue
    before = full['collectives'].get(name, (0, 0))
    if row['plan'] in COMPRESSORS and (name.endswith(OWN) or mb <= before[1] + 0.1):
      continue  # It has parameters of its own, each with a norm; QueCC reads the question again.
    # Layers that run alone gather in an order of their own: of hundreds, a few more or less.
    if times > before[0] * (1.01 if row['step'] == 'train' else 1):
      wrong.append(f'adds {name}: {times} for {before[0]}')
  sent, before_mb = (sum(mb for name, (_, mb) in one['collectives'].items()
                         if not name.endswith('of scores')) for one in (row, full))
  if sent > before_mb * 1.001 and (row['step'] != 'train' or row['plan'] not in COMPRESSORS):
    wrong.append(f'sends {sent:.0f} MB for {before_mb:.0f}')
  return wrong


def compiled(target: str, step: str, plan: str) -> dict[str, Any]:
  """Compiles one step under one plan; returns how it is divided, its bytes and its traffic."""
  axes, rows = (TRAINING if step == 'train' else SERVING)[target]
  mesh = topology_mesh(target, dict(zip(sharding.AXES, (*axes, 1), strict=True)))
  assert mesh.size == count(target)
  platform = mesh.devices.flat[0].platform
  shared = {'dtype': jnp.bfloat16, 'mesh': mesh,
            'implementation': pick(platform, jnp.bfloat16),
            'remat': 'full' if step == 'train' else 'none'}
  vlm = make_vlm('llava1.5_7b', tower=shared, lm=shared)
  reduction = PLANS.get(plan)
  if reduction:
    reduced = make_plan(reduction, vlm.lm.host(SLOTS, visual=VISUAL))
    vlm = vlm.clone(lm=vlm.lm.clone(plan=reduced))
  if plan in COMPRESSORS:
    made = make_projector(COMPRESSORS[plan], width=vlm.lm.width, dtype=jnp.bfloat16)
    vlm = vlm.clone(projection='', compressor=made)
  make_step = {'prefill': reading, 'decode': decoding, 'train': training}[step]
  options: dict[str, Any] = hlo.OPTIONS[platform] | (UNMERGED if platform != 'tpu' else {})
  with platforms.made_for(platform):
    run, arguments, weights = make_step(vlm, mesh, rows * axes[0] * axes[1])
    program, seconds = timing.compile_seconds(run.lower(*arguments), options=options)
  return {'mesh': 'data {} fsdp {} tensor {}'.format(*axes), 'rows': rows,
          **hlo.memory(program),
          'expected_mb': {name: round(size / 2 ** 20, 1)
                          for name, size in saved(vlm, step, rows, axes[2]).items()},
          'collectives': traffic(program, parameter_sizes(weights, axes[2]), rows, axes[1]),
          'compile_s': round(seconds, 1)}


def traffic(program: jax.stages.Compiled, sizes: Mapping[int, int], rows: int,
            slices: int) -> dict[str, tuple[int, float]]:
  """Returns {'collective of what it carries': (times, MB)} of a program; takes as `carried`."""
  totals: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
  for one in hlo.collectives(program.as_text()):
    total = totals[f'{one.kind} of {carried(one, sizes, rows, slices)}']
    total[0] += one.times
    total[1] += one.bytes / 2 ** 20
  return {name: (int(times), round(mb, 1)) for name, (times, mb) in sorted(totals.items())}


def saved(vlm: VLM, step: str, rows: int, tensor: int) -> dict[str, float]:
  """Returns {figure: bytes a device that it must at least be below the unreduced model's}.

  Keys and values of the slots that are gone, where a cache is read or written; in training, the
  features before each half of each block, which the backward pass starts from.
  """
  full, lm = (lm_cost.of(vlm.lm.clone(plan=None), SLOTS),
              lm_cost.of(vlm.lm, IDS + vlm.visual_slots((1, 1, 0))))
  gone = rows * (full.kv_bytes - lm.kv_bytes) / tensor
  if step == 'decode':
    return {'argument': gone, 'peak': gone}
  if step == 'prefill':
    return {'output': gone, 'peak': gone}
  slots = sum(one.attention + one.mlp - other.attention - other.mlp
              for one, other in zip(full.layers, lm.layers, strict=True))
  return {'peak': rows * slots * vlm.lm.width * jnp.dtype(vlm.lm.dtype).itemsize}


def parameter_sizes(weights: Any, tensor: int) -> dict[int, int]:
  """Returns {elements: layers} of parameters and stacks, whole or as 'tensor' divides them."""
  sizes: dict[int, int] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
    names = [getattr(part, 'key', None) for part in path]
    stacked = 'blocks' in names and not any(hasattr(part, 'idx') for part in path)
    layers = leaf.shape[0] if stacked else 1
    for several in range(1, layers + 1):
      for parts in {1, tensor}:
        size = leaf.size // layers * several // parts
        # What is one layer of a large parameter may be several of a small one.
        sizes[size] = min(sizes.get(size, several), several)
  return sizes


def carried(one: hlo.Collective, sizes: Mapping[int, int], rows: int, slices: int) -> str:
  """Tells what a collective carries, by the size of its result and by where it comes from.

  Args:
    one: the collective.
    sizes: as of `parameter_sizes`.
    rows: B on each device.
    slices: size of the 'fsdp' axis.
  """
  layers = sizes.get(one.size * (slices if one.kind == 'reduce-scatter' else 1))
  if one.kind == 'collective-permute':
    return 'slices'
  if 'reduction' in one.scope.split('/') and one.size <= rows * SLOTS:
    return 'scores'
  if one.kind == 'all-gather' and layers:
    return 'parameters' if layers == 1 else 'stacked parameters'
  if layers and (one.kind == 'reduce-scatter' or 'transpose(' in one.scope):
    return 'gradients'
  if one.kind == 'all-reduce' and one.size % rows == 0 and one.size >= rows * 1024:
    return 'tokens'
  return 'others'


def reading(vlm: VLM, mesh: Mesh, batch: int) -> Step:
  """Returns the step that reads a prompt: logits after it, and the cache."""
  weights = serving(vlm, mesh)
  run = functools.partial(vlm.apply, room=ROOM, method='prefill')
  arguments = ({'params': weights}, *prompt(mesh, batch))
  outputs = results(mesh, jax.eval_shape(run, *arguments))
  return jax.jit(run, out_shardings=outputs), arguments, weights


def decoding(vlm: VLM, mesh: Mesh, batch: int) -> Step:
  """Returns the step of one more token over the cache that a prompt left, which is donated."""
  weights = serving(vlm, mesh)
  _, cache = jax.eval_shape(functools.partial(vlm.apply, room=ROOM, method='prefill'),
                            {'params': weights}, *prompt(mesh, batch))
  run = functools.partial(vlm.apply, method='decode')
  shardings = results(mesh, cache)
  ids = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=sharding.batch_sharding(mesh))
  arguments = ({'params': weights}, ids, sharding.shapes(cache, shardings))
  return jax.jit(run, donate_argnums=2, out_shardings=results(
      mesh, jax.eval_shape(run, *arguments))), arguments, weights


def training(vlm: VLM, mesh: Mesh, batch: int) -> Step:
  """Returns a step of training on the answers' tokens."""
  optimizer = optax.chain(optax.clip_by_global_norm(1.0),
                          optax.adamw(2e-5, weight_decay=0.1, mask=decayed))

  def start(key: jax.Array) -> TrainState:
    params = fresh(vlm, key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), params)

  def update(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, jax.Array]:
    def loss_of(params: Any) -> jax.Array:
      logits, out = qa_task.apply(vlm, params, batch, rngs={'dropout': key})
      return qa_task.losses(logits, out, batch)['loss']

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optax.incremental_update(params, state.ema, 0.01)
    return TrainState(state.step + 1, params, opt_state, ema), loss

  shapes = jax.eval_shape(start, jax.random.key(0))
  shardings = sharding.make_shardings(shapes, VLM_SHARDING, mesh)
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  ids, valid, images = prompt(mesh, batch)
  inputs = {'ids': ids, 'valid': valid, 'answer': valid,
            'image': jax.ShapeDtypeStruct((batch, *images.pixels.shape[2:]), jnp.float32,
                                          sharding=rows)}
  key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole)
  run = jax.jit(update, out_shardings=(shardings, whole), donate_argnums=0)
  return run, (sharding.shapes(shapes, shardings), inputs, key), shapes.params


def prompt(mesh: Mesh, batch: int) -> tuple[Any, Any, Images]:
  """Returns shapes of ids, mask and one image a row, divided over the batch axes."""
  rows = sharding.batch_sharding(mesh)
  return (jax.ShapeDtypeStruct((batch, IDS), jnp.int32, sharding=rows),
          jax.ShapeDtypeStruct((batch, IDS), bool, sharding=rows),
          Images(jax.ShapeDtypeStruct((batch, 1, 336, 336, 3), jnp.float32, sharding=rows)))


def fresh(vlm: VLM, key: jax.Array) -> Any:
  """Makes parameters, whose shapes do not depend on mesh, plan, kernel or batch."""
  plain = {'mesh': None, 'plan': None, 'implementation': 'xla'}
  vlm = vlm.clone(tower=vlm.tower.clone(**plain), lm=vlm.lm.clone(**plain))
  ids = jnp.zeros((1, IDS), jnp.int32)
  side = vlm.tower.image_size
  return vlm.init(key, ids, ids == 0, Images(jnp.zeros((1, 1, side, side, 3))))['params']


def serving(vlm: VLM, mesh: Mesh) -> Any:
  """Returns shapes of bfloat16 parameters, each with its sharding.

  The blocks are a tuple, as for models/decoding/generator.py, which reads and decodes with the same
  ones: a run of layers as one loop would hold its part of the cache twice, as the loop leaves it
  and layer by layer.
  """
  shapes = jax.eval_shape(functools.partial(fresh, vlm), jax.random.key(0))
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, vlm.lm.dtype), shapes)
  shapes = jax.eval_shape(functools.partial(to_storage, storage='unstacked'), shapes)
  return sharding.shapes(shapes, sharding.make_shardings(shapes, VLM_SHARDING, mesh))


def results(mesh: Mesh, shapes: Any) -> Any:
  """Returns shardings of logits and caches: rows over the batch axes, other axes over 'tensor'."""

  def shard(leaf: Any) -> NamedSharding:
    if not leaf.ndim:
      return sharding.replicated(mesh)
    divided = ('tensor',) if jnp.issubdtype(leaf.dtype, jnp.floating) else ()
    return NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES, *divided))

  return jax.tree.map(shard, shapes)


def _short(traffic: Mapping[str, tuple[int, float]]) -> str:
  return ', '.join(f'{name} {times} ({mb:.0f} MB)' for name, (times, mb) in traffic.items())


if __name__ == '__main__':
  cli.run(main)
