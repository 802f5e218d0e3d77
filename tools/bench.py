"""Times primitives and every method by itself on this device, and writes one JSON file.

  python -m tools.bench                      (results/bench_<device>.json)
  python -m tools.bench --only=reducers --methods=tome,atc --batch=8

What is compared runs interleaved, and compile time is apart. Floors say what the work costs at the
device's own measured speed: FLOPs for products, bytes for moves. Whole models under every method:
tools/speed.py.

Axes: B batch, N slots, M slots after, D features.
"""

import functools
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from lib.runtime import cli, timing
from models.backbones.vit import make_vit
from models.compressors import COMPRESSORS
from models.plan import methods
from models.stack import STATIC
from ops import assignments, attention
from ops import tokens as tk
from ops.primitives import select
from ops.signals import Signals

ONLY = flags.DEFINE_multi_enum('only', ['primitives', 'reducers'], ['primitives', 'reducers'],
                               'What to time.')
BATCH = flags.DEFINE_integer('batch', None, 'Batch size; by default 8 on a CPU, else 256.')
METHODS = flags.DEFINE_list('methods', None, 'Methods; all by default.')
ROUNDS = flags.DEFINE_integer('rounds', 10, 'Interleaved rounds.')
OUT = flags.DEFINE_string('out', None, 'Where the JSON goes; results/bench_<device>.json if unset.')


def main(argv):
  """Times what --only names, and writes the file."""
  del argv
  # A cached program would make compile times mean nothing.
  jax.config.update('jax_enable_compilation_cache', False)
  on_cpu = jax.default_backend() == 'cpu'
  dtype = jnp.float32 if on_cpu else jnp.bfloat16
  batch = BATCH.value or (8 if on_cpu else 256)
  speed = timing.device_speed(dtype)
  result = {'machine': timing.machine(), 'dtype': jnp.dtype(dtype).name, 'rounds': ROUNDS.value,
            'measured_gflops': speed[0] / 1e9, 'measured_gbytes': speed[1] / 1e9}
  if 'primitives' in ONLY.value:
    result['primitives'] = primitives(batch, dtype, speed)
  if 'reducers' in ONLY.value:
    result['reducers'] = reducers(batch, dtype, speed)
  device = re.sub(r'\W+', '_', result['machine']['device']).strip('_').lower()
  path = pathlib.Path(OUT.value or f'results/bench_{device}.json')
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(result, indent=1) + '\n')
  print(path)


def timed(candidates, title):
  """{name: (function, args)} -> {name: (Timing, compile seconds)}, all interleaved."""
  calls = {name: timing.ready(*candidate) for name, candidate in tqdm(
      candidates.items(), desc=title, disable=not sys.stderr.isatty())}
  times = timing.interleave({name: call for name, (call, _) in calls.items()},
                            rounds=ROUNDS.value)
  return {name: (times[name], seconds) for name, (_, seconds) in calls.items()}


def row(timing_, compile_s, **fields):
  """A JSON row of one timing."""
  return fields | {'median_ms': round(timing_.median_ms, 4), 'low_ms': round(timing_.low_ms, 4),
                   'high_ms': round(timing_.high_ms, 4), 'compile_s': round(compile_s, 3)}


