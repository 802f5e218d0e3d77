"""Writes a data set to disk once, as ArrayRecord, for training and evaluation to read.

  python -m tools.prepare --name=digits --data_dir=data
  python -m tools.prepare --name=imagenet2012 --manual_dir=downloads
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from lib.data.prepare import prepare
from lib.runtime import cli

NAME = flags.DEFINE_string('name', None, "A TFDS name: 'digits', 'cifar10', 'emnist/letters'.")
DATA_DIR = flags.DEFINE_string(
    'data_dir', '', "Where sets lie; '' is $TFDS_DATA_DIR or ~/tensorflow_datasets.")
MANUAL_DIR = flags.DEFINE_string(
    'manual_dir', '', "Files you downloaded yourself; '' is downloads/manual in the data_dir.")


def main(argv: Sequence[str]) -> None:
  """Prepares one set and says where it is."""
  del argv
  print(f'{NAME.value} is ready in '
        f'{prepare(NAME.value, data_dir=DATA_DIR.value, manual_dir=MANUAL_DIR.value)}')


if __name__ == '__main__':
  flags.mark_flag_as_required('name')
  cli.run(main)
