"""Measures what each method gains on this device, and where its time goes.

  python -m tools.speed                                  (results/speed_<device>.jsonl and .md)
  python -m tools.speed --methods=tome,atc --batches=8

A ViT under every method, three cuts or one in every layer, forward pass alone. Rows that the file
has already are kept, so a run that was stopped goes on where it was; `--again` measures anew. In
one row all programs take turns (lib/runtime/timing.py), so ratios hold on a machine that others use
too:

  base      the unreduced model
  made      the model under the method

and, at the batch size --apart,

  slice     the same token counts by slicing: no decision, nothing to gather. What no method of
            these counts can beat

and, by themselves, on the tokens and signals that `made` has at its cuts, all cuts in one program:

  scoring   the rows of attention that the method asks for. Keys, queries, values, features and,
            inside attention, the map are there anyway and count as free
  selection the method itself: its own scores, and whatever turns them into an assignment (top-k,
            matching, clustering); in watched layers too
  applying  gathering, merging or mixing the tokens, sizes too (inside attention: rows of the map,
            or values and what was read of them, as well)

The time of a program that takes the same arguments and computes nothing is taken off these three.
The share of each is of `made`. What `made` takes beyond `slice` and the three is `rest_ms`: what
other sizes of arrays, log(size) in attention and lost fusions cost; noise too.

`of_macs_ratio` is the speed-up over the ratio of MACs of the two models (lib/cost/vit.py), which
leaves out the method's own work. The floor of that work is what it multiplies (from the traced
program) and what it reads and writes at least (arguments of the three programs that are used, and
their results), at the speeds of a large product and of a copy, measured in the same run. It knows
nothing of steps that must wait for each other, of sorting, or of what is held in between.

Images are noise under random weights: times depend on shapes alone, but for `centerclip`, which
stops when its clusters do.

Axes: B batch, N slots, M slots after.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import flags
from flax import struct
from jax.interpreters import partial_eval

from lib.cost import jaxpr as jaxpr_cost
from lib.cost import vit as vit_cost
from lib.report import measuring, tables
from lib.report.rows import Row, read_jsonl
from lib.runtime import cli, timing
from lib.runtime.meter import floor_seconds
from models.backbones.vit import ViT, make_vit
from models.plan import make_plan, methods
from models.plans.events import Plan, make_events
from models.reduction import Reduction
from models.storage import fastest_storage, to_storage
from ops import assignments, attention, choices
from ops import tokens as tk
from ops.assignments import Extras
from ops.signals import Signals, measure, measure_map

VARIANT = flags.DEFINE_string('variant', 'S/16', 'The ViT.')
BATCHES = flags.DEFINE_list('batches', ['1', '8', '32'], 'Batch sizes.')
cli.check_counts('batches', high=65536)
METHODS = flags.DEFINE_list('methods', None, 'Methods; all by default.')
EVERY_LAYER = flags.DEFINE_list(
    'every_layer', ['tome', 'pitome', 'mctf', 'crossget', 'dymu', 'dtem'],
    'Methods that are also timed with a cut in every layer.')
# Tests import several tools at once, whose flags share their names.
ROUNDS = flags.DEFINE_integer('rounds', None, 'Interleaved rounds; by default 15, from batch 16 '
                              'on 5.', lower_bound=1, allow_override=True)
APART = flags.DEFINE_integer('apart', 8, 'Batch size at which passes are taken apart.',
                             lower_bound=1)
AGAIN = flags.DEFINE_bool('again', False, 'Measures rows anew that are there already.')
OUT = flags.DEFINE_string('out', None, 'Where rows are added; results/speed_<device>.jsonl if '
                          'unset. The table goes beside it.', allow_override=True)

# Three cuts as most papers place them, or one in every layer.
SCHEDULES = {'3 cuts': {'layers': (3, 6, 9), 'keep_ratio': 0.7},
             'every layer': {'layers': 'all', 'remove': 13}}
# The released resampler is a quarter as wide as its tokens; its default suits those of a 7B model.
ARGS = {'textmonkey_resampler': {'width': 96, 'heads': 3, 'head_dim': 32}}
# Signals that a layer has at hand anyway.
AT_HAND = frozenset({'keys', 'queries', 'values', 'hidden', 'attention'})
COMPUTED = frozenset({'cls_attention', 'received_attention'})
PARTS = ('scoring', 'selection', 'applying')
HEAD = ('variant', 'method', 'schedule', 'batch')  # What tells a row from others.

Params = Mapping[str, Any]
Pieces = dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]


@struct.dataclass
class Call:
  """Holds what a method was asked at a cut, or in a watched layer, and what it answered.

  Attributes:
    tokens: N slots.
    signals: those that it needs, and queries and keys (inside attention: the map).
    answer: the assignment; in a watched layer stats by name.
    layer: index. Static.
    keep: M slots; None in a watched layer. Static.
  """

  tokens: tk.TokenSet
  signals: Signals
  answer: assignments.Assignment | dict[str, jax.Array]
  layer: int = struct.field(pytree_node=False)
  keep: int | None = struct.field(pytree_node=False, default=None)


class Recorder:
  """Records what a method is asked and what it answers; stands in for the method in a plan.

  Args:
    plan: that of the method.
    params: of the stack, among them the method's own.
  """

  def __init__(self, plan: Plan, params: Params) -> None:
    self._method, self._params = plan.only.method, params
    recorded = {'attention'} if site_of(plan) == 'inside' else {'queries', 'keys'}
    self.needs: frozenset[str] = self._method.needs | recorded
    self.calls: list[Call] = []
    if plan.only.watch:
      self.watch_needs: frozenset[str] = self._method.watch_needs | recorded
      self.watch = self._watch

  def __getattr__(self, name: str) -> Any:
    return getattr(self._method, name)

  def __call__(self, tokens: tk.TokenSet, signals: Signals, *,
               num_slots: int) -> assignments.Assignment:
    """Returns the method's answer."""
    answer = ask(self._method, self._params, tokens, select_signals(self._method.needs, signals),
                 num_slots=num_slots)
    self.calls.append(Call(tokens, signals, answer, signals.layer, num_slots))
    return answer

  def _watch(self, tokens: tk.TokenSet, signals: Signals) -> dict[str, jax.Array]:
    stats = self._method.watch(tokens, select_signals(self._method.watch_needs, signals))
    self.calls.append(Call(tokens, signals, stats, signals.layer))
    return stats


