"""What each method gains on this device, and where its time goes.

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

import dataclasses
import pathlib
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import flags
from flax import struct
from jax.interpreters import partial_eval
from tqdm import tqdm

from lib.cost import jaxpr as jaxpr_cost
from lib.cost import vit as vit_cost
from lib.report.rows import append_jsonl, read_jsonl
from lib.runtime import cli, timing
from lib.runtime.meter import floor_seconds
from models.backbones.vit import make_vit
from models.plan import Plan, make_plan, methods
from models.storage import fastest_storage, to_storage
from ops import assignments, attention
from ops import tokens as tk
from ops.signals import Signals, measure, measure_map

VARIANT = flags.DEFINE_string('variant', 'S/16', 'The ViT.')
BATCHES = flags.DEFINE_list('batches', ['1', '8', '32'], 'Batch sizes.')
METHODS = flags.DEFINE_list('methods', None, 'Methods; all by default.')
EVERY_LAYER = flags.DEFINE_list(
    'every_layer', ['tome', 'pitome', 'mctf', 'crossget', 'dymu', 'dtem'],
    'Methods that are also timed with a cut in every layer.')
# Tests import several tools at once, whose flags share their names.
ROUNDS = flags.DEFINE_integer('rounds', None, 'Interleaved rounds; by default 15, from batch 16 '
                              'on 5.', allow_override=True)
APART = flags.DEFINE_integer('apart', 8, 'Batch size at which passes are taken apart.')
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


@struct.dataclass
class Asked:
  """What a method was asked at a cut, or in a layer that it watches, and what it answered.

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
  """A method that also keeps what it is asked and what it answers."""

  def __init__(self, plan, params):
    self._method, self._params = plan.method, params
    beside = {'attention'} if plan.site == 'inside' else {'queries', 'keys'}
    self.needs = plan.method.needs | beside
    self.asked = []
    if plan.watch:
      self.watch_needs, self.watch = plan.method.watch_needs | beside, self._watch

  def __getattr__(self, name):
    return getattr(self._method, name)

  def __call__(self, tokens, signals, *, num_slots):
    """The method's answer."""
    answer = ask(self._method, self._params, tokens, told(self._method.needs, signals),
                 num_slots=num_slots)
    self.asked.append(Asked(tokens, signals, answer, signals.layer, num_slots))
    return answer

  def _watch(self, tokens, signals):
    stats = self._method.watch(tokens, told(self._method.watch_needs, signals))
    self.asked.append(Asked(tokens, signals, stats, signals.layer))
    return stats


@struct.dataclass
class Slice:
  """The first M slots, without an index."""

  outputs: int = struct.field(pytree_node=False)
  slots: int = struct.field(pytree_node=False)
  batch: int = struct.field(pytree_node=False)
  valid = None

  @property
  def src(self):
    """int32[B, M]."""
    return jnp.broadcast_to(jnp.arange(self.outputs, dtype=jnp.int32), (self.batch, self.outputs))

  @property
  def dst(self):
    """int32[B, N]."""
    slot = jnp.minimum(jnp.arange(self.slots, dtype=jnp.int32), self.outputs)
    return jnp.broadcast_to(slot, (self.batch, self.slots))

  def apply(self, values):
    """[B, N, ...] -> [B, M, ...]."""
    return values[:, :self.outputs]

  def totals(self, sizes):
    """The same."""
    return self.apply(sizes)

  def restore(self, values):
    """[B, M, ...] -> [B, N, ...], zeros behind."""
    room = ((0, 0), (0, self.slots - self.outputs), *((0, 0) for _ in values.shape[2:]))
    return jnp.pad(values, room)


@dataclasses.dataclass(frozen=True)
class Slicing:
  """Keeps the first slots: what a reduction would cost if deciding and applying were free."""

  merges: bool
  needs = watch_needs = frozenset()
  proportional = False

  def __call__(self, tokens, signals, *, num_slots):
    """The first `keep` slots."""
    del signals
    if self.merges:
      return Slice(num_slots, *tokens.x.shape[1::-1])
    # Inside attention a Gather tells that the values need not be made anew.
    return assignments.Gather(Slice(num_slots, *tokens.x.shape[1::-1]).src, tokens.slots)


