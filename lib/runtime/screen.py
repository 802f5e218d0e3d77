"""The screen of a command that outlives it: a terminal or pipe that goes away costs no work."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any


class Lasting:
  """A text stream that is silent from the first write on that fails.

  Args:
    stream: sys.stdout or sys.stderr.
  """

  def __init__(self, stream: Any) -> None:
    self._stream = stream

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    """Writes a text if anyone still reads."""
    with self._lasting():
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    """Flushes if anyone still reads."""
    with self._lasting():
      self._stream.flush()

  @contextlib.contextmanager
  def _lasting(self) -> Any:
    try:
      yield
    except (OSError, ValueError):  # Closed, full, or its terminal or reader is gone.
      # The descriptor itself: libraries write to it too, and what is buffered must go somewhere.
      with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def outlive() -> None:
  """Lets this process go on, and end as it would, when nobody reads its output any more."""
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:
      # Started without it: the next file to be opened would get its number, and others' messages.
      os.open(os.devnull, os.O_RDWR)
  for name in ('stdout', 'stderr'):
    stream = getattr(sys, name) or open(os.devnull, 'w')  # noqa: SIM115
    if not isinstance(stream, Lasting):
      setattr(sys, name, Lasting(stream))
