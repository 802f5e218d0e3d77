"""What reducing tokens gains in answering: time to the first token, and tokens a second.

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

import dataclasses
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from configs import digit_scenes
from lib.cost import jaxpr as jaxpr_cost
from lib.cost import lm as lm_cost
from lib.data.qa import Info
from lib.report.rows import append_jsonl, read_jsonl
from lib.runtime import cli, timing
from lib.runtime.meter import floor_seconds
from lib.tasks import qa as qa_task
from models.backbones.lm import LM
from models.backbones.vlm import Images
from models.plan import make_cache_plan, make_plan
from models.storage import to_storage
from ops.rope import Rope
from ops.tokens import SPECIAL, TEXT

MODELS = flags.DEFINE_list('models', ['scenes', 'lm'], 'Which models.')
# Tests import several tools at once, whose flags share their names.
ROUNDS = flags.DEFINE_integer('rounds', None, 'Interleaved rounds; by default 15, and 3 of reading '
                              'and 5 of decoding for lm.', allow_override=True)
TOKENS = flags.DEFINE_integer('tokens', 16, 'Tokens that are decoded in a round.')
OUT = flags.DEFINE_string('out', None, 'Where rows are added; results/decode_<device>.jsonl if '
                          'unset. The table goes beside it.', allow_override=True)

PROMPT, QUESTION, ASKED, ROOM = 4096, 64, 12, 32
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


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """A model under a plan, and what it reads.

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

  def first(self, params, *inputs):
    """The first token int32[B] and the cache: what a prompt costs."""
    logits, cache = self.model.apply({'params': params}, *inputs, room=ROOM, method='prefill')
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

  def step(self, params, ids, cache):
    """The next token and the cache."""
    logits, cache = self.model.apply({'params': params}, ids, cache, method='decode')
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache


class Decoding:
  """A cache, and a call that decodes so many tokens over it, again and again from its start."""

  def __init__(self, run, params, ids, cache):
    self._run, self._params, self._ids, self._cache = run, params, ids, cache

  def __call__(self):
    """The last token."""
    ids, cache = self._ids, self._cache
    for _ in range(TOKENS.value):
      ids, cache = self._run(self._params, ids, cache)
    self._cache = cache.replace(steps=jnp.zeros((), jnp.int32))
    return ids


def main(argv):
  """Measures, adds rows, and writes the table."""
  del argv
  if not 0 < TOKENS.value <= ROOM:
    raise ValueError(f'tokens={TOKENS.value} is impossible: decode 1 to {ROOM}')
  unknown = sorted(set(MODELS.value) - set(PLANS))
  if unknown:
    raise ValueError(f'model {unknown[0]!r} is unknown: choose from {", ".join(PLANS)}')
  # A cached program would make compile times mean nothing.
  jax.config.update('jax_enable_compilation_cache', False)
  device = re.sub(r'\W+', '_', jax.devices()[0].device_kind).strip('_').lower()
  out = pathlib.Path(OUT.value or f'results/decode_{device}.jsonl')
  speed = timing.device_speed(jnp.float32)
  for name in MODELS.value:
    for row in measured(name, speed):
      append_jsonl(out, row)
  rows = list({(row['model'], row['plan']): row for row in read_jsonl(out)}.values())
  text = table(rows)
  out.with_suffix('.md').write_text(text)
  print(text)
  faults = [f'{row["model"]}, {row["plan"]}: {row["fault"]}' for row in rows if row['fault']]
  if faults:
    raise ValueError('; '.join(faults))


