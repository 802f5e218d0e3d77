"""Several processes that train together: they meet, watch each other, and tell each other things.

JAX ends a process whose peers are missing or lost with a dump of its stack, after minutes. So they
meet here first, at the address that JAX uses afterwards, and keep these connections: a process
that ends, fails or falls silent is named in one line by all others, which then end too.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from lib.runtime import cli

FAILED, STDERR = 2, 2
# A connection that breaks at the same time as a computation is noticed within this time.
GRACE_SECONDS = 2.0
PINGS_A_TIMEOUT = 6


def gather(value: Any) -> list[Any]:
  """Returns every process's value, in order; all of them must ask.

  Args:
    value: JSON-like.
  """
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.asarray(text.size))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[:text.size] = text
  return [json.loads(row[:size].tobytes())
          for row, size in zip(multihost_utils.process_allgather(padded), sizes, strict=True)]


@contextlib.contextmanager
def joined(address: str, count: int, index: int, *, about: Mapping[str, Any],
           timeout: float) -> Iterator[None]:
  """Joins the other processes of a command, and ends with them when one fails inside.

  Args:
    address: host:port where process 0 is met, first by us, then by JAX.
    count: of processes.
    index: of this one.
    about: flat, JSON-like: what must be the same in all of them.
    timeout: seconds to wait for one that does not come, and for one that is silent.

  Raises:
    ValueError, OSError: as `meet`.
  """
  lines = meet(address, count, index, about=about, timeout=timeout)
  peers = _Peers(index, count, lines, timeout)
  try:
    # Silence is noticed here before JAX notices it.
    jax.distributed.initialize(address, count, index, initialization_timeout=int(2 * timeout) + 1,
                               heartbeat_timeout_seconds=int(2 * timeout) + 1)
    yield
  except BaseException as error:
    peers.fail(error)
  peers.leave()


def meet(address: str, count: int, index: int, *, about: Mapping[str, Any],
         timeout: float) -> dict[int, Line]:
  """Returns a line to each other process for process 0, a line to process 0 for each other.

  Args:
    address, count, index, about, timeout: as for `joined`.

  Raises:
    ValueError, OSError: no such address or index; the port is taken; a process did not come, or
      came with something else.
  """
  host, _, port = address.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise ValueError(f'--coordinator={address} is no address: give host:port of process 0, the '
                     'port below 65536, as in 10.0.0.1:1234')
  if not 0 <= index < count:
    raise ValueError(f'--process={index} of --processes={count} cannot be: processes are counted '
                     'from 0, and there is at least one')
  about = {'processes': count, **about}
  if index == 0:
    return _wait_for_all(int(port), count, about, timeout)
  return {0: _come(host.strip('[]'), int(port), count, index, about, timeout)}


class Line:
  """A connection to a peer, over which both say dicts in JSON, one a line of text."""

  def __init__(self, connection: socket.socket) -> None:
    self.socket, self._reader = connection, connection.makefile('rb')

  def say(self, **words: Any) -> None:
    """Sends a dict if the peer is still there."""
    with contextlib.suppress(OSError):
      self.socket.sendall(json.dumps(words).encode() + b'\n')

  def hear(self) -> dict[str, Any]:
    """Returns what the peer says next.

    Raises:
      TimeoutError: it says nothing.
      OSError, ValueError: it is gone, or is no peer.
    """
    line = self._reader.readline(2**20)
    if not line:
      raise ConnectionError('it closed the connection')
    return dict(json.loads(line))

  def close(self) -> None:
    """Ends the connection."""
    self._reader.close()
    self.socket.close()


class _Peers:
  """Watches the others: process 0 all of them, each of them process 0."""

  def __init__(self, index: int, count: int, lines: Mapping[int, Line], timeout: float) -> None:
    self._index, self._count, self._lines, self._timeout = index, count, lines, timeout
    self._ending = threading.Lock()
    for peer, line in lines.items():
      line.socket.settimeout(timeout)
      threading.Thread(target=self._listen, args=(peer, line), daemon=True).start()
    threading.Thread(target=self._ping, daemon=True).start()

  def leave(self) -> None:
    """Tells the others that this process is through."""
    self._say(through=True)

  def fail(self, error: BaseException) -> NoReturn:
    """Ends all processes because of an error in this one."""
    # A lost peer breaks a computation in ways that differ between devices; its line names it.
    time.sleep(GRACE_SECONDS)
    with self._ending:
      if isinstance(error, cli.USER_ERRORS) and '--debug' not in sys.argv:
        with contextlib.suppress(SystemExit):
          cli.stop(error)
      elif isinstance(error, Exception):
        traceback.print_exception(error)
      text = ' '.join(f'{type(error).__name__}: {error}'.split())[:500]
      self._end(f'process {self._index} of {self._count} failed: {text}')

  def _lost(self, text: str) -> NoReturn:
    """Ends this process, and all others through process 0, because of another one."""
    with self._ending:
      # The last line of all: JAX, which notices at the same time, writes there from its threads.
      sys.stderr.flush()
      seen = os.dup(STDERR)
      with open(os.devnull, 'w') as nowhere:
        os.dup2(nowhere.fileno(), STDERR)
      os.write(seen, f'error: {text}\n'.encode())
      self._end(text)

  def _end(self, text: str) -> NoReturn:
    self._say(error=text)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by way of JAX, which would wait for the others.
    os._exit(FAILED)

  def _say(self, **words: Any) -> None:
    for line in self._lines.values():
      line.say(**words)

  def _ping(self) -> None:
    while True:
      self._say()
      time.sleep(self._timeout / PINGS_A_TIMEOUT)

  def _listen(self, peer: int, line: Line) -> None:
    """Returns when the peer is through."""
    try:
      while 'through' not in (said := line.hear()):
        if 'error' in said:
          self._lost(said['error'])
      return
    except TimeoutError:
      how = f'has been silent for {self._timeout:.0f} s (--peer_timeout)'
    except (OSError, ValueError) as fault:
      how = f'is gone ({fault})'
    self._lost(f'process {peer} of {self._count} {how}; the same command goes on from the newest '
               'checkpoint')


def _wait_for_all(port: int, count: int, about: Mapping[str, Any],
                  timeout: float) -> dict[int, Line]:
  """Lets the others come to process 0."""
  try:
    both = socket.has_dualstack_ipv6()
    server = socket.create_server(('', port), dualstack_ipv6=both,
                                  family=socket.AF_INET6 if both else socket.AF_INET)
  except OSError as fault:
    reason = os.strerror(fault.errno or 0)
    raise OSError(f'port {port} of --coordinator cannot be used here ({reason}): another program '
                  'has it, or another process with --process=0; give all processes another port'
                  ) from fault
  came: dict[int, Line] = {}
  wrong = ''
  with server, contextlib.ExitStack() as opened:
    arrivals = _arrivals(server, time.monotonic() + timeout)
    while len(came) < count - 1 and not wrong:
      line, peer, theirs = next(arrivals, (None, 0, {}))
      if line is None:
        missing = ', '.join(str(peer) for peer in range(1, count) if peer not in came)
        wrong = (f'of {count} processes {missing} did not come within {timeout:.0f} s '
                 '(--peer_timeout): start each with its --process and the --coordinator of all')
      else:
        wrong = _differs(peer, theirs, about) or (
            f'two processes were started with --process={peer}' if peer in came else '')
        came[-1 if wrong else peer] = line
        opened.callback(line.close)
    for line in came.values():
      line.say(**({'error': wrong} if wrong else {}))
    if wrong:
      raise ValueError(wrong)
    opened.pop_all()
  return came


def _arrivals(server: socket.socket, end: float) -> Iterator[tuple[Line, int, dict[str, Any]]]:
  """Yields the lines of peers until a time, each with its index and what it is about."""
  while (left := end - time.monotonic()) > 0:
    server.settimeout(left)
    try:
      line = Line(server.accept()[0])
    except OSError:
      continue
    line.socket.settimeout(min(left, 5.0))
    try:
      said = line.hear()
      arrival = line, int(said['process']), dict(said['about'])
    except (OSError, ValueError, KeyError, TypeError):  # Others too ask at ports.
      line.close()
    else:
      yield arrival


def _differs(peer: int, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
  """Returns a line about what is not the same in both, nothing where all is."""
  keys = [key for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key)]
  if not keys:
    return ''
  them, us = (', '.join(f'{key}={about.get(key)}' for key in keys[:3]) for about in (theirs, ours))
  return (f'process {peer} was started with {them}, process 0 with {us}: give all the same flags, '
          'but for --process')


def _come(host: str, port: int, count: int, index: int, about: Mapping[str, Any],
          timeout: float) -> Line:
  """Comes to process 0."""
  where, end = f'process 0 of {count}, at {host}:{port},', time.monotonic() + timeout
  while True:
    try:
      line = Line(socket.create_connection((host, port), max(end - time.monotonic(), 1.0)))
      break
    except OSError as fault:
      if time.monotonic() > end:
        raise OSError(f'{where} did not answer within {timeout:.0f} s (--peer_timeout; {fault}): '
                      'start it, or give all processes its --coordinator') from fault
      time.sleep(0.2)
  line.say(process=index, about=about)
  # It waits for the others as long as this one did for it.
  line.socket.settimeout(timeout + GRACE_SECONDS)
  with contextlib.ExitStack() as opened:
    opened.callback(line.close)
    try:
      said = line.hear()
    except (OSError, ValueError) as fault:
      raise OSError(f'{where} is gone, or another program is there ({fault})') from fault
    if 'error' in said:
      raise ValueError(said['error'])
    opened.pop_all()
  return line
