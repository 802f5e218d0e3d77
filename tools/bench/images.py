"""Times every method made for vision-language models by itself, on one image and on a batch.

  python -m tools.bench.images             (results/reducers_llava.jsonl and .md)
  python -m tools.bench.images --sites=projector --methods=divprune,holov --visual=576

A method decides and reduces: alone on one image, another one each time, and on a batch of them, in
turns. Shapes are those of LLaVA-1.5-7B (576 visual tokens, of which 64 stay) and LLaVA-NeXT (2,880,
and 160). 'projector' is behind the projector: signals of CLIP-L, 16 heads of 64 features, and
tokens of 4,096 features, [CLS] in front. 'language' is in the language model: 32 heads of 128
features, 32 words on each side. Features are random.

The floor is what the products of the program cost at the speed of a large one ('FLOPs'), or, if
that takes longer, what must be moved at the speed of the fastest copy ('bytes'): signals are read,
tokens that stay are read and written, and the others are read by a method that merges. A method
that takes more than 1.5 times as long an image in a batch as alone is at fault, which makes the
command fail. What a run frees stays with the process, so that results of a batch are not made of
pages that are mapped anew. Where the process has one core times are its own, whatever else runs
there. Rows that the file has are not measured again.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags

from lib.cost import jaxpr as jaxpr_cost
from lib.report import measuring, tables
from lib.report.rows import Row
from lib.runtime import cli, memory, timing
from ops import choices
from tools.bench.sites import SITES

# Visual tokens of an image: those that stay, and rounds of timing.
SHAPES = {576: (64, 10), 2880: (160, 3)}
PLACES = ('projector', 'language')
WHERE = flags.DEFINE_list('sites', list(PLACES), 'Where methods act.')
METHODS = flags.DEFINE_list('methods', None, 'Methods; all by default.', allow_override=True)
VISUAL = flags.DEFINE_multi_integer('visual', list(SHAPES), 'Visual tokens of an image.')
IMAGES = flags.DEFINE_integer('images', 16, 'Images in a batch.', lower_bound=2, upper_bound=1024)
ROUNDS = flags.DEFINE_integer('rounds', None, 'Interleaved rounds; by default 10, or 3 for 2,880 '
                              'tokens.', lower_bound=1, allow_override=True)
LONGEST = flags.DEFINE_float('longest', 60.0, 'Seconds of the floor of a batch, above which a '
                             'method is not timed.', lower_bound=0.0)
OUT = flags.DEFINE_string('out', 'results/reducers_llava.jsonl', 'Where rows are added. The table '
                          'goes beside it.', allow_override=True)

HEAD = ('site', 'method', 'visual', 'kept', 'images')
MOST = 1.5  # Times the time alone.
TOO_LONG = 'not timed'
SHOWN = ('site', 'method', 'visual', 'kept', 'alone', 'batch', 'ratio', 'floor_ms', 'floor_of',
         'compile_s', 'note')


def main(argv: Sequence[str]) -> None:
  """Measures what the file lacks, adds rows, and writes the table."""
  del argv
  for site in WHERE.value:
    choices.check('site ', site, PLACES)
  offered = {name for site in WHERE.value for name in SITES[site].methods}
  for name in METHODS.value or ():
    choices.check('method ', name, sorted(offered))
  for visual in VISUAL.value:
    choices.check('visual=', visual, SHAPES)
  timing.compile_anew()
  memory.keep()
  out = timing.result_path('reducers', 'jsonl', path=OUT.value)
  heads = [{'site': site, 'method': name, 'visual': visual, 'kept': SHAPES[visual][0],
            'images': IMAGES.value}
           for visual in VISUAL.value for site in WHERE.value for name in SITES[site].methods
           if name in (METHODS.value or offered)]
  measured = measuring.measure_rows(heads, measure, path=out, about=timing.machine())
  rows = list(measuring.newest(out, HEAD).values())
  out.with_suffix('.md').write_text(text := table(rows))
  print(text)
  measuring.check_faults([row for row in measured
                          if not str(row.get('note')).startswith(TOO_LONG)], HEAD)


def measure(head: Row) -> Row:
  """Returns times of a method alone and in a batch, and its floor.

  Raises:
    ValueError: the floor is above --longest.
  """
  images, visual, site = head['images'], head['visual'], SITES[head['site']]
  kept, rounds = SHAPES[visual]
  rounds = ROUNDS.value or rounds
  work = functools.partial(site.work, head['method'], visual=visual, keep=kept,
                           dtype=timing.usual_dtype())
  one, args = work(batch=1)
  method = site.methods[head['method']]()
  floor = floor_of(one, args, merges=method.merges or not method.drops)
  if floor['floor_ms'] * images > 1e3 * LONGEST.value:
    raise ValueError(f'{TOO_LONG}: {floor["floor_of"]} alone take {floor["floor_ms"] / 1e3:.2g} s '
                     'an image')
  function, args = work(batch=images)
  several = [_row(args, number, images) for number in range(min(images, rounds + 1))]
  alone = timing.compile_seconds(jax.jit(one).lower(*several[0]))
  batch = timing.ready(function, args)
  in_turn = itertools.cycle(several)
  times = timing.interleave({'alone': lambda: alone.run(*next(in_turn)), 'batch': batch.call},
                            rounds=rounds, warmup=1, clock=clock())
  each = timing.Timing.of([run / images for run in times['batch'].runs])
  ratio = each.median_ms / times['alone'].median_ms
  fields = {f'{name}_{key}': round(value, 4) for name, found in
            (('alone', times['alone']), ('batch', each)) for key, value in found.fields().items()}
  fault = f'{ratio:.2f} times as dear in a batch' if ratio > MOST else ''
  return {**fields, 'ratio': round(ratio, 3), **floor, 'compile_s': round(batch.seconds, 2),
          'rounds': rounds, 'fault': fault}


def floor_of(function: Callable[..., Any], args: tuple[Any, ...], *, merges: bool) -> Row:
  """Returns what the work on one image costs at least here, and what of.

  Args:
    function: as `Site.work` returns it.
    args: of one image.
    merges: whether all tokens are read for what stays.
  """
  flops, bandwidth = speed()
  tokens, signals = args
  out = jax.eval_shape(function, *args)
  kept = out.size * out.dtype.itemsize
  read = tokens.x.nbytes if merges else kept
  moved = sum(leaf.nbytes for leaf in jax.tree.leaves(signals)) + read + kept
  ms = {'FLOPs': 2e3 * jaxpr_cost.count(function, *args).total / flops,
        'bytes': 1e3 * moved / bandwidth}
  longest = max(ms, key=lambda name: ms[name])
  return {'floor_ms': round(ms[longest], 4), 'floor_of': longest}


@functools.cache
def speed() -> tuple[float, float]:
  """Measures FLOPs and bytes a second, once."""
  return timing.device_speed(timing.usual_dtype(), clock=clock())


def clock() -> timing.Clock:
  """Returns what times are taken by."""
  return time.process_time if timing.machine()['cores'] == 1 else time.perf_counter


def _row(args: tuple[Any, ...], number: int, images: int) -> tuple[Any, ...]:
  """Returns the arguments for one image; what all share, as a projector, stays whole."""
  return jax.tree.map(lambda leaf: leaf[number:number + 1] if len(leaf) == images else leaf, args)


def table(rows: Sequence[Row]) -> str:
  """Returns Markdown: a line a method and shape."""
  good = measuring.measured(rows)
  if not good:
    return 'Nothing was measured.\n'
  shown = [{**row, 'alone': _ms(row, 'alone'), 'batch': _ms(row, 'batch')} for row in rows]
  dear = sum(bool(row['fault']) for row in good)
  head = (f'Milliseconds an image, medians [quartiles], alone and in a batch of '
          f'{good[-1]["images"]}, float32, {tables.describe_machine(good[-1])}. Of {len(good)} '
          f'rows {dear} are more than {MOST} times as dear in a batch. tools/bench/images.py says '
          'what the rest means.')
  return f'{head}\n\n{tables.markdown(shown, SHOWN)}\n'


def _ms(row: Row, name: str) -> str:
  if row.get('failed'):
    return ''
  return '{:.3g} [{:.3g}, {:.3g}]'.format(
      *(row[f'{name}_{key}_ms'] for key in ('median', 'low', 'high')))


if __name__ == '__main__':
  cli.run(main)
