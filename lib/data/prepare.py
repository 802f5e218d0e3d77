"""Finds TFDS sets by name, and writes them as ArrayRecord where they are missing."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds
from absl import logging

from lib.data.datasets import digit_scenes, digit_segments, digits, emoji_scenes, stdlib_needle
from models.checkpoints.json_files import needed, value_of
from ops import choices

# Sets that are prepared on first use: nothing is downloaded and it takes seconds.
# Some come in several configs, named behind a slash; lib/data/qa.py reads those with questions.
BUNDLED: dict[str, type[tfds.core.GeneratorBasedBuilder]] = {
           'digits': digits.Digits, 'digit_segments': digit_segments.DigitSegments,
           'digit_scenes': digit_scenes.DigitScenes, 'stdlib_needle': stdlib_needle.StdlibNeedle,
           'emoji_scenes': emoji_scenes.EmojiScenes}

# Where the configs of this project keep their sets.
DATA_DIR = 'data'


def prepare(name: str, *, data_dir: str = '', manual_dir: str = '') -> pathlib.Path:
  """Writes a set as ArrayRecord under `data_dir`, unless it is there; returns its folder.

  Args:
    name: a TFDS name.
    data_dir: as `lib.data.settings.Settings.data_dir`.
    manual_dir: where files lie that a person has to download; '' is data_dir/downloads/manual.

  Raises:
    ValueError: an unknown name; files that must be downloaded by hand; a package that TFDS needs to
      write this set and that is not installed, such as TensorFlow.
  """
  builder = _find(name, data_dir)
  final = pathlib.Path(builder.data_dir)
  if _is_prepared(builder):
    _check_format(name, builder)
  elif _is_bundled(name):
    _prepare_bundled(name, builder)
  else:
    _download(name, builder, manual_dir)
  return final


def prepared(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
  """Returns the builder of a stored set; a bundled one is stored now where it is not.

  Raises:
    ValueError: an unknown name, or stored in another format than ArrayRecord.
    FileNotFoundError: the set is not prepared.
  """
  builder = _find(name, data_dir)
  if not _is_prepared(builder):
    if not _is_bundled(name):
      flag = f' --data_dir={data_dir}' if data_dir else ''
      versions = sorted(builder.data_path.parent.glob('*/dataset_info.json'))
      other = ''
      if versions:
        other = f', or set data.name={name}:{versions[-1].parent.name}, which is there'
      raise FileNotFoundError(f'{name} is not prepared in {builder.data_dir}: run '
                              f'`python -m tools.prepare --name={name}{flag}`{other}')
    _prepare_bundled(name, builder)
    builder = _find(name, data_dir)
  _check_format(name, builder)
  return builder


def data_dir_of_run(data: Mapping[str, Any]) -> str:
  """Returns where the set of a run lies, or may be written.

  A run's config.json may come from somebody else, so it does not decide where we write: a set that
  is not stored where it says belongs into `DATA_DIR`.

  Args:
    data: `config.data` of the run.

  Raises:
    ValueError: it names no set.
  """
  name, stated = needed(data, 'name', str), value_of(data, 'data_dir', str) or ''
  if stated in ('', DATA_DIR):
    return stated
  try:
    return stated if _is_prepared(_find(name, stated)) else DATA_DIR
  except ValueError:  # A set that is not known: whoever needs it says so.
    return DATA_DIR


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Silences TFDS on stdout and in absl's log, where our own messages say the same."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.WARNING)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(before)


def _download(name: str, builder: tfds.core.DatasetBuilder, manual_dir: str) -> None:
  """Downloads a set, or takes the files that a person downloaded, and writes it."""
  manual = pathlib.Path(manual_dir or builder.data_dir_root / 'downloads' / 'manual').expanduser()
  if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and not (manual.is_dir() and any(manual.iterdir())):
    instructions = ' '.join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
    raise ValueError(f'{name} has files that you must download yourself, and {manual} has none: '
                     'put them there, or name their folder with --manual_dir. TFDS says: '
                     f'{instructions}')
  tfds.display_progress_bar(sys.stderr.isatty())
  settings = tfds.download.DownloadConfig(manual_dir=manual if manual.is_dir() else None)
  try:
    builder.download_and_prepare(file_format='array_record', download_config=settings)
  except ImportError as error:
    # TFDS puts a print of the whole example before the reason.
    missing = re.search(r"No module named '([\w.]+)'", str(error))
    if not missing:
      raise
    raise ValueError(
        f'TFDS needs the package {missing[1]} to write {name}, and it is not installed: `pip '
        f'install {missing[1]}`, here or in an environment of its own, and run this command there; '
        'reading the set does not need it') from error


def _prepare_bundled(name: str, builder: tfds.core.DatasetBuilder) -> None:
  """Writes into a folder of its own and renames it, so that processes may start together."""
  final = pathlib.Path(builder.data_dir)
  final.parent.mkdir(parents=True, exist_ok=True)
  tfds.display_progress_bar(sys.stderr.isatty())
  with tempfile.TemporaryDirectory(prefix='.incomplete-', dir=final.parent) as scratch:
    writer = _bundled(name, scratch)
    with quiet():
      writer.download_and_prepare()
    try:
      os.rename(writer.data_dir, final)
    except OSError:
      # Another process was first, with the same bytes; anything else is an error.
      if not _is_prepared(builder):
        raise


def _find(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
  """Returns the builder of a name, prepared or not."""
  folder = os.path.expanduser(data_dir) or None
  if _is_bundled(name):
    return _bundled(name, folder)
  try:
    with quiet():
      return tfds.builder(name, data_dir=folder)
  except tfds.core.DatasetNotFoundError:
    names = sorted({*BUNDLED, *tfds.list_builders(with_community_datasets=False)})
    close = difflib.get_close_matches(name, names, n=5) or ['digits', 'cifar10', 'imagenet2012']
    raise ValueError(
        f'data set {name!r} is not known to TFDS and not under {data_dir or "its data_dir"}: did '
        f'you mean {", ".join(close)}? tfds.list_builders() lists all {len(names)}') from None
  except ValueError as error:  # In several lines.
    raise ValueError(f'data set {name!r} is no name that TFDS can read '
                     f"({str(error).splitlines()[0]}): give one as 'digits'") from error


def _is_bundled(name: str) -> bool:
  return name.partition('/')[0] in BUNDLED


def _bundled(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  """Returns the builder of a bundled set."""
  base, _, config = name.partition('/')
  configs = [each.name for each in BUNDLED[base].BUILDER_CONFIGS]
  choices.check('data set ', name, [f'{base}/{each}' for each in configs] or [base])
  return BUNDLED[base](data_dir=data_dir, file_format='array_record', config=config or None)


def _is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
  # TFDS's own is_prepared() logs a warning where the answer is no.
  return (builder.data_path / 'dataset_info.json').exists()


def _check_format(name: str, builder: tfds.core.DatasetBuilder) -> None:
  """Raises ValueError for a set that is not stored as ArrayRecord."""
  formats = {entry.value for entry in builder.info.available_file_formats()}
  if 'array_record' not in formats:
    raise ValueError(
        f'{name} in {builder.data_dir} is stored as {", ".join(sorted(formats))}, but random '
        'access needs array_record: write it into another data_dir with '
        f'`python -m tools.prepare --name={name} --data_dir=...`')
