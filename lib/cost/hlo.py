"""Reads a compiled program: memory per device, and collectives between devices.

XLA writes a loop's body once, however often it runs, so collectives are counted with the trips of
the loops around them: programs that cut a depth into stages otherwise cannot be compared.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax

# Without a card to try tiles on, XLA's Triton products may find none that fit; cuBLAS needs none.
# On a TPU all bytes are counted in one memory: by itself the compiler keeps what fits in the chip's
# vector memory, which no figure counts, and what fits there changes with the stages.
_GPU = {'xla_gpu_enable_triton_gemm': False}
_TPU = {f'xla_{family}_vmem_memory_space_assignment': False for family in ('jf', 'vf', 'gf')}
OPTIONS: dict[str, dict[str, Any]] = {'gpu': _GPU, 'cuda': _GPU, 'tpu': _TPU}

KINDS = ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute', 'reduce-scatter')
_OPERATION = re.compile(
    rf'^\s*(?:ROOT )?%?[\w.-]+ = (?P<type>.*?) (?P<kind>{"|".join(KINDS)})(?P<start>-start)?\(')
_COMPUTATION = re.compile(r'^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$')
_CALLED = re.compile(r'(?:calls|body|condition|called_computations|branch_computations|'
                     r'true_computation|false_computation)=(?:\{([^}]*)\}|%?([\w.-]+))')
_ANY = re.compile(r'^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.*?) (?P<kind>[\w-]+)'
                  r'\((?P<rest>.*)$')
# What moves nothing, or is the end of something that was counted where it began.
_FREE = {'parameter', 'tuple', 'get-tuple-element', 'bitcast', 'constant', 'copy-done',
         'async-done', 'after-all'}
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LIMIT = re.compile(r's32\[\]\S* constant\((\d+)\)')
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4,
          'f32': 4, 's64': 8, 'u64': 8, 'f64': 8}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One result of one collective operation of a program.

  Attributes:
    kind: one of `KINDS`.
    dtype: of the result, as XLA names it.
    shape: of the result on each device.
    times: how often a run of the program does it.
    scope: where in the model it comes from, as JAX named it; '' where the compiler did not say.
  """

  kind: str
  dtype: str
  shape: tuple[int, ...]
  times: int
  scope: str

  @property
  def size(self) -> int:
    """Elements of the result."""
    return math.prod(self.shape)

  @property
  def bytes(self) -> int:
    """Bytes of the results of all times together."""
    return self.times * self.size * _BYTES[self.dtype]


def memory(program: jax.stages.Compiled) -> dict[str, float]:
  """MB (2^20 bytes) a device: the most that live at once, results, arguments, and temporaries."""
  analysis = program.memory_analysis()
  assert analysis is not None
  return {'peak_mb': round(analysis.peak_memory_in_bytes / 2 ** 20, 1),
          'output_mb': round(analysis.output_size_in_bytes / 2 ** 20, 3),
          'argument_mb': round(analysis.argument_size_in_bytes / 2 ** 20, 1),
          'temp_mb': round(analysis.temp_size_in_bytes / 2 ** 20, 1)}


def moved(text: str) -> int:
  """Counts the bytes that the operations of a program read and write, each operand once.

  A buffer that is updated in place counts as what is written into it. Loops and calls count as one
  operation: it is for programs without them, as a step of decoding. What a kernel needs as scratch
  space, which compilers give as bytes, does not count.

  Args:
    text: of `program.as_text()`.
  """
  bodies, entry = _computations(text)
  updating = {name for name, lines in bodies.items()
              if any(' dynamic-update-slice(' in line for line in lines)}
  sizes: dict[str, list[int]] = {}
  total = 0
  for line in bodies[entry]:
    match = _ANY.match(line)
    if not match:
      continue
    arrays = [(dtype, math.prod(map(int, filter(None, dims.split(',')))) * _BYTES[dtype])
              for dtype, dims in _ARRAY.findall(match['type']) if dtype in _BYTES]
    sizes[match['name']] = [size for _, size in arrays]
    if match['kind'] in _FREE:
      continue
    scratch = ('s8', 'u8') if match['kind'] == 'custom-call' else ()
    results = [size for dtype, size in arrays if dtype not in scratch]
    operands = [size for name in re.findall(r'%([\w.-]+)', match['rest'].split('), ')[0])
                for size in sizes.get(name, ())]
    called = re.search(r'calls=%?([\w.-]+)', line)
    if match['kind'] == 'dynamic-update-slice' or (called and called[1] in updating):
      for size in list(results):
        if size in operands and size == max(operands):
          operands.remove(size)
          results.remove(size)
    total += sum(results) + sum(operands)
  return total