def primitives(batch, dtype, speed):
  """Ways of applying a merge, of selecting, and of scoring, each with its floor."""
  rows = []
  for slots, keep, width in ((197, 184, 384), (197, 99, 768), (577, 288, 1024)):
    random = np.random.default_rng(0)
    src = np.stack([np.sort(random.permutation(slots)[:keep]) for _ in range(batch)])
    dst = random.integers(0, keep, (batch, slots))
    np.put_along_axis(dst, src, np.arange(keep)[None].repeat(batch, 0), 1)
    merge = assignments.Merge(jnp.asarray(src, jnp.int32), jnp.asarray(dst, jnp.int32),
                              jnp.ones((batch, slots)))
    x = jnp.asarray(random.normal(size=(batch, slots, width)), dtype)
    scores = jnp.asarray(random.normal(size=(batch, slots)), jnp.float32)
    found = timed({
        'apply: segment sum': (lambda m, x: m.apply(x), (merge, x)),
        'apply: one-hot product': (
            lambda m, x: jnp.einsum('bmn,bnd->bmd', m.matrix().astype(x.dtype), x), (merge, x)),
        'apply: gather': (lambda m, x: assignments.take(x, m.src), (merge, x)),
        'select: top_k': (lambda s: select.top(s, keep), (scores,)),
        'select: argsort': (lambda s: jnp.argsort(-s, axis=1)[:, :keep], (scores,)),
    }, f'primitives {slots}')
    moved = (slots + keep) * width * batch * x.dtype.itemsize
    for name, (time, seconds) in found.items():
      floor = 1e3 * (moved if 'apply' in name else 2 * scores.nbytes) / speed[1]
      rows.append(row(time, seconds, name=name, batch=batch, slots=slots, num_slots=keep,
                      width=width,
                      floor_ms=round(floor, 4)))
  for slots in (197, 577):
    q, k, v = (jax.random.normal(jax.random.key(i), (batch, slots, 6, 64), dtype)
               for i in range(3))
    name = attention.pick(jax.default_backend(), dtype)
    fused = functools.partial(attention.attend, implementation=name)
    found = timed({
        'attend': (lambda q, k, v: fused(q, k, v).out, (q, k, v)),
        'attend with a [CLS] row': (lambda q, k, v: _with_row(fused, q, k, v), (q, k, v)),
        'attend with received': (lambda q, k, v: _with_received(fused, q, k, v), (q, k, v)),
        'eager map': (lambda q, k, v: jnp.einsum(
            'bhnm,bmhd->bnhd', attention.eager(q, k).astype(v.dtype), v), (q, k, v)),
    }, f'attention {slots}')
    floor = 1e3 * 4 * batch * slots ** 2 * 384 / speed[0]
    rows += [row(time, seconds, name=f'{label} ({name})', batch=batch, slots=slots,
                 floor_ms=round(floor, 4)) for label, (time, seconds) in found.items()]
  return rows


def _with_row(fused, q, k, v):
  mixed = fused(q, k, v)
  return mixed.out, attention.rows(q[:, :1], k, mixed.lse[:, :1])


def _with_received(fused, q, k, v):
  mixed = fused(q, k, v)
  return mixed.out, attention.received(q, k, mixed.lse)


def reducers(batch, dtype, speed):
  """Every method alone: decide and reduce, from 197 tokens of a ViT-S to 138."""
  host = make_vit('S/16').host
  slots, heads, width, keep = host.slots, 6, 384, 138
  kind = jnp.broadcast_to(jnp.where(jnp.arange(slots) == 0, tk.SPECIAL, tk.VISUAL).astype(jnp.int8),
                          (batch, slots))
  pos = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32) - 1, (batch, slots))
  normal = functools.partial(jax.random.normal, dtype=dtype)
  tokens = tk.TokenSet.create(normal(jax.random.key(0), (batch, slots, width)), kind=kind, pos=pos,
                              protected=1)
  shape = (batch, slots, heads, width // heads)
  q, k, v = (normal(jax.random.key(i), shape) for i in (1, 2, 3))
  attended = attention.eager(q, k)
  everything = {'keys': k, 'queries': q, 'values': v, 'cls_attention': attended[:, :, 0],
                'received_attention': attended.mean(axis=2), 'attention': attended,
                'next_received_attention': attended.mean(axis=2), 'hidden': tokens.x,
                'grid': (14, 14), 'layer': 3, 'depth': 12, 'slots': slots}
  assert everything.keys() == host.offers
  candidates = {}
  for name in chosen():
    method = methods()[name]()
    wanted = {key: everything[key] for key in method.needs | (STATIC & host.offers)}
    signals = Signals(**wanted)
    if name in COMPRESSORS:
      params = method.init(jax.random.key(0), tokens, signals, num_slots=keep)
      candidates[name] = (lambda p, t, s, method=method: tk.reduce(
          t, method.apply(p, t, s, num_slots=keep)).x, (params, tokens, signals))
    else:
      candidates[name] = (lambda t, s, method=method: tk.reduce(
          t, method(t, s, num_slots=keep)).x, (tokens, signals))
  floor = 1e3 * (slots + keep) * width * batch * tokens.x.dtype.itemsize / speed[1]
  return [row(time, seconds, name=name, batch=batch, slots=slots, num_slots=keep, width=width,
              floor_ms=round(floor, 4))
          for name, (time, seconds) in timed(candidates, 'reducers').items()]


def chosen():
  """The methods to time, 'none' left out."""
  return METHODS.value or sorted(set(methods(make_vit('S/16').host)) - {'none'})


if __name__ == '__main__':
  cli.run(main)