class Slice(Extras, struct.PyTreeNode):
  """Keeps the first M slots, without an index."""

  outputs: int = struct.field(pytree_node=False)
  slots: int = struct.field(pytree_node=False)
  batch: int = struct.field(pytree_node=False)

  @property
  def src(self) -> jax.Array:
    """int32[B, M], the slot that each output holds."""
    return jnp.broadcast_to(jnp.arange(self.outputs, dtype=jnp.int32), (self.batch, self.outputs))

  @property
  def dst(self) -> jax.Array:
    """int32[B, N], the output that holds each slot, M for none."""
    slot = jnp.minimum(jnp.arange(self.slots, dtype=jnp.int32), self.outputs)
    return jnp.broadcast_to(slot, (self.batch, self.slots))

  def apply(self, values: jax.Array) -> jax.Array:
    """Slices [B, N, ...] to [B, M, ...]."""
    return values[:, :self.outputs]

  def apply_by_head(self, values: jax.Array) -> jax.Array:
    """Slices [B, H, N, K] to [B, H, M, K]."""
    return values[:, :, :self.outputs]

  def reduce_keys(self, attention: jax.Array) -> jax.Array:
    """Slices the keys of a map, as a method that merges would: [B, H, N, N] to [B, H, N, M]."""
    return attention[..., :self.outputs]

  def totals(self, sizes: jax.Array) -> jax.Array:
    """Slices sizes as `apply` does."""
    return self.apply(sizes)

  def restore(self, values: jax.Array) -> jax.Array:
    """Pads [B, M, ...] with zeros to [B, N, ...]."""
    room = ((0, 0), (0, self.slots - self.outputs), *((0, 0) for _ in values.shape[2:]))
    return jnp.pad(values, room)