def operations(text: str) -> collections.Counter[str]:
  """{kind: collective operations written in a program}, loops counted once."""
  bodies, _ = _computations(text)
  return collections.Counter(
      match['kind'] for lines in bodies.values() for _, match in _sent(lines))


def collectives(text: str) -> list[Collective]:
  """Every collective of a program, from `program.as_text()`."""
  bodies, entry = _computations(text)
  times = _times(bodies, entry)
  results = []
  for name, lines in bodies.items():
    for line, match in _sent(lines) if times[name] else ():
      scope = re.search(r'op_name="([^"]*)"', line)
      results += [Collective(match['kind'], dtype, shape, times[name], scope[1] if scope else '')
                  for dtype, shape in _results(match)]
  return results


def _sent(lines: list[str]) -> Iterator[tuple[str, re.Match[str]]]:
  """Yields the collectives of a computation, each line with what it says.

  XLA for TPUs writes one that runs beside other operations into every fusion of its chain; it
  counts where it starts.
  """
  starts = any('"AsyncCollectiveStart"' in line for line in lines)
  for line in lines:
    match = _OPERATION.match(line)
    if match and (starts or 'chain_id=' not in line):
      yield line, match


def _results(match: re.Match[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
  """(dtype, shape) of what an operation gives; one that only starts lists its operands before."""
  arrays = [(dtype, tuple(map(int, filter(None, dims.split(',')))))
            for dtype, dims in _ARRAY.findall(re.sub(r'\{[^{}]*\}', '', match['type']))]
  if match['start'] and match['kind'] != 'all-reduce':
    # Beside them a permutation may list what it waits by.
    arrays = [array for array in arrays if array[0] in _BYTES and array != ('u32', ())]
    arrays = arrays[len(arrays) // 2:]
  yield from arrays


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """{name: lines} of each computation, and the name of the one that runs first."""
  bodies: dict[str, list[str]] = {}
  entry, lines = '', []
  for line in text.splitlines():
    match = _COMPUTATION.match(line)
    if match:
      lines = bodies.setdefault(match['name'], [])
      entry = match['name'] if match['entry'] else entry
    else:
      lines.append(line)
  return bodies, entry


def _times(bodies: dict[str, list[str]], entry: str) -> collections.Counter[str]:
  """Counts the runs of each computation in one run of the program."""
  calls: dict[str, list[tuple[str, int]]] = {name: [] for name in bodies}
  for name, lines in bodies.items():
    for line in lines:
      called = [one.strip().lstrip('%') for group in _CALLED.findall(line)
                for one in (group[0] or group[1]).split(',')]
      trips = _trips(line, bodies) if ' while(' in line else 1
      calls[name] += [(other, trips) for other in called if other in bodies]
  times: collections.Counter[str] = collections.Counter()

  def run(name: str, count: int) -> None:
    times[name] += count
    for other, trips in calls[name]:
      run(other, count * trips)

  run(entry, 1)
  return times


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
  """Trips of a loop: as the compiler notes them, or the limit that its condition compares with."""
  noted = _TRIPS.search(line)
  if noted:
    return int(noted[1])
  condition = re.search(r'condition=%?([\w.-]+)', line)
  assert condition is not None
  limits = {int(limit) for inner in bodies[condition[1]] for limit in _LIMIT.findall(inner)}
  # A loop whose end is data: its collectives count once.
  return limits.pop() if len(limits) == 1 else 1
