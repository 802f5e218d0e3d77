"""A run's life: it dies, resumes bit for bit, is asked to stop, meets damage and bad numbers.

Every run is the real command line in a process of its own, on a model that trains in seconds.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).parents[2]
SMALL = ('width=32', 'depth=2', 'heads=2', 'mlp=32', 'variant=Ti/8')


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
  """Data set and compiled programs, shared by the runs of this file."""
  return tmp_path_factory.mktemp('shared')


STEPS = 40


def command(shared, workdir, *flags):
  settings = [f'--config.model.{setting}' for setting in SMALL]
  return [sys.executable, '-m', 'train', '--config=configs/digits.py', f'--workdir={workdir}',
          f'--compile_cache={shared / "xla"}', f'--config.data.data_dir={shared / "data"}',
          *settings, '--config.data.batch_size=32', f'--config.total_steps={STEPS}',
          '--config.log_steps=1', '--config.eval_steps=20', '--config.checkpoint_steps=2',
          '--config.optimizer.warmup_steps=2', *flags]


def run(*args):
  done = subprocess.run(command(*args), cwd=ROOT, text=True, capture_output=True, check=False,
                        timeout=300)
  return done.returncode, done.stdout + done.stderr


def losses(workdir):
  """{step: loss}; what a resumed run repeats stands last."""
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return {row['step']: row['loss'] for row in rows if 'loss' in row}


def saved(workdir):
  return sorted(int(path.name) for path in (workdir / 'checkpoints').glob('*') if
                path.name.isdigit())


@pytest.fixture(scope='module')
def whole(shared, tmp_path_factory):
  """A run that nothing happened to."""
  workdir = tmp_path_factory.mktemp('whole')
  code, text = run(shared, workdir)
  assert code == 0, text
  assert sorted(losses(workdir)) == list(range(1, STEPS + 1))
  return workdir


def stopped(shared, workdir, number):
  """A run that gets a signal once it has saved step 10: its exit code, and what it printed."""
  process = subprocess.Popen(command(shared, workdir), cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  end = time.monotonic() + 240
  while not (workdir / 'checkpoints' / '10').exists() and max(saved(workdir), default=0) < 10:
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < end, 'step 10 was never saved'
    time.sleep(0.02)
  process.send_signal(number)
  text, _ = process.communicate(timeout=120)
  return process.returncode, text


def test_killed_and_resumed_every_loss_is_the_same_bit_for_bit(shared, whole, tmp_path):
  code, _ = stopped(shared, tmp_path, signal.SIGKILL)
  assert code == -signal.SIGKILL
  assert max(losses(tmp_path)) < STEPS
  newest = max(saved(tmp_path))
  code, text = run(shared, tmp_path)
  assert code == 0, text
  assert f'resumed at step {newest} of {STEPS}' in text
  assert losses(tmp_path) == losses(whole)


def test_asked_to_stop_it_saves_and_the_next_run_goes_on_from_there(shared, whole, tmp_path):
  code, text = stopped(shared, tmp_path, signal.SIGTERM)
  assert code == 0, text
  last = max(losses(tmp_path))
  assert last < STEPS
  assert max(saved(tmp_path)) == last
  assert f'stopped by a signal at step {last}' in text
  code, text = run(shared, tmp_path)
  assert code == 0, text
  assert losses(tmp_path) == losses(whole)


def test_the_newest_two_and_the_best_checkpoints_are_kept(whole):
  kept = saved(whole)
  assert kept[-2:] == [STEPS - 2, STEPS]
  rows = [json.loads(line) for line in (whole / 'metrics.jsonl').read_text().splitlines()]
  best = max((row for row in rows if 'accuracy' in row), key=lambda row: row['accuracy'])
  assert best['step'] in kept
  assert len(kept) <= 3


def test_a_teacher_is_read_from_another_run(shared, whole, tmp_path):
  """A learned reduction, its own losses, and those that hold it to the unreduced run."""
  code, text = run(shared, tmp_path, '--config.reduce.vision.method=dynamicvit',
                   '--config.reduce.vision.layers=(1,)', '--config.reduce.vision.keep_ratio=0.5',
                   f'--config.optimizer.distill.teacher={whole}', '--config.total_steps=3')
  assert code == 0, text
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  measured = next(row for row in rows if 'distill_tokens' in row)
  assert measured['distill_tokens'] > 0
  assert measured['ratio_01'] > 0


def test_a_truncated_checkpoint_is_passed_over(shared, whole, tmp_path):
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  for path in (tmp_path / 'checkpoints' / str(STEPS) / 'state').rglob('*'):
    if path.is_file() and path.stat().st_size > 64:
      os.truncate(path, path.stat().st_size // 2)
  code, text = run(shared, tmp_path)
  assert code == 0, text
  assert f'resumed at step {STEPS - 2} of {STEPS}' in text
  assert losses(tmp_path) == losses(whole)


def test_a_checkpoint_of_another_shape_is_a_one_line_error(shared, whole, tmp_path):
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  before = saved(tmp_path)
  code, text = run(shared, tmp_path, '--config.model.mlp=48')
  error, = re.findall(r'^error: .*', text, re.M)
  assert code == 2
  assert '[48' in error.replace('(', '[') or '48' in error
  assert 'another workdir' in error
  assert saved(tmp_path) == before


def test_a_bad_number_stops_the_run_and_spares_the_checkpoints(shared, tmp_path):
  code, text = run(shared, tmp_path, '--config.optimizer.peak_lr=1e30',
                   '--config.optimizer.clip_norm=1e30', '--config.optimizer.warmup_steps=12')
  error, = re.findall(r'^error: .*', text, re.M)
  assert code == 2
  assert 'not finite' in error
  assert 'peak_lr' in error
  good = max(step for step, loss in losses(tmp_path).items() if loss == loss)
  assert saved(tmp_path) == [] or max(saved(tmp_path)) <= good + 1


@pytest.mark.parametrize(('flag', 'parts'), [
    ('--config.reduce.vision.method=tom', ("'tom'", "'tome'")),
    ('--config.reduce.vision.methd=tome', ('methd', 'method')),
    ('--config.mesh.data=3', ('needs 3 devices', 'there are')),
    ('--config.mesh.dta=3', ('dta', 'data')),
    ('--config.data.name=digitz', ('digitz', 'digits')),
    ('--config.model.num_classes=7', ('7', '10 classes')),
    ('--config.data.batch_size=33', ('33', 'multiple')),
], ids=lambda value: value if isinstance(value, str) else '')
def test_mistakes_are_one_line_that_says_what_to_do(shared, tmp_path, flag, parts):
  extra = ['--config.optimizer.accumulate=2'] if 'batch_size' in flag else []
  code, text = run(shared, tmp_path, flag, *extra)
  assert code == 2, text
  error, = re.findall(r'^error: .*', text, re.M)
  assert all(part in error for part in parts), error
