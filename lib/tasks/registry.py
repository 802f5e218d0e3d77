"""The tasks by name: how each is trained, and how it is swept."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

from jax.sharding import Mesh
from ml_collections import ConfigDict

from lib.tasks import align, settings
from lib.tasks import image as image_task
from lib.tasks import qa as qa_task
from lib.tasks.base import Task, task_name
from lib.tasks.image_sweep import ImageSweep
from lib.tasks.qa_sweep import QASweep
from lib.tasks.sweep import Sweep
from ops import choices


@dataclasses.dataclass(frozen=True)
class Entry:
  """Holds the two makers of a task.

  Attributes:
    make_task: (config, mesh) -> the task, ready for train.py.
    make_sweep: (config, workdir, mesh) -> the sweep, ready for eval.py.
  """

  make_task: Callable[[ConfigDict, Mesh], Task]
  make_sweep: Callable[[ConfigDict, pathlib.Path, Mesh], Sweep]


TASKS: dict[str, Entry] = {
    'classify': Entry(image_task.make_task, ImageSweep),
    'segment': Entry(image_task.make_task, ImageSweep),
    'answers': Entry(qa_task.make_task, QASweep),
    'align': Entry(align.make_task, QASweep),
}


def make_task(config: ConfigDict, mesh: Mesh) -> Task:
  """Makes the task that `config.task.name` names, 'classify' where there is no `config.task`.

  Raises:
    ValueError: an unknown name, or a config that contradicts itself or its data.
  """
  return _entry(config).make_task(config, mesh)


def make_sweep(config: ConfigDict, workdir: pathlib.Path, mesh: Mesh) -> Sweep:
  """Makes the sweep of the same task over the run in a workdir.

  Raises:
    ValueError, FileNotFoundError: an unknown name; or as `Sweep`.
  """
  settings.check_config(config, *settings.EVALUATION, 'sweep')
  return _entry(config).make_sweep(config, workdir, mesh)


def _entry(config: ConfigDict) -> Entry:
  name = task_name(config)
  choices.check('task ', name, TASKS)
  return TASKS[name]
