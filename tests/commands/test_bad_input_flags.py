"""Flags of a config: every key that is shown works, and one that is not there says which are."""

import dataclasses
import pathlib
import subprocess
import sys

import pytest
from absl import flags, logging
from helpers import processes
from helpers.errors import said

import train
from configs import digit_scenes, digit_segments, digits, parts, stdlib_needle
from lib.data.settings import ImageSettings, QASettings
from lib.runtime import cli, config_flag, launch, sharding
from models import renames
from models.backbones.vit import ViT
from models.plan import make_plan

ROOT = pathlib.Path(__file__).parents[2]
# ml_collections loads config files so.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')


@pytest.fixture
def parsed(monkeypatch):
  """Flags -> the config, as a program reads it."""
  def parse(file, *arguments):
    argv = ['train', f'--config={file}', *map(renames.flag, arguments)]
    monkeypatch.setattr(sys, 'argv', argv)
    flags.FLAGS(argv)
    return launch.CONFIG.value
  yield parse
  # One module of that name is loaded over another, and would keep what the other had.
  sys.modules.pop('config_config', None)
  for name in [name for name in flags.FLAGS if name.startswith('config.')]:
    delattr(flags.FLAGS, name)
  flags.FLAGS.unparse_flags()


@pytest.mark.parametrize(('key', 'value', 'read'), [
    ('model.weights', 'timm/deit_small_patch16_224.fb_in1k', 'timm/deit_small_patch16_224.fb_in1k'),
    ('start', 'runs/a', 'runs/a'), ('mesh.fsdp', '1', 1), ('data.threads', '3', 3),
    ('data.on_corrupt', 'skip', 'skip'), ('data.image_size', '(32, 48)', (32, 48)),
    ('model.image_size', '48', 48), ('model.registers', '2', 2),
    ('reduce.vision.args.protect', '1', 1),
    ('reduce.vision.args.by', 'received_attention', 'received_attention'),
    ('reduce.vision.layers', '(1, 2)', (1, 2)), ('data.augment.flip', '0.5', 0.5)])
def test_keys_that_are_shown_can_be_set(parsed, key, value, read):
  config = parsed('configs/digits.py', f'--config.{key}={value}')
  for part in key.split('.'):
    config = config[part]
  assert config == read


def test_arguments_of_a_method_one_by_one(parsed):
  config = parsed(
      'configs/digits_sweep.py', '--config.sweep.overrides.tome.args.proportional=False',
      '--config.reduce.vision.method=topk', '--config.reduce.vision.keep=8',
      '--config.reduce.vision.args.by=received_attention')
  assert config.sweep.overrides.to_dict() == {'tome': {'args': {'proportional': False}}}
  reduce = {key: value for key, value in config.reduce.vision.items() if value is not None}
  host = ViT(width=16, depth=2, mlp=24, heads=2, patch=4, image_size=16, num_classes=5).host
  assert make_plan(reduce, host).only.method.by == 'received_attention'
  config.reduce.vision.args.by = 'received'
  assert 'by=' in said(make_plan, {**reduce, 'args': config.reduce.vision.args}, host)


@pytest.mark.parametrize(('flag', 'message'), [
    ('mesh.fsp=1', "config.mesh has no key 'fsp' (did you mean 'fsdp'?): choose from data, fsdp, "
                   'sequence, tensor'),
    ('reduce.language.method=fastv', "config.reduce has no key 'language': choose from vision"),
    ('strat=runs/a', "config has no key 'strat' (did you mean 'start'?): choose from "),
    ('seed.of=1', "config.seed is 0, which has no key 'of': set it as a whole"),
    ('data.thread=1', "config.data has no key 'thread' (did you mean 'threads'?): choose from ")])
def test_keys_that_are_not_there(flag, message):
  key = flag.partition('=')[0]
  config = digits.get_config()
  with pytest.raises(flags.Error) as caught:
    config_flag.make_room(config, key)
  assert str(caught.value).startswith(message)
  assert '\n' not in str(caught.value)


@pytest.mark.long
def test_unknown_keys_end_the_command_with_status_2(tmp_path):
  done = subprocess.run(
      [sys.executable, '-m', 'train', '--config=configs/digits.py', f'--workdir={tmp_path}/run',
       '--config.reduce.language.method=fastv'], cwd=ROOT, text=True, capture_output=True,
      check=False, timeout=120)
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1] == (
      "error: config.reduce has no key 'language': choose from vision (--debug shows where)")
  assert not (tmp_path / 'run').exists()


# -- the config's file ---------------------------------------------------------------------------


