"""Several processes meet, and none waits in vain for another."""

import concurrent.futures
import json
import re
import shutil
import signal
import socket
import textwrap
import time

import pytest
from helpers.errors import said
from helpers.processes import Process
from helpers.processes import run as run_python

from lib.runtime import processes

SAME = {'config.seed': 0}


def free_port():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


def meet(port, count, index, about=(), timeout=0.6):
  """Returns what a process says to the others it met, or the error that it ends with."""
  try:
    lines = processes.meet(f'127.0.0.1:{port}', count, index, about={**SAME, **dict(about)},
                           timeout=timeout)
  except (ValueError, OSError) as error:
    return str(error)
  for peer, line in lines.items():
    line.say(to=peer)
  heard = {peer: line.hear() for peer, line in lines.items()}
  for line in lines.values():
    line.close()
  return heard


def all_meet(*asked):
  """Returns what each process, (count, index, ...), ends with when all come at once."""
  port = free_port()
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return [each.result() for each in [pool.submit(meet, port, *each) for each in asked]]


@pytest.mark.parametrize(('address', 'count', 'index', 'words'), [
    ('abc', 2, 0, 'is no address: give host:port'), (':1234', 2, 0, 'is no address'),
    ('host:', 2, 0, 'is no address'), ('host:port', 2, 0, 'is no address'),
    ('host:99999', 2, 1, 'the port below 65536'), ('host:0', 2, 1, 'is no address'),
    ('host:-1', 2, 1, 'is no address'), ('host:1.5', 2, 1, 'is no address'),
    ('host:1', 2, 2, '--process=2 of --processes=2'), ('host:1', 2, -1, '--process=-1'),
    ('host:1', 0, 0, '--processes=0'), ('host:1', -3, 0, '--processes=-3'),
])
def test_addresses_and_indices_that_cannot_be(address, count, index, words):
  assert words in said(processes.meet, address, count, index, about={}, timeout=1.0)


def test_all_meet_and_hear_each_other():
  assert all_meet((3, 0), (3, 1), (3, 2)) == [
      {1: {'to': 0}, 2: {'to': 0}}, {0: {'to': 1}}, {0: {'to': 2}}]
  assert all_meet((1, 0)) == [{}]


@pytest.mark.parametrize(('asked', 'words'), [
    ([(3, 0), (3, 2)], 'of 3 processes 1 did not come within 1 s'),
    ([(2, 0), (3, 1)], 'process 1 was started with processes=3, process 0 with processes=2'),
    ([(2, 0), (2, 1, {'config.seed': 1})], 'process 1 was started with config.seed=1, process 0'),
    ([(3, 0), (3, 1), (3, 1)], 'two processes were started with --process=1'),
], ids=['missing', 'count', 'config', 'twice'])
def test_those_who_do_not_fit_are_named_to_all(asked, words):
  for text in all_meet(*asked):
    assert words in text


def test_nobody_at_the_port():
  text = meet(free_port(), 2, 1)
  assert re.search(r'process 0 of 2, at 127.0.0.1:\d+, did not answer within 1 s', text)
  assert 'did not answer' in str(processes_error('no.such.host.invalid:1'))


def processes_error(address):
  with pytest.raises(OSError, match=r'\w') as caught:
    processes.meet(address, 2, 1, about={}, timeout=0.1)
  return caught.value


def test_another_program_at_the_port():
  with socket.create_server(('127.0.0.1', 0)) as other, \
       concurrent.futures.ThreadPoolExecutor() as pool:
    port = other.getsockname()[1]
    assert f'port {port} of --coordinator cannot be used here' in meet(port, 2, 0)
    came = pool.submit(meet, port, 2, 1)
    connection, _ = other.accept()
    with connection:
      connection.sendall(b'HTTP/1.1 400 Bad Request\r\n')
      assert 'or another program is there' in came.result()


def test_a_stranger_at_the_port_is_passed_over():
  port = free_port()
  with concurrent.futures.ThreadPoolExecutor() as pool:
    met = [pool.submit(meet, port, 2, 0, (), 10.0)]
    for words in (b'GET / HTTP/1.1\r\n', b'[1]\n', b''):
      stranger = None
      while stranger is None:
        try:
          stranger = socket.create_connection(('127.0.0.1', port))
        except ConnectionRefusedError:
          time.sleep(0.01)
      with stranger:
        stranger.sendall(words)
    met.append(pool.submit(meet, port, 2, 1, (), 10.0))
    assert [each.result() for each in met] == [{1: {'to': 0}}, {0: {'to': 1}}]


# What follows runs real processes, joined through JAX.

SCRIPT = '''
import os, sys, time
import jax, jax.numpy as jnp
from lib.runtime import cli, processes
index, port, part = int(sys.argv[1]), sys.argv[2], sys.argv[3]
def main(argv):
  with processes.joined('127.0.0.1:' + port, 2, index, about={}, timeout=5.0):
    print(processes.gather({'index': index, 'text': 'x' * (1 + index)}), flush=True)
    exec(part, globals())
sys.argv = sys.argv[:1]
cli.run(main)
'''
WORK = '''
while True:
  processes.gather(time.time())
  time.sleep(0.05)
'''


def lines_of(text):
  """The whole lines that a process has printed, without the library's own."""
  *lines, _ = text.split('\n')
  return [line for line in lines if not line.startswith('[Gloo]')]


@pytest.fixture
def started():
  """Starts two processes that have joined and do what their parts say; none outlives a test."""
  all_started = []

  def start(*parts):
    all_started.extend(both := joined(*parts))
    return both

  yield start
  for process in all_started:
    process.end()


