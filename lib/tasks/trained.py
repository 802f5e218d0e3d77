"""Runs of train.py that learned to answer questions, as models to use."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from lib.data import prepare
from lib.data import qa as qa_data
from lib.data.qa import Info
from lib.runtime import checkpoint, sharding
from lib.tasks import pretrained
from lib.tasks import qa as qa_task
from lib.tasks.settings import check_config
from models.backbones.lm import LM
from models.backbones.vlm import VLM
from models.checkpoints.json_files import read_json

INFO = 'info.json'


@dataclasses.dataclass(frozen=True)
class TrainedModel:
  """Holds a model that was trained to answer questions.

  Attributes:
    step: of the checkpoint.
    config: of the run.
    info: of its set.
    model: with the reductions that it was trained with.
    params: averaged over steps.
  """

  step: int
  config: ml_collections.ConfigDict
  info: Info
  model: LM | VLM
  params: Any


def load_run(workdir: str | pathlib.Path, *, data_dir: str = '',
             mesh: Mesh | None = None) -> TrainedModel:
  """Loads the best checkpoint of a run.

  Args:
    workdir: the run's folder, with its config.json and checkpoints; or what tools/pack.py wrote.
    data_dir: where the set is, if not where the run found it. A folder that tools/pack.py wrote
      needs no set: it says itself what the set is. What only the run says is read, never written.
    mesh: where parameters go; None for the first device.

  Raises:
    ValueError, FileNotFoundError: no run there, one that learned something else, no checkpoint, a
      damaged one, or its set is not there.
  """
  folder = pathlib.Path(workdir)
  if not (folder / 'config.json').exists():
    raise FileNotFoundError(f'there is no run in {folder}, which lacks config.json: train one, '
                            'with python -m train --config=configs/digit_scenes.py '
                            f'--workdir={folder}')
  if (folder / checkpoint.PACKED).exists():
    checkpoint.check_packed(folder, ['config.json', INFO])
  config = ml_collections.ConfigDict(read_json(folder / 'config.json'))
  if 'lm' not in (config.get('model') or {}):
    raise ValueError(f'the run in {folder} was not trained to answer questions: give one of '
                     'configs/digit_scenes.py or configs/stdlib_needle.py')
  check_config(config, 'model', 'data', 'reduce', 'sharding')
  config.data.data_dir = data_dir or prepare.data_dir_of_run(config.data)
  info = read_info(folder) or qa_data.info(config.data)
  model = qa_task.build(config.model, config.reduce, info, context=config.data.context)
  best = pretrained.best(
      folder, functools.partial(qa_task.init, model, info, config.data.context),
      functools.partial(pretrained.load, config.model, model), config,
      mesh or sharding.make_mesh({}, jax.devices()[:1]), metric='accuracy')
  if best is None:
    raise FileNotFoundError(f'no checkpoint in {folder / "checkpoints"}: let the run come to one '
                            '(config.checkpoint_steps)')
  step, params = best
  return TrainedModel(step, config, info, model, params)


def save_info(info: Info, folder: str | pathlib.Path) -> None:
  """Writes beside a run what its set is, so that the model loads where the set is not."""
  (pathlib.Path(folder) / INFO).write_text(json.dumps(dataclasses.asdict(info)) + '\n')


def read_info(folder: pathlib.Path) -> Info | None:
  """Returns what `save_info` wrote, None where it wrote nothing."""
  file = folder / INFO
  if not file.exists():
    return None
  stored: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value
                            for name, value in read_json(file).items()}
  try:
    return Info(**stored)
  except (TypeError, ValueError) as error:
    raise ValueError(f'{file} describes no set ({error}): pack the run again') from error
