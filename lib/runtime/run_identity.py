"""The identity of a run: everything that makes it, compared when it goes on from its workdir.

config.json says what made a run. A command that goes on with other settings is refused before
anything is written, except for the keys of the table below. What was changed on purpose stands in
config.json under 'changes', each with the step from which it holds.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from lib.data.settings import ImageSettings, QASettings
from lib.report.rows import plain, replace_file
from lib.runtime.checkpoint import PACKED
from models import renames
from models.plan import reduction_settings

CONFIG, CHANGES = 'config.json', 'changes'
# Keys by pattern; * also stands for what has dots. All others never change: the model, its
# reductions, its data and the seed.
# Free to change: how a run is watched, where it runs, where its data lie, what other tools read.
FREE = ('log_steps', 'eval_steps', 'checkpoint_steps', 'mesh.*', 'sharding', 'data.data_dir',
        'data.threads', 'data.prefetch_batches', 'data.on_corrupt', 'model.*remat',
        'model.*implementation', 'sweep.*', 'study.*', 'expected.*', 'needs.*', CHANGES)
# Changed on purpose only: how the rest is trained and scored. total_steps may also just be raised.
ON_PURPOSE = ('total_steps', 'optimizer.*', 'anneal.*', 'data.augment*', 'data.test_split',
              'data.test_crop', 'model.*dropout', 'model.training_patches')
# What a config of an earlier version leaves out.
DEFAULTS = {f'data.{field.name}': plain(field.default) for kind in (QASettings, ImageSettings)
            for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}
NO_METHOD = 'none'
MOST_NAMED = 6


@dataclasses.dataclass(frozen=True)
class Change:
  """Holds a setting that differs from that of the run so far."""

  key: str
  before: Any
  now: Any

  def __str__(self) -> str:
    return f'{self.key} was {self.before!r} and is now {self.now!r}'


def compare(config: ConfigDict, workdir: pathlib.Path, *,
            on_purpose: Collection[str] = ()) -> list[Change]:
  """Returns the changes on purpose that a config makes to the run in a workdir; writes nothing.

  A workdir without a checkpoint holds no run yet: anything may be trained there.

  Args:
    config: the experiment.
    workdir: of the run.
    on_purpose: keys that may differ; naming one that does not is no error.

  Raises:
    ValueError: other settings differ, with both values of each and what to do; a key that cannot
      be changed; a workdir that is another program's or a packed model.
  """
  for key in on_purpose:
    if not _matches(key, ON_PURPOSE):
      raise ValueError(f'--change={key}: a run that goes on cannot change this; it can change '
                       f'{", ".join(ON_PURPOSE)}')
  before, newest = stored(workdir), _newest_step(workdir)
  if newest is None and (workdir / PACKED).exists():
    raise ValueError(f'{workdir} holds a packed model, not a run: train in another workdir, with '
                     f'config.start={workdir} to begin with its parameters')
  if newest is None or before is None:
    return []
  found = [change for change in differences(before, _of_json(config))
           if not _matches(change.key, FREE)]
  fixed = [change for change in found if not _matches(change.key, ON_PURPOSE)]
  unasked = [change for change in found if change not in fixed and change.key not in on_purpose
             and not _goes_further(change, newest)]
  if fixed or unasked:
    raise ValueError(_refusal(workdir, fixed, unasked))
  return found


def record(config: ConfigDict, workdir: pathlib.Path, changes: list[Change], *, step: int) -> None:
  """Writes config.json, and in it since when which setting was changed.

  Args:
    config: the experiment.
    workdir: of the run.
    changes: of `compare`.
    step: after which they hold, 0 for a run that begins.
  """
  history = ((stored(workdir) or {}).get(CHANGES, []) if step else []) + [
      {'step': step, **dataclasses.asdict(change)} for change in changes]
  text = json.dumps(_of_json(config) | ({CHANGES: history} if history else {}), indent=2)
  replace_file(workdir / CONFIG, text.encode() + b'\n')


def stored(workdir: pathlib.Path) -> dict[str, Any] | None:
  """Returns config.json of a run under the current names of its keys.

  None where there is none, or only what a kill or a power cut left of it.

  Raises:
    ValueError: the file is not that of a run.
  """
  file = workdir / CONFIG
  if not file.exists():
    return None
  try:
    config = json.loads(file.read_text())
  except ValueError as error:
    logging.warning('%s is damaged (%s): what made the run is not compared, and it is written anew',
                    file, error)
    return None
  try:
    reduce = {place: renames.current('reduce', settings or {})
              for place, settings in (config.get('reduce') or {}).items()}
    renamed = {part: renames.current(part, config[part]) for part in ('task', 'sweep')
               if config.get(part)}
    return config | renamed | {'total_steps': int(config['total_steps']), 'reduce': reduce}
  except (AttributeError, KeyError, TypeError) as error:
    raise ValueError(f'{file} is not that of a run of train.py, and would be overwritten: give '
                     'another --workdir') from error


def settings(config: ConfigDict) -> dict[str, Any]:
  """Returns the settings that make a run, by dotted key: those that are set and not `FREE`."""
  return {key: value for key, value in _flat(_of_json(config))
          if value is not None and not _matches(key, FREE)}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
  """Yields the settings that differ, by dotted key.

  One that a side does not have has its default, or is as good as None, 0, False and empty.
  """
  old, new = (dict(_flat({**config, 'reduce': _reductions(config)})) for config in (before, now))
  for key in dict.fromkeys((*old, *new)):
    default = DEFAULTS.get(key, NO_METHOD if fnmatch.fnmatchcase(key, 'reduce.*.method') else None)
    values = old.get(key, default), new.get(key, default)
    both = key in old and key in new
    if values[0] != values[1] and (both or any(values)):
      yield Change(key, *values)


def _reductions(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `config.reduce`, its methods alone where nothing is reduced: no other key counts."""
  return {place: reduction_settings(settings) or {'method': NO_METHOD}
          for place, settings in (config.get('reduce') or {}).items()}


def _flat(config: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  for key, value in config.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def _of_json(config: ConfigDict) -> dict[str, Any]:
  """Returns a config as config.json holds it."""
  content: dict[str, Any] = json.loads(config.to_json_best_effort())
  return content


def _matches(key: str, patterns: Collection[str]) -> bool:
  return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _newest_step(workdir: pathlib.Path) -> int | None:
  steps = [int(path.name) for path in (workdir / 'checkpoints').glob('*') if path.name.isdigit()]
  return max(steps, default=None)


def _goes_further(change: Change, newest: int) -> bool:
  """Whether it says to train on, or that the run is through: neither is a slip."""
  return change.key == 'total_steps' and not newest < change.now < change.before


def _refusal(workdir: pathlib.Path, fixed: list[Change], unasked: list[Change]) -> str:
  changes = [*fixed, *unasked]
  named = ', '.join(map(str, changes[:MOST_NAMED]))
  if len(changes) > MOST_NAMED:
    named += f', and {len(changes) - MOST_NAMED} more'
  if fixed:
    advice = f'train in another workdir, which config.start={workdir} lets begin from this run'
  else:
    advice = f'change it on purpose with --change={",".join(change.key for change in unasked)}'
  return f'the run in {workdir} was made with other settings: {named}. Set this back, or {advice}'