def measured(name, speed):
  """Rows of one model under all its plans.

  Args:
    name: of the model.
    speed: (FLOPs, bytes) a second of this device, the latter of the fastest copy.
  """
  cases = {plan: CASES[name](**places) for plan, places in PLANS[name].items()}
  params = weights(cases['unreduced'])
  reading, decoding, programs = {}, {}, {}
  for plan, case in cases.items():
    reading[plan] = timing.ready(case.first, (params, *case.inputs))
    ids, cache = reading[plan].call()
    step = jax.jit(case.step, donate_argnums=2).lower(params, ids, cache)
    programs[plan] = timing.compile_seconds(step)
    decoding[plan] = Decoding(programs[plan].run, params, ids, cache)
  rounds = {part: ROUNDS.value or default for part, default in
            (('reading', 3 if name == 'lm' else 15), ('decoding', 5 if name == 'lm' else 15))}
  first = timing.interleave({plan: ready.call for plan, ready in reading.items()}, warmup=1,
                            rounds=rounds['reading'])
  after = timing.interleave(decoding, warmup=1, rounds=rounds['decoding'])

  held = sum(leaf.nbytes for leaf in jax.tree.leaves(_read_by_steps(params)))
  full = cases['unreduced']
  cached = lm_cost.of(full.lm, full.slots, room=ROOM).allocated_bytes
  # What fits into a processor's cache is read as fast as the fastest copy.
  bandwidth = speed[1] if held < 2 ** 24 else timing.read_speed(held + cached)
  rows = []
  for plan, case in cases.items():
    costs, base = lm_cost.of(case.lm, case.slots, room=ROOM), lm_cost.of(
        full.lm, full.slots, room=ROOM)
    macs = jaxpr_cost.count(case.first, params, *case.inputs).total
    floors = [1e3 * floor_seconds(work, moved, peak_flops=speed[0], bandwidth=bandwidth)
              for work, moved in ((macs, held), (costs.decode_macs, held + costs.allocated_bytes))]
    memory = programs[plan].run.memory_analysis()
    row = {'model': name, 'plan': plan, 'dtype': 'float32', 'batch': 1, 'slots': case.slots,
           'decoded': TOKENS.value, 'reading_rounds': rounds['reading'],
           'decoding_rounds': rounds['decoding'],
           'cached': [layer.cached for layer in costs.layers]}
    for part, times, tokens, floor, seconds in (
        ('first', first, 1, floors[0], reading[plan].seconds),
        ('token', after, TOKENS.value, floors[1], programs[plan].seconds)):
      time, faster = times[plan], timing.speedup(times['unreduced'], times[plan])
      row |= {f'{part}_ms': time.median_ms / tokens, f'{part}_low_ms': time.low_ms / tokens,
              f'{part}_high_ms': time.high_ms / tokens, f'{part}_speedup': faster.ratio,
              f'{part}_speedup_low': faster.low, f'{part}_speedup_high': faster.high,
              f'{part}_floor_ms': floor, f'{part}_above_floor': time.median_ms / tokens / floor,
              f'{part}_compile_s': seconds}
    row |= {'tokens_a_second': 1e3 / row['token_ms'], 'first_gmacs': macs / 1e9,
            'macs_ratio': costs.macs / base.macs, 'kv_ratio': costs.kv_bytes / base.kv_bytes,
            'token_macs_ratio': costs.decode_macs / base.decode_macs,
            'token_bytes_ratio': (held + costs.allocated_bytes) / (held + base.allocated_bytes),
            'weights_mb': held / 2 ** 20, 'cache_mb': costs.allocated_bytes / 2 ** 20,
            'temporaries_mb': memory.temp_size_in_bytes / 2 ** 20,
            'temporaries_share': memory.temp_size_in_bytes / costs.allocated_bytes,
            'device_gflops': speed[0] / 1e9, 'read_gbytes': bandwidth / 1e9}
    row = {key: round(value, 4) if isinstance(value, float) else value
           for key, value in row.items()}
    row['fault'] = fault(row, memory.alias_size_in_bytes, costs.allocated_bytes)
    rows.append(row | timing.machine())
  return rows


def fault(row, aliased, cache_bytes):
  """What a decode step copies that it should not, '' for nothing."""
  if row['temporaries_share'] > MOST_TEMPORARIES:
    return f'temporaries are {row["temporaries_share"]:.0%} of the cache'
  return '' if aliased >= cache_bytes else 'the cache is not written in place'


# -- models ----------------------------------------------------------------------------------------