@pytest.mark.parametrize(('text', 'message'), [
    (None, 'is no file: give one of configs/, as configs/digits.py'),
    ('x = 1', "AttributeError: module 'config_config' has no attribute 'get_config'"),
    ('def get_config(:', 'SyntaxError: invalid syntax'),
    ('def get_config():\n  return {"seed": 0}', 'must return an ml_collections.ConfigDict'),
    ('def get_config():\n  return None', 'must return an ml_collections.ConfigDict'),
    ('def get_config():\n  raise RuntimeError("no luck")', 'RuntimeError: no luck'),
    ('def get_config():\n  open("/nothing")', "No such file or directory: '/nothing'"),
    ('import nothing_of_that_name', "No module named 'nothing_of_that_name'")])
def test_files_that_are_no_config(parsed, tmp_path, text, message):
  if text is not None:
    (tmp_path / 'mine.py').write_text(text)
  with pytest.raises(flags.Error) as caught:
    parsed(tmp_path / 'mine.py')
  assert message in str(caught.value)
  assert str(tmp_path / 'mine.py') in str(caught.value)


def test_folders_are_no_config(parsed, tmp_path):
  with pytest.raises(flags.Error, match='is no file: give one of configs/'):
    parsed(tmp_path)


# -- the whole line ------------------------------------------------------------------------------


def test_words_that_are_no_flags_and_values_of_flags(monkeypatch):
  values = flags.FlagValues()
  flags.DEFINE_integer('rounds', 1, '', lower_bound=1, flag_values=values)
  flags.DEFINE_multi_string('image', [], '', flag_values=values)
  flags.DEFINE_list('sizes', None, '', flag_values=values)
  monkeypatch.setattr(cli.flags, 'FLAGS', values)
  cli.check_counts('sizes', length=2, high=64, flag_values=values)
  for line, message in (
      ('--image=a --image=b --rounds=2 --sizes=3,64', ''),
      ('--rounds=2 stray', "'stray' is not understood"),
      ('stray --rounds=2', "'stray' is not understood"),
      ('--rounds=3 --rounds=2', ''),
      ('--rounds=0', 'flag --rounds=0'), ('--sizes=3', 'must be 2 whole numbers from 1 to 64'),
      ('--sizes=3,65', 'must be 2 whole'), ('--sizes=3,a', 'must be 2 whole'),
      ('--sizes=0,1', 'must be 2 whole'), ('--sizes=', 'must be 2 whole')):
    values.unparse_flags()
    for flag in values:
      values[flag].unparse()
    if message:
      with pytest.raises(flags.Error, match=message):
        cli.read_line(['tool', *line.split()])
    else:
      assert cli.read_line(['tool', *line.split()]) == ['tool']
      assert values.rounds == 2


DIGITS = ('--config=configs/digits.py', '--workdir={run}')
SWEEP = ('--config=configs/digits_sweep.py', '--workdir={run}')


@pytest.mark.long
@pytest.mark.parametrize(('command', 'message'), [
    (('train', *DIGITS, '--config.optimizer.peak_lr=-1'), 'config.optimizer.peak_lr=-1.0 must be'),
    (('train', *DIGITS, '--config.model.heads=5'), 'heads=5 does not divide width=96'),
    (('train', *DIGITS, '--config.data.batch_size=1000000000'), 'take 24,960.0 GB'),
    (('train', *DIGITS, '--config.data.image_size=36'), 'is not what the model reads'),
    (('train', *DIGITS, '--config.optimizer.distill.teacher={run}/none'), 'has no checkpoint'),
    (('train', *DIGITS, '--config.start={run}/none'), 'has no checkpoint'),
    (('train', *DIGITS, '--config.log_steps='), 'flag --config.log_steps='),
    (('train', *DIGITS, '--config.start=\udcff\U0001f600'), 'has no checkpoint'),
    (('train', *DIGITS, 'stray'), "'stray' is not understood"),
    (('train', '--config=configs/vit_s16_tome.py', '--workdir={run}'), 'config lacks seed, '),
    (('eval', *DIGITS), 'config lacks sweep'),
    (('eval', *SWEEP, "--config.sweep.methods=('tom',)"), "did you mean 'tome'?"),
    (('tools.study', '--config=configs/digits_study.py', '--workdir={run}',
      '--config.study.tuned=1 %'), "'1 %' is unknown"),
    (('tools.pack', *DIGITS, '--out={run}', '--config.model.depth=0'), 'config.model.depth=0 must'),
    (('tools.explain', '--config=configs/vit_s16_tome.py', '--config.model.depth=10000000'),
     'from 1 to 1000 layers'),
    (('tools.explain', '--model=llava1.5_7b', '--images=-1'), 'flag --images=-1'),
    (('tools.generate', '--model=results/digit_scenes', '--example=0', '--temperature=nan'),
     'temperature=nan must be finite'),
    (('tools.generate', '--model=results/digit_scenes', '--example=0', '--buckets=a'),
     'must be one or more whole numbers'),
    (('tools.bench', '--rounds=0'), 'flag --rounds=0'),
    (('tools.bench', '--methods=tom'), "did you mean 'tome'?")], ids=lambda value: value[-1])
