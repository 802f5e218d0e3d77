"""The lock of a workdir: one command trains in it at a time.

The operating system holds it (flock on a file, which Linux passes on over NFS) and frees it with
the process, however that ends. The file tells others who holds it; commands that only read a
workdir need no lock.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator

import jax
from absl import logging

from lib.runtime import processes

NAME = 'lock.json'
# What flock raises where another process holds the lock (the second over NFS), and on a file system
# without locks.
HELD = (errno.EAGAIN, errno.EACCES)
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def held(workdir: pathlib.Path, *, first: bool) -> Iterator[None]:
  """Holds the lock of a workdir, and makes the folder if need be.

  What it made is gone afterwards: the file, and a workdir that stayed empty. A command that ends
  with an error also leaves the file of a killed one as it was.

  Args:
    workdir: the folder.
    first: whether this is the first process of the command, which locks for all of them.

  Raises:
    BlockingIOError: another command holds it; says who. Every process of a command raises.
  """
  refusal = ''
  with contextlib.ExitStack() as stack:
    try:
      if first:
        stack.enter_context(_locked(workdir))
    except OSError as error:
      if jax.process_count() == 1:
        raise
      refusal = str(error)
    # The others would wait in vain for a first process that is refused.
    refusal = processes.gather(refusal)[0]
    if refusal:
      raise BlockingIOError(refusal)
    yield


@contextlib.contextmanager
def _locked(workdir: pathlib.Path) -> Iterator[None]:
  made = not workdir.exists()
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / NAME
  file, before = _lock(path)
  try:
    _write(file, json.dumps({
        'pid': os.getpid(), 'host': socket.gethostname(),
        'since': datetime.datetime.now().astimezone().isoformat(timespec='seconds')}).encode())
    yield
    before = b''
  finally:
    if before:
      _write(file, before)
    else:
      path.unlink(missing_ok=True)
    os.close(file)
    if made:
      with contextlib.suppress(OSError):  # It is not empty.
        workdir.rmdir()


def _lock(path: pathlib.Path) -> tuple[int, bytes]:
  """Returns the locked file, open, and what stood in it."""
  while True:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno in HELD:
        holder = _holder(os.pread(file, 4096, 0))
        os.close(file)
        raise BlockingIOError(
            f'{path.parent} is in use: {holder} trains in it. Wait for it or stop it, or give '
            'another --workdir') from error
      if error.errno not in UNSUPPORTED:
        raise
      logging.warning('%s cannot be locked (%s): see to it that only one command trains there',
                      path.parent, error.strerror)
    # Its holder may have removed the file since it was opened: then the lock is of nothing.
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file), path.stat()):
        return file, os.pread(file, 4096, 0)
    os.close(file)


def _holder(text: bytes) -> str:
  try:
    holder = json.loads(text)
    return f'process {holder["pid"]} on {holder["host"]}, since {holder["since"]},'
  except (ValueError, KeyError, TypeError):
    return 'another command'


def _write(file: int, content: bytes) -> None:
  os.ftruncate(file, 0)
  os.pwrite(file, content, 0)
