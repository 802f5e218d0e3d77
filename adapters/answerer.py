"""Answers what harnesses ask of a model: texts in batches until a stop, and how likely texts are.

Rows of a batch are never mixed with others' sizes: those with images of other shapes get a batch of
their own, so that a budget counts what a row has and no padding.

Axes: B rows of a batch.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lib import assistant
from lib.assistant import Assistant
from lib.data.pictures import row_of
from models.backbones.images import Images
from models.checkpoints.json_files import read_json, shown
from models.decoding.generator import BUCKETS, ENDED, Generator, Score
from models.decoding.sampling import Sampling
from models.reduce_config import check_components

CHUNK = 16  # Batches whose images are held at a time.
# What harnesses call the most tokens to decode, the first that is there counts.
MOST = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')


@dataclasses.dataclass(frozen=True)
class Settings:
  """Holds how to answer.

  Attributes:
    new_tokens: the most to decode.
    until: texts that end an answer, and are no part of it.
    sampling: see there.
  """

  new_tokens: int
  until: tuple[str, ...] = ()
  sampling: Sampling = dataclasses.field(default_factory=Sampling)

  @classmethod
  def of(cls, arguments: Mapping[str, Any], *, new_tokens: int) -> Settings:
    """Reads a task's generation arguments.

    Args:
      arguments: `until`, one of `MOST`, do_sample, temperature, top_k, top_p; others are about
        other libraries.
      new_tokens: where it does not say.
    """
    until = arguments.get('until') or ()
    until = (until,) if isinstance(until, str) else tuple(filter(None, until))
    most = next((arguments[name] for name in MOST if arguments.get(name) is not None), new_tokens)
    warm = float(arguments.get('temperature') or 0.0)
    if arguments.get('do_sample') is False:
      warm = 0.0
    elif arguments.get('do_sample') and arguments.get('temperature') is None:
      warm = 1.0
    if not warm:
      return cls(int(most), until)
    top_p = arguments.get('top_p')
    return cls(int(most), until, Sampling(warm, max(0, int(arguments.get('top_k') or 0)),
                                          1.0 if top_p is None else float(top_p)))


@dataclasses.dataclass(frozen=True)
class Question:
  """Holds one request.

  Attributes:
    prompt: token ids, with a placeholder an image.
    images: in the order of the placeholders.
    answer: token ids whose likelihood is asked for, () to decode.
    settings: how to decode.
  """

  prompt: tuple[int, ...]
  images: tuple[Image.Image, ...] = ()
  answer: tuple[int, ...] = ()
  settings: Settings | None = None


class Answerer:
  """Runs a model behind a harness.

  Args:
    path: as `lib.assistant.load_run` takes it.
    reduce: reductions by place (vision, projector, language, cache); as text JSON, or a file of it.
      None for those that a run was trained with.
    batch_size: B; 'auto' is 8.
    dtype: 'float32' or 'bfloat16'.
    buckets: lengths that prompts are padded to (`models.decoding.generator.padded_length`), as
      '64:256:1024' or as numbers.
    data_dir: where a run's set is, if not where the run had it.

  Raises:
    ValueError: as `lib.assistant.load_run`; reductions that are none.
  """

  def __init__(self, path: str, *, reduce: Any = None, batch_size: Any = 8,
               dtype: str = 'float32', buckets: Any = BUCKETS, data_dir: str = ''):
    self.assistant = assistant.load(path, dtype=dtype, data_dir=data_dir)
    self.reduce = read_reductions(reduce)
    sizes = (8,) if str(batch_size).startswith('auto') else whole_numbers(batch_size, 'batch_size')
    if len(sizes) > 1:
      raise ValueError(f'batch_size={batch_size!r} is impossible: give one number')
    self.batch_size = sizes[0]
    self._buckets = whole_numbers(buckets, 'buckets')
    self._generators: dict[Any, Generator] = {}

  @property
  def context(self) -> int:
    """Tokens of the longest prompt and answer together."""
    return self.assistant.model.context

  def texts(self, questions: Sequence[Question]) -> list[str]:
    """Returns the answers."""
    texts = [''] * len(questions)
    for places, rows, generator, images in self._batches(questions, lambda each: each.settings):
      # What a row samples depends on its own place among all, not on those beside it.
      seeds = [places[min(row, len(places) - 1)] for row in range(len(rows))]
      answers = self._until(generator, rows, images, seeds, len(places))
      for place, answer in zip(places, answers, strict=True):
        texts[place] = answer
    return texts

  def texts_of(self, requests: Sequence[Any], questions: Sequence[Question],
               cache_hook: Any) -> list[str]:
    """Returns the answers, and hands each to the harness's cache of 'generate_until'.

    Args:
      requests: of the harness.
      questions: one a request.
      cache_hook: of the harness's model.
    """
    answers = self.texts(questions)
    for request, answer in zip(requests, answers, strict=True):
      cache_hook.add_partial('generate_until', request.args, answer)
    return answers

  def scores(self, questions: Sequence[Question]) -> list[Score]:
    """Returns how likely each question's answer is."""
    results: list[Any] = [None] * len(questions)
    for places, rows, generator, images in self._batches(questions, lambda each: None):
      scores = generator.score([row.prompt for row in rows], [row.answer for row in rows], images)
      for place, score in zip(places, scores, strict=False):
        results[place] = score
    return results

  def _until(self, generator: Generator, rows: Sequence[Question], images: Images | None,
             seeds: Sequence[int], count: int) -> list[str]:
    """Returns answers of the first `count` rows, each up to what ends it."""
    settings, model = rows[0].settings, self.assistant
    assert settings is not None
    ids: list[list[int]] = [[] for _ in range(count)]
    texts, done = [''] * count, [False] * count
    for tokens in generator.stream([row.prompt for row in rows], images, seeds=seeds,
                                   new_tokens=settings.new_tokens, sampling=settings.sampling):
      for row, token in enumerate(tokens[:count].tolist()):
        if done[row]:
          continue
        if token == ENDED:
          done[row] = True
          continue
        ids[row].append(token)
        texts[row] = model.text(ids[row])
        ends = [place for stop in settings.until if (place := texts[row].find(stop)) >= 0]
        if ends:
          texts[row], done[row] = texts[row][:min(ends)], True
      if all(done):
        break
    return texts

  def _batches(self, questions: Sequence[Question], alike: Callable[[Question], Any]) -> Iterator[
      tuple[list[int], list[Question], Generator, Images | None]]:
    """Yields (places of a batch in the list, its B rows, the generator for it, its images).

    The last rows of a batch that is not full are its last one again: one program for all.
    """
    whole, chunk = len(questions), CHUNK * self.batch_size
    for first in range(0, whole, chunk):
      # Images are many: those of a few batches at a time.
      yield from self._chunk(questions, range(first, min(first + chunk, whole)), alike)

  def _chunk(self, questions: Sequence[Question], places: Sequence[int],
             alike: Callable[[Question], Any]) -> Iterator[
                 tuple[list[int], list[Question], Generator, Images | None]]:
    seen = {place: self.assistant.with_grid_for(questions[place].images) for place in places}
    pictures = {place: row_of([seen[place].look(image) for image in questions[place].images])
                for place in places}

    def kind(place: int) -> tuple[str, str]:
      shapes = [(picture.pixels.shape, picture.index.shape) for picture in pictures[place]]
      return repr(alike(questions[place])), repr(shapes)

    def length(place: int) -> int:
      return len(questions[place].prompt) + len(questions[place].answer)

    order = sorted(places, key=lambda place: (kind(place), -length(place)))
    for _, group in itertools.groupby(order, key=kind):
      for batch in self._parted(list(group), questions):
        filled = batch + batch[-1:] * (self.batch_size - len(batch))
        model = seen[batch[0]]
        images = model.encode_images([pictures[place] for place in filled])
        yield batch, [questions[place] for place in filled], self._answering(model), images

  def _parted(self, places: Sequence[int], questions: Sequence[Question]) -> Iterator[list[int]]:
    """Yields batches of at most B places; longest prompt and longest answer fit the context."""
    batch: list[int] = []
    for place in places:
      wider = [*batch, place]
      prompt = max(len(questions[each].prompt) for each in wider)
      answer = max(len(questions[each].answer) for each in wider)
      if batch and (len(wider) > self.batch_size or prompt + answer > self.context):
        yield batch
        wider = [place]
      batch = wider
    if batch:
      yield batch

  def _answering(self, model: Assistant) -> Generator:
    """Returns the generator of a grid, which keeps its programs."""
    grid = model.model.tower.grid if model.look else None
    if grid not in self._generators:
      self._generators[grid] = model.generator(self.reduce, buckets=self._buckets)
    return self._generators[grid]