def told(needs, signals):
  """The signals that a method asked for, without those recorded beside them."""
  beside = {name: None for name in AT_HAND | COMPUTED if name not in needs}
  return signals.replace(**beside)


def ask(method, params, tokens, signals, *, num_slots):
  """What a method answers, with its parameters at this cut if it has any."""
  if isinstance(method, nn.Module):
    params = params[f'reducer_{signals.layer:02d}']
    return method.apply({'params': params}, tokens, signals, num_slots=num_slots)
  return method(tokens, signals, num_slots=num_slots)


# -- programs --------------------------------------------------------------------------------------


def forward(vit, plan, trained, images):
  """A forward pass under a plan and its arguments, parameters in the form fastest here."""
  vit = vit.clone(plan=plan)
  params = dict(trained)
  if plan is not None and isinstance(plan.method, nn.Module):
    fresh = jax.jit(vit.init)(jax.random.key(1), images[:1])['params']
    params['stack'] = {**fresh['stack'], **trained['stack']}
  params = to_storage(params, fastest_storage(plan, platform=jax.default_backend()))
  return lambda p, x: vit.apply({'params': p}, x)[0], (params, images)


def record(vit, plan, params, images):
  """What the method was asked in every cut and watched layer of one pass."""

  def run(params, images):
    recorder = Recorder(plan, params['stack'])
    vit.clone(plan=dataclasses.replace(plan, method=recorder)).apply({'params': params}, images)
    return recorder.asked

  return jax.jit(run)(params, images)


def parts(plan, stack, asked):
  """{part: (function, arguments)}: the method's own work at all its cuts, in three pieces."""
  method, inside = plan.method, plan.site == 'inside'
  own = {name: value for name, value in stack.items() if name.startswith('reducer_')}
  cuts = [one for one in asked if one.keep is not None]

  def needed(one):
    return method.needs if one.keep is not None else method.watch_needs

  def scoring(asked):
    rows = []
    for one in asked:
      wanted, valid = needed(one) & COMPUTED, one.tokens.valid
      q, k = one.signals.queries, one.signals.keys
      if inside:
        rows.append(measure_map(wanted, one.signals.attention, q=q, k=k, v=k, query_valid=valid))
      else:
        bias = tk.key_bias(one.tokens, proportional=method.proportional)
        rows.append(measure(wanted, q=q, k=k, v=k, lse=one.answer, bias=bias, query_valid=valid))
    return rows

  def selection(own, asked):
    return [method.watch(one.tokens, one.signals) if one.keep is None else
            ask(method, own, one.tokens, one.signals, num_slots=one.keep) for one in asked]

  def applying(asked):
    made = []
    for one in asked:
      reduced = tk.reduce(one.tokens, one.answer)
      # Who owns what is for those who ask afterwards: the model's answer does not need it.
      made.append(reduced.replace(owner=None))
      if inside and isinstance(one.answer, assignments.Gather):
        made.append(tk.reduce_attention_map(one.answer, one.signals.attention))
      elif inside:
        # As tk.attend does around the product with the values, which counts as the block's.
        made.append(one.answer.apply(one.answer.restore(reduced.x)))
    return made

  found = {}
  if any(needed(one) & COMPUTED for one in asked):
    normal = [] if inside else [_lse(one, method) for one in asked]
    found['scoring'] = (scoring, (
        [one.replace(answer=lse) for one, lse in zip(asked, normal or [None] * len(asked),
                                                     strict=True)],))
  plain = [one.replace(signals=told(needed(one), one.signals), answer=None) for one in asked]
  found['selection'] = (selection, (own, plain))
  found['applying'] = (applying, (
      [one.replace(signals=told({'attention'}, one.signals)) for one in cuts],))
  return found


def _lse(one, method):
  """float32[B, N, H]: attention has it, whoever asks."""
  bias = tk.key_bias(one.tokens, proportional=method.proportional)
  q, k = one.signals.queries, one.signals.keys
  return attention.attend(q, k, k, bias=bias).lse


# -- rows ------------------------------------------------------------------------------------------


