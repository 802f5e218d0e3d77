"""Times primitives and every method by itself on this device, and writes one JSON file.

  python -m tools.bench                      (results/bench_<device>.json)
  python -m tools.bench --only=reducers --methods=tome,atc --batch=8

What is compared runs interleaved, and compile time is apart. Floors say what the work costs at the
device's own measured speed: FLOPs for products, bytes for moves. Whole models under every method:
tools/speed.py. Methods of vision-language models, at the shapes of these: tools/bench/images.py.

Axes: B batch, N slots, M slots after, D features.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from lib.report import measuring, tables
from lib.report.rows import Row
from lib.runtime import cli, timing
from ops import assignments, attention, choices
from ops.moves.rows import take
from ops.primitives import select
from tools.bench.sites import SITES

ONLY = flags.DEFINE_multi_enum('only', ['primitives', 'reducers'], ['primitives', 'reducers'],
                               'What to time.')
BATCH = flags.DEFINE_integer('batch', None, 'Batch size; by default 8 on a CPU, else 256.',
                             lower_bound=1, upper_bound=65536)
METHODS = flags.DEFINE_list('methods', None, 'Methods; all by default.')
ROUNDS = flags.DEFINE_integer('rounds', 10, 'Interleaved rounds.', lower_bound=1)
OUT = flags.DEFINE_string('out', None, 'Where the JSON goes; results/bench_<device>.json if unset.')

SHOWN = ('name', 'slots', 'keep', 'latency', 'floor_ms', 'compile_s')
Array = jax.Array
Fused = Callable[..., attention.Attended]


@dataclasses.dataclass(frozen=True)
class Candidate:
  """Holds a program to time in turns with others.

  Attributes:
    head: the first keys of its row, `name` among them.
    function: of arrays.
    args: its arguments.
    floor_ms: the least that its work takes at this device's measured speed.
  """

  head: Row
  function: Callable[..., Any]
  args: tuple[Any, ...]
  floor_ms: float


class Turns:
  """Candidates that take turns: all are compiled and timed when the first row is asked for."""

  def __init__(self, candidates: Sequence[Candidate], title: str) -> None:
    self._candidates = {candidate.head['name']: candidate for candidate in candidates}
    self._title = title

  def measure(self, head: Row) -> Row:
    """Returns times and floor of one candidate; raises what its compilation raised."""
    name = head['name']
    ready, times = self._timed
    if isinstance(ready[name], Exception):
      raise ready[name]
    return {'floor_ms': round(self._candidates[name].floor_ms, 4),
            **{key: round(value, 4) for key, value in times[name].fields().items()},
            'compile_s': round(ready[name].seconds, 3)}

  @functools.cached_property
  def _timed(self) -> tuple[dict[str, Any], Mapping[str, timing.Timing]]:
    """{name: what is ready to run, or why it does not compile}, and times of the former."""
    ready: dict[str, Any] = {}
    for name, candidate in tqdm(self._candidates.items(), desc=self._title,
                                disable=not sys.stderr.isatty()):
      try:
        ready[name] = timing.ready(candidate.function, candidate.args)
      except measuring.FAILURES as reason:
        ready[name] = reason
    calls = {name: one.call for name, one in ready.items() if isinstance(one, timing.Ready)}
    return ready, timing.interleave(calls, rounds=ROUNDS.value) if calls else {}


def main(argv: Sequence[str]) -> None:
  """Times what --only names, writes the file, and shows a table."""
  del argv
  chosen()  # A wrong name ends here, not behind the primitives.
  timing.compile_anew()
  dtype = timing.usual_dtype()
  batch = BATCH.value or (8 if jax.default_backend() == 'cpu' else 256)
  speed = timing.device_speed(dtype)
  result = {'machine': timing.machine(), 'dtype': jnp.dtype(dtype).name, 'rounds': ROUNDS.value,
            'measured_gflops': speed[0] / 1e9, 'measured_gbytes': speed[1] / 1e9}
  rows = []
  for section in ('primitives', 'reducers'):
    if section in ONLY.value:
      result[section] = []
      for group in SECTIONS[section](batch, dtype, speed):
        result[section] += measuring.measure_rows([one.head for one in group],
                                                  Turns(group, section).measure)
      rows += result[section]
  path = timing.result_path('bench', 'json', path=OUT.value)
  path.write_text(json.dumps(result, indent=1) + '\n')
  good = measuring.measured(rows)
  if good:
    print(tables.table(good, SHOWN))
  print(path)
  measuring.check_faults(rows, ('name',))


# -- primitives ----------------------------------------------------------------------------------


def primitives(batch: int, dtype: Any,
               speed: tuple[float, float]) -> Iterator[Sequence[Candidate]]:
  """Yields ways of applying a merge and of selecting, then ways of scoring, size by size.

  Args:
    batch: B.
    dtype: of features.
    speed: (FLOPs, bytes) a second of this device.
  """
  for slots, keep, width in ((197, 184, 384), (197, 99, 768), (577, 288, 1024)):
    yield merging(batch, slots, keep, width, dtype, speed[1])
  for slots in (197, 577):
    yield scoring(batch, slots, dtype, speed[0])


def merging(batch: int, slots: int, keep: int, width: int, dtype: Any,
            bandwidth: float) -> list[Candidate]:
  """Returns ways of merging N slots to `keep`, and of selecting so many."""
  random = np.random.default_rng(0)
  src = np.stack([np.sort(random.permutation(slots)[:keep]) for _ in range(batch)])
  dst = random.integers(0, keep, (batch, slots))
  np.put_along_axis(dst, src, np.arange(keep)[None].repeat(batch, 0), 1)
  merge = assignments.Merge(jnp.asarray(src, jnp.int32), jnp.asarray(dst, jnp.int32),
                            jnp.ones((batch, slots)))
  x = jnp.asarray(random.normal(size=(batch, slots, width)), dtype)
  scores = jnp.asarray(random.normal(size=(batch, slots)), jnp.float32)
  applied, selected = (merge, x), (scores,)
  moved = {'apply': (slots + keep) * width * batch * x.dtype.itemsize,
           'select': 2 * scores.nbytes}
  ways: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
      'apply: merge': (lambda m, x: m.apply(x), applied),
      'apply: one-hot product': (
          lambda m, x: jnp.einsum('bmn,bnd->bmd', m.matrix().astype(x.dtype), x), applied),
      'apply: gather': (lambda m, x: take(x, m.src), applied),
      'select: top_k': (lambda s: select.top(s, keep), selected),
      'select: argsort': (lambda s: jnp.argsort(-s, axis=1)[:, :keep], selected)}
  head = {'batch': batch, 'slots': slots, 'keep': keep, 'width': width}
  return [Candidate({'name': name, **head}, function, args,
                    1e3 * moved[name.partition(':')[0]] / bandwidth)
          for name, (function, args) in ways.items()]


def scoring(batch: int, slots: int, dtype: Any, peak_flops: float) -> list[Candidate]:
  """Returns ways of measuring scores beside attention over N slots."""
  qkv = tuple(jax.random.normal(jax.random.key(i), (batch, slots, 6, 64), dtype)
              for i in range(3))
  kernel = attention.pick(jax.default_backend(), dtype)
  fused = functools.partial(attention.attend, implementation=kernel)
  ways: dict[str, Callable[..., Any]] = {
      'attend': lambda q, k, v: fused(q, k, v).out,
      'attend with a [CLS] row': lambda q, k, v: _with_row(fused, q, k, v),
      'attend with received': lambda q, k, v: _with_received(kernel, q, k, v),
      'eager map': lambda q, k, v: jnp.einsum(
          'bhnm,bmhd->bnhd', attention.eager(q, k).astype(v.dtype), v)}
  floor_ms = 1e3 * 4 * batch * slots ** 2 * 384 / peak_flops
  return [Candidate({'name': f'{name} ({kernel})', 'batch': batch, 'slots': slots}, function, qkv,
                    floor_ms) for name, function in ways.items()]


def _with_row(fused: Fused, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
  mixed = fused(q, k, v)
  return mixed.out, attention.rows(q[:, :1], k, mixed.lse[:, :1])


def _with_received(kernel: str, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
  mixed = attention.attend(q, k, v, implementation=kernel)
  return mixed.out, attention.received(q, k, mixed.lse, implementation=kernel)


# -- methods -------------------------------------------------------------------------------------


def reducers(batch: int, dtype: Any, speed: tuple[float, float]) -> Iterator[Sequence[Candidate]]:
  """Yields every method alone, deciding and reducing 197 tokens of a ViT-S to 138."""
  vit, visual, keep = SITES['vit'], 196, 138
  slots, width = vit.slots(visual), vit.sizes['D']
  floor_ms = 1e3 * (slots + keep) * width * batch * jnp.dtype(dtype).itemsize / speed[1]
  head = {'batch': batch, 'slots': slots, 'keep': keep, 'width': width}
  yield [Candidate({'name': name, **head},
                   *vit.work(name, batch=batch, visual=visual, keep=keep - 1, dtype=dtype),
                   floor_ms) for name in chosen()]


def chosen() -> list[str]:
  """Returns the names of the methods to time; by default all but 'none'.

  Raises:
    ValueError: a name that a ViT knows no method of.
  """
  offered = SITES['vit'].methods
  names = METHODS.value or sorted(set(offered) - {'none'})
  for name in names:
    choices.check('method ', name, offered)
  return names


SECTIONS = {'primitives': primitives, 'reducers': reducers}


if __name__ == '__main__':
  cli.run(main)
