"""Times primitives, every reducer, and ViTs under them on this device, and writes one JSON file.

  python -m tools.bench                      (results/bench_<device>.json)
  python -m tools.bench --only=models --variants=S/16 --batches=8

Every model runs interleaved with the unreduced model and with the *oracle*: the same token counts
by slicing, without scores, matching or merging. Compile time is apart. Floors say what the work
costs at the device's own measured speed: FLOPs for products, bytes for moves.

Axes: B batch, N slots, M slots after, D features.
"""

import dataclasses
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

from lib import cli, cost, timing
from models.compressors import COMPRESSORS
from models.plan import Plan, make_plan, methods
from models.stack import best_form, unstack
from models.vit import OFFERS, make_vit
from ops import attention, select
from ops import tokens as tk
from ops.signals import NAMES, Signals

ONLY = flags.DEFINE_multi_enum('only', ['primitives', 'reducers', 'models'],
                               ['primitives', 'reducers', 'models'], 'What to time.')
VARIANTS = flags.DEFINE_list('variants', None, 'ViTs; by default what the device can carry.')
BATCHES = flags.DEFINE_list('batches', None, 'Batch sizes; by default what the device can carry.')
METHODS = flags.DEFINE_list('methods', None, 'Methods; all by default.')
EVERY_LAYER = flags.DEFINE_list('every_layer', ['tome', 'pitome', 'mctf'],
                                'Methods that are also timed with a cut in every layer.')
ROUNDS = flags.DEFINE_integer('rounds', 10, 'Interleaved rounds.')
OUT = flags.DEFINE_string('out', None, 'Where the JSON goes; results/bench_<device>.json if unset.')

# Layers and budget of the model runs: three cuts as most papers place them, or one in every layer.
THREE = {'layers': (3, 6, 9), 'keep_ratio': 0.7}
EVERY = {'layers': 'all', 'remove': 13}


@dataclasses.dataclass(frozen=True)
class Oracle:
  """Keeps the first slots: what a reduction would cost if deciding were free."""

  needs = frozenset()
  site = 'between'
  proportional = False
  extra_slots = 0
  joins = False

  def __call__(self, tokens, signals, *, keep):
    """The first `keep` slots."""
    del signals
    batch = tokens.x.shape[0]
    return tk.Gather(jnp.broadcast_to(jnp.arange(keep, dtype=jnp.int32), (batch, keep)),
                     tokens.slots)


def main(argv):
  """Times what --only names, and writes the file."""
  del argv
  # A cached program would make compile times mean nothing.
  jax.config.update('jax_enable_compilation_cache', False)
  on_cpu = jax.default_backend() == 'cpu'
  dtype = jnp.float32 if on_cpu else jnp.bfloat16
  batches = [int(b) for b in BATCHES.value or (('1', '8') if on_cpu else ('1', '32', '256'))]
  variants = VARIANTS.value or (['S/16'] if on_cpu else ['S/16', 'B/16', 'L/16'])
  speed = measured_speed(dtype)
  result = {'machine': timing.machine(), 'dtype': jnp.dtype(dtype).name, 'rounds': ROUNDS.value,
            'measured_gflops': speed[0] / 1e9, 'measured_gbytes': speed[1] / 1e9}
  if 'primitives' in ONLY.value:
    result['primitives'] = primitives(batches[-1], dtype, speed)
  if 'reducers' in ONLY.value:
    result['reducers'] = reducers(batches[-1], dtype, speed)
  if 'models' in ONLY.value:
    result['models'] = [row for variant in variants for batch in batches
                        for row in models(variant, batch, dtype, speed)]
  device = re.sub(r'\W+', '_', result['machine']['device']).strip('_').lower()
  path = pathlib.Path(OUT.value or f'results/bench_{device}.json')
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(result, indent=1) + '\n')
  print(path)


def measured_speed(dtype):
  """(FLOPs a second of a large product, bytes a second of the fastest copy) of this device.

  Copies of several sizes: what a small batch moves may never leave a processor's cache.
  """
  side = 2048 if jax.default_backend() == 'cpu' else 8192
  square = jnp.ones((side, side), dtype)
  copies = {elements: jnp.ones((elements,), jnp.float32) for elements in (2**18, 2**22, 2**26)}
  runs = {n: functools.partial(jax.jit(lambda x: x + 1), x) for n, x in copies.items()}
  runs['product'] = functools.partial(jax.jit(jnp.matmul), square, square)
  times = timing.interleave(runs, rounds=20)
  return (2e3 * side ** 3 / min(times['product'].runs),
          max(2e3 * x.nbytes / min(times[n].runs) for n, x in copies.items()))


def ready(function, args):
  """Compiles: (a call without arguments, compile seconds)."""
  compiled = timing.compile_seconds(jax.jit(function).lower(*args))
  return functools.partial(compiled.run, *args), compiled.seconds