def measured(vit, trained, name, schedule, batch, base, slices, speed):
  """A row: one method, one schedule, one batch size.

  Args:
    vit, trained: the model without a plan, and its parameters.
    name, schedule, batch: of the row.
    base: the unreduced model's compiled call, and the images that it gets.
    slices: compiled calls by plan; shared, and added to.
    speed: (FLOPs, bytes) a second.
  """
  call, images = base
  plan = make_plan({'method': name, 'args': ARGS.get(name, {}), **SCHEDULES[schedule]}, vit.host)
  function, args = forward(vit, plan, trained, images)
  made = timing.ready(function, args)
  calls, pieces = {'base': call, 'made': made.call}, {}
  if batch == APART.value:
    # What happens to slots that are joined or picked differs inside attention alone.
    merges = plan.method.merges or plan.site != 'inside'
    sliced = Plan('slice', Slicing(merges), plan.site, plan.cuts)
    if sliced not in slices:
      slices[sliced] = timing.ready(*forward(vit, sliced, trained, images)).call
    calls['slice'] = slices[sliced]
    pieces = parts(plan, args[0]['stack'], record(vit, plan, *args))
  for part, (run, given) in pieces.items():
    calls[part] = timing.ready(run, given).call
    calls[f'{part} empty'] = timing.ready(lambda *given: (), given, keep_unused=True).call
  rounds = ROUNDS.value or (15 if batch < 16 else 5)
  times = timing.interleave(calls, rounds=rounds, warmup=1)

  full, reduced = vit_cost.of(vit), vit_cost.of(vit.clone(plan=plan))
  faster, ratio = timing.speedup(times['base'], times['made']), full.macs / reduced.macs
  whole = times['made'].median_ms
  row = {'method': name, 'schedule': schedule, 'variant': VARIANT.value, 'batch': batch,
         'site': plan.site, 'rounds': rounds, 'args': ARGS.get(name, {}),
         'tokens': [layer.left for layer in reduced.layers], 'macs_ratio': ratio,
         'base_ms': times['base'].median_ms, 'median_ms': whole,
         'low_ms': times['made'].low_ms, 'high_ms': times['made'].high_ms,
         'compile_s': made.seconds, 'speedup': faster.ratio, 'speedup_low': faster.low,
         'speedup_high': faster.high, 'of_macs_ratio': faster.ratio / ratio}
  if pieces:
    row |= taken_apart(times, pieces, ratio, speed)
  return {key: round(value, 4) if isinstance(value, float) else value
          for key, value in row.items()} | timing.machine()


def taken_apart(times, pieces, ratio, speed):
  """Where the time of a pass goes, and the floor of the method's own work: keys of a row."""
  whole = times['made'].median_ms
  spent = {part: max(times[part].median_ms - times[f'{part} empty'].median_ms, 0.0)
           if part in pieces else 0.0 for part in PARTS}
  work = [floor(run, given) for run, given in pieces.values()]
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


def floor(function, args):
  """(MACs, bytes) of one piece: its products, arguments that it uses, and results."""
  closed = jax.make_jaxpr(function)(*args)
  _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
  read = sum(leaf.nbytes for leaf, use in zip(jax.tree.leaves(args), used, strict=True) if use)
  return (jaxpr_cost.count(function, *args).total,
          read + sum(leaf.size * leaf.dtype.itemsize for leaf in closed.out_avals))


