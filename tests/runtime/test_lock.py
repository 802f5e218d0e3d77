"""The lock of a workdir: who holds it, and what is left of it afterwards."""

import fcntl
import os
import re
import socket
import subprocess
import sys

import pytest

from lib.runtime import lock

HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], 'a')
fcntl.flock(file, fcntl.LOCK_EX)
print('held', flush=True)
time.sleep(60)
"""


def test_the_second_is_told_who_holds_it_and_changes_nothing(tmp_path):
  workdir = tmp_path / 'deep' / 'run'
  with lock.held(workdir, first=True):
    before = (workdir / 'lock.json').read_bytes()
    with pytest.raises(BlockingIOError) as caught, lock.held(workdir, first=True):
      pass
    assert re.fullmatch(
        rf'{workdir} is in use: process {os.getpid()} on {socket.gethostname()}, since '
        r'\d{4}-\d\d-\d\dT[\d:]{8}[+-]\d\d:\d\d, trains in it\. Wait for it or stop it, or give '
        'another --workdir', str(caught.value))
    assert (workdir / 'lock.json').read_bytes() == before
    with lock.held(workdir, first=False):  # Another process of the same command.
      pass
    (workdir / 'metrics.jsonl').touch()
  assert [path.name for path in workdir.iterdir()] == ['metrics.jsonl']
  with lock.held(workdir, first=True):
    pass


def test_a_refused_command_leaves_no_folder(tmp_path):
  with pytest.raises(ValueError, match='refused'), lock.held(tmp_path / 'run', first=True):
    raise ValueError('refused')
  assert not (tmp_path / 'run').exists()


def test_a_killed_holder_holds_nothing(tmp_path):
  path = tmp_path / 'lock.json'
  path.write_text('{"pid": 1}')
  holder = subprocess.Popen([sys.executable, '-S', '-c', HOLDER, path], stdout=subprocess.PIPE)
  with holder:
    assert holder.stdout.readline() == b'held\n'
    with (pytest.raises(BlockingIOError, match='is in use: another command trains in it'),
          lock.held(tmp_path, first=True)):
      pass
    holder.kill()
  # What it left is there again after a command that is refused, and gone after one that is not.
  with pytest.raises(ValueError, match=f'"pid": {os.getpid()}'), lock.held(tmp_path, first=True):
    raise ValueError(path.read_text())
  assert path.read_text() == '{"pid": 1}'
  with lock.held(tmp_path, first=True):
    pass
  assert not path.exists()


def test_a_file_system_without_locks_is_no_error(tmp_path, monkeypatch):
  def flock(file, operation):
    raise OSError(lock.errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', flock)
  with lock.held(tmp_path, first=True):
    pass
  monkeypatch.setattr(lock, 'UNSUPPORTED', ())
  with pytest.raises(OSError, match='No locks available'), lock.held(tmp_path, first=True):
    pass
