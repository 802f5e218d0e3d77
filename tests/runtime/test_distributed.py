"""Two processes on this machine train as one does."""

import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).parents[2]


def command(workdir, shared, *flags):
  return [sys.executable, '-m', 'train', '--config=configs/digits.py', f'--workdir={workdir}',
          f'--config.data.data_dir={shared / "data"}', '--compile_cache=',
          '--config.total_steps=6', '--config.log_steps=1', '--config.eval_steps=6',
          '--config.checkpoint_steps=3', '--config.optimizer.warmup_steps=2',
          '--config.model.width=32', '--config.model.heads=2', '--config.model.mlp=32',
          '--config.model.depth=4', '--config.reduce.vision.method=tome',
          '--config.reduce.vision.layers=(1,3)', '--config.reduce.vision.keep_ratio=0.7', *flags]


def rows(workdir, key):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [row[key] for row in map(json.loads, lines) if key in row]


def pair(workdir, shared, *flags):
  """Two processes of one run, just started."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  return [
      subprocess.Popen(command(workdir, shared, f'--coordinator=127.0.0.1:{port}', '--processes=2',
                               f'--process={index}', *flags),
                       cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                       preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
      for index in range(2)]


@pytest.mark.parametrize(('number', 'index'), [(signal.SIGTERM, 1), (signal.SIGHUP, 0)])
def test_all_processes_stop_when_one_is_asked_to(number, index, tmp_path):
  """Within seconds and after the same step, though nothing is logged for a million of them."""
  processes = pair(tmp_path / 'run', tmp_path, '--config.total_steps=1000000',
                   '--config.log_steps=1000000', '--config.eval_steps=1000000')
  end = time.monotonic() + 240
  while not (tmp_path / 'run' / 'checkpoints' / '3').exists() and time.monotonic() < end:
    time.sleep(0.1)
  # Another command is refused in each of its processes, and says why in one.
  refused = [process.communicate(timeout=120)[0] for process in pair(tmp_path / 'run', tmp_path)]
  assert f'is in use: process {processes[0].pid} on ' in refused[0]
  assert 'process 0 could not lock' in refused[1]
  processes[index].send_signal(number)
  asked = time.monotonic()
  texts = [process.communicate(timeout=120)[0] for process in processes]
  assert time.monotonic() - asked < 30
  assert [process.returncode for process in processes] == [0, 0], texts
  step, = {re.search(r'stopped by a signal at step (\d+)', text)[1] for text in texts}
  assert (tmp_path / 'run' / 'checkpoints' / step).exists()


def test_two_processes_match_one(tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  done = subprocess.run(command(one, tmp_path), cwd=ROOT, capture_output=True, text=True,
                        check=False, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]
  for process in pair(two, tmp_path):
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text[-3000:]
  assert rows(two, 'loss') == pytest.approx(rows(one, 'loss'), abs=1e-5)
  assert rows(two, 'accuracy') == rows(one, 'accuracy')
  assert (two / 'checkpoints' / '6').exists()
