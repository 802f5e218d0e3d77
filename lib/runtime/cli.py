"""Command lines: a user's mistake is one line on the screen, not a stack of calls."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

from models import renames

# What the libraries underneath and our own checks raise for wrong settings, files and values.
USER_ERRORS = (ValueError, OSError, FloatingPointError, OverflowError, MemoryError, flags.Error)


def check_counts(name: str, *, length: int | None = None, high: int = 2 ** 31 - 1,
                 flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Makes a flag of a list refuse all but whole numbers.

  Args:
    name: of the flag, which is defined already.
    length: how many numbers it takes, None for any number of them.
    high: the largest; the smallest is 1.
    flag_values: where the flag is.
  """
  def counts(words: Sequence[str] | None) -> bool:
    return words is None or (len(words) == (length or len(words)) > 0 and all(
        re.fullmatch('[0-9]{1,10}', word) and 1 <= int(word) <= high for word in words))

  flags.register_validator(name, counts, f'must be {length or "one or more"} whole numbers from 1 '
                           f'to {high}, with commas between them', flag_values)


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


def read_line(argv: Sequence[str]) -> Sequence[str]:
  """Sets the flags by a command line, and returns what else is in it: the program's name.

  Of a flag that is given twice the last one counts.

  Raises:
    flags.Error: words that are no flag, or what flags refuse.
  """
  # Else flags behind a stray word are left unread, and missed.
  flags.FLAGS.set_gnu_getopt(True)
  rest = flags.FLAGS(argv)
  if rest[1:]:
    raise flags.Error(f'{rest[1]!r} is not understood: everything is set with flags, as '
                      '--name=value; put quotes around a value with spaces')
  return rest


def _parse(argv: Sequence[str]) -> Sequence[str]:
  try:
    return read_line(argv)
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
  # A KeyError shows its message as Python would write it.
  message = error.args[0] if isinstance(error, KeyError) and error.args else error
  text = ' '.join(str(message).split())
  print(f'error: {text} (--debug shows where)', file=sys.stderr)
  sys.exit(2)