@dataclasses.dataclass(frozen=True)
class Slicing:
  """Keeps the first slots, as a reduction would if deciding and applying were free."""

  merges: bool
  needs: ClassVar[frozenset[str]] = frozenset()
  watch_needs: ClassVar[frozenset[str]] = frozenset()
  proportional: ClassVar[bool] = False
  tied: ClassVar[bool] = False

  def __call__(self, tokens: tk.TokenSet, signals: Signals, *,
               num_slots: int) -> Slice | assignments.Gather:
    """Returns an assignment of the first `num_slots` slots."""
    del signals
    if self.merges:
      return Slice(num_slots, *tokens.x.shape[1::-1])
    # Inside attention a Gather tells that the values need not be made anew.
    return assignments.Gather(Slice(num_slots, *tokens.x.shape[1::-1]).src, tokens.slots)


def select_signals(needs: frozenset[str] | set[str], signals: Any) -> Any:
  """Returns the signals that a method asked for, without those recorded beside them."""
  return signals.replace(**{name: None for name in AT_HAND | COMPUTED if name not in needs})


def ask(method: Any, params: Params, tokens: tk.TokenSet, signals: Signals, *,
        num_slots: int) -> Any:
  """Asks a method for its assignment, with its parameters at this cut if it has any."""
  if isinstance(method, nn.Module):
    params = params[f'reducer_{signals.layer:02d}']
    return method.apply({'params': params}, tokens, signals, num_slots=num_slots)
  return method(tokens, signals, num_slots=num_slots)


def site_of(plan: Plan) -> str:
  """Returns the site of a plan whose events have one."""
  return plan.events[0].site


# -- programs --------------------------------------------------------------------------------------


def forward(vit: ViT, plan: Plan | None, trained: Params,
            images: jax.Array) -> tuple[Callable[..., jax.Array], tuple[Any, ...]]:
  """Returns a forward pass under a plan and its arguments, parameters stored as is fastest here."""
  vit = vit.clone(plan=plan)
  params = dict(trained)
  if plan is not None and plan.only.learned:
    fresh = jax.jit(vit.init)(jax.random.key(1), images[:1])['params']
    params['stack'] = {**fresh['stack'], **trained['stack']}
  params = to_storage(params, fastest_storage(plan, platform=jax.default_backend()))
  return lambda p, x: vit.apply({'params': p}, x)[0], (params, images)


def record(vit: ViT, plan: Plan, params: Params, images: jax.Array) -> list[Call]:
  """Records what the method is asked in every cut and watched layer of one pass."""

  def run(params: Params, images: jax.Array) -> list[Call]:
    recorder = Recorder(plan, params['stack'])
    vit.clone(plan=plan.with_method(recorder)).apply({'params': params}, images)
    return recorder.calls

  return jax.jit(run)(params, images)


def parts(plan: Plan, stack: Params, calls: Sequence[Any]) -> Pieces:
  """Returns {part: (function, arguments)}: the method's own work at all its cuts, in pieces.

  Args:
    plan: the method and where it acts.
    stack: parameters of the stack, among them the method's own.
    calls: as `record` returns it. A method that needs no computed row has no 'scoring'.
  """
  method, inside = plan.only.method, site_of(plan) == 'inside'
  own = {name: value for name, value in stack.items() if name.startswith('reducer_')}
  pieces: Pieces = {}
  if any(_needed(method, call) & COMPUTED for call in calls):
    # Inside attention there is a map, and no log-sum-exp to read.
    scored = [call.replace(answer=None if inside else _lse(call, method)) for call in calls]
    pieces['scoring'] = (functools.partial(_scoring, method, inside), (scored,))
  plain = [call.replace(signals=select_signals(_needed(method, call), call.signals), answer=None)
           for call in calls]
  pieces['selection'] = (functools.partial(_selection, method), (own, plain))
  cuts = [call.replace(signals=select_signals({'attention'}, call.signals)) for call in calls
          if call.keep is not None]
  pieces['applying'] = (functools.partial(_applying, inside), (cuts,))
  return pieces


