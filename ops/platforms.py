"""Which platform programs are traced for: that of this process's devices, or of absent ones."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

# The platform of devices that are not here; None for JAX's own.
_ABSENT: contextvars.ContextVar[str | None] = contextvars.ContextVar('platform', default=None)


@contextlib.contextmanager
def made_for(platform: str) -> Iterator[None]:
  """Lets programs that are traced within be those of another platform: 'gpu', 'tpu'."""
  token = _ABSENT.set(platform)
  try:
    yield
  finally:
    _ABSENT.reset(token)


def current() -> str:
  """Returns the platform that a program is being traced for: 'cpu', 'gpu' or 'tpu'.

  What is small enough to be traced twice asks `jax.lax.platform_dependent` instead, which knows
  when it is compiled.
  """
  return _ABSENT.get() or jax.default_backend()
