"""What stands before a pretrained model: pixels as its authors prepared them, and token ids.

Axes: H, W sides of an image in pixels, K texts, T tokens of a text.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

# The numbers that configs give are Pillow's own; all of these antialias when they shrink.
RESAMPLE = {code.value: code for code in Image.Resampling}
# Before `size` was a dict, a single number meant the shorter edge to these, a square to all others.
SHORTEST_EDGE = ('CLIPFeatureExtractor', 'CLIPImageProcessor', 'BitImageProcessor')
CANONICAL = ('none', 'lower', 'words')


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """Resize, crop, rescale, normalise: a step that is None is left out.

  Attributes:
    size: (height, width), or the length of the shorter edge.
    resample: a key of `RESAMPLE`.
    crop: (height, width) cut from the centre; black is added where the image is smaller.
    rescale: factor on pixels of 0 to 255.
    mean, std: one number a channel, after rescaling.
  """

  size: tuple[int, int] | int | None
  resample: int
  crop: tuple[int, int] | None
  rescale: float | None
  mean: tuple[float, ...] | None
  std: tuple[float, ...] | None

  def __call__(self, image: Image.Image | np.ndarray) -> np.ndarray:
    """An image, or uint8[H, W, 3], as float32[H, W, 3] for a model."""
    if not isinstance(image, Image.Image):
      image = Image.fromarray(image)
    image = image.convert('RGB')
    if self.size is not None:
      image = image.resize(self._sides(image.size), RESAMPLE[self.resample])
    pixels = np.asarray(image)
    if self.crop is not None:
      pixels = _centre(pixels, self.crop)
    values = pixels.astype(np.float64)
    if self.rescale is not None:
      values = values * self.rescale
    values = values.astype(np.float32)
    if self.mean is not None:
      mean, std = (np.asarray(numbers, np.float32) for numbers in (self.mean, self.std))
      values = (values - mean[None, None]) / std[None, None]
    return values

  def _sides(self, sides: tuple[int, int]) -> tuple[int, int]:
    """(width, height) to resize to."""
    if isinstance(self.size, tuple):
      return self.size[::-1]
    short, long = min(sides), max(sides)
    # Rounded down, as the references do.
    longer = int(self.size * long / short)
    return (self.size, longer) if sides[0] <= sides[1] else (longer, self.size)


def read(source: str | pathlib.Path) -> Preprocess:
  """The steps that a checkpoint's preprocessor_config.json describes.

  Args:
    source: that file, or the folder it lies in.

  Raises:
    ValueError: no such file, or steps that are not known here.
  """
  path = pathlib.Path(source)
  path = path / 'preprocessor_config.json' if path.is_dir() else path
  if not path.exists():
    raise ValueError(f'there is no {path}: give the folder of a checkpoint that has one, or build '
                     'Preprocess(...) by hand')
  return from_config(json.loads(path.read_text()))


def from_config(config: dict[str, Any]) -> Preprocess:
  """`read`, of the file's content."""
  size = crop = rescale = mean = std = None
  if config.get('do_resize', True):
    size = _size(config)
  if config.get('do_center_crop', False):
    crop = _square(config['crop_size'])
  if config.get('do_rescale', True):
    rescale = config.get('rescale_factor', 1 / 255)
  if config.get('do_normalize', True):
    mean, std = tuple(config['image_mean']), tuple(config['image_std'])
  resample = config.get('resample', Image.Resampling.BILINEAR.value)
  if resample not in RESAMPLE:
    raise ValueError(f'resample={resample!r} is unknown: choose one of '
                     f'{", ".join(f"{key} ({code.name})" for key, code in RESAMPLE.items())}')
  return Preprocess(size, resample, crop, rescale, mean, std)


def _size(config: dict[str, Any]) -> tuple[int, int] | int:
  size = config['size']
  if isinstance(size, int):
    name = config.get('image_processor_type') or config.get('feature_extractor_type')
    return size if name in SHORTEST_EDGE else (size, size)
  given = {key for key, value in size.items() if value is not None}
  if given == {'height', 'width'}:
    return (size['height'], size['width'])
  if given == {'shortest_edge'}:
    return size['shortest_edge']
  raise ValueError(f'size={size} is unknown: give height and width, or shortest_edge')