def joined(*parts):
  port = free_port()
  both = [Process('-c', SCRIPT, index, port, textwrap.dedent(part))
          for index, part in enumerate(parts)]
  for process in both:
    while not lines_of(process.text()):
      assert process.poll() is None, process.text(1)
      time.sleep(0.02)
    assert lines_of(process.text())[0] == "[{'index': 0, 'text': 'x'}, {'index': 1, 'text': 'xx'}]"
  return both


def ended(process, since, within):
  """Its exit code and the last line of its errors, if it ended in time."""
  _, text = process.communicate(timeout=within + 30)
  assert time.monotonic() - since < within, text
  assert 'Fatal Python error' not in text
  return process.returncode, text.splitlines()[-1] if text else ''


@pytest.mark.long
@pytest.mark.parametrize('victim', [0, 1])
def test_a_process_that_is_killed_ends_the_other(started, victim):
  both = started(WORK, WORK)
  both[victim].kill()
  code, line = ended(both[1 - victim], time.monotonic(), 5.0)
  assert code == 2
  assert re.fullmatch(f'error: process {victim} of 2 is gone .*; the same command goes on .*', line)


@pytest.mark.long
@pytest.mark.parametrize('victim', [0, 1])
def test_a_silent_process_ends_the_other_and_then_itself(started, victim):
  both = started(WORK, WORK)
  both[victim].send_signal(signal.SIGSTOP)
  code, line = ended(both[1 - victim], time.monotonic(), 10.0)
  assert code == 2
  assert f'error: process {victim} of 2 has been silent for 5 s (--peer_timeout)' in line
  both[victim].send_signal(signal.SIGCONT)
  assert ended(both[victim], time.monotonic(), 5.0)[0] == 2


@pytest.mark.long
@pytest.mark.parametrize('failing', [0, 1])
def test_an_error_in_one_process_is_said_by_both(started, failing):
  parts = [WORK, WORK]
  parts[failing] = "raise ValueError('the disk of this one is full')"
  both, since = started(*parts), time.monotonic()
  assert ended(both[failing], since, 8.0) == (
      2, 'error: the disk of this one is full (--debug shows where)')
  code, line = ended(both[1 - failing], since, 8.0)
  assert code == 2
  assert f'process {failing} of 2 failed: ValueError: the disk of this one is full' in line


@pytest.mark.long
def test_one_that_is_through_first_leaves_the_other_alone(started):
  both, since = started('pass', 'time.sleep(8)'), time.monotonic()
  assert [ended(process, since, 25.0)[0] for process in both] == [0, 0]


RESTORE = '''
from lib.runtime import checkpoint, checksums
folder = FOLDER
def seen(place, names=(), check=checksums.check):
  if DAMAGED and place == checkpoints._folder / '3':
    raise checksums.Damaged('3 is damaged')
  return check(place, names)
checksums.check = seen
place = jax.sharding.NamedSharding(jax.make_mesh((2,), ('data',)), jax.sharding.PartitionSpec())
template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                        {'w': jnp.zeros((4, 2))})
checkpoints = checkpoint.Checkpoints(folder)
step, parts, _ = checkpoints.restore({'state': template, 'ema': template})
print(step, float(parts['ema']['w'].sum()), flush=True)
checkpoints.save(4, parts, {}, metrics={'accuracy': 0.4})
checkpoints.close()
'''
SAVE = '''
import sys
import jax.numpy as jnp
from lib.runtime.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
for step in (1, 2, 3):
  tree = {'w': jnp.full((4, 2), float(step))}
  checkpoints.save(step, {'state': tree, 'ema': tree}, {}, metrics={'accuracy': step / 10})
checkpoints.close()
'''


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp('saved') / 'checkpoints'
  run_python('-c', SAVE, folder).check_returncode()
  return folder


def restored(started, folders, damaged):
  """Returns what two processes print once they have joined, and their exit codes."""
  both = started(*[RESTORE.replace('FOLDER', repr(str(folder))).replace('DAMAGED', str(each))
                   for folder, each in zip(folders, damaged, strict=True)])
  texts = [process.communicate(timeout=120) for process in both]
  return [(lines_of(text)[1:], errors, process.returncode)
          for process, (text, errors) in zip(both, texts, strict=True)]


@pytest.mark.long
def test_damage_that_one_process_sees_is_passed_over_by_both(started, saved, tmp_path):
  folder = shutil.copytree(saved, tmp_path / 'checkpoints')
  done = restored(started, [folder, folder], [False, True])
  for text, errors, code in done:
    assert (text, code) == (['2 16.0'], 0), errors
  assert 'in process 1, 3 is damaged: renamed the checkpoint' in done[0][1]
  assert done[1][1] == ''
  names = sorted(path.name[:9] for path in folder.iterdir())
  assert names == ['2', '4', 'damaged-3']
  assert json.loads((folder / '4' / 'metrics' / 'metrics').read_text()) == {'accuracy': 0.4}


@pytest.mark.long
@pytest.mark.parametrize('lacks', [True, False])
def test_storage_that_is_not_shared_is_an_error_in_both(started, saved, tmp_path, lacks):
  # As if one name meant a folder on each machine.
  folders = [shutil.copytree(saved, tmp_path / name) for name in ('of_0', 'of_1')]
  if lacks:
    shutil.rmtree(folders[1] / '3')
  for _, errors, code in restored(started, folders, [False, False]):
    assert code == 2
    assert 'is not the same for all processes' in errors
    assert ('[[2, 3], [2]]' if lacks else 'process 1 does not see') in errors
  assert sorted(path.name for path in folders[0].iterdir()) == ['2', '3']
