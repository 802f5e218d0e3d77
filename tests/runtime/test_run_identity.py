"""The identity of a run: what may differ when it goes on, what is said, what is recorded."""

import json
import re

import ml_collections
import pytest
from helpers.errors import said

from configs import digit_scenes, digits
from configs.parts import reduction
from lib.report.rows import replace_file
from lib.runtime import run_identity
from lib.runtime.checkpoint import PACKED


@pytest.fixture
def workdir(tmp_path):
  """A run at step 10 of 400."""
  run_identity.record(digits.get_config(), tmp_path, [], step=0)
  (tmp_path / 'checkpoints' / '10').mkdir(parents=True)
  return tmp_path


def changed(**settings):
  config = digits.get_config()
  with config.unlocked():
    config.update_from_flattened_dict(settings)
  return config


def content(folder):
  return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize('settings', [
    {}, {'log_steps': 7}, {'eval_steps': 1}, {'checkpoint_steps': 3}, {'mesh.fsdp': 2},
    {'data.data_dir': 'elsewhere'}, {'data.threads': 9}, {'data.on_corrupt': 'skip'},
    {'model.remat': 'full'}, {'model.implementation': 'xla'}, {'sharding': ()}])
def test_settings_that_are_free_to_change(workdir, settings):
  before = content(workdir)
  assert run_identity.compare(changed(**settings), workdir) == []
  assert content(workdir) == before


@pytest.mark.parametrize('settings', [
    {'seed': 1}, {'start': 'runs/other'}, {'model.width': 48}, {'model.heads': 6},
    {'model.pool': 'mean'}, {'model.dtype': 'bfloat16'}, {'model.weights': 'x.safetensors'},
    {'data.name': 'cifar10'}, {'data.batch_size': 32}, {'data.train_split': 'train[:50%]'},
    {'data.mean': (0.1,)}, {'reduce.vision.method': 'tome'},
    {'task': {'name': 'segment'}}])
def test_settings_that_never_change(workdir, settings):
  before, ((key, now),) = content(workdir), settings.items()
  message = said(run_identity.compare, changed(**settings), workdir)
  now = now['name'] if key == 'task' else now
  assert key in message
  assert f'is now {list(now) if isinstance(now, tuple) else now!r}' in message
  assert message.endswith(
      f'train in another workdir, which config.start={workdir} lets begin from this run')
  assert content(workdir) == before
  message = said(run_identity.compare, changed(), workdir, on_purpose=(key,))
  assert message.startswith(f'--change={key}: a run that goes on cannot change this')


@pytest.mark.parametrize('settings', [
    {'reduce.vision.layers': (1, 2)}, {'reduce.vision.args': {'by': 'knorm'}},
    {'reduce.vision.remove': 9}, {'reduce.vision.method': 'none'}])
def test_a_reduction_never_changes(workdir, settings):
  reduced = {'reduce.vision.method': 'topk', 'reduce.vision.remove': 8}
  run_identity.record(changed(**reduced), workdir, [], step=0)
  assert run_identity.compare(changed(**reduced), workdir) == []
  message = said(run_identity.compare, changed(**reduced | settings), workdir)
  assert next(iter(settings)) in message
  # Where nothing is reduced, how it would be is the same.
  run_identity.record(changed(), workdir, [], step=0)
  assert run_identity.compare(changed(**settings | {'reduce.vision.method': 'none'}), workdir) == []


@pytest.mark.parametrize('settings', [
    {'total_steps': 200}, {'optimizer.peak_lr': 1e-3}, {'optimizer.accumulate': 2},
    {'optimizer.distill.teacher': 'runs/teacher'}, {'anneal.phases': 2}, {'data.test_split': 't'},
    {'data.augment.shift': 0.0}, {'data.augment.method': 'none'}, {'model.dropout': 0.1}])
def test_settings_that_change_on_purpose(workdir, settings):
  (key, now), = settings.items()
  message = said(run_identity.compare, changed(**settings), workdir)
  assert f'other settings: {key} was ' in message
  assert message.endswith(f'Set this back, or change it on purpose with --change={key}')
  change, = run_identity.compare(changed(**settings), workdir, on_purpose=(key, 'anneal.phases'))
  assert (change.key, change.now) == (key, now)


def test_all_that_differs_is_said_at_once(workdir):
  message = said(run_identity.compare, changed(**{
      'optimizer.peak_lr': 1e-3, 'data.batch_size': 32}), workdir, on_purpose=('total_steps',))
  assert message == (
      f'the run in {workdir} was made with other settings: data.batch_size was 64 and is now 32, '
      'optimizer.peak_lr was 0.002 and is now 0.001. Set this back, or train in another workdir, '
      f'which config.start={workdir} lets begin from this run')
  message = said(run_identity.compare, digit_scenes.get_config(), workdir)
  assert len(message) < 1000
  assert re.search(r', and \d\d more\. Set this back', message)