def _square(size: int | dict[str, int]) -> tuple[int, int]:
  return (size, size) if isinstance(size, int) else (size['height'], size['width'])


def _centre(pixels: np.ndarray, crop: tuple[int, int]) -> np.ndarray:
  """The middle of uint8[H, W, 3]; where a side is short, black comes in around it."""
  missing = [max(0, wanted - there) for wanted, there in zip(crop, pixels.shape, strict=False)]
  pixels = np.pad(pixels, [(-(-short // 2), short // 2) for short in missing] + [(0, 0)])
  top, left = ((there - wanted) // 2 for wanted, there in zip(crop, pixels.shape, strict=False))
  return pixels[top:top + crop[0], left:left + crop[1]]


class TextTowerTokenizer:
  """Texts to token ids of one length, by a checkpoint's tokenizer.json.

  Args:
    source: the folder with tokenizer.json, and tokenizer_config.json where there is one: it names
      the padding token and its side, and which of the first and the end token to add.
    context: T; the tower's own.
    canonical: what happens to a text first: 'none'; 'lower' (SigLIP 2); or 'words', lower case
      without punctuation and with single spaces (SigLIP, arXiv:2303.15343, as released).

  Raises:
    ValueError: no such file, an unknown setting, or the package that reads it is missing.
  """

  def __init__(self, source: str | pathlib.Path, *, context: int, canonical: str = 'none'):
    if canonical not in CANONICAL:
      raise ValueError(f'canonical={canonical!r} is unknown: choose one of {", ".join(CANONICAL)}')
    try:
      import tokenizers
    except ImportError as error:
      raise ValueError('reading tokenizer.json needs a package that is not installed: `pip install '
                       '-r requirements-hub.txt`') from error
    folder = pathlib.Path(source)
    if not (folder / 'tokenizer.json').exists():
      raise ValueError(f'there is no tokenizer.json in {folder}: give the folder of a checkpoint '
                       'that has one')
    self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
    # Both would hide what a text has too much or too little of.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    settings = folder / 'tokenizer_config.json'
    self._settings = json.loads(settings.read_text()) if settings.exists() else {}
    self._context, self._canonical = context, canonical

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """int32[K, T].

    Raises:
      ValueError: a text has more tokens than the context, or shorter ones need a padding token that
        is not named.
    """
    rows = [self._encode(text) for text in texts]
    for text, row in zip(texts, rows, strict=True):
      if len(row) > self._context:
        raise ValueError(f'{text[:60]!r} has {len(row)} tokens and the context of the text tower '
                         f'is {self._context}: shorten it')
    filled = np.full((len(rows), self._context), self._pad(rows), np.int32)
    for place, row in zip(filled, rows, strict=True):
      if self._settings.get('padding_side') == 'left':
        place[self._context - len(row):] = row
      else:
        place[:len(row)] = row
    return filled

  def _encode(self, text: str) -> list[int]:
    if self._canonical != 'none':
      text = text.lower()
    if self._canonical == 'words':
      text = ' '.join(text.translate(str.maketrans('', '', string.punctuation)).split())
    added = [self._settings.get(f'add_{end}_token') for end in ('bos', 'eos')]
    if added == [None, None]:
      return self._tokenizer.encode(text).ids
    first, last = ([self._id(end)] if wanted else []
                   for end, wanted in zip(('bos', 'eos'), added, strict=True))
    return [*first, *self._tokenizer.encode(text, add_special_tokens=False).ids, *last]

  def _id(self, name: str) -> int | None:
    """The id of the token that the settings name as 'bos', 'eos' or 'pad'."""
    token = self._settings.get(f'{name}_token')
    token = token['content'] if isinstance(token, dict) else token
    return None if token is None else self._tokenizer.token_to_id(token)

  def _pad(self, rows: Sequence[Sequence[int]]) -> int:
    pad = self._id('pad')
    if pad is None and any(len(row) < self._context for row in rows):
      raise ValueError('shorter texts need padding, and tokenizer_config.json names no pad_token '
                       'that the tokenizer has: add it there')
    return pad or 0
