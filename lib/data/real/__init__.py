"""Data that `python -m tools.real.fetch` fetches, read from its folder."""

from __future__ import annotations

import pathlib

FOLDER = 'real'


def language_model(folder: pathlib.Path) -> pathlib.Path:
  """Returns the file of the language model that was fetched.

  Raises:
    ValueError: it is not there.
  """
  found = sorted((folder / 'smollm2').glob('*.gguf'))
  if not found:
    raise ValueError(f'there is no .gguf file in {folder / "smollm2"}: `python -m '
                     'tools.real.fetch` fetches it')
  return found[0]