def _needed(method: Any, call: Any) -> frozenset[str]:
  """Returns the signals that a method needs at a cut, or in a watched layer."""
  return method.needs if call.keep is not None else method.watch_needs


def _scoring(method: Any, inside: bool, calls: Sequence[Any]) -> list[Any]:
  """Measures the rows of attention that the method asks for."""
  rows = []
  for call in calls:
    wanted, valid = _needed(method, call) & COMPUTED, call.tokens.valid
    q, k = call.signals.queries, call.signals.keys
    if inside:
      rows.append(measure_map(wanted, call.signals.attention, q=q, k=k, v=k, query_valid=valid))
    else:
      bias = tk.key_bias(call.tokens, proportional=method.proportional)
      rows.append(measure(wanted, q=q, k=k, v=k, lse=call.answer, bias=bias, query_valid=valid))
  return rows


def _selection(method: Any, own: Params, calls: Sequence[Any]) -> list[Any]:
  """Asks the method itself, in watched layers too."""
  return [method.watch(call.tokens, call.signals) if call.keep is None else
          ask(method, own, call.tokens, call.signals, num_slots=call.keep) for call in calls]


def _applying(inside: bool, calls: Sequence[Any]) -> list[Any]:
  """Applies the method's answers to tokens, and inside attention to the map or what it read."""
  results: list[Any] = []
  for call in calls:
    reduced: Any = tk.reduce(call.tokens, call.answer)
    # Who owns what is for those who ask afterwards: the model's answer does not need it.
    results.append(reduced.replace(owner=None))
    if inside and isinstance(call.answer, assignments.Gather):
      results.append(tk.reduce_attention_map(call.answer, call.signals.attention))
    elif inside:
      # As tk.attend_after_cut does around the product with the values, which is the block's.
      results.append(call.answer.apply(call.answer.restore(reduced.x)))
  return results


def _lse(call: Any, method: Any) -> jax.Array:
  """Computes float32[B, N, H] of one layer: attention has it, whatever a method needs."""
  bias = tk.key_bias(call.tokens, proportional=method.proportional)
  q, k = call.signals.queries, call.signals.keys
  return attention.attend(q, k, k, bias=bias).lse


# -- rows ------------------------------------------------------------------------------------------


