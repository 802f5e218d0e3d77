"""Two processes on this machine train as one does."""

import json
import socket
import time

import pytest
from helpers import processes

pytestmark = pytest.mark.long


def command(workdir, shared, *flags):
  return ['-m', 'train', '--config=configs/digits.py', f'--workdir={workdir}',
          f'--config.data.data_dir={shared / "data"}', f'--compile_cache={shared / "xla"}',
          '--config.total_steps=6', '--config.log_steps=1', '--config.eval_steps=6',
          '--config.checkpoint_steps=3', '--config.optimizer.warmup_steps=2',
          '--config.model.width=32', '--config.model.heads=2', '--config.model.mlp=32',
          '--config.model.depth=3', '--config.reduce.vision.method=tome',
          '--config.reduce.vision.layers=(0,1)', '--config.reduce.vision.keep_ratio=0.7', *flags]


def rows(workdir, key):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [row[key] for row in map(json.loads, lines) if key in row]


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  """A run of one process."""
  shared = tmp_path_factory.mktemp('one')
  done = processes.run(*command(shared / 'run', shared))
  assert done.returncode == 0, done.stderr[-3000:]
  return shared


def start(workdir, shared, *flags):
  """Two processes of one run."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  return [
      processes.Process(*command(workdir, shared, f'--coordinator=127.0.0.1:{port}',
                                 '--processes=2', f'--process={index}', *flags), together=True)
      for index in range(2)]


def check(workdir, one, both):
  for process in both:
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text[-3000:]
  assert rows(workdir, 'loss')[-1] == pytest.approx(rows(one / 'run', 'loss')[-1], abs=1e-5)
  assert rows(workdir, 'accuracy') == rows(one / 'run', 'accuracy')
  assert (workdir / 'checkpoints' / '6').exists()


def test_two_processes_match_one(one, tmp_path):
  check(tmp_path, one, start(tmp_path, one))
  assert rows(tmp_path, 'loss') == pytest.approx(rows(one / 'run', 'loss'), abs=1e-5)


def test_one_of_two_is_killed_and_the_same_command_goes_on(one, tmp_path):
  both = start(tmp_path, one, '--config.checkpoint_steps=1')
  end = time.monotonic() + 300
  while not (tmp_path / 'checkpoints' / '1').exists():
    assert time.monotonic() < end
    time.sleep(0.01)
  both[1].kill()
  both[1].communicate()
  text, _ = both[0].communicate(timeout=60)
  assert both[0].returncode == 2
  assert 'error: process 1 of 2 is gone' in text.splitlines()[-1]
  check(tmp_path, one, start(tmp_path, one, '--config.checkpoint_steps=1'))
