"""Measures what reducing tokens gains in answering: time to the first token, tokens a second.

  python -m tools.decode_bench                   (results/decode_<device>.jsonl and .md)
  python -m tools.decode_bench --models=scenes --rounds=3

Two models with random weights, as times depend on shapes alone, one row at a time, greedily:

  scenes    the small vision-language model of configs/digit_scenes.py: 64 visual tokens and 12 ids
  lm        16 layers of width 1024, 245 M parameters, float32: a prompt of 4,096 tokens, the last
            64 of which (the question) no reduction touches

each unreduced and under the reductions of `PLANS`. All plans of a model take turns
(lib/runtime/timing.py), in reading a prompt and in decoding; compiling is timed apart. Beside each
time is
its floor: what is multiplied at the speed of a large product, or, if that takes longer, what must
be read once (weights, and in decoding the cache) at the speed of reading as many bytes, both
measured in the same run. A fault, which makes the command fail, is a decode step whose temporaries
exceed a tenth of the cache, or which does not write into the cache in place.

Axes: B batch, N slots.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from configs import digit_scenes
from lib.cost import jaxpr as jaxpr_cost
from lib.cost import lm as lm_cost
from lib.data.qa import Info
from lib.report import measuring, tables
from lib.report.rows import Row
from lib.runtime import cli, timing
from lib.runtime.meter import floor_seconds
from lib.tasks import qa as qa_task
from models.backbones.images import Images
from models.backbones.lm import LM
from models.reduce_config import with_plans
from models.storage import to_storage
from ops import choices
from ops.rope import Rope
from ops.tokens import SPECIAL, TEXT

MODELS = flags.DEFINE_list('models', ['scenes', 'lm'], 'Which models.')
# Tests import several tools at once, whose flags share their names.
ROUNDS = flags.DEFINE_integer('rounds', None, 'Interleaved rounds; by default 15, and 3 of reading '
                              'and 5 of decoding for lm.', lower_bound=1, allow_override=True)
OUT = flags.DEFINE_string('out', None, 'Where rows are added; results/decode_<device>.jsonl if '
                          'unset. The table goes beside it.', allow_override=True)

PROMPT, QUESTION, ASKED, ROOM = 4096, 64, 12, 32
TOKENS = flags.DEFINE_integer('tokens', 16, 'Tokens that are decoded in a round.',
                              lower_bound=1, upper_bound=ROOM)
# model: {name of a plan: {place: reduction}}; a place is vision, projector, language or cache.
PLANS = {
    'scenes': {
        'unreduced': {},
        'fastv, layer 2, 25 %': {'language': {
            'method': 'fastv', 'token_kinds': 'visual', 'layers': 2, 'keep_ratio': 0.25}},
        'topk, projector, 16 of 64': {'projector': {'method': 'topk', 'keep': 16}},
        'divprune, projector, 16 of 64': {'projector': {'method': 'divprune', 'keep': 16}}},
    'lm': {
        'unreduced': {},
        'fastv, layer 2, 50 %': {'language': {'method': 'fastv', 'token_kinds': 'text', 'layers': 2,
                                              'keep_ratio': 0.5}},
        'pyramiddrop, layers 4, 8, 12, 50 %': {'language': {
            'method': 'pyramiddrop', 'token_kinds': 'text', 'layers': (4, 8, 12),
            'keep_ratio': 0.5}},
        'snapkv, cache, 25 %': {'cache': {'method': 'snapkv', 'keep_ratio': 0.25}},
        'streaming_llm, cache, 25 %': {'cache': {'method': 'streaming_llm', 'keep_ratio': 0.25}}},
}
MOST_TEMPORARIES = 0.1  # As a share of the cache.
HEAD = ('model', 'plan')  # What tells a row from others.
# What fits into a processor's cache is read as fast as the fastest copy.
IN_CACHE = 2 ** 24

Array = jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """Holds a model under a plan, with its inputs.

  Attributes:
    model: an LM or a VLM.
    lm: its language model.
    slots: N that the language model reads.
    inputs: of `prefill`.
  """

  model: Any
  lm: LM
  slots: int
  inputs: tuple[Any, ...]

  def first(self, params: Any, *inputs: Any) -> tuple[Array, Any]:
    """Reads a prompt: the first token int32[B] and the cache."""
    logits, cache = self.model.apply({'params': params}, *inputs, room=ROOM, method='prefill')
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

  def step(self, params: Any, ids: Array, cache: Any) -> tuple[Array, Any]:
    """Decodes: the next token int32[B] and the cache."""
    logits, cache = self.model.apply({'params': params}, ids, cache, method='decode')
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache


class Decoding:
  """A cache, and a call that decodes so many tokens over it, again and again from its start."""

  def __init__(self, run: Callable[..., Any], params: Any, ids: Array, cache: Any) -> None:
    self._run, self._params, self._ids, self._cache = run, params, ids, cache

  def __call__(self) -> Array:
    """Decodes, and returns the last token int32[B]."""
    ids, cache = self._ids, self._cache
    for _ in range(TOKENS.value):
      ids, cache = self._run(self._params, ids, cache)
    self._cache = cache.replace(steps=jnp.zeros((), jnp.int32))
    return ids


@dataclasses.dataclass(frozen=True)
class Programs:
  """Holds a case's two compiled programs, ready to time in turns with others.

  Attributes:
    reading: reads the prompt.
    decoding: decodes over the cache that it left.
    step: one step of decoding.
  """

  reading: timing.Ready
  decoding: Decoding
  step: timing.Compiled

  @classmethod
  def of(cls, case: Case, params: Any) -> Programs:
    """Compiles both."""
    reading = timing.ready(case.first, (params, *case.inputs))
    ids, cache = reading.call()
    step = timing.compile_seconds(
        jax.jit(case.step, donate_argnums=2).lower(params, ids, cache))
    return cls(reading, Decoding(step.run, params, ids, cache), step)


def main(argv: Sequence[str]) -> None:
  """Measures, adds rows, and writes the table."""
  del argv
  for name in MODELS.value:
    choices.check('model ', name, PLANS)
  timing.compile_anew()
  out = timing.result_path('decode', 'jsonl', path=OUT.value)
  speed = timing.device_speed(jnp.float32)

  @functools.cache
  def by_plan(name: str) -> dict[str, Row]:
    # Plans of a model take turns: their rows are measured together.
    return {row['plan']: row for row in measured(name, speed)}

  heads = [{'model': name, 'plan': plan} for name in MODELS.value for plan in PLANS[name]]
  measuring.measure_rows(heads, lambda head: by_plan(head['model'])[head['plan']], path=out,
                         about=timing.machine(), again=True)
  rows = list(measuring.newest(out, HEAD).values())
  text = table(rows)
  out.with_suffix('.md').write_text(text)
  print(text)
  measuring.check_faults(rows, HEAD)


def measured(name: str, speed: tuple[float, float]) -> list[Row]:
  """Measures one model under all its plans.

  Args:
    name: of the model.
    speed: (FLOPs, bytes) a second of this device, the latter of the fastest copy.
  """
  cases = {plan: CASES[name](**reductions) for plan, reductions in PLANS[name].items()}
  full = cases['unreduced']
  params = weights(full)
  programs = {plan: Programs.of(case, params) for plan, case in cases.items()}
  rounds = {part: ROUNDS.value or default for part, default in
            (('reading', 3 if name == 'lm' else 15), ('decoding', 5 if name == 'lm' else 15))}
  first = timing.interleave({plan: one.reading.call for plan, one in programs.items()}, warmup=1,
                            rounds=rounds['reading'])
  after = timing.interleave({plan: one.decoding for plan, one in programs.items()}, warmup=1,
                            rounds=rounds['decoding'])

  weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(_read_by_steps(params)))
  cache_bytes = lm_cost.of(full.lm, full.slots, room=ROOM).allocated_bytes
  bandwidth = (speed[1] if weight_bytes < IN_CACHE
               else timing.read_speed(weight_bytes + cache_bytes))
  rows: list[Row] = []
  for plan, case in cases.items():
    row = {'model': name, 'plan': plan, 'dtype': 'float32', 'batch': 1, 'slots': case.slots,
           'decoded': TOKENS.value, 'reading_rounds': rounds['reading'],
           'decoding_rounds': rounds['decoding'],
           **work(case, full, params, weight_bytes, programs[plan].step.run,
                  peak_flops=speed[0], bandwidth=bandwidth)}
    row |= part_fields('first', first, plan, 1, row['first_floor_ms'],
                       programs[plan].reading.seconds)
    row |= part_fields('token', after, plan, TOKENS.value, row['token_floor_ms'],
                       programs[plan].step.seconds)
    row |= {'tokens_a_second': 1e3 / row['token_ms'], 'device_gflops': speed[0] / 1e9,
            'read_gbytes': bandwidth / 1e9}
    rows.append({key: round(value, 4) if isinstance(value, float) else value
                 for key, value in row.items()} | timing.machine())
  return rows


def part_fields(part: str, times: Mapping[str, timing.Timing], plan: str, tokens: int,
                floor_ms: float, compile_s: float) -> dict[str, float]:
  """Returns keys of a row about reading ('first') or decoding ('token'), in time a token."""
  time, faster = times[plan], timing.speedup(times['unreduced'], times[plan])
  return {f'{part}_ms': time.median_ms / tokens, f'{part}_low_ms': time.low_ms / tokens,
          f'{part}_high_ms': time.high_ms / tokens, **faster.fields(f'{part}_'),
          f'{part}_above_floor': time.median_ms / tokens / floor_ms,
          f'{part}_compile_s': compile_s}


def work(case: Case, full: Case, params: Any, weight_bytes: int, step: jax.stages.Compiled, *,
         peak_flops: float, bandwidth: float) -> dict[str, Any]:
  """Returns keys of a row about what is computed and held, beside the unreduced model.

  Args:
    case, full: the model under the plan, and under none.
    params: of both.
    weight_bytes: bytes of the parameters that a decode step reads.
    step: the compiled decode step.
    peak_flops, bandwidth: of this device.
  """
  costs, base = (lm_cost.of(each.lm, each.slots, room=ROOM) for each in (case, full))
  macs = jaxpr_cost.count(case.first, params, *case.inputs).total
  floors = {part: 1e3 * floor_seconds(products, moved, peak_flops=peak_flops, bandwidth=bandwidth)
            for part, products, moved in (
                ('first', macs, weight_bytes),
                ('token', costs.decode_macs, weight_bytes + costs.allocated_bytes))}
  memory = step.memory_analysis()
  if memory is None:
    raise ValueError('this backend does not tell what memory a program needs: measure on a CPU, '
                     'GPU or TPU')
  share = memory.temp_size_in_bytes / costs.allocated_bytes
  return {'cached': [layer.cached for layer in costs.layers],
          'first_floor_ms': floors['first'], 'token_floor_ms': floors['token'],
          'first_gmacs': macs / 1e9, 'macs_ratio': costs.macs / base.macs,
          'kv_ratio': costs.kv_bytes / base.kv_bytes,
          'token_macs_ratio': costs.decode_macs / base.decode_macs,
          'token_bytes_ratio': (weight_bytes + costs.allocated_bytes)
                               / (weight_bytes + base.allocated_bytes),
          'weights_mb': weight_bytes / 2 ** 20, 'cache_mb': costs.allocated_bytes / 2 ** 20,
          'temporaries_mb': memory.temp_size_in_bytes / 2 ** 20, 'temporaries_share': share,
          'fault': fault({'temporaries_share': share}, memory.alias_size_in_bytes,
                         costs.allocated_bytes)}


def fault(row: Row, aliased: int, cache_bytes: int) -> str:
  """Names what a decode step copies that it should not, '' for nothing.

  Args:
    row: with 'temporaries_share'.
    aliased: bytes that the program writes in place.
    cache_bytes: those of the cache.
  """
  if row['temporaries_share'] > MOST_TEMPORARIES:
    return f'temporaries are {row["temporaries_share"]:.0%} of the cache'
  return '' if aliased >= cache_bytes else 'the cache is not written in place'


# -- models ----------------------------------------------------------------------------------------


def scenes(**reductions: Any) -> Case:
  """Builds the vision-language model of configs/digit_scenes.py under reductions by place."""
  # Imported here: it takes TFDS with it.
  from lib.data.datasets.digit_scenes import END, IMAGE, PAD, WORDS
  config = digit_scenes.get_config()
  info = Info(len(WORDS), PAD, END, IMAGE, (), 0, 0, (64, 64, 3), (), 1)
  model = qa_task.build(config.model, reductions, info, context=ASKED)
  ids = jnp.full((1, ASKED), IMAGE + 1, jnp.int32).at[:, 0].set(IMAGE)
  pixels = jax.random.normal(jax.random.key(0), (1, 1, *info.image_shape))
  visual = model.projector_reduction.plan.events[-1].slots_out if model.projector_reduction else 64
  return Case(model, model.lm, ASKED + visual, (ids, jnp.ones(ids.shape, bool), Images(pixels)))


def language(**reductions: Any) -> Case:
  """Builds a language model of 16 layers under reductions by place."""
  lm = LM(vocabulary=32000, width=1024, depth=16, mlp=2816, heads=16, kv_heads=4, head_width=64,
          context=2 * PROMPT, rope=Rope(64))
  ids = jax.random.randint(jax.random.key(0), (1, PROMPT), 0, lm.vocabulary)
  lm = with_plans(lm, **reductions, special=QUESTION)(PROMPT)
  return Case(_WithQuestion(lm), lm, PROMPT, (ids,))


@dataclasses.dataclass(frozen=True)
class _WithQuestion:
  """A language model whose last tokens are a question, of a kind that no reduction touches."""

  lm: LM

  def init(self, key: Array, ids: Array) -> Any:
    return self.lm.init(key, ids)

  def apply(self, variables: Any, *inputs: Any, method: str, **settings: Any) -> Any:
    if method == 'prefill':
      tokens: Any = self.lm.apply(variables, *inputs, method='embed')
      kind = jnp.where(jnp.arange(tokens.slots) < tokens.slots - QUESTION, TEXT, SPECIAL)
      inputs = (tokens.replace(kind=jnp.broadcast_to(kind.astype(jnp.int8), tokens.kind.shape)),)
    return self.lm.apply(variables, *inputs, method=method, **settings)


CASES = {'scenes': scenes, 'lm': language}


def weights(case: Case) -> Any:
  """Makes random parameters, the blocks as a tuple, in which decoding copies none."""
  params = jax.jit(case.model.init)(jax.random.key(1), *case.inputs)['params']
  return to_storage(params, 'unstacked')


def _read_by_steps(params: Any) -> dict[str, Any]:
  """Returns parameters that a decode step reads whole: not the tower's, nor embeddings."""
  params = params.get('lm', params)
  return {name: part for name, part in params.items() if name != 'table'}


