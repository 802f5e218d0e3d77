"""The table of a config's keys: every config's keys are in it, and bad values end in one line."""

import functools
import importlib
import json
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin

import jax
import ml_collections
import pytest
from helpers.errors import said

from configs import digit_scenes_sweep, digits, digits_study, digits_sweep, stdlib_needle
from lib.runtime import memory, sharding
from lib.tasks import image as image_task
from lib.tasks import registry
from lib.tasks.settings import EVALUATION, TABLES, TRAINING, check_config, check_sources
from models.backbones.vit import make_vit
from models.plan import KEYS
from models.reduce_config import COMPONENTS
from ops import values
from ops.values import Keys, OneOf, Pattern, Range

ROOT = pathlib.Path(__file__).parents[2]
NAN = float('nan')
# Parts that any key may be in, or any value: their readers check them.
OPEN = {
    'data.augment',  # By lib/data/augment.py.
    'sweep.overrides', 'study.overrides', 'search.reduction',  # By models/plans/.
    'search.args',  # By lib/search/bayes.py.
    'model.compressor.args', 'model.compressor.turns[]',  # By models/projectors/.
    # By tools/study.py, as parts of the config of a training.
    'study.recipes[].model', 'study.recipes[].optimizer', 'study.recipes[].anneal'}
# Keys of a reduction: by models/plans/, beside the model that it is for.
OF_REDUCTIONS = {f'{place}.{key}' for key in KEYS.kinds
                 for place in (*(f'{part}reduce.{each}' for part in ('', 'stages[].')
                                 for each in COMPONENTS), 'sweep.candidates[]')}
# Numbers of any size: pixels' means, what a layer's scale starts from, and sizes of a mesh, which
# lib/runtime/sharding.py holds against the devices.
UNBOUNDED = {'data.mean[]', 'model.layer_scale', 'mesh.data', 'mesh.fsdp', 'mesh.tensor',
             'mesh.sequence', 'model.tower.layer_scale'}
# Texts that are no choice among a few: names, places, what is shown, and what others check.
TEXTS = {
    'start', 'task.name', 'data.name', 'data.data_dir', 'data.train_split', 'data.test_split',
    'data.kinds[]', 'model.variant', 'model.weights', 'model.fresh[]', 'model.unused[]',
    'optimizer.frozen[]', 'model.implementation', 'optimizer.distill.teacher', 'sweep.title',
    'sweep.baselines[]', 'sweep.sets[][]', 'study.title', 'study.results', 'study.baselines[]',
    'study.budgets[].budget',
    'study.lower[].budget', 'study.resolutions[][]', 'study.tuned', 'study.recipes[].name',
    'study.recipes[].budget', 'expected.source', 'expected.convention', 'expected.mismatch',
    'needs', 'sweep.candidates[].name', 'sweep.candidates[].versus', 'sweep.pictured[]'}


def configs():
  """Every config of configs/ with its name, one of its rows where it has rows."""
  for file in sorted((ROOT / 'configs').glob('*.py')):
    if file.stem not in ('__init__', 'parts'):
      module = importlib.import_module(f'configs.{file.stem}')
      config = module.get_config(*list(getattr(module, 'ROWS', ()))[:1])
      if 'model' in config:  # Others are of commands that train nothing.
        yield file.stem, config


def leaves(kind, path='', marks=()):
  """Yields (path, type, marks) of everything below a type that is no table, tuple or union."""
  origin, args = get_origin(kind), get_args(kind)
  if origin is Annotated:
    yield from leaves(args[0], path, (*marks, *args[1:]))
  elif origin is tuple:
    for each in args:
      if each is not Ellipsis:
        yield from leaves(each, f'{path}[]')
  elif isinstance(kind, Keys) or hasattr(kind, '__required_keys__'):
    for key, each in values.keys_of(kind).kinds.items():
      yield from leaves(each, f'{path}.{key}'.removeprefix('.'))
  elif origin not in (None, Mapping) and origin.__module__ in ('typing', 'types'):
    for each in args:
      yield from leaves(each, path, marks)
  else:
    yield path, kind, marks


ALL = {task: list(leaves(Keys(table))) for task, table in TABLES.items()}


def test_tasks_have_a_table_each():
  assert registry.TASKS.keys() == TABLES.keys()


@pytest.mark.parametrize('config', [
    pytest.param(config, id=name) for name, config in configs()])
def test_every_key_of_every_config_is_in_the_table(config):
  check_config(config)


@pytest.mark.parametrize('name', ['digit_scenes', 'stdlib_needle'])
def test_configs_of_stored_runs_pass(name):
  check_config(json.loads((ROOT / 'results' / name / 'config.json').read_text()), 'model', 'data')


