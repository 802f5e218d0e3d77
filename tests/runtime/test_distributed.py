"""Two processes on this machine train as one does."""

import json
import pathlib
import socket
import subprocess
import sys

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


def test_two_processes_match_one(tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  done = subprocess.run(command(one, tmp_path), cwd=ROOT, capture_output=True, text=True,
                        check=False, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  processes = [
      subprocess.Popen(command(two, tmp_path, f'--coordinator=127.0.0.1:{port}', '--processes=2',
                               f'--process={index}'),
                       cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
      for index in range(2)]
  for process in processes:
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text[-3000:]
  assert rows(two, 'loss') == pytest.approx(rows(one, 'loss'), abs=1e-5)
  assert rows(two, 'accuracy') == rows(one, 'accuracy')
  assert (two / 'checkpoints' / '6').exists()