def test_commands_end_in_one_line_with_status_2(command, message, tmp_path):
  run = tmp_path / 'run'
  done = processes.run('-m', *(part.replace('{run}', str(run)) for part in command), timeout=120)
  assert done.returncode == 2, done.stderr
  assert message in done.stderr.splitlines()[-1]
  assert 'Traceback' not in done.stderr
  assert not run.exists()


# -- the keys that there are ---------------------------------------------------------------------


@pytest.mark.parametrize(('config', 'kind'), [
    (digits, ImageSettings), (digit_segments, ImageSettings),
    (digit_scenes, QASettings), (stdlib_needle, QASettings)])
def test_configs_declare_every_key_of_their_data_and_mesh(config, kind):
  config, text = config.get_config(), config is stdlib_needle
  fields = {field.name: field for field in dataclasses.fields(kind)}
  # Pixels are of no use to text.
  assert fields.keys() - config.data.keys() == ({'mean', 'std'} if text else set())
  assert set(config.mesh) == set(sharding.AXES)


@pytest.mark.parametrize(('declared', 'kind'), [
    (parts.IMAGES, ImageSettings), (parts.QUESTIONS, QASettings)])
def test_declared_defaults_are_those_of_the_reader(declared, kind):
  for field in dataclasses.fields(kind):
    if field.name in declared:
      default = (field.default_factory() if field.default is dataclasses.MISSING
                 else field.default)
      assert declared[field.name] == default, field.name


# -- renamed keys --------------------------------------------------------------------------------


@pytest.fixture
def warned(monkeypatch):
  said_so = []
  monkeypatch.setattr(renames, '_said', set())
  monkeypatch.setattr(logging, 'warning', lambda text, *args: said_so.append(text % args))
  return said_so


def test_old_names_work_and_warn_once(warned):
  for _ in range(2):
    assert renames.current('reduce', {'of': 'visual', 'keep': 3}) == {
        'token_kinds': 'visual', 'keep': 3}
  assert warned == ["reduce: 'of' is now called 'token_kinds'; the old name goes with the next "
                    'release']
  assert renames.current('task', {'way': 'bypass', 'fill': None}) == {'fill': 'bypass'}
  assert len(warned) == 2
  assert renames.current('sweep', {'budget': 'keep'}) == {'budget': 'keep'}
  assert len(warned) == 2
  assert said(renames.current, 'task', {'way': 'bypass', 'fill': 'restore'}) == (
      "task: 'way' is the old name of 'fill', and both are set: leave out 'way'")


@pytest.mark.parametrize(('argument', 'now'), [
    ('--config.reduce.language.of=visual', '--config.reduce.language.token_kinds=visual'),
    ('--reduce.language.of=visual', '--reduce.language.token_kinds=visual'),
    ('--config.task.way', '--config.task.fill'), ('--config.sweep.form=keep',
                                                  '--config.sweep.budget=keep'),
    ('--config.reduce.language.offset=1', '--config.reduce.language.offset=1'),
    ('of=visual', 'of=visual')])
def test_old_flags_set_the_new_keys(warned, argument, now):
  assert renames.flag(argument) == now
  assert len(warned) == (argument != now)


def test_old_names_in_a_config_file(warned, parsed, tmp_path):
  (tmp_path / 'mine.py').write_text(
      'from configs import digit_scenes_sweep, digit_segments_sweep\n\n\ndef get_config():\n'
      '  config = digit_segments_sweep.get_config()\n'
      "  config.sweep.form, config.task.way = config.sweep.budget, 'bypass'\n"
      '  del config.sweep.budget, config.task.fill\n  return config\n')
  config = parsed(tmp_path / 'mine.py', '--config.sweep.form=keep_ratio')
  assert (config.sweep.budget, config.task.fill) == ('keep_ratio', 'bypass')
  assert 'form' not in config.sweep
  assert len(warned) == 2


# -- steps ---------------------------------------------------------------------------------------


def test_training_that_is_shorter_than_its_warm_up(tmp_path):
  config = digits.get_config()
  config.total_steps = 30
  assert said(train.run, config, tmp_path / 'run', first=True) == (
      'config.total_steps=30 must be more than optimizer.warmup_steps=60, in which the learning '
      'rate only rises: raise it, or lower optimizer.warmup_steps')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('key', ['start', 'teacher'])
def test_runs_to_begin_from_that_are_not_there(key, tmp_path):
  config = digits.get_config()
  config.data.data_dir = str(tmp_path / 'data')
  if key == 'start':
    config.start, name = str(tmp_path / 'nothing'), 'start'
  else:
    config.optimizer.distill.teacher, name = str(tmp_path / 'nothing'), 'optimizer.distill.teacher'
  with pytest.raises(FileNotFoundError) as caught:
    train.run(config, tmp_path / 'run', first=True)
  assert str(caught.value) == (f'{name}={tmp_path}/nothing has no checkpoint: name the workdir of '
                               'a run that has one')
  assert not (tmp_path / 'run').exists()
