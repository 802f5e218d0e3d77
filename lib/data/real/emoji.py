"""Emoji as several vendors draw them."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image


def emoji_pairs(folder: pathlib.Path, rng: np.random.Generator,
                count: int) -> tuple[list[Image.Image], list[Image.Image]]:
  """Reads the same emoji of two vendors, on white.

  Raises:
    ValueError: they are not there.
  """
  places = [folder / f'emoji_{vendor}' for vendor in ('google', 'twitter')]
  for place in places:
    if not (place / 'emoji.json').exists():
      raise ValueError(f'there is no {place / "emoji.json"}: `python -m tools.real.fetch` fetches '
                       'it')
  names = [{each['image'] for each in json.loads((place / 'emoji.json').read_text())
            if (place / '64' / each['image']).exists()} for place in places]
  both = sorted(names[0] & names[1])
  chosen = [both[index] for index in rng.permutation(len(both))[:count]]

  def on_white(path: pathlib.Path) -> Image.Image:
    picture = Image.open(path).convert('RGBA')
    white = Image.new('RGBA', picture.size, 'white')
    return Image.alpha_composite(white, picture).convert('RGB')

  one, other = ([on_white(place / '64' / name) for name in chosen] for place in places)
  return one, other


def drawings(folder: pathlib.Path, vendor: str, names: Sequence[str]) -> list[Image.Image]:
  """Reads the emoji of one vendor by their short names, with transparency.

  Raises:
    ValueError: they are not there.
  """
  place = folder / f'emoji_{vendor}'
  try:
    files = {each['short_name']: each['image']
             for each in json.loads((place / 'emoji.json').read_text())}
    return [Image.open(place / '64' / files[name]).convert('RGBA') for name in names]
  except (OSError, KeyError) as error:
    raise ValueError(f'{place} has not all of the emoji ({error}): `python -m tools.real.fetch` '
                     'fetches them') from error
