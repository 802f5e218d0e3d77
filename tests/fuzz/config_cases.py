"""Configs whose values cannot be: every key of every experiment, set to something of no sense."""

from __future__ import annotations

import contextlib
import functools
import importlib
import pathlib
import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

from fuzz.case import Accepted, Case, bad_values, changed, leaves, once, shown
from ml_collections import ConfigDict

TRAINED = ('digits', 'digit_segments', 'digit_scenes', 'stdlib_needle')
SWEPT = ('digits_sweep', 'digit_segments_sweep', 'digit_scenes_sweep', 'stdlib_needle_sweep')
STUDIED = ('digits_study', 'digit_segments_study')
# Values that make sense after all, by the end of a key.
FINE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(('title', 'study.results', 'data.data_dir'), ('no such thing',)),
    'mesh.data': (-1,),
    # A place without a method has any layers.
    'layers': (5,)}


def of(name: str) -> dict[str, Any]:
  """Returns an experiment as a dict."""
  return importlib.import_module(f'configs.{name}').get_config().to_dict()


def fine(path: tuple[str, ...], value: Any) -> bool:
  """Whether a value makes sense."""
  key = '.'.join(path)
  return any(key.endswith(end) and any(value == each and type(value) is type(each)
                                       for each in values) for end, values in FINE.items())


def mutations(name: str, rng: random.Random, *,
              inside: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any], str]]:
  """Yields (name of a case, config, key) for keys of an experiment.

  Args:
    name: of the experiment.
    rng: chooses where a key is added.
    inside: only keys of these parts; () for all.
  """
  config = of(name)
  for path, value in bad_values(config):
    # The sets of questions are not read.
    unread = 'lm' in config['model'] and path[0] == 'data' and isinstance(value, str)
    if (not inside or path[0] in inside) and not unread and not fine(path, value):
      yield f'{name}: {".".join(path)}={shown(value)}', changed(config, path, value), path[-1]
  for path, _ in leaves(config):
    if (not inside or path[0] in inside) and rng.random() < 0.1:
      where = '.'.join((*path[:-1], 'no_such_key'))
      yield f'{name}: {where}', changed(config, (*path[:-1], 'no_such_key'), 1), 'no_such_key'


def train(config: dict[str, Any], folder: pathlib.Path, shared: pathlib.Path) -> None:
  """Does all that train.py does before it makes fresh parameters."""
  import train as training

  def begin(config: ConfigDict, setup: Any, template: Any, key: Any) -> None:
    del template, key
    if not config.start:
      setup.task.pretrained()
    raise Accepted

  with described(), mock.patch.object(training, 'fresh_state', begin):
    training.run(stored(config, shared), folder / 'run', first=True)


def sweep(config: dict[str, Any], run: pathlib.Path, shared: pathlib.Path) -> None:
  """Does all that eval.py does before it measures a row."""
  from lib.runtime import sharding
  from lib.tasks import registry
  made = stored(config, shared)
  with described():
    list(registry.make_sweep(made, run, sharding.make_mesh(made.mesh)).rows())


def sweep_of(name: str, config: dict[str, Any], folder: pathlib.Path, shared: pathlib.Path) -> None:
  """Sweeps over a run of fresh parameters."""
  del folder
  sweep(config, once(shared / f'run_of_{name}', functools.partial(save_run, name, shared)), shared)


def save_run(name: str, shared: pathlib.Path, folder: pathlib.Path) -> None:
  """Saves parameters of zeros as the run that an experiment sweeps over."""
  import jax
  import jax.numpy as jnp

  from lib.runtime import sharding
  from lib.runtime.checkpoint import Checkpoints
  from lib.tasks import registry
  config = stored(of(name), shared)
  with described():
    task = registry.make_task(config, sharding.make_mesh(config.mesh))
  params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
                        jax.eval_shape(task.init, jax.random.key(0)))
  checkpoints = Checkpoints(folder / 'checkpoints', metric=task.score)
  checkpoints.save(1, {'state': {'step': jnp.ones(())}, 'ema': params}, {},
                   metrics={task.score: 0.5})
  checkpoints.close()


def study(config: dict[str, Any], folder: pathlib.Path, shared: pathlib.Path) -> None:
  """Does all that tools.study does before it trains."""
  from tools import study as studies
  with mock.patch.object(studies, 'unreduced', side_effect=Accepted):
    studies.study(stored(config, shared), folder)


def stored(config: dict[str, Any], shared: pathlib.Path) -> ConfigDict:
  """Returns a config whose set lies in a folder of these tests."""
  data = config.get('data')
  if isinstance(data, dict) and data.get('data_dir') == 'data':
    config = changed(config, ('data', 'data_dir'), str(shared / 'data'))
  return ConfigDict(config)


@contextlib.contextmanager
def described() -> Iterator[None]:
  """Describes the sets of questions instead of writing them, which takes a minute."""
  from helpers import qa

  from lib.data import qa as qa_data
  from lib.data.settings import qa_settings

  def info(data: Any) -> qa_data.Info:
    return qa.NEEDLE if 'needle' in qa_settings(data).name else qa.SCENES

  with mock.patch.object(qa_data, 'info', info), mock.patch.object(
      qa_data, 'train_iterator', side_effect=Accepted):
    yield


def training() -> Iterator[Case]:
  """Yields cases of what train.py reads."""
  rng = random.Random(0)
  for name in TRAINED:
    yield Case(name, functools.partial(train, of(name)), fine=True, seconds=60)
    for case, config, key in mutations(name, rng):
      yield Case(case, functools.partial(train, config), says=(key, 'no checkpoint'))


def sweeps_and_studies() -> Iterator[Case]:
  """Yields cases of what eval.py and tools.study read beside that."""
  rng = random.Random(8)
  for name in SWEPT:
    yield Case(name, functools.partial(sweep_of, name, of(name)), fine=True, seconds=60)
    for case, config, key in mutations(name, rng, inside=('sweep',)):
      yield Case(case, functools.partial(sweep_of, name, config), says=(key,))
  for name in STUDIED:
    yield Case(name, functools.partial(study, of(name)), fine=True, seconds=60)
    for case, config, key in mutations(name, rng, inside=('study',)):
      yield Case(case, functools.partial(study, config), says=(key, 'budget'))


KINDS = {'training configs': training, 'sweeps and studies': sweeps_and_studies}
