"""Latency measured fairly: candidates take turns, and compiling is timed apart.

A machine's speed drifts (clocks, heat, neighbours). Timing one candidate after the other blames the
drift on whoever ran last; taking turns spreads it over all, and ratios are taken within a round.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Timing:
  """Holds wall-clock times of one candidate, in milliseconds.

  Attributes:
    median_ms: median of the runs.
    low_ms, high_ms: first and third quartile of the runs, interpolated linearly.
    runs: every run, in the order of the rounds.
  """

  median_ms: float
  low_ms: float
  high_ms: float
  runs: tuple[float, ...]

  @classmethod
  def of(cls, runs: Sequence[float]) -> Timing:
    """Summarises runs given in milliseconds."""
    low, median, high = np.quantile(runs, (0.25, 0.5, 0.75)).tolist()
    return cls(median, low, high, tuple(runs))

  def fields(self) -> dict[str, float]:
    """Returns the keys of a row (lib/report/rows.py): median and quartiles."""
    return {'median_ms': self.median_ms, 'low_ms': self.low_ms, 'high_ms': self.high_ms}


@dataclasses.dataclass(frozen=True)
class Speedup:
  """Holds how many times as fast one candidate is as another.

  Attributes:
    ratio: of the two medians; above 1 the other is faster than the base.
    median, low, high: median and quartiles of the ratios of runs in the same round.
  """

  ratio: float
  median: float
  low: float
  high: float

  def fields(self, prefix: str = '') -> dict[str, float]:
    """Returns the keys of a row: `<prefix>speedup` of the medians, and its quartiles."""
    return {f'{prefix}speedup': self.ratio, f'{prefix}speedup_low': self.low,
            f'{prefix}speedup_high': self.high}


class Compiled(NamedTuple):
  """Holds a compiled function, and the seconds that compiling it took."""

  run: jax.stages.Compiled
  seconds: float


def interleave(candidates: Mapping[str, Callable[[], Any]], *, rounds: int = 10, warmup: int = 2,
               clock: Clock = time.perf_counter) -> dict[str, Timing]:
  """Times candidates in rounds: each runs once a round, and the order rotates by one each round.

  Args:
    candidates: functions without arguments that return JAX arrays, in any tree. Each run lasts
      until its arrays are computed.
    rounds: timed rounds; a multiple of the number of candidates puts each in every place equally
      often.
    warmup: rounds before them that do not count. With functions that compile when first called, at
      least one.
    clock: seconds, ever rising.

  Raises:
    ValueError: no candidates, or fewer than one round.
  """
  if not candidates:
    raise ValueError('nothing to time: give at least one candidate')
  if rounds < 1 or warmup < 0:
    raise ValueError(f'rounds={rounds} must be at least 1 and warmup={warmup} at least 0')
  names = list(candidates)
  runs: dict[str, list[float]] = {name: [] for name in names}
  for turn in range(-warmup, rounds):
    first = turn % len(names)
    for name in names[first:] + names[:first]:
      start = clock()
      jax.block_until_ready(candidates[name]())
      elapsed = clock() - start
      if turn >= 0:
        runs[name].append(1e3 * elapsed)
  return {name: Timing.of(times) for name, times in runs.items()}


def speedup(base: Timing, other: Timing) -> Speedup:
  """Computes how many times as fast as `base` is `other`, both from one call of `interleave`.

  Raises:
    ValueError: the two have different numbers of runs, or a run took no time at all.
  """
  if len(base.runs) != len(other.runs):
    raise ValueError(f'runs pair up by round, but there are {len(base.runs)} and '
                     f'{len(other.runs)}: time both in one call of interleave')
  if min(other.runs) <= 0:
    raise ValueError('a run took 0 ms, too short for this clock: do more work in each run')
  ratios = np.asarray(base.runs) / np.asarray(other.runs)
  low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
  return Speedup(base.median_ms / other.median_ms, median, low, high)


def compile_seconds(lowered: jax.stages.Lowered, *, clock: Clock = time.perf_counter,
                    options: Mapping[str, str | bool] | None = None) -> Compiled:
  """Compiles `jitted.lower(args)`, with compiler options; tracing, done by then, is not timed.

  With a persistent compilation cache a second call reads from it, and the time says so.
  """
  start = clock()
  compiled = lowered.compile(compiler_options=dict(options) if options else None)
  return Compiled(compiled, clock() - start)


class Ready(NamedTuple):
  """Holds a compiled call without arguments, and the seconds that compiling it took."""

  call: Callable[[], Any]
  seconds: float


def ready(function: Callable[..., Any], args: Sequence[Any], *,
          keep_unused: bool = False) -> Ready:
  """Compiles a function for its arguments.

  Args:
    function: of arrays.
    args: what each call gets.
    keep_unused: whether to hand over arguments that the program does not read; a program that
      reads none then costs what handing them over does.
  """
  compiled = compile_seconds(jax.jit(function, keep_unused=keep_unused).lower(*args))
  return Ready(functools.partial(compiled.run, *args), compiled.seconds)


def device_speed(dtype: Any, *, clock: Clock = time.perf_counter) -> tuple[float, float]:
  """Measures FLOPs a second of a large product, and bytes a second of the fastest copy, here.

  Copies of several sizes: what a small batch moves may never leave a processor's cache.
  """
  side = 2048 if jax.default_backend() == 'cpu' else 8192
  square = jnp.ones((side, side), dtype)
  arrays = [jnp.ones((elements,), jnp.float32) for elements in (2**18, 2**22, 2**26)]
  copy = jax.jit(lambda x: x + 1)
  runs = {f'copy {x.size}': functools.partial(copy, x) for x in arrays}
  runs['product'] = functools.partial(jax.jit(jnp.matmul), square, square)
  times = interleave(runs, rounds=20, clock=clock)
  return (2e3 * side ** 3 / min(times['product'].runs),
          max(2e3 * x.nbytes / min(times[f'copy {x.size}'].runs) for x in arrays))


def read_speed(num_bytes: int) -> float:
  """Measures the bytes a second at which sums of rows read an array of so many bytes, at best."""
  rows = jnp.ones((max(1, num_bytes // 2 ** 14), 2 ** 12), jnp.float32)
  run = functools.partial(jax.jit(lambda x: jnp.sum(x, axis=1)), rows)
  return 1e3 * rows.nbytes / min(interleave({'read': run}, rounds=10)['read'].runs)


def machine() -> dict[str, Any]:
  """Describes this machine for a row: device, versions, processor and date, ready for JSON."""
  devices = jax.devices()
  return {
      'platform': devices[0].platform,
      'device': devices[0].device_kind,
      'devices': len(devices),
      'jax': jax.__version__,
      'jaxlib': jaxlib.__version__,
      'python': platform.python_version(),
      'cpu': _cpu(),
      'cores': _cores(),
      'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
  }


def usual_dtype() -> Any:
  """Returns the dtype to measure in here: float32 on a CPU, else bfloat16."""
  return jnp.float32 if jax.default_backend() == 'cpu' else jnp.bfloat16


def result_path(name: str, ending: str, *, path: str | None = None) -> Path:
  """Returns `path`, or without one results/<name>_<device>.<ending>, and makes its folder."""
  device = re.sub(r'\W+', '_', jax.devices()[0].device_kind).strip('_').lower()
  result = Path(path or f'results/{name}_{device}.{ending}')
  result.parent.mkdir(parents=True, exist_ok=True)
  return result


def compile_anew() -> None:
  """Turns the compilation cache off: compile times mean nothing of programs read from it."""
  jax.config.update('jax_enable_compilation_cache', False)


def _cores() -> int:
  """Counts cores that this process may use: fewer than the machine has, in many containers."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _cpu(info: Path = Path('/proc/cpuinfo')) -> str:
  """Returns the processor's name; Linux tells it only in /proc/cpuinfo."""
  if info.exists():
    for line in info.read_text().splitlines():
      key, _, value = line.partition(':')
      if key.strip() == 'model name' and value.strip():
        return value.strip()
  return platform.processor() or platform.machine()
