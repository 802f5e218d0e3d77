"""A run's life: it dies, resumes bit for bit, is asked to stop, refuses, meets damage.

Every run is the command in a process of its own, on a model that trains in seconds; the one that
nothing happens to, and those that lose their readers, are started from nothing.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from helpers import processes

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).parents[2]
SMALL = ('width=32', 'depth=2', 'heads=2', 'mlp=32', 'variant=Ti/8')


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
  """Data set and compiled programs, shared by the runs of this file."""
  return tmp_path_factory.mktemp('shared')


STEPS = 24


def command(shared, workdir, *flags):
  settings = [f'--config.model.{setting}' for setting in SMALL]
  return ['-m', 'train', '--config=configs/digits.py', f'--workdir={workdir}',
          f'--compile_cache={shared / "xla"}', f'--config.data.data_dir={shared / "data"}',
          *settings, '--config.data.batch_size=32', f'--config.total_steps={STEPS}',
          '--config.log_steps=1', '--config.eval_steps=12', '--config.checkpoint_steps=2',
          '--config.optimizer.warmup_steps=2', *flags]


def run(*args):
  done = processes.run(*command(*args), timeout=300)
  return done.returncode, done.stdout + done.stderr


def losses(workdir):
  """{step: loss}; each step stands there once, and in order."""
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  found = [(row['step'], row['loss']) for row in rows if 'loss' in row]
  assert [step for step, _ in found] == list(range(1, len(found) + 1))
  return dict(found)


def content(workdir):
  return {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}


def saved(workdir):
  return sorted(int(path.name) for path in (workdir / 'checkpoints').glob('*') if
                path.name.isdigit())


@pytest.fixture(scope='module')
def whole(shared, tmp_path_factory):
  """A run that nothing happened to."""
  workdir = tmp_path_factory.mktemp('whole')
  line = [sys.executable, *command(shared, workdir, '--config.eval_steps=2')]
  done = subprocess.run(line, cwd=ROOT, text=True, capture_output=True, check=False, timeout=300)
  assert done.returncode == 0, done.stderr
  assert sorted(losses(workdir)) == list(range(1, STEPS + 1))
  return workdir


def at_step_6(shared, workdir):
  """A running command that has saved step 6."""
  process = processes.Process(*command(shared, workdir), together=True)
  end = time.monotonic() + 240
  while max(saved(workdir), default=0) < 6:
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < end, 'step 6 was never saved'
    time.sleep(0.02)
  return process


def stopped(shared, workdir, number):
  """A run that gets a signal once it has saved step 6: its exit code, and what it printed."""
  process = at_step_6(shared, workdir)
  process.send_signal(number)
  text, _ = process.communicate(timeout=120)
  return process.returncode, text


def test_killed_and_resumed_every_loss_is_the_same_bit_for_bit(shared, whole, tmp_path):
  code, _ = stopped(shared, tmp_path, signal.SIGKILL)
  assert code == -signal.SIGKILL
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 1')
  newest = max(saved(tmp_path))
  code, text = run(shared, tmp_path)
  assert code == 0, text
  assert f'resumed at step {newest} of {STEPS}' in text
  assert losses(tmp_path) == losses(whole)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_asked_to_stop_it_saves_and_the_next_run_goes_on_from_there(number, shared, whole,
                                                                    tmp_path):
  code, text = stopped(shared, tmp_path, number)
  assert code == 0, text
  last = max(losses(tmp_path))
  assert last < STEPS
  assert max(saved(tmp_path)) == last
  assert f'stopped by a signal at step {last}' in text
  code, text = run(shared, tmp_path)
  assert code == 0, text
  assert losses(tmp_path) == losses(whole)


def test_the_second_of_two_commands_is_refused_and_the_first_unharmed(shared, whole, tmp_path):
  process = at_step_6(shared, tmp_path)
  # So that it cannot be through before the other begins.
  process.send_signal(signal.SIGSTOP)
  code, text = run(shared, tmp_path)
  process.send_signal(signal.SIGCONT)
  assert code == 2, text
  assert re.fullmatch(rf'error: {tmp_path} is in use: process {process.pid} on \S+, since \S+, '
                      r'trains in it\. .*', text.strip())
  text, _ = process.communicate(timeout=240)
  assert process.returncode == 0, text
  assert losses(tmp_path) == losses(whole)


def pair(shared, workdir, *flags):
  """Two processes of one run, just started."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  return [processes.Process(
      *command(shared, workdir, f'--coordinator=127.0.0.1:{port}', '--processes=2',
               f'--process={index}', *flags), together=True) for index in range(2)]


