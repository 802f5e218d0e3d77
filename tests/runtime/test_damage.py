"""Damage to checkpoints and packed runs is found, and what is there stays there."""

import hashlib
import json
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import pytest
from helpers.errors import said

from lib.runtime import checkpoint, checksums
from lib.tasks import trained

ROOT = pathlib.Path(__file__).parents[2]
TREE = {'blocks': {'kernel': jnp.arange(60.0).reshape(3, 4, 5), 'bias': jnp.ones(5)},
        'cls': jnp.zeros((1, 4))}
# Step 1 is the best, 2 and 3 the newest.
SCORES = {1: 0.9, 2: 0.5, 3: 0.7}


def shapes(tree):
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                      tree)


def tree(step):
  return jax.tree.map(lambda leaf: leaf + step, TREE)


def save(folder, step, made):
  checkpoints = checkpoint.Checkpoints(folder)
  checkpoints.save(step, {'state': made, 'ema': made}, {'place': step},
                   metrics={'accuracy': SCORES[step]})
  checkpoints.close()


def restore(folder, template=None):
  template = shapes(TREE) if template is None else template
  checkpoints = checkpoint.Checkpoints(folder)
  try:
    return checkpoints.restore({'state': template, 'ema': template})
  finally:
    checkpoints.close()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A workdir with three checkpoints."""
  workdir = tmp_path_factory.mktemp('saved')
  for step in SCORES:
    save(workdir / 'checkpoints', step, tree(step))
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  return shutil.copytree(saved, tmp_path, dirs_exist_ok=True)


def files(folder):
  return sorted(path for path in folder.rglob('*') if path.is_file())


def hashes(folder):
  return {path: hashlib.md5(path.read_bytes()).hexdigest() for path in files(folder)}


def flip(path, rng):
  """Turns one bit of a file."""
  raw = bytearray(path.read_bytes())
  raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
  path.write_bytes(raw)


def aside(folder):
  return [path.name.rsplit('-', 2)[0] for path in folder.glob('damaged-*')]


def test_every_checkpoint_lists_all_its_files(saved):
  for step in SCORES:
    folder = saved / 'checkpoints' / str(step)
    listed = dict(line.split('  ')[::-1]
                  for line in (folder / checksums.LIST).read_text().splitlines())
    assert listed == {path.relative_to(folder).as_posix():
                      hashlib.sha256(path.read_bytes()).hexdigest()
                      for path in files(folder) if path.name != checksums.LIST}
    assert {'_CHECKPOINT_METADATA', 'ema/_METADATA', 'state/_METADATA', 'data/metadata',
            'metrics/metrics'} < listed.keys()


def flipped(workdir, places):
  """Turns a bit of the newest checkpoint at random places, each alone: what became of it."""
  rng, folder = random.Random(0), workdir / 'checkpoints'
  newest, intact = folder / '3', shutil.copytree(folder / '3', workdir / 'intact')
  sizes = {path: path.stat().st_size for path in files(newest)}
  # One place in every file, then by size.
  chosen = [*sizes, *rng.choices(list(sizes), list(sizes.values()), k=places)][:places]
  for path in chosen:
    flip(path, rng)
    step, parts, data = restore(folder)
    yield path, step, data['place'], float(parts['ema']['cls'][0, 0]), aside(folder)
    for renamed in folder.glob('damaged-*'):
      shutil.rmtree(renamed)
    shutil.rmtree(newest, ignore_errors=True)
    shutil.copytree(intact, newest)


@pytest.mark.long
@pytest.mark.parametrize('places', [30, pytest.param(120, marks=pytest.mark.long)])
def test_no_turned_bit_is_loaded_in_silence(workdir, places):
  seen = list(flipped(workdir, places))
  assert len(seen) == places
  for path, *outcome in seen:
    assert outcome == [2, 2, 2.0, ['damaged-3']], path


def test_a_damaged_score_does_not_choose_the_best(workdir):
  folder = workdir / 'checkpoints'
  (folder / '1' / 'metrics' / 'metrics').write_text('{"accuracy": 0.1}')
  before = hashes(workdir)
  error = said(checkpoint.best, workdir, shapes(TREE), metric='accuracy')
  assert 'checkpoints/1/metrics/metrics' in error
  assert 'move that checkpoint away' in error
  assert hashes(workdir) == before
  assert restore(folder)[0] == 3
  assert aside(folder) == ['damaged-1']
  assert checkpoint.best(workdir, shapes(TREE), metric='accuracy')[0] == 3


def test_scores_of_another_task_are_no_damage(workdir):
  before = hashes(workdir)
  assert 'whose score is accuracy and not mean_iou' in said(
      checkpoint.best, workdir, shapes(TREE), metric='mean_iou')
  assert hashes(workdir) == before


def test_the_best_is_read_alone(workdir):
  (workdir / 'checkpoints' / '1' / 'state' / '_METADATA').unlink()
  step, params = checkpoint.best(workdir, shapes(TREE), metric='accuracy')
  assert step == 1
  assert params['cls'].tolist() == [[1.0] * 4]
  flip(files(workdir / 'checkpoints' / '1' / 'ema')[-1], random.Random(0))
  assert 'differs from its checksum' in said(checkpoint.best, workdir, shapes(TREE),
                                             metric='accuracy')


def test_a_run_goes_on_to_the_steps_that_were_damaged(workdir, caplog):
  folder = workdir / 'checkpoints'
  for step in (2, 3):
    (folder / str(step) / 'ema' / 'manifest.ocdbt').write_bytes(b'')
  assert restore(folder)[0] == 1
  lines = [record.getMessage() for record in caplog.records if 'renamed' in record.getMessage()]
  assert [line.split('checkpoints/')[1].split(' ')[0] for line in lines] == [
      '3/ema/manifest.ocdbt', '2/ema/manifest.ocdbt']
  assert all('going on from step 1' in line for line in lines)
  for step in (2, 3):
    save(folder, step, tree(step))
  assert restore(folder)[0] == 3
  assert sorted(path.name for path in folder.iterdir() if path.name.isdecimal()) == ['1', '2', '3']
  assert sorted(aside(folder)) == ['damaged-2', 'damaged-3']


def damage_all(folder):
  for step in SCORES:
    flip(folder / str(step) / 'data' / 'metadata', random.Random(step))


def unmount(folder):
  """Puts a link in a file's place whose disk is not there."""
  path = files(folder / '3' / 'state')[-1]
  path.unlink()
  path.symlink_to('/nowhere/at/all')


