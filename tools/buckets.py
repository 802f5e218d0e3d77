"""Times an adaptive method whose easy images may run in smaller programs, on real images.

  python -m tools.buckets --config=configs/digit_segments.py --workdir=runs/segments \\
      --config.reduce.vision.method=ats --config.reduce.vision.layers='(1,)' \\
      --config.reduce.vision.keep=90

Loads the best checkpoint of a training run, counts the tokens that each test image keeps behind the
first cut, and times batches of the easiest images, of the hardest, and of all kinds. Each runs
interleaved without reduction, at full capacity, in one bucket a batch, and sorted into buckets a
few rows at a time. One JSON line a batch goes to --out.

Axes: B batch, R rows that share a bucket.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from lib.data import images as image_data
from lib.report import tables
from lib.report.rows import append_jsonl
from lib.runtime import cli, launch, sharding, timing
from lib.tasks import image_sweep
from lib.tasks.settings import EVALUATION, check_config
from models.build import build
from models.decoding.buckets import Buckets
from models.storage import fastest_storage, to_storage

SIZES = flags.DEFINE_list('sizes', None, 'Capacities in slots; four even steps if unset.')
ROWS = flags.DEFINE_integer('rows', 8, 'Rows that share a bucket where a batch is sorted.',
                            lower_bound=1)
BATCH = flags.DEFINE_integer('batch', 32, 'Images a batch.', lower_bound=1, upper_bound=65536)
ROUNDS = flags.DEFINE_integer('rounds', 20, 'Interleaved rounds.', lower_bound=1)
cli.check_counts('sizes')
OUT = flags.DEFINE_string('out', 'results/buckets.jsonl', 'Where rows are added.')


def main(argv: Sequence[str]) -> None:
  """Counts, times, and prints a table."""
  del argv
  config = launch.CONFIG.value
  check_config(config, *EVALUATION)
  mesh = sharding.make_mesh(config.mesh)
  step, params = image_sweep.load(config, pathlib.Path(launch.WORKDIR.value), mesh)
  vit = build(config.model, config.reduce.vision, task=config.get('task'))
  if vit.plan is None:
    raise ValueError('nothing is reduced: name an adaptive method, as with '
                     '--config.reduce.vision.method=ats')
  params = to_storage(params, fastest_storage(vit.plan, platform=jax.default_backend()))
  sizes = [int(size) for size in SIZES.value] if SIZES.value else None
  whole = Buckets(vit, params, sizes=sizes)
  sorted_ = Buckets(vit, params, sizes=sizes, rows=ROWS.value)

  plain = jax.jit(lambda p, x: vit.clone(plan=None).apply({'params': p}, x)[0])
  full = jax.jit(lambda p, x: vit.apply({'params': p}, x)[0])
  ways: dict[str, Callable[[jax.Array], Any]] = {
      'plain': functools.partial(plain, params), 'full': functools.partial(full, params),
      'bucket': lambda x: whole(x).logits, 'sorted': lambda x: sorted_(x).logits}
  rows = [measured(name, images, ways, sorted_)
          for name, images in kinds(config.data, whole).items()]
  about = {'step': step, 'method': vit.plan.name,
           'cuts': [[cut.layer, cut.slots_out] for cut in vit.plan.events], 'sizes': whole.sizes,
           'batch': BATCH.value, 'rows_a_bucket': ROWS.value,
           'compilations': len(whole.compiled) + len(sorted_.compiled),
           'overflow': whole.overflow, **timing.machine()}
  for row in rows:
    append_jsonl(OUT.value, about | row)
  print(tables.table(rows, list(rows[0])))
  print(f'{about["compilations"]} programs for buckets {whole.sizes}, '
        f'{sum(whole.compiled.values()) + sum(sorted_.compiled.values()):.1f} s of compiling; '
        f'{whole.overflow} rows in no bucket')


def kinds(data: Any, buckets: Buckets) -> dict[str, jax.Array]:
  """Returns batches of the test images that keep the fewest tokens, the most, and of all kinds."""
  batches = list(image_data.eval_batches(data))
  images = np.concatenate([batch['image'][batch['mask'] > 0] for batch in batches])
  images = images[:len(images) // BATCH.value * BATCH.value]
  counts = np.concatenate([buckets(jnp.asarray(part)).counts for part in np.split(
      images, len(images) // BATCH.value)])
  order = np.argsort(counts, kind='stable')
  spread = np.linspace(0, len(order) - 1, BATCH.value).round().astype(int)
  chosen = {'easy': order[:BATCH.value], 'hard': order[-BATCH.value:],
            'mixed': np.random.default_rng(0).permutation(order[spread])}
  return {name: jnp.asarray(images[index]) for name, index in chosen.items()}


def measured(name: str, images: jax.Array, ways: Mapping[str, Callable[[jax.Array], Any]],
             sorted_: Buckets) -> dict[str, Any]:
  """Measures a row: one batch under every way of running it.

  Args:
    name: of the row.
    images: [B, height, width, C].
    ways: {name: images -> logits}, 'full' among them.
    sorted_: buckets that rows are sorted into.
  """
  answer, expected = sorted_(images), ways['full'](images)
  times = timing.interleave({key: functools.partial(way, images) for key, way in ways.items()},
                            rounds=ROUNDS.value)
  row = {'images': name, 'tokens_mean': float(answer.counts.mean()),
         'tokens_most': int(answer.counts.max()), 'capacity_mean': answer.capacity.mean(),
         'largest_difference': float(jnp.abs(answer.logits - expected).max())}
  for key, time in times.items():
    row[f'{key}_ms'] = round(time.median_ms, 2)
  for key in ('bucket', 'sorted'):
    faster = timing.speedup(times['full'], times[key])
    row[f'{key}_speedup'] = f'{faster.ratio:.2f} [{faster.low:.2f}, {faster.high:.2f}]'
  return row


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
