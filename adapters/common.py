"""What every harness asks of a model: answers in batches until some text, and how likely texts are.

Rows of a batch are never mixed with others' sizes: those with images of other shapes get a batch of
their own, so that a budget counts what a row has and no padding.

Axes: B rows of a batch.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lib import assistant
from lib.assistant import Assistant
from lib.tasks.qa import check_components
from models.backbones.vlm import Images
from models.decoding.generator import ENDED, Generator, Score
from models.decoding.sampling import Sampling

CHUNK = 16  # Batches whose images are held at a time.
BUCKETS = (64, 256, 512, 1024, 2048, 4096)
# What harnesses call the most tokens to decode, the first that is there counts.
MOST = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to answer.

  Attributes:
    new_tokens: the most to decode.
    until: texts that end an answer, and are no part of it.
    sampling: see there.
  """

  new_tokens: int
  until: tuple[str, ...] = ()
  sampling: Sampling = dataclasses.field(default_factory=Sampling)

  @classmethod
  def of(cls, given: Mapping[str, Any], *, new_tokens: int) -> Settings:
    """From a task's generation arguments.

    Args:
      given: `until`, one of `MOST`, do_sample, temperature, top_k, top_p; others are about other
        libraries.
      new_tokens: where it does not say.
    """
    until = given.get('until') or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    most = next((given[name] for name in MOST if given.get(name) is not None), new_tokens)
    warm = float(given.get('temperature') or 0.0)
    if given.get('do_sample') is False:
      warm = 0.0
    elif given.get('do_sample') and given.get('temperature') is None:
      warm = 1.0
    if not warm:
      return cls(int(most), until)
    top_p = given.get('top_p')
    return cls(int(most), until, Sampling(warm, max(0, int(given.get('top_k') or 0)),
                                          1.0 if top_p is None else float(top_p)))


@dataclasses.dataclass(frozen=True)
class Question:
  """One request.

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
  """A model behind a harness.

  Args:
    path: as `lib.assistant.load_run` takes it.
    reduce: reductions by place (vision, projector, language, cache); as text JSON, or a file of it.
      None for those that a run was trained with.
    batch_size: B.
    dtype: 'float32' or 'bfloat16'.
    buckets: lengths that prompts are padded to.
    data_dir: where a run's set is, if not where the run had it.

  Raises:
    ValueError: as `lib.assistant.load_run`; reductions that are none.
  """

  def __init__(self, path: str, *, reduce: Any = None, batch_size: int = 8,
               dtype: str = 'float32', buckets: Sequence[int] = BUCKETS, data_dir: str = ''):
    self.assistant = assistant.load(path, dtype=dtype, data_dir=data_dir)
    self.reduce = read_reductions(reduce)
    self.batch_size, self._buckets = int(batch_size), tuple(buckets)
    self._generators: dict[Any, Generator] = {}

  @property
  def context(self) -> int:
    """The longest prompt and answer together."""
    return self.assistant.model.context

  def texts(self, questions: Sequence[Question]) -> list[str]:
    """The answers."""
    found = [''] * len(questions)
    for places, rows, generator, images in self._batches(questions, lambda each: each.settings):
      # What a row samples depends on its own place among all, not on those beside it.
      seeds = [places[min(row, len(places) - 1)] for row in range(len(rows))]
      answers = self._until(generator, rows, images, seeds, len(places))
      for place, answer in zip(places, answers, strict=True):
        found[place] = answer
    return found

  def scores(self, questions: Sequence[Question]) -> list[Score]:
    """How likely each question's answer is."""
    found: list[Any] = [None] * len(questions)
    for places, rows, generator, images in self._batches(questions, lambda each: None):
      scores = generator.score([row.prompt for row in rows], [row.answer for row in rows], images)
      for place, score in zip(places, scores, strict=False):
        found[place] = score
    return found

  def _until(self, generator: Generator, rows: Sequence[Question], images: Images | None,
             seeds: Sequence[int], count: int) -> list[str]:
    """Answers of the first `count` rows, each up to what ends it."""
    settings, model = rows[0].settings, self.assistant
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
    """(places of a batch in the list, its B rows, what answers it, its images).

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
    pictures = {place: [seen[place].look(image) for image in questions[place].images]
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
    """At most B places a batch, and its longest prompt and longest answer within the context."""
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
    """What answers; one a grid, which keeps its programs."""
    grid = model.model.tower.grid if model.look else None
    if grid not in self._generators:
      self._generators[grid] = model.generator(self.reduce, buckets=self._buckets)
    return self._generators[grid]


def read_reductions(given: Any) -> Mapping[str, Mapping[str, Any]] | None:
  """Reductions by place, from text or as they are.

  Raises:
    ValueError: what is none, or of an unknown place.
  """
  if isinstance(given, str) and given.endswith('.json'):
    given = json.loads(pathlib.Path(given).read_text())
  elif isinstance(given, str):
    try:
      given = ast.literal_eval(given) if given else None
    except (SyntaxError, ValueError) as error:
      raise ValueError(f'reduce={given!r} is no dict: give one as {{"language": {{"method": '
                       '"fastv", "layers": 2, "keep_ratio": 0.5}}, or a .json file') from error
  if given is None:
    return None
  if not isinstance(given, Mapping) or not all(isinstance(each, Mapping | None)
                                               for each in given.values()):
    raise ValueError(f'reduce={given!r} is no dict of reductions by place: give one as '
                     '{"language": {"method": "fastv", "layers": 2, "keep_ratio": 0.5}}')
  check_components(given)
  return given


def whole_numbers(text: Any) -> tuple[int, ...]:
  """Buckets from '64:256', from a number, or as they are."""
  if isinstance(text, str):
    return tuple(int(part) for part in text.split(':'))
  return (text,) if isinstance(text, int) else tuple(np.asarray(text).tolist())