def read_reductions(reduce: Any) -> Mapping[str, Mapping[str, Any]] | None:
  """Returns reductions by place, from text or as they are.

  Raises:
    ValueError: what is none, or of an unknown place.
  """
  if isinstance(reduce, str) and reduce.endswith('.json'):
    reduce = read_json(pathlib.Path(reduce))
  elif isinstance(reduce, str):
    try:
      reduce = ast.literal_eval(reduce) if reduce else None
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
      raise ValueError(f'reduce={shown(reduce)} is no dict: give one as {{"language": {{"method": '
                       '"fastv", "layers": 2, "keep_ratio": 0.5}}, or a .json file') from error
  if reduce is None:
    return None
  if not isinstance(reduce, Mapping) or not all(isinstance(each, Mapping | None)
                                               for each in reduce.values()):
    raise ValueError(f'reduce={shown(reduce)} is no dict of reductions by place: give one as '
                     '{"language": {"method": "fastv", "layers": 2, "keep_ratio": 0.5}}')
  check_components(reduce)
  return reduce


def whole_numbers(value: Any, name: str) -> tuple[int, ...]:
  """Returns the numbers of an argument, from 1 on: of '64:256', of a number, or as they are.

  Raises:
    ValueError: anything else.
  """
  parts = value.split(':') if isinstance(value, str) else np.atleast_1d(value).tolist()
  if not all(re.fullmatch(r'[1-9][0-9]{0,8}', str(part)) for part in parts):
    raise ValueError(f'{name}={value!r} is impossible: give whole numbers from 1 on, several as '
                     '64:256')
  return tuple(map(int, parts))