def main(argv):
  """Measures what is missing, and writes the table."""
  if len(argv) > 1:
    raise ValueError(f'{argv[1]!r} is not understood: everything is set with flags')
  # A cached program would make compile times mean nothing.
  jax.config.update('jax_enable_compilation_cache', False)
  dtype = jnp.float32 if jax.default_backend() == 'cpu' else jnp.bfloat16
  device = re.sub(r'\W+', '_', jax.devices()[0].device_kind).strip('_').lower()
  out = pathlib.Path(OUT.value or f'results/speed_{device}.jsonl')
  vit = make_vit(VARIANT.value, dtype=dtype,
                 implementation=attention.pick(jax.default_backend(), dtype))
  names = METHODS.value or [name for name in methods(vit.host) if name != 'none']
  wanted = [(name, schedule, int(batch)) for batch in BATCHES.value for name in names
            for schedule in SCHEDULES if schedule == '3 cuts' or name in EVERY_LAYER.value]
  rows = newest(read_jsonl(out) if out.exists() else [])
  missing = [key for key in wanted if AGAIN.value or (VARIANT.value, *key) not in rows]
  if missing:
    speed = timing.device_speed(dtype)
    trained = jax.jit(vit.init)(jax.random.key(1), jnp.zeros((1, 224, 224, 3), dtype))['params']
  bases, slices = {}, {}
  bar = tqdm(missing, disable=not sys.stderr.isatty())
  for name, schedule, batch in bar:
    bar.set_description(f'{name}, {schedule}, batch {batch}')
    if batch not in bases:
      slices.clear()
      images = jax.random.normal(jax.random.key(0), (batch, 224, 224, 3), dtype)
      bases = {batch: (timing.ready(*forward(vit, None, trained, images)).call, images)}
    row = measured(vit, trained, name, schedule, batch, bases[batch], slices, speed)
    append_jsonl(out, row | {'dtype': jnp.dtype(dtype).name,
                             'device_gflops': round(speed[0] / 1e9, 1),
                             'device_gbytes': round(speed[1] / 1e9, 1)})
  rows = newest(read_jsonl(out))
  text = table([row for key, row in rows.items() if key[0] == VARIANT.value])
  out.with_suffix('.md').write_text(text)
  print(text)


def newest(rows):
  """{(variant, method, schedule, batch): row}, the last of each, in the order of the methods."""
  found = {(row['variant'], row['method'], row['schedule'], row['batch']): row for row in rows}
  order = list(methods())
  return dict(sorted(found.items(), key=lambda item: (item[0][0], order.index(item[0][1]),
                                                      item[0][2:])))


# -- the table -------------------------------------------------------------------------------------


def table(rows):
  """Markdown: a line a method and schedule; speed by batch, shares where they were measured."""
  batches = sorted({row['batch'] for row in rows})
  shown = next((batch for batch in batches if any(
      row['batch'] == batch and 'floor_ms' in row for row in rows)), batches[-1])
  lines = {}
  for row in rows:
    lines.setdefault((row['method'], row['schedule']), {})[row['batch']] = row
  titles = ['method', 'cuts', 'MACs ratio', *(f'speed-up, batch {batch}' for batch in batches),
            'break-even batch', *(f'{part} %' for part in PARTS), 'own GFLOPs', 'own MB',
            'floor ms', 'own ms']
  cells = [[name, schedule, f'{next(iter(found.values()))["macs_ratio"]:.2f}',
            *(_speed(found.get(batch)) for batch in batches), _break_even(found),
            *_shares(found.get(shown))] for (name, schedule), found in lines.items()]
  about = rows[-1]
  head = (f'{about["variant"]}, {about["dtype"]}, {about["cores"]} cores of {about["cpu"]}, jax '
          f'{about["jax"]}, {about["date"]}. Speed-up over the unreduced model [quartiles] and, '
          'behind it, that over the ratio of MACs. Shares of the time of a pass, floors and own '
          f'milliseconds at batch {shown}: tools/speed.py says what they mean.')
  body = [titles, ['---'] * len(titles), *cells]
  return head + '\n\n' + '\n'.join('| ' + ' | '.join(line) + ' |' for line in body) + '\n'


def _speed(row):
  if row is None:
    return '-'
  return (f'{row["speedup"]:.2f} [{row["speedup_low"]:.2f}, {row["speedup_high"]:.2f}], '
          f'{row["of_macs_ratio"]:.2f}')


def _break_even(found):
  """The smallest batch measured at which a method is faster than no method."""
  return str(next((batch for batch in sorted(found) if found[batch]['speedup'] > 1), 'never'))


def _shares(row):
  if row is None or 'floor_ms' not in row:
    return ['-'] * (len(PARTS) + 4)
  own = sum(row[f'{part}_ms'] for part in PARTS)
  return [*(f'{100 * row[f"{part}_share"]:.1f}' for part in PARTS), f'{row["own_gflops"]:.2f}',
          f'{row["own_mbytes"]:.1f}', f'{row["floor_ms"]:.2f}', f'{own:.2f}']


if __name__ == '__main__':
  cli.run(main)