class Bench:
  """Measures rows of one ViT; programs and device speeds that several rows need are made once.

  Args:
    vit: the model without a plan.
    dtype: of images and activations.
  """

  def __init__(self, vit: ViT, dtype: Any) -> None:
    self._vit, self._dtype = vit, dtype
    self._batch = 0
    self._images: Any = None
    self._base: Any = None
    self._slices: dict[Plan, Callable[[], Any]] = {}

  @functools.cached_property
  def _speed(self) -> tuple[float, float]:
    """(FLOPs, bytes) a second of this device."""
    return timing.device_speed(self._dtype)

  @functools.cached_property
  def _trained(self) -> Params:
    """The unreduced model's parameters."""
    return jax.jit(self._vit.init)(jax.random.key(1), jnp.zeros((1, 224, 224, 3), self._dtype))[
        'params']

  def _use_batch(self, batch: int) -> None:
    """Compiles the unreduced model for a batch size; what was compiled for another is let go."""
    if batch != self._batch:
      self._slices.clear()
      self._images = jax.random.normal(jax.random.key(0), (batch, 224, 224, 3), self._dtype)
      self._base = timing.ready(*forward(self._vit, None, self._trained, self._images)).call
      self._batch = batch

  def _slice(self, plan: Plan) -> Callable[[], Any]:
    """Returns a pass with the counts of a plan, by slicing; rows with equal counts share it."""
    # What happens to slots that are joined or picked differs inside attention alone.
    merges = plan.only.method.merges or site_of(plan) != 'inside'
    slicing = Reduction('slice', Slicing(merges))
    sliced = Plan(make_events(slicing, site_of(plan), plan.events, parts=plan.events[0].parts),
                  (slicing,))
    if sliced not in self._slices:
      self._slices[sliced] = timing.ready(
          *forward(self._vit, sliced, self._trained, self._images)).call
    return self._slices[sliced]

  def measure(self, head: Row) -> Row:
    """Returns the other keys of a row: one method, one schedule, one batch size."""
    name, batch = head['method'], head['batch']
    plan = make_plan({'method': name, 'args': ARGS.get(name, {}), **SCHEDULES[head['schedule']]},
                     self._vit.host)
    self._use_batch(batch)
    function, args = forward(self._vit, plan, self._trained, self._images)
    reduced_pass = timing.ready(function, args)
    calls = {'base': self._base, 'made': reduced_pass.call}
    pieces: Pieces = {}
    if batch == APART.value:
      calls['slice'] = self._slice(plan)
      pieces = parts(plan, args[0]['stack'], record(self._vit, plan, *args))
    for part, (run, inputs) in pieces.items():
      calls[part] = timing.ready(run, inputs).call
      calls[f'{part} empty'] = timing.ready(lambda *unread: (), inputs, keep_unused=True).call
    rounds = ROUNDS.value or (15 if batch < 16 else 5)
    times = timing.interleave(calls, rounds=rounds, warmup=1)

    full, reduced = vit_cost.of(self._vit), vit_cost.of(self._vit.clone(plan=plan))
    faster, ratio = timing.speedup(times['base'], times['made']), full.macs / reduced.macs
    row = {'site': site_of(plan), 'rounds': rounds, 'args': ARGS.get(name, {}),
           'tokens': [layer.left for layer in reduced.layers], 'macs_ratio': ratio,
           'base_ms': times['base'].median_ms, **times['made'].fields(),
           'compile_s': reduced_pass.seconds, **faster.fields(),
           'of_macs_ratio': faster.ratio / ratio}
    if pieces:
      row |= taken_apart(times, pieces, ratio, self._speed)
    return {**{key: round(value, 4) if isinstance(value, float) else value
               for key, value in row.items()},
            'dtype': jnp.dtype(self._dtype).name,
            'device_gflops': round(self._speed[0] / 1e9, 1),
            'device_gbytes': round(self._speed[1] / 1e9, 1)}


def taken_apart(times: Mapping[str, timing.Timing], pieces: Pieces, ratio: float,
                speed: tuple[float, float]) -> dict[str, float]:
  """Returns where the time of a pass goes, and the floor of the method's own work: keys of a row.

  Args:
    times: of the base, the reduced pass, the slices and the pieces, with and without their work.
    pieces: as `parts` returns them.
    ratio: MACs of the unreduced model over those of the reduced one.
    speed: (FLOPs, bytes) a second.
  """
  whole = times['made'].median_ms
  spent = {part: max(times[part].median_ms - times[f'{part} empty'].median_ms, 0.0)
           if part in pieces else 0.0 for part in PARTS}
  work = [floor(run, inputs) for run, inputs in pieces.values()]
  macs, moved = (sum(column) for column in zip(*work, strict=True))
  possible = timing.speedup(times['base'], times['slice']).ratio
  row = {'slice_ms': times['slice'].median_ms, 'slice_of_macs_ratio': possible / ratio}
  row |= {f'{part}_ms': value for part, value in spent.items()}
  row |= {f'{part}_share': value / whole for part, value in spent.items()}
  return row | {
      'rest_ms': whole - times['slice'].median_ms - sum(spent.values()),
      'own_gflops': 2 * macs / 1e9, 'own_mbytes': moved / 1e6,
      'floor_ms': 1e3 * floor_seconds(macs, moved, peak_flops=speed[0],
                                      bandwidth=speed[1])}