def unmount_beside_damage(folder):
  unmount(folder)
  (folder / '2' / 'data' / 'metadata').write_text('{}')


def replace(folder):
  """Saves another model's state as the newest; the older ones would fit."""
  shutil.rmtree(folder / '3')
  save(folder, 3, {**TREE, 'cls': jnp.zeros((1, 6))})


@pytest.mark.parametrize(('harm', 'error', 'words'), [
    (damage_all, ValueError, 'all checkpoints in .* are damaged and stay as they are.*another'),
    (unmount, OSError, '/3 cannot be read now.*No such file.*try again'),
    (unmount_beside_damage, OSError, '/3 cannot be read now'),
    (replace, ValueError, 'of another model: cls has shape .1, 6. .* and .1, 4. in the model'),
], ids=lambda value: getattr(value, '__name__', ''))
def test_a_refusal_changes_nothing(workdir, harm, error, words):
  folder = workdir / 'checkpoints'
  harm(folder)
  # Another process may be writing it.
  half = folder / '4.orbax-checkpoint-tmp'
  shutil.copytree(folder / '2', half)
  before, names = hashes(workdir), sorted(workdir.rglob('*'))
  with pytest.raises(error, match=words):
    restore(folder)
  assert hashes(workdir) == before
  assert sorted(workdir.rglob('*')) == names


def test_reading_the_best_spares_what_is_being_written(workdir):
  half = workdir / 'checkpoints' / '4.orbax-checkpoint-tmp'
  shutil.copytree(workdir / 'checkpoints' / '2', half)
  assert checkpoint.best(workdir, shapes(TREE), metric='accuracy')[0] == 1
  assert len(files(half)) == len(files(workdir / 'checkpoints' / '2'))