def timed(candidates, title):
  """{name: (function, args)} -> {name: (Timing, compile seconds)}, all interleaved."""
  calls = {name: ready(*candidate) for name, candidate in tqdm(
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
    merge = tk.Merge(jnp.asarray(src, jnp.int32), jnp.asarray(dst, jnp.int32),
                     jnp.ones((batch, slots)))
    x = jnp.asarray(random.normal(size=(batch, slots, width)), dtype)
    scores = jnp.asarray(random.normal(size=(batch, slots)), jnp.float32)
    found = timed({
        'apply: segment sum': (lambda m, x: m.apply(x), (merge, x)),
        'apply: one-hot product': (
            lambda m, x: jnp.einsum('bmn,bnd->bmd', m.matrix().astype(x.dtype), x), (merge, x)),
        'apply: gather': (lambda m, x: tk.take(x, m.src), (merge, x)),
        'select: top_k': (lambda s: select.top(s, keep), (scores,)),
        'select: argsort': (lambda s: jnp.argsort(-s, axis=1)[:, :keep], (scores,)),
    }, f'primitives {slots}')
    moved = (slots + keep) * width * batch * x.dtype.itemsize
    for name, (time, seconds) in found.items():
      floor = 1e3 * (moved if 'apply' in name else 2 * scores.nbytes) / speed[1]
      rows.append(row(time, seconds, name=name, batch=batch, slots=slots, keep=keep, width=width,
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
                'grid': (14, 14), 'layer': 3, 'depth': 12}
  assert everything.keys() == set(NAMES) == OFFERS | {'cls_attention'}
  candidates = {}
  for name in chosen():
    method = methods()[name]()
    wanted = {key: everything[key] for key in method.needs | {'grid', 'layer', 'depth'}}
    signals = Signals(**wanted)
    if name in COMPRESSORS:
      params = method.init(jax.random.key(0), tokens, signals, keep=keep)
      candidates[name] = (lambda p, t, s, method=method: tk.reduce(
          t, method.apply(p, t, s, keep=keep)).x, (params, tokens, signals))
    else:
      candidates[name] = (lambda t, s, method=method: tk.reduce(
          t, method(t, s, keep=keep)).x, (tokens, signals))
  floor = 1e3 * (slots + keep) * width * batch * tokens.x.dtype.itemsize / speed[1]
  return [row(time, seconds, name=name, batch=batch, slots=slots, keep=keep, width=width,
              floor_ms=round(floor, 4))
          for name, (time, seconds) in timed(candidates, 'reducers').items()]


def chosen():
  """The methods to time, 'none' left out."""
  return METHODS.value or sorted(set(methods()) - {'none'})


def models(variant, batch, dtype, speed):
  """A ViT under every method, each interleaved with the unreduced model and its oracle."""
  platform = jax.default_backend()
  vit = make_vit(variant, dtype=dtype, implementation=attention.pick(platform, dtype))
  images = jax.random.normal(jax.random.key(0), (batch, 224, 224, 3), dtype)
  trained = jax.jit(vit.init)(jax.random.key(1), images[:1])['params']
  rows, full = [], cost.of(vit)
  base_call, base_seconds = ready(*candidate(vit, trained, images, None, platform))
  oracles = {}  # Methods with the same counts share one.
  for name in tqdm(chosen(), desc=f'{variant} batch {batch}', disable=not sys.stderr.isatty()):
    for label, budget in (('3 cuts', THREE), ('every layer', EVERY)):
      if label == 'every layer' and name not in EVERY_LAYER.value:
        continue
      plan = make_plan({'method': name, **budget}, vit.host)
      # Deciding inside attention has no counterpart that is free; slicing after it is closest.
      site = 'between' if plan.site == 'inside' else plan.site
      oracle = Plan('oracle', Oracle(), site, plan.cuts)
      if oracle not in oracles:
        oracles[oracle], _ = ready(*candidate(vit, trained, images, oracle, platform))
      call, seconds = ready(*candidate(vit, trained, images, plan, platform))
      times = timing.interleave({'base': base_call, 'made': call, 'oracle': oracles[oracle]},
                                rounds=ROUNDS.value)
      made, base, best = (times[key] for key in ('made', 'base', 'oracle'))
      reduced = cost.of(vit.clone(plan=plan))
      floor = cost.floor_seconds(batch * reduced.macs,
                                 reduced.weight_bytes + batch * reduced.activation_bytes,
                                 peak_flops=speed[0], bandwidth=speed[1])
      faster, possible = timing.speedup(base, made), timing.speedup(base, best)
      rows.append(row(
          made, seconds, variant=variant, batch=batch, name=name, schedule=label,
          floor_ms=round(1e3 * floor, 3), base_ms=round(base.median_ms, 3),
          oracle_ms=round(best.median_ms, 3), base_compile_s=round(base_seconds, 3),
          macs_ratio=round(full.macs / reduced.macs, 4), speedup=round(faster.ratio, 4),
          speedup_low=round(faster.low, 4), speedup_high=round(faster.high, 4),
          oracle_speedup=round(possible.ratio, 4),
          of_macs_ratio=round(faster.ratio * reduced.macs / full.macs, 4)))
      print(json.dumps(rows[-1]), flush=True)
  return rows


def candidate(vit, trained, images, plan, platform):
  """A forward pass and its arguments, parameters in the form that is fastest here."""
  vit = vit.clone(plan=plan)
  params = dict(trained)
  if plan is not None and plan.name in COMPRESSORS:
    fresh = jax.jit(vit.init)(jax.random.key(1), images[:1])['params']
    params['stack'] = {**fresh['stack'], **trained['stack']}
  if best_form(plan, platform=platform) == 'unstacked':
    params['stack'] = {**params['stack'],
                       'blocks': unstack(params['stack']['blocks'], vit.depth)}
  return lambda p, x: vit.apply({'params': p}, x)[0], (params, images)


if __name__ == '__main__':
  cli.run(main)
