"""What a run outlives: signals, readers of its output, and what kills left of its metrics."""

import io
import json
import os
import signal
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lib.report.rows import keep_rows
from lib.runtime import launch, metrics, screen

# -- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_to_stop(number):
  before = signal.signal(number, signal.SIG_DFL)
  stop = launch.Stop()
  try:
    assert not stop.should_stop(1)
    os.kill(os.getpid(), number)
    assert stop.should_stop(2)
  finally:
    stop.close()
    assert signal.signal(number, before) is signal.SIG_DFL


def test_a_hangup_that_nohup_hides_stays_hidden():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  stop = launch.Stop()
  try:
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.should_stop(1)
  finally:
    stop.close()
    signal.signal(signal.SIGHUP, before)


# -- output --------------------------------------------------------------------------------------


def test_a_reader_that_goes_away():
  reading, writing = os.pipe()
  with open(writing, 'w') as stream:
    lasting = screen.Lasting(stream)
    lasting.write('heard\n')
    lasting.flush()
    assert os.read(reading, 9) == b'heard\n'
    os.close(reading)
    for _ in range(3):
      assert lasting.write('unheard\n') == 8
      lasting.flush()
    assert os.path.samestat(os.fstat(writing), os.stat(os.devnull))
    assert lasting.fileno() == writing


def test_a_full_device_and_a_closed_stream():
  with open('/dev/full', 'w') as stream:
    print('lost', file=screen.Lasting(stream), flush=True)
  closed = io.StringIO()
  closed.close()
  print('lost', file=screen.Lasting(closed), flush=True)


def test_streams_that_were_never_there(monkeypatch):
  monkeypatch.setattr('sys.stdout', None)
  monkeypatch.setattr('sys.stderr', stream := io.StringIO())
  screen.outlive()
  screen.outlive()
  print('unheard')
  screen.sys.stderr.write('heard')
  screen.sys.stdout.close()
  assert stream.getvalue() == 'heard'


# -- metrics -------------------------------------------------------------------------------------


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def events(folder):
  """The events of the newest of TensorBoard's files in a folder."""
  file = max(folder.glob('events.out*'), key=lambda path: path.stat().st_mtime_ns)
  content, found = file.read_bytes(), []
  while content:
    size, = struct.unpack('<Q', content[:8])
    found.append(Event.FromString(content[12:12 + size]))
    content = content[16 + size:]
  return found


def live(folder, start, steps, *, killed=False):
  writer = metrics.Writer(folder, total_steps=9, start=start, active=True)
  for step in steps:
    writer.write(step, {'loss': float(10 * len(steps) + step)})
    if step % 2 == 0:
      writer.write(step, {'accuracy': 0.5})
  if not killed:
    writer.close()
  return writer


def test_steps_that_come_again_replace_what_earlier_lives_wrote(tmp_path, capsys):
  path = tmp_path / 'metrics.jsonl'
  dead = live(tmp_path, 0, (1, 2, 3, 4, 5), killed=True)
  assert [event.step for event in events(tmp_path) if event.summary.value] == [
      1, 2, 2, 3, 4, 4, 5]
  with path.open('a') as file:
    file.write('{"step": 6, "lo')
  live(tmp_path, 3, (4, 5))
  assert [(row['step'], row.get('loss')) for row in rows(path)] == [
      (1, 51), (2, 52), (2, None), (3, 53), (4, 24), (4, None), (5, 25)]
  began = [event for event in events(tmp_path)
           if event.session_log.status == SessionLog.START]
  assert [event.step for event in began] == [4]
  dead.close()


def test_rows_that_an_earlier_version_wrote_twice(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 2, "accuracy": 0}\n'
                  '{"step": 2, "lo{"step": 1, "loss": 3}\nnull\n{"loss": 1}\n'
                  '{"step": 2, "loss": 2.5}\n{"step": 3, "loss": 1}')
  live(tmp_path, 3, ())
  assert rows(path) == [{'step': 1, 'loss': 3}, {'step': 2, 'loss': 2.5},
                        {'step': 2, 'accuracy': 0}, {'step': 3, 'loss': 1}]
  before = path.stat()
  live(tmp_path, 3, ())
  assert path.stat().st_mtime_ns == before.st_mtime_ns
  live(tmp_path, 0, ())
  assert path.read_text() == ''


def test_a_process_that_does_not_write_leaves_the_file_alone(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 5}\n')
  writer = metrics.Writer(tmp_path, total_steps=9, start=0, active=False)
  writer.write(1, {'loss': 1.0})
  writer.close()
  assert [path.name for path in tmp_path.iterdir()] == ['metrics.jsonl']
  assert rows(tmp_path / 'metrics.jsonl') == [{'step': 5}]
  keep_rows(tmp_path / 'nothing', lambda row: 0)
  assert not (tmp_path / 'nothing').exists()
