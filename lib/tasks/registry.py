"""Which learner a config asks for."""

from __future__ import annotations

from collections.abc import Callable

from jax.sharding import Mesh
from ml_collections import ConfigDict

from lib.tasks import image as image_task
from lib.tasks import qa as qa_task
from lib.tasks.base import Task

LEARNERS: dict[str, Callable[[ConfigDict, Mesh], Task]] = {
    'classify': image_task.learner, 'segment': image_task.learner, 'answers': qa_task.learner}


def of(config: ConfigDict, mesh: Mesh) -> Task:
  """The learner that `config.task.name` names, 'classify' where there is no `config.task`.

  Raises:
    ValueError: an unknown name, or what the learner raises.
  """
  name = config.get('task', {'name': 'classify'})['name']
  if name not in LEARNERS:
    raise ValueError(f'task {name!r} is unknown: choose one of {", ".join(LEARNERS)}')
  return LEARNERS[name](config, mesh)