def test_a_checkpoint_has_its_name_only_with_its_checksums(workdir, monkeypatch):
  folder, write = workdir / 'checkpoints', checksums.write

  def stop(path, names=()):
    assert not (folder / '4').exists()
    write(path, names)
    raise OSError('stopped here')

  monkeypatch.setitem(SCORES, 4, 0.6)
  with monkeypatch.context() as patched:
    patched.setattr(checksums, 'write', stop)
    with pytest.raises(OSError, match='stopped here'):
      save(folder, 4, tree(4))
  assert not (folder / '4').exists()
  checkpoints = checkpoint.Checkpoints(folder)
  template = shapes(TREE)
  assert checkpoints.restore({'state': template, 'ema': template})[0] == 3
  checkpoints.save(4, {'state': TREE, 'ema': TREE}, {'place': 4})
  checkpoints.close()
  assert checksums.check(folder / '4')
  assert sorted(path.name for path in folder.iterdir()) == ['1', '3', '4']


def test_a_checkpoint_loses_its_name_before_its_files(workdir, monkeypatch):
  """A kill while an old one is removed leaves no part of it among the others."""
  folder, removed = workdir / 'checkpoints', []
  monkeypatch.setitem(SCORES, 4, 0.8)
  with monkeypatch.context() as patched:
    patched.setattr(shutil, 'rmtree', lambda path, **_: removed.append(path))
    save(folder, 4, tree(4))
  old, = {path for path in removed if path.exists()}
  assert checksums.check(old / '2')
  assert sorted(path.name for path in folder.iterdir() if path != old) == ['1', '3', '4']
  assert restore(folder)[0] == 4
  assert not old.exists()


def test_checkpoints_without_checksums_are_read_with_a_word(workdir, caplog):
  folder = workdir / 'checkpoints'
  for step in SCORES:
    (folder / str(step) / checksums.LIST).unlink()
  step, parts, _ = restore(folder)
  assert (step, float(parts['state']['cls'][0, 0])) == (3, 3.0)
  assert [record.getMessage() for record in caplog.records
          if 'has no checksums' in record.getMessage()]
  (folder / '3' / 'ema' / '_METADATA').write_text('{')
  assert restore(folder)[0] == 2
  assert aside(folder) == ['damaged-3']


@pytest.mark.parametrize('name', ['digit_scenes', 'stdlib_needle'])
def test_the_packed_runs_that_are_kept_are_whole(name):
  folder = ROOT / 'results' / name
  assert checksums.check(folder, ['config.json', 'info.json', 'metrics.jsonl', checkpoint.PACKED])


def test_damage_to_a_packed_run_is_found(tmp_path):
  rng, names = random.Random(0), ['config.json', 'info.json', checkpoint.PACKED]
  for name in [checksums.LIST, *names]:
    shutil.copy(ROOT / 'results' / 'digit_scenes' / name, tmp_path)
  for name in names:
    intact = (tmp_path / name).read_bytes()
    for _ in range(3):
      flip(tmp_path / name, rng)
      assert f'{name} differs from its checksum' in said(trained.load_run, tmp_path)
      (tmp_path / name).write_bytes(intact)


def test_a_packed_tree_without_checksums_is_read_with_a_word(tmp_path, caplog):
  path = checkpoint.pack(TREE, 7, tmp_path)
  assert checkpoint.best(tmp_path, shapes(TREE), metric='accuracy')[0] == 7
  assert 'no checksums' in caplog.text
  checksums.write(tmp_path, [checkpoint.PACKED])
  assert checkpoint.best(tmp_path, shapes(TREE), metric='accuracy')[0] == 7
  (tmp_path / 'sweep.jsonl').write_text(json.dumps({}))
  assert checkpoint.best(tmp_path, shapes(TREE), metric='accuracy')[0] == 7
  flip(path, random.Random(0))
  assert 'differs from its checksum' in said(checkpoint.best, tmp_path, shapes(TREE),
                                             metric='accuracy')
