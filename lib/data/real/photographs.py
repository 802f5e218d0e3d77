"""Crops of the photographs that come with scikit-learn."""

from __future__ import annotations

from PIL import Image
from sklearn.datasets import load_sample_images

SIDE, ROWS, COLUMNS = 280, 2, 4


def crops() -> list[Image.Image]:
  """Cuts each photograph into overlapping squares: 16 in all."""
  found = []
  for pixels in load_sample_images().images:
    photograph = Image.fromarray(pixels)
    across, down = photograph.width - SIDE, photograph.height - SIDE
    found += [photograph.crop((left, top, left + SIDE, top + SIDE))
              for top in (down * row // (ROWS - 1) for row in range(ROWS))
              for left in (across * column // (COLUMNS - 1) for column in range(COLUMNS))]
  return found