# -- the table -------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
  """Returns Markdown: a line a model and plan; rows that failed are left out."""
  rows = measuring.measured(rows)
  if not rows:
    return 'Nothing was measured.\n'
  titles = ['model', 'plan', 'first token ms', 'speed-up', 'MACs ratio', 'above floor',
            'tokens/s', 'speed-up', 'bytes ratio', 'KV ratio', 'above floor', 'temporaries % of KV',
            'compile s']
  cells = [[row['model'], row['plan'],
            f'{row["first_ms"]:.4g} [{row["first_low_ms"]:.4g}, {row["first_high_ms"]:.4g}]',
            _speedup(row, 'first'), f'{row["macs_ratio"]:.2f}', f'{row["first_above_floor"]:.1f}x',
            f'{row["tokens_a_second"]:.4g} [{1e3 / row["token_high_ms"]:.4g}, '
            f'{1e3 / row["token_low_ms"]:.4g}]',
            _speedup(row, 'token'), f'{row["token_bytes_ratio"]:.2f}', f'{row["kv_ratio"]:.2f}',
            f'{row["token_above_floor"]:.1f}x', f'{100 * row["temporaries_share"]:.1f}',
            f'{row["first_compile_s"]:.1f} + {row["token_compile_s"]:.1f}'] for row in rows]
  rounds = {row['model']: f'{row["model"]} {row["reading_rounds"]} rounds of reading and '
                          f'{row["decoding_rounds"]} of decoding {row["decoded"]} tokens'
            for row in rows}
  head = (f'Batch 1, {rows[-1]["dtype"]}, {tables.describe_machine(rows[-1])}; medians '
          f'[quartiles]: {"; ".join(rounds.values())}. '
          "MACs, bytes and KV are shares of the unreduced model's; bytes are the weights and cache "
          'that a decode step reads. '
          'tools/decode_bench.py says what the rest means.')
  return f'{head}\n\n{tables.markdown_lines(titles, cells)}'


def _speedup(row: Row, part: str) -> str:
  return (f'{row[f"{part}_speedup"]:.2f} [{row[f"{part}_speedup_low"]:.2f}, '
          f'{row[f"{part}_speedup_high"]:.2f}]')


if __name__ == '__main__':
  cli.run(main)
