"""Shows published rows beside ours: the cost always, accuracy where weights and data are.

  python -m tools.reproduce
  python -m tools.reproduce --config=configs/reproduce.py:tome_deit_s16_r13

Without --config every row of configs/reproduce.py. What a row lacks is said, and where to put it.
Accuracies go to rows.jsonl in --workdir (runs/reproduce if unset); rows that are there are not
measured again. `config.expected` of a row has `source` and, of these, what was printed:

  top1, unreduced_top1   % of the images right, with and without the reduction
  gmacs                  of one image, counted by `convention` (lib/cost/vit.py; 'macs' if unset)
  images_per_second      without and with the reduction: their ratio is held against that of MACs
  mismatch               why our cost is another, and what it is
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import reproduce as published_rows
from lib.cost import vit as vit_cost
from lib.data import images as image_data
from lib.report import measuring
from lib.runtime import cli, launch, sharding
from lib.tasks import image_sweep
from lib.tasks.base import sum_counts
from lib.tasks.image_metrics import metric_of
from lib.tasks.sweep import fingerprint
from models.backbones.vit import ViT
from models.build import build
from models.compressors import COMPRESSORS
from models.storage import fastest_storage, to_storage

WORKDIR = 'runs/reproduce'
# Figures are printed to few digits; throughput follows MACs on a busy device only so far.
WITHIN = {'GMACs': 0.01, 'speedup': 0.06}


@dataclasses.dataclass(frozen=True)
class Figure:
  """Holds a published figure of cost beside ours.

  Attributes:
    kind: 'GMACs', or 'speedup', which our ratio of MACs is held against.
    published, ours: the figures.
    mismatch: why they differ; empty where they should not.
  """

  kind: str
  published: float
  ours: float
  mismatch: str

  @property
  def agrees(self) -> bool:
    """True if ours is within `WITHIN`, or prints as published."""
    near = abs(self.ours - self.published) <= WITHIN[self.kind] * self.published
    digits = len(f'{self.published:g}'.partition('.')[2])
    return near or (self.kind == 'GMACs' and round(self.ours, digits) == self.published)


def main(argv: Sequence[str]) -> None:
  """Prints the rows."""
  del argv
  workdir = pathlib.Path(launch.WORKDIR.value or WORKDIR)
  named = rows()
  if launch.CONFIG.value:
    flag: Any = flags.FLAGS['config']
    path, _, row = flag.config_filename.partition(':')
    named = [(row or pathlib.Path(path).stem, launch.CONFIG.value)]
  for name, config in named:
    print(describe(name, config, workdir), flush=True)


def rows() -> Iterator[tuple[str, ConfigDict]]:
  """Yields name and config of every row, in order of name."""
  for name in sorted(published_rows.ROWS):
    yield name, published_rows.get_config(name)


def describe(name: str, config: ConfigDict, workdir: pathlib.Path) -> str:
  """Returns a row as text: costs, then accuracies or what they lack.

  Raises:
    ValueError: for a config that is no row, and as the loading of weights and data does.
  """
  if 'expected' not in config:
    raise ValueError(f'{name} says not what was published: give a row of configs/reproduce.py, as '
                     '--config=configs/reproduce.py:tome_deit_s16_r13, or set config.expected')
  expected = config.expected
  lines = [f'{name}: {expected.source}']
  for figure in figures(config):
    verdict = 'agrees' if figure.agrees else f'differs: {figure.mismatch}'
    lines.append(f'  {figure.kind}: published {figure.published:.4g}, ours {figure.ours:.3f}, '
                 f'{verdict}')
  lacks = missing(name, config, workdir)
  if lacks:
    lines.append(f'  top-1: published {expected.top1} %, not measured')
    return '\n'.join([*lines, *(f'    missing: {lack}' for lack in lacks)])
  mesh = sharding.make_mesh(config.mesh)
  _, params = image_sweep.load(config, workdir / name, mesh)
  row, = measuring.measure_rows(
      [{'settings': config.to_json_best_effort(sort_keys=True), 'weights': fingerprint(params)}],
      lambda head: accuracies(config, params, mesh), path=workdir / 'rows.jsonl',
      about={'name': name}, failures=())
  for key, measured in row.items():
    if key in ('top1', 'unreduced_top1'):
      printed = expected.get(key)
      beside = f'published {printed} %, ' if printed else ''
      off = f' ({measured - printed:+.2f})' if printed else ''
      lines.append(f'  {key}: {beside}measured {measured:.2f} %{off}')
  return '\n'.join(lines)


def model(config: ConfigDict, **where: Any) -> ViT:
  """Builds the reduced model of a row."""
  return build(config.model, config.reduce.vision, macs=vit_cost.solver, **where)


def figures(config: ConfigDict) -> list[Figure]:
  """Returns the published costs of a row, beside ours."""
  vit, expected = model(config), config.expected
  beside: list[Figure] = []
  ours, mismatch = vit_cost.of(vit), expected.get('mismatch', '')
  if 'gmacs' in expected:
    convention = vit_cost.CONVENTIONS[expected.get('convention', 'macs')]
    beside.append(Figure('GMACs', expected.gmacs, convention(ours) / 1e9, mismatch))
  if 'images_per_second' in expected:
    before, after = expected.images_per_second
    ratio = vit_cost.of(vit.clone(plan=None)).macs / ours.macs
    beside.append(Figure('speedup', after / before, ratio, mismatch))
  return beside


def missing(name: str, config: ConfigDict, workdir: pathlib.Path) -> list[str]:
  """Lists what has to be there before the accuracy of a row can be measured, one line each."""
  lacks = []
  method, trained = config.reduce.vision.method, workdir / name / 'checkpoints'
  if method in COMPRESSORS:
    lacks.append(f'trained parameters of {method} itself, which no file read here holds '
                 f'({config.needs.made_by}): only its cost is compared')
  elif not pathlib.Path(config.model.weights).expanduser().exists() and not trained.exists():
    lacks.append(f'weights {config.needs.weights} ({config.needs.made_by}): put the file at '
                 f'{config.model.weights}, or name it with --config.model.weights=...')
  try:
    image_data.info(config.data)
  except FileNotFoundError as error:
    lacks.append(f'data: {error}')
  return lacks


def accuracies(config: ConfigDict, params: Any, mesh: Mesh) -> dict[str, float]:
  """Measures % of the test images right: 'top1', and 'unreduced_top1' with a reduction."""
  platform = mesh.devices.flat[0].platform
  vit = model(config, mesh=mesh if mesh.size > 1 else None, platform=platform)
  models = {'top1': vit} if vit.plan is None else {'top1': vit,
                                                   'unreduced_top1': vit.clone(plan=None)}
  task, percent = metric_of(config), {}
  for key, each in models.items():
    own = to_storage(params, fastest_storage(each.plan, platform=platform))
    run = jax.jit(lambda p, x, each=each: each.apply({'params': p}, x)[0])
    counts = []
    for batch in image_data.eval_batches(config.data):
      placed = sharding.put(batch, mesh)
      counts.append(task.counts(run(own, placed['image']), placed['label'], placed['mask']))
    percent[key] = 100 * task.total(sum_counts(counts))
  return percent


if __name__ == '__main__':
  cli.run(main)