@pytest.mark.parametrize('task', TABLES)
def test_every_leaf_has_a_type_and_a_range(task):
  """Leaves without them are listed above, with the place that checks each."""
  leaves_of = [leaf for leaf in ALL[task] if leaf[0].removesuffix('[]') not in OF_REDUCTIONS]
  assert {path for path, kind, _ in leaves_of
          if kind is Any or get_origin(kind) is not None or kind is dict} <= OPEN | {'needs'}
  assert {path for path, kind, marks in leaves_of if kind in (int, float)
          and not any(isinstance(mark, Range | OneOf) for mark in marks)} <= UNBOUNDED
  assert {path for path, kind, marks in leaves_of if kind is str
          and not any(isinstance(mark, OneOf | Pattern) for mark in marks)} <= TEXTS


# -- bad values ----------------------------------------------------------------------------------


def changed(config, path, value):
  """A copy of a config with another value, whatever its type."""
  copy = config.to_dict()
  node = copy
  *parts, last = path.split('.')
  for part in parts:
    node = node[part]
  node[last] = value
  return copy


@pytest.mark.parametrize(('task', 'config'), [
    ('classify', digits_sweep), ('classify', digits_study), ('answers', digit_scenes_sweep)])
def test_every_number_refuses_what_is_none(task, config):
  """NaN, negative, true, text, a dict, a fraction of a count: the line names the key."""
  config, refused = config.get_config().to_dict(), 0
  for path, kind, marks in ALL[task]:
    *parts, last = path.split('.')
    node = functools.reduce(lambda node, part: node.get(part, {}), parts, config)
    if last in node and any(isinstance(mark, Range) for mark in marks):
      good = node[last]
      for value in (NAN, -1, True, 'abc', {'a': 1}, 1.5 if kind is int else 2 ** 2000):
        node[last] = value
        text = said(check_config, config)
        assert text.startswith(f'config.{path}'), (path, value, text)
        assert len(text) < 300, text
        refused += 1
      node[last] = good
  assert refused > 150


@pytest.mark.parametrize(('path', 'value', 'message'), [
    ('optimizer.peak_lr', -1, 'config.optimizer.peak_lr=-1 must be above 0'),
    ('log_steps', 0, 'config.log_steps=0 must be from 1 to'), ('seed', 2 ** 70, 'to 4294967295'),
    ('optimizer.accumulate', 0, 'must be from 1'), ('model.depth', 0, 'from 1 to 1000 layers'),
    ('model.depth', 10 ** 7, 'config.model.depth=10000000 must be from 1 to 1000 layers'),
    ('model.dropout', 2, 'at least 0 and below 1'), ('data.image_size', 10 ** 6, '16384 pixels'),
    ('data.image_size', (32, 32, 3), 'config.data.image_size=(32, 32, 3) must be a whole number'),
    ('data.batch_size', '64', "config.data.batch_size='64' must be a whole number"),
    ('data.name', '', "config.data.name='' is empty"), ('data.std', (0.0,), 'must be above 0'),
    ('data.filter', 'lanczos', 'choose one of bilinear, bicubic, nearest'),
    ('data.mean', 'abc', "config.data.mean='abc' must be a tuple, each a number"),
    ('data', 3, 'config.data=3 must be a dict of keys'),
    ('model', None, 'config lacks model: set them'),
    ('optimizer.clip_norm', None, 'config.optimizer lacks clip_norm'),
    ('optimizer.peek_lr', 1, "no key 'peek_lr' (did you mean 'peak_lr'?)"),
    ('model.width', {'a': 1}, "config.model.width={'a': 1} must be a whole number"),
    ('model.window', (0, 1), 'config.model.window[0]=0 must be from 1'),
    ('model.dtype', 'float64', 'choose one of float32, bfloat16'),
    ('mesh.fsdp', 1.5, 'config.mesh.fsdp=1.5 must be a whole number'),
    ('sharding', (('(', ()),), 'is no regular expression'),
    ('sharding', (('a', ('tensors',)),), "'tensors' is unknown (did you mean 'tensor'?)"),
    ('task', 'segment', "config.task='segment' must be a dict of keys"),
    ('task', {'name': 'detect'}, "config.task.name='detect' is unknown"),
    ('optimizer.warmup_steps', 400, 'config.total_steps=400 must be more than'),
    ('sweep.budgets', (), 'config.sweep.budgets=() is empty'),
    ('sweep.budgets', 0.5, 'config.sweep.budgets=0.5 must be a tuple'),
    ('sweep.budgets', (0.5, NAN), 'config.sweep.budgets[1]=nan must be finite'),
    ('sweep.methods', ('tom',), "config.sweep.methods[0]='tom' is unknown (did you mean 'tome'?)"),
    ('sweep.layers', (1, 'a'), "config.sweep.layers[1]='a' must be a whole number"),
    ('sweep.layers', (-1,), 'config.sweep.layers[0]=-1 must be from 0'),
    ('sweep.overrides', {'tom': {}}, "a key of config.sweep.overrides='tom' is unknown"),
    ('sweep.overrides', {'tome': 3}, 'config.sweep.overrides.tome=3 must be a dict of keys'),
    ('sweep', None, 'config lacks sweep'), ('sweep', 3, 'config.sweep=3 must be a dict of keys'),
    ('reduce.vision', 'tome', "config.reduce.vision='tome' must be a dict of keys"),
    ('reduce.language', {}, "config.reduce has no key 'language': choose from vision"),
    ('note', 'mine', "config has no key 'note'")], ids=str)
