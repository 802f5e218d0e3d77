"""The flag --config: a file of configs/, each key of which is a flag as well.

  --config=configs/digits.py --config.reduce.vision.method=topk --config.reduce.vision.args.by=knorm

A key that the file does not have is an error that says which there are. Open to any key are a
method's arguments, what `overrides` of a sweep or study say of a method, and the arguments of an
augmentation: whoever reads them checks them.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from lib.runtime import cli
from models import renames
from ops import choices

OPEN = ('args', 'overrides', 'augment')


def define(help: str, name: str = 'config') -> flags.FlagHolder[Any]:
  """Defines the flag, and returns what holds its value, a locked ConfigDict."""
  holder = config_flags.DEFINE_config_file(name, None, help)
  # The only way in between the loading of the file and the reading of the other flags.
  flag = flags.FLAGS[name]
  flag.parser = _Parser(name, flag.parser)
  return holder


def define_dict(name: str, config: ConfigDict, help: str) -> flags.FlagHolder[Any]:
  """Defines a flag for each key of a config, and returns what holds the config.

  A flag of a key that is not there ends the command here: ml_collections reads the command line
  before absl does.
  """
  try:
    with config.unlocked():
      _make_room_for_flags(config, name)
    return config_flags.DEFINE_config_dict(name, config, help)
  except (AttributeError, KeyError, flags.Error) as error:
    cli.stop(error)


class _Parser(flags.ArgumentParser):
  """Reads a config file, and makes room in it for what the command line adds."""

  def __init__(self, name: str, read: flags.ArgumentParser) -> None:
    self._name, self._read = name, read

  def parse(self, path: str) -> Any:
    """Returns the config of a path.

    Raises:
      flags.Error: one line, for a flag of a key that is not there, or what get_config says.
    """
    file = pathlib.Path(path.partition(':')[0])
    if not file.is_file():
      raise flags.Error(f'--{self._name}={path}: {file} is no file: give one of configs/, as '
                        'configs/digits.py')
    try:
      config = self._read.parse(path)
      # Asked for anything, what stands for a file that could not be read raises why.
      config = config if hasattr(config, 'unlocked') else None
    except Exception as error:  # A config is a program, and may raise whatever it likes.
      # Theirs holds a whole traceback; the config's own words are what it came of.
      cause = error.__context__ or error
      kind = '' if isinstance(cause, ValueError) else f'{type(cause).__name__}: '
      raise flags.Error(f'{path}: {kind}{cause}') from error
    if not isinstance(config, ConfigDict):
      raise flags.Error(f'{path}: its get_config() must return an ml_collections.ConfigDict')
    with config.unlocked():
      _rename(config)
      _make_room_for_flags(config, self._name)
    return config

  def flag_type(self) -> str:
    """Returns what the flag's value is, as --help says it."""
    return self._read.flag_type()


def make_room(config: ConfigDict, key: str, *, name: str = 'config') -> None:
  """Adds a key to the open parts of a config, unset; does nothing where it is there.

  Args:
    config: the config, unlocked.
    key: as 'reduce.vision.args.protect'.
    name: of the flag, for the message.

  Raises:
    flags.Error: a key that is neither there nor in an open part.
  """
  node, parts, open_to_any = config, key.split('.'), False
  for index, part in enumerate(parts):
    open_to_any = open_to_any or (index > 0 and parts[index - 1] in OPEN)
    if part not in node:
      if not open_to_any:
        where = '.'.join((name, *parts[:index]))
        try:
          choices.check_key(f'{where} has no key ', part, node)
        except ValueError as error:
          raise flags.Error(str(error)) from None
      node[part] = config_dict.placeholder(object)
    if index == len(parts) - 1:
      return
    if node[part] is None:
      node[part] = ConfigDict()
    elif not isinstance(node[part], ConfigDict):
      raise flags.Error(f'{name}.{".".join(parts[:index + 1])} is {node[part]!r}, which has no '
                        f'key {parts[index + 1]!r}: set it as a whole')
    node = node[part]


def _make_room_for_flags(config: ConfigDict, name: str) -> None:
  """Adds the keys of all flags that the command line has, as `make_room`."""
  for argument in sys.argv:
    key = argument.lstrip('-').partition('=')[0]
    if argument.startswith('-') and key.startswith(f'{name}.'):
      make_room(config, key.removeprefix(f'{name}.'), name=name)


def _rename(config: ConfigDict) -> None:
  """Gives keys that have a new name that name."""
  places = [('reduce', place) for place in (config.get('reduce') or {}).values()]
  for part, node in (*places, ('task', config.get('task')), ('sweep', config.get('sweep'))):
    if isinstance(node, ConfigDict) and renames.RENAMED[part].keys() & node.keys():
      new = renames.current(part, node)
      for key in renames.RENAMED[part].keys() & node.keys():
        del node[key]
      node.update(new)