@pytest.mark.parametrize(('total', 'differs'), [(500, True), (10, True), (5, True), (399, None)])
def test_more_steps_need_no_flag_and_fewer_do(workdir, total, differs):
  """Fewer than are done only say that the run is through."""
  if differs:
    change, = run_identity.compare(changed(total_steps=total), workdir)
    assert str(change) == f'total_steps was 400 and is now {total}'
  else:
    assert '--change=total_steps' in said(run_identity.compare, changed(total_steps=total), workdir)


def test_changes_are_recorded_with_their_steps_and_the_same_command_goes_on(workdir):
  flags = {'total_steps': 500}
  config = changed(**flags)
  run_identity.record(config, workdir, run_identity.compare(config, workdir), step=10)
  assert run_identity.compare(config, workdir) == []
  second = changed(**flags, **{'optimizer.peak_lr': 1e-4})
  keys = ('optimizer.peak_lr',)
  for _ in range(2):  # Again, as a scheduler does.
    changes = run_identity.compare(second, workdir, on_purpose=keys)
    run_identity.record(second, workdir, changes, step=30)
  stored = json.loads((workdir / 'config.json').read_text())
  assert stored['changes'] == [
      {'step': 10, 'key': 'total_steps', 'before': 400, 'now': 500},
      {'step': 30, 'key': 'optimizer.peak_lr', 'before': 2e-3, 'now': 1e-4}]
  assert (stored['total_steps'], stored['optimizer']['peak_lr']) == (500, 1e-4)
  assert 'optimizer.peak_lr was 0.0001' in said(run_identity.compare, config, workdir)
  # As those read it that build the run's model.
  read = ml_collections.ConfigDict(stored)
  assert read.model.width == 96
  assert read.changes[1]['step'] == 30


def test_without_a_checkpoint_there_is_no_run_yet(workdir):
  (workdir / 'checkpoints' / '10').rmdir()
  config = changed(seed=3)
  assert run_identity.compare(config, workdir) == []
  run_identity.record(config, workdir, [], step=0)
  assert json.loads((workdir / 'config.json').read_text())['seed'] == 3
  (workdir / 'config.json').unlink()
  (workdir / 'checkpoints' / '10').mkdir()
  assert run_identity.compare(config, workdir) == []


def test_a_config_of_an_earlier_version(workdir, monkeypatch):
  """It has old names, and lacks keys that have their defaults now."""
  file = workdir / 'config.json'
  old = json.loads(file.read_text())
  for part, keys in (('data', ('test_crop', 'filter', 'on_corrupt', 'threads')),
                     ('model', ('window', 'weights', 'training_patches', 'fresh')),
                     ('optimizer', ('accumulate',))):
    for key in keys:
      del old[part][key]
  del old['reduce']['vision']['token_kinds'], old['anneal']
  old['reduce']['vision'] |= {'method': 'topk', 'of': 'visual'}
  file.write_text(json.dumps(old))
  now = changed(**{'reduce.vision.token_kinds': 'visual', 'reduce.vision.method': 'topk',
                   'reduce.cache': reduction(), 'optimizer.accumulate': 0})
  assert run_identity.compare(now, workdir) == []
  now.data.filter, now.reduce.vision.token_kinds = 'bicubic', None
  message = said(run_identity.compare, now, workdir)
  assert "data.filter was 'bilinear' and is now 'bicubic'" in message
  assert "reduce.vision.token_kinds was 'visual' and is now None" in message
  now.model.window, now.reduce.cache.method = 7, 'snapkv'
  message = said(run_identity.compare, now, workdir)
  assert 'model.window was None and is now 7' in message
  assert "reduce.cache.method was 'none' and is now 'snapkv'" in message


def test_workdirs_of_others_are_left_alone(tmp_path):
  config = digits.get_config()
  for other in ('{"model_type": "llava"}', '[]', 'null', '{"total_steps": 4, "reduce": [1]}',
                '{"total_steps": null}'):
    (tmp_path / 'config.json').write_text(other)
    assert f'{tmp_path}/config.json is not that of a run' in said(
        run_identity.compare, config, tmp_path)
  (tmp_path / 'config.json').write_text(config.to_json_best_effort())
  (tmp_path / PACKED).touch()
  assert 'holds a packed model' in said(run_identity.compare, config, tmp_path)


@pytest.mark.parametrize('left', ['', '{"seed": 0, "total_'])
def test_what_a_power_cut_left_of_config_json_is_written_anew(workdir, left):
  (workdir / 'config.json').write_text(left)
  assert run_identity.compare(changed(seed=1), workdir) == []
  run_identity.record(changed(), workdir, [], step=10)
  assert 'seed was 0 and is now 1' in said(run_identity.compare, changed(seed=1), workdir)


def test_a_file_is_replaced_as_a_whole(tmp_path):
  path, link = tmp_path / 'file', tmp_path / 'link'
  path.write_bytes(b'before')
  link.symlink_to(path)
  replace_file(link, b'after')
  assert path.read_bytes() == b'after'
  assert link.is_symlink()
  assert sorted(each.name for each in tmp_path.iterdir()) == ['file', 'link']