def test_values_that_cannot_be(path, value, message):
  text = said(check_config, changed(digits_sweep.get_config(), path, value), *TRAINING, 'sweep')
  assert message in text


@pytest.mark.parametrize(('path', 'value', 'message'), [
    ('model.lm.heads', 0, 'config.model.lm.heads=0 must be from 1'),
    ('model.lm.context', True, 'config.model.lm.context=True must be a whole number'),
    ('model.lm.vocabulary', 3, "config.model.lm has no key 'vocabulary'"),
    ('model.lm.width', None, 'config.model.lm lacks width'),
    ('model.tower', 16, 'config.model.tower=16 must be a dict of keys'),
    ('model.projection', 'relu', 'config.model.projection='),
    ('data.context', 0, 'from 1 to 16777216 tokens'), ('data.pad_side', 'up', 'left, right'),
    ('optimizer.patch_weight', -1, 'config.optimizer.patch_weight=-1 must be at least 0'),
    ('optimizer.distill', {'teacher': 'a'}, 'config.optimizer.distill lacks logit_weight'),
    ('stages', ({'start_step': 0},), 'config.stages[0] lacks reduce'),
    ('sweep.sets', (('digit_scenes/64',),), 'config.sweep.sets[0]'),
    ('sweep.budgets', (1.5,), 'config.sweep.budgets[0]=1.5 must be above 0 and at most 1'),
    ('reduce.tower', {}, "config.reduce has no key 'tower'")], ids=str)
def test_values_of_questions_that_cannot_be(path, value, message):
  text = said(check_config, changed(digit_scenes_sweep.get_config(), path, value), *EVALUATION)
  assert message in text


def test_keys_that_a_command_reads():
  check_config({'model': {'variant': 'S/16'}}, 'model')
  assert said(check_config, {'model': {'variant': 'S/16'}}, *EVALUATION) == (
      'config lacks seed, mesh, sharding, data, reduce: set them')


def test_old_names_of_a_stored_config():
  config = digits_sweep.get_config().to_dict()
  config['sweep']['form'] = config['sweep'].pop('budget')
  check_config(config)


# -- what is there -------------------------------------------------------------------------------


def test_runs_that_are_not_there(tmp_path):
  config = digits.get_config()
  check_sources(config)
  check_sources(stdlib_needle.get_config())
  (tmp_path / 'run' / 'checkpoints').mkdir(parents=True)
  config.start = config.optimizer.distill.teacher = str(tmp_path / 'run')
  check_sources(config)
  config.optimizer.distill.teacher = str(tmp_path / 'nothing')
  with pytest.raises(FileNotFoundError, match=r'^optimizer\.distill\.teacher=.*/nothing has no ch'):
    check_sources(config)


def test_what_no_memory_can_hold():
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  assert 2 ** 28 < memory.available(mesh) < 2 ** 50
  memory.check_batch(64, slots=65, width=96, mesh=mesh)
  assert said(memory.check_batch, 10 ** 9, slots=65, width=96, mesh=mesh).startswith(
      'the tokens of a batch, data.batch_size=1000000000 times 65 of width 96, take 24,960.0 GB, ')
  memory.check_state({'a': jax.ShapeDtypeStruct((9, 9), 'float32')}, mesh)
  assert 'the moments of the optimizer take 4,000.0 GB' in said(
      memory.check_state, {'a': jax.ShapeDtypeStruct((10 ** 6, 10 ** 6), 'float32')}, mesh)


def test_images_of_another_size_than_the_model_reads():
  config = digits.get_config()
  vit = make_vit('Ti/4', image_size=32, channels=1)
  image_task.check_images(vit, config.data)
  for change in ({'image_size': 36}, {'image_size': (32, 36)}):
    data = ml_collections.ConfigDict(config.data.to_dict() | change)
    assert 'is not what the model reads, (32, 32, 1)' in said(image_task.check_images, vit, data)