def scenes(**places):
  """The vision-language model of configs/digit_scenes.py under reductions by place."""
  # Imported here: it takes TFDS with it.
  from lib.data.datasets.digit_scenes import END, IMAGE, PAD, WORDS
  config = digit_scenes.get_config()
  info = Info(len(WORDS), PAD, END, IMAGE, (), 0, 0, (64, 64, 3), (), 1)
  model = qa_task.build(config.model, places, info, context=ASKED)
  ids = jnp.full((1, ASKED), IMAGE + 1, jnp.int32).at[:, 0].set(IMAGE)
  pixels = jax.random.normal(jax.random.key(0), (1, 1, *info.image_shape))
  visual = model.door.plan.cuts[-1].slots_out if model.door else 64
  return Case(model, model.lm, ASKED + visual, (ids, jnp.ones(ids.shape, bool), Images(pixels)))


def language(**places):
  """A language model of 16 layers under reductions by place."""
  lm = LM(vocabulary=32000, width=1024, depth=16, mlp=2816, heads=16, kv_heads=4, head_width=64,
          context=2 * PROMPT, rope=Rope(64))
  ids = jax.random.randint(jax.random.key(0), (1, PROMPT), 0, lm.vocabulary)
  host = lm.host(PROMPT, special=QUESTION)
  plan = make_plan(places['language'], host) if 'language' in places else None
  kept = make_cache_plan(places['cache'], host, plan=plan) if 'cache' in places else None
  lm = lm.clone(plan=plan, cache_plan=kept)
  return Case(_Asked(lm), lm, PROMPT, (ids,))


@dataclasses.dataclass(frozen=True)
class _Asked:
  """A language model whose last tokens are a question, of a kind that no reduction touches."""

  lm: LM

  def init(self, key, ids):
    return self.lm.init(key, ids)

  def apply(self, variables, *inputs, method, **settings):
    if method == 'prefill':
      tokens = self.lm.apply(variables, *inputs, method='embed')
      kind = jnp.where(jnp.arange(tokens.slots) < tokens.slots - QUESTION, TEXT, SPECIAL)
      inputs = (tokens.replace(kind=jnp.broadcast_to(kind.astype(jnp.int8), tokens.kind.shape)),)
    return self.lm.apply(variables, *inputs, method=method, **settings)


CASES = {'scenes': scenes, 'lm': language}


def weights(case):
  """Random parameters, the blocks as a tuple, in which decoding copies none."""
  params = jax.jit(case.model.init)(jax.random.key(1), *case.inputs)['params']
  return to_storage(params, 'unstacked')


def _read_by_steps(params):
  """The parameters that a decode step reads whole: not the tower's, nor embeddings."""
  params = params.get('lm', params)
  return {name: part for name, part in params.items() if name != 'table'}


# -- the table -------------------------------------------------------------------------------------


def table(rows):
  """Markdown: a line a model and plan."""
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
  about = rows[-1]
  rounds = {row['model']: f'{row["model"]} {row["reading_rounds"]} rounds of reading and '
                          f'{row["decoding_rounds"]} of decoding {row["decoded"]} tokens'
            for row in rows}
  head = (f'Batch 1, {about["dtype"]}, {about["cores"]} cores of {about["cpu"]}, jax '
          f'{about["jax"]}, {about["date"]}; medians [quartiles]: {"; ".join(rounds.values())}. '
          "MACs, bytes and KV are shares of the unreduced model's; bytes are the weights and cache "
          'that a decode step reads. '
          'tools/decode_bench.py says what the rest means.')
  body = [titles, ['---'] * len(titles), *cells]
  return head + '\n\n' + '\n'.join('| ' + ' | '.join(line) + ' |' for line in body) + '\n'


def _speedup(row, part):
  return (f'{row[f"{part}_speedup"]:.2f} [{row[f"{part}_speedup_low"]:.2f}, '
          f'{row[f"{part}_speedup_high"]:.2f}]')


if __name__ == '__main__':
  cli.run(main)