@pytest.mark.parametrize(('number', 'index'), [(signal.SIGTERM, 1), (signal.SIGHUP, 0)])
def test_all_processes_stop_when_one_is_asked_to(number, index, shared, tmp_path):
  """Within seconds and after the same step, though nothing is logged until then."""
  processes = pair(shared, tmp_path, '--config.total_steps=20000',
                   '--config.log_steps=1000000', '--config.eval_steps=1000000')
  end = time.monotonic() + 240
  while not saved(tmp_path) and time.monotonic() < end:
    time.sleep(0.1)
  # Another command is refused in each of its processes.
  for process in pair(shared, tmp_path):
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert f'is in use: process {processes[0].pid} on ' in text
  processes[index].send_signal(number)
  asked = time.monotonic()
  texts = [process.communicate(timeout=120)[0] for process in processes]
  assert time.monotonic() - asked < 30
  assert [process.returncode for process in processes] == [0, 0], texts
  step, = {re.search(r'stopped by a signal at step (\d+)', text)[1] for text in texts}
  assert int(step) in saved(tmp_path)


@pytest.mark.parametrize('lost', ['2>&1 | head -1', '>&- 2>&-', '2>/dev/full >/dev/full'])
def test_a_run_outlives_the_readers_of_its_output(lost, shared, whole, tmp_path):
  line = shlex.join([
      sys.executable, *command(shared, tmp_path, f'--config.checkpoint_steps={STEPS}')])
  line += f' {lost}; exit ${{PIPESTATUS[0]}}'
  done = subprocess.run(['bash', '-c', line], cwd=ROOT, capture_output=True, check=False,
                        timeout=300)
  assert done.returncode == 0
  assert losses(tmp_path) == losses(whole)
  assert max(saved(tmp_path)) == STEPS


@pytest.mark.parametrize(('flags', 'said'), [
    (['--config.reduce.vision.method=tome'], "reduce.vision.method was 'none' and is now 'tome'"),
    (['--config.optimizer.peak_lr=1e-3'], 'on purpose with --change=optimizer.peak_lr (--debug'),
    (['--config.data.name=no_such_set'], 'no_such_set'), (['--config.mesh.fsdp=64'], "'fsdp': 64")])
def test_a_refused_command_changes_no_file(flags, said, shared, whole):
  before = content(whole)
  code, text = run(shared, whole, '--config.total_steps=30', *flags)
  assert code == 2, text
  assert said in text
  assert content(whole) == before


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(shared, whole,
                                                                              tmp_path):
  """Also by eval.py; nobody says what made the run."""
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  (tmp_path / 'config.json').unlink()
  before = content(tmp_path)
  code, text = run(shared, tmp_path, '--config.total_steps=30', '--config.model.width=48')
  assert code == 2, text
  assert content(tmp_path) == before
  args = command(shared, tmp_path, '--config.model.width=48')
  args[1:3] = 'eval', '--config=configs/digits_sweep.py'
  done = processes.run(*args, timeout=300)
  assert done.returncode == 2, done.stderr
  assert content(tmp_path) == before


def test_what_changes_on_purpose_is_recorded(shared, whole, tmp_path):
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  flags = ['--config.total_steps=26', '--config.optimizer.peak_lr=1e-3',
           '--change=optimizer.peak_lr']
  for _ in range(2):
    code, text = run(shared, tmp_path, *flags)
    assert code == 0, text
  assert 'nothing left to train' in text
  config = json.loads((tmp_path / 'config.json').read_text())
  assert [(change['step'], change['key']) for change in config['changes']] == [
      (STEPS, 'total_steps'), (STEPS, 'optimizer.peak_lr')]
  assert len(losses(tmp_path)) == 26
  code, text = run(shared, tmp_path, '--config.total_steps=28')
  assert code == 2
  assert 'optimizer.peak_lr was 0.001 and is now 0.002' in text


def test_the_newest_two_and_the_best_checkpoints_are_kept(whole):
  kept = saved(whole)
  assert kept[-2:] == [STEPS - 2, STEPS]
  rows = [json.loads(line) for line in (whole / 'metrics.jsonl').read_text().splitlines()]
  scores = {row['step']: row['accuracy'] for row in rows if 'accuracy' in row}
  assert max(scores, key=scores.get) in kept
  assert len(kept) <= 3


def test_a_checkpoint_has_no_score_but_its_own(shared, tmp_path):
  code, text = run(shared, tmp_path, '--config.total_steps=4', '--config.eval_steps=4',
                   '--config.checkpoint_steps=3')
  assert code == 0, text
  scored = {step: (tmp_path / 'checkpoints' / str(step) / 'metrics' / 'metrics').exists()
            for step in saved(tmp_path)}
  assert scored == {3: False, 4: True}


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
