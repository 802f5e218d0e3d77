"""Keeps a trained run in small: its config, its log, its best averaged parameters, and its words.

  python -m tools.pack --config=configs/digit_scenes.py --workdir=runs/scenes \\
      --out=results/digit_scenes

What it writes serves as a --workdir of eval.py, and as `config.start` of train.py. Parameters that
were frozen are not in it: loading it reads them from the files that its config names.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Sequence

import jax
from absl import flags

from lib.data import qa as qa_data
from lib.runtime import checkpoint, checksums, cli, launch, sharding
from lib.tasks import pretrained, registry, trained
from lib.tasks.settings import EVALUATION, check_config

OUT = flags.DEFINE_string('out', None, 'The folder to write.')


def main(argv: Sequence[str]) -> None:
  """Reads the run, and writes its files and their checksums."""
  del argv
  config = launch.CONFIG.value
  workdir, out = pathlib.Path(launch.WORKDIR.value), pathlib.Path(OUT.value)
  check_config(config, *EVALUATION, 'optimizer')
  mesh = sharding.make_mesh(config.mesh)
  task = registry.make_task(config, mesh)
  abstract, _ = pretrained.split(jax.eval_shape(task.init, jax.random.key(0)),
                                 pretrained.names(config))
  template = sharding.shapes(abstract, sharding.make_shardings(abstract, config.sharding, mesh))
  best = checkpoint.best(workdir, template, metric=task.score)
  if best is None:
    raise FileNotFoundError(f'no checkpoint in {workdir / "checkpoints"}: train first, with '
                            f'python -m train --config=... --workdir={workdir}')
  step, params = best
  path = checkpoint.pack(params, step, out)
  names = ['config.json', 'metrics.jsonl']
  for name in names:
    shutil.copy(workdir / name, out)
  if 'lm' in config.model:
    trained.save_info(qa_data.info(config.data), out)
    names.append(trained.INFO)
  checksums.write(out, [checkpoint.PACKED, *names])
  print(f'{path}: step {step}, {path.stat().st_size / 1e6:.1f} MB')


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir', 'out'])
  cli.run(main)
