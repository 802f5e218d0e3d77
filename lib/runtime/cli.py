"""Command lines: a user's mistake is one line on the screen, not a stack of calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

from models import renames

# What the libraries underneath and our own checks raise for wrong settings, files and values.
USER_ERRORS = (ValueError, OSError, FloatingPointError, flags.Error)


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs `main` under absl's flags; with --debug errors keep their traceback and libraries talk."""
  # In place: flags of a config are looked up in sys.argv.
  sys.argv[1:] = [renames.flag(argument) for argument in sys.argv[1:]]
  if '--debug' in sys.argv:
    app.run(main, argv=[arg for arg in sys.argv if arg != '--debug'])
    return
  logging.set_verbosity(logging.WARNING)
  try:
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)
  except USER_ERRORS as error:
    stop(error)


def _parse(argv: Sequence[str]) -> Sequence[str]:
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError, TypeError, *USER_ERRORS) as error:
    stop(error)


def _guarded(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
  try:
    main(argv)
  except USER_ERRORS as error:
    stop(error)
  except KeyboardInterrupt:
    sys.exit(130)  # As shells say it: 128 and the signal's number.


def stop(error: Exception) -> NoReturn:
  """Prints a user's mistake in one line, and exits with status 2."""
  text = ' '.join(str(error).strip('\'"').replace('\\n', ' ').split())
  print(f'error: {text} (--debug shows where)', file=sys.stderr)
  sys.exit(2)