def floor(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[int, int]:
  """Returns (MACs, bytes) of one piece: its products, arguments that it uses, and results."""
  closed = jax.make_jaxpr(function)(*args)
  _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
  read = sum(leaf.nbytes for leaf, use in zip(jax.tree.leaves(args), used, strict=True) if use)
  return (jaxpr_cost.count(function, *args).total,
          read + sum(leaf.size * leaf.dtype.itemsize for leaf in closed.out_avals))


def main(argv: Sequence[str]) -> None:
  """Measures what is missing, and writes the table."""
  del argv
  timing.compile_anew()
  dtype = timing.usual_dtype()
  out = timing.result_path('speed', 'jsonl', path=OUT.value)
  vit = make_vit(VARIANT.value, dtype=dtype,
                 implementation=attention.pick(jax.default_backend(), dtype))
  names = METHODS.value or [name for name in methods(vit.host) if name != 'none']
  for name in names:
    choices.check('method ', name, methods(vit.host))
  heads = [{'variant': VARIANT.value, 'method': name, 'schedule': schedule, 'batch': int(batch)}
           for batch in BATCHES.value for name in names for schedule in SCHEDULES
           if schedule == '3 cuts' or name in EVERY_LAYER.value]
  rows = measuring.measure_rows(heads, Bench(vit, dtype).measure, path=out,
                                about=timing.machine(), again=AGAIN.value)
  text = table([row for row in newest(read_jsonl(out)).values()
                if row['variant'] == VARIANT.value])
  out.with_suffix('.md').write_text(text)
  print(text)
  measuring.check_faults(rows, HEAD)


def newest(rows: Iterable[Row]) -> dict[str, Row]:
  """Returns the last row of each head, in the order of variants, methods, schedules, batches."""
  latest = {measuring.identity(row, HEAD): row for row in rows}
  order = list(methods())
  return dict(sorted(latest.items(), key=lambda item: (
      item[1]['variant'], order.index(item[1]['method']), item[1]['schedule'], item[1]['batch'])))


# -- the table -------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
  """Returns Markdown: a line a method and schedule; speed by batch, shares where measured.

  Rows that failed are left out.
  """
  rows = measuring.measured(rows)
  if not rows:
    return 'Nothing was measured.\n'
  batches = sorted({row['batch'] for row in rows})
  shown = next((batch for batch in batches if any(
      row['batch'] == batch and 'floor_ms' in row for row in rows)), batches[-1])
  lines: dict[tuple[str, str], dict[int, Row]] = {}
  for row in rows:
    lines.setdefault((row['method'], row['schedule']), {})[row['batch']] = row
  titles = ['method', 'cuts', 'MACs ratio', *(f'speed-up, batch {batch}' for batch in batches),
            'break-even batch', *(f'{part} %' for part in PARTS), 'own GFLOPs', 'own MB',
            'floor ms', 'own ms']
  cells = [[name, schedule, f'{next(iter(by_batch.values()))["macs_ratio"]:.2f}',
            *(_speed(by_batch.get(batch)) for batch in batches), _break_even(by_batch),
            *_shares(by_batch.get(shown))] for (name, schedule), by_batch in lines.items()]
  last = rows[-1]
  head = (f'{last["variant"]}, {last["dtype"]}, {tables.describe_machine(last)}. Speed-up over '
          'the unreduced model [quartiles] and, behind it, that over the ratio of MACs. Shares of '
          f'the time of a pass, floors and own milliseconds at batch {shown}: tools/speed.py says '
          'what they mean.')
  return f'{head}\n\n{tables.markdown_lines(titles, cells)}'


def _speed(row: Row | None) -> str:
  if row is None:
    return '-'
  return (f'{row["speedup"]:.2f} [{row["speedup_low"]:.2f}, {row["speedup_high"]:.2f}], '
          f'{row["of_macs_ratio"]:.2f}')


def _break_even(by_batch: Mapping[int, Row]) -> str:
  """Returns the smallest batch measured at which a method is faster than no method."""
  return str(next((batch for batch in sorted(by_batch) if by_batch[batch]['speedup'] > 1),
                  'never'))


def _shares(row: Row | None) -> list[str]:
  if row is None or 'floor_ms' not in row:
    return ['-'] * (len(PARTS) + 4)
  own = sum(row[f'{part}_ms'] for part in PARTS)
  return [*(f'{100 * row[f"{part}_share"]:.1f}' for part in PARTS), f'{row["own_gflops"]:.2f}',
          f'{row["own_mbytes"]:.1f}', f'{row["floor_ms"]:.2f}', f'{own:.2f}']


if __name__ == '__main__':
  cli.run(main)
