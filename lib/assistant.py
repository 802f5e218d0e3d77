"""Models that answer, as one thing to talk to: texts and images in, texts out.

  assistant = load('runs/scenes')                      # a run of train.py
  assistant = load('llava-1.5-7b-hf', dtype='bfloat16')     # a checkpoint's folder
  prompt = assistant.prompt('What is on the table?', images=1)
  generator = assistant.generator({'language': {'method': 'fastv', ...}})
  answer = assistant.text(generator([prompt], assistant.see([[image]]), new_tokens=64)[0])
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import ml_collections
import numpy as np
from PIL import Image

from lib.data import anyres
from lib.data.anyres import Patches, Square
from lib.data.pictures import Picture, batch_pictures
from lib.data.preprocess import Preprocess
from lib.data.tokenizers import FILES, Chat, HubTokenizer, WordTokenizer
from lib.tasks import qa as qa_task
from lib.tasks import trained as runs
from models import checkpoints
from models.backbones import vlm as seeing
from models.backbones.lm import LM
from models.backbones.vlm import VLM, Images
from models.build import DTYPES
from models.checkpoints import files, lm_config, vlm_config
from models.decoding.fitted import with_plans
from models.decoding.generator import Generator
from models.families import LM_FAMILIES
from models.storage import to_storage
from ops.attention import pick

PLACE = '<image>'
# A Qwen tower's grid grows by so many patches: images of similar sizes share a program.
GRID_STEP = 8


class Tokenizer(Protocol):
  """What texts are made of; lib/data/tokenizers.py has two."""

  @property
  def size(self) -> int:
    """One more than its largest id."""

  def encode(self, text: str, *, special: bool) -> list[int]:
    """Ids of a text, with those that start it if `special`."""

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids."""


@dataclasses.dataclass(frozen=True)
class Assistant:
  """A model and what stands around it.

  Attributes:
    model: without reductions.
    params: its parameters, blocks as a tuple: that decodes without copying them.
    tokens: text to ids and back.
    ends: ids that end an answer.
    look: an image to a Picture; None for a model that sees none.
    chat: the template of conversations, or None.
    reduce: reductions that it was trained with, by place; {} for none.
    data: `config.data` of its run, whose test split has questions; None for a checkpoint.
  """

  model: LM | VLM
  params: Any
  tokens: Tokenizer
  ends: tuple[int, ...]
  look: Callable[[Image.Image], Picture] | None = None
  chat: Chat | None = None
  reduce: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  data: ml_collections.ConfigDict | None = None

  def generator(self, reduce: Mapping[str, Mapping[str, Any] | None] | None = None,
                **settings: Any) -> Generator:
    """What decodes.

    Args:
      reduce: reductions by place, one of `answers.PLACES`, as in `config.reduce`; those that it
        was trained with where None.
      **settings: as of `Generator`.

    Raises:
      ValueError: an unknown place; or, once it runs, as `with_plans`.
    """
    reduce = self.reduce if reduce is None else reduce
    for place in reduce:
      if place not in qa_task.PLACES:
        raise ValueError(f'reduce.{place} is unknown: choose from {", ".join(qa_task.PLACES)}')
    return Generator(self.model, self.params, ends=self.ends, fit=with_plans(self.model, **reduce),
                     **settings)

  def prompt(self, text: str, *, images: int = 0, template: bool = True) -> list[int]:
    """The ids of what somebody says.

    Args:
      text: the words.
      images: how many go with them. They stand where the text says '<image>', if it does so as
        often; else where it has the model's own placeholders, or in front.
      template: whether to wrap the text in the chat template, if there is one.

    Raises:
      ValueError: images for a model that sees none, or a text that this tokenizer cannot encode.
    """
    if images and not isinstance(self.model, VLM):
      raise ValueError('this model reads text alone: leave the images out, or load a '
                       'vision-language model')
    there = images and text.count(PLACE) == images
    pieces = text.split(PLACE) if there else [''] * images + [text]
    if template and self.chat is not None:
      content: Any = [{'type': 'text', 'text': pieces[0]}]
      for piece in pieces[1:]:
        content += [{'type': 'image'}, {'type': 'text', 'text': piece}]
      content = [part for part in content if part.get('text') != '']
      return self.encode(self.chat([{'role': 'user', 'content': content if images else text}]))
    ids = self.encode(text)
    if not images or (not there and ids.count(self.model.image_token) == images):
      return ids
    ids = self.encode(pieces[0])
    for piece in pieces[1:]:
      ids += [self.model.image_token, *self.tokens.encode(piece, special=False)]
    return ids

  def encode(self, text: str) -> list[int]:
    """Ids of a whole text; what starts texts is added unless the text has it."""
    start = self.chat.tokens.get('bos_token', '') if self.chat else ''
    return self.tokens.encode(text, special=not (start and text.startswith(start)))

  def text(self, ids: Sequence[int]) -> str:
    """The text of an answer, without the token that ended it."""
    return self.tokens.decode([each for each in ids if each not in self.ends])

  def see(self, rows: Sequence[Sequence[Image.Image | Picture]], **fixed: int) -> Images | None:
    """The images of rows, in the order of their placeholders.

    Args:
      rows: of each row; those of `look` are taken as they are.
      **fixed: crops, images and tokens, as `lib.data.pictures.batch_pictures` takes them.

    Raises:
      ValueError: images for a model that sees none, or that do not fit into its grid (`seeing`).
    """
    if not any(rows):
      return None
    if self.look is None:
      raise ValueError('this model reads text alone: leave the images out, or load a '
                       'vision-language model')
    prepared = [[each if isinstance(each, Picture) else self.look(each) for each in row]
                for row in rows]
    return batch_pictures(prepared, patches=seeing.passed_on(self.model.tower)[0], **fixed)

  def seeing(self, images: Sequence[Image.Image]) -> Assistant:
    """The same with a grid that these images fit into; itself where it has no grid, or one that
    they fit into."""
    if not isinstance(self.look, Patches) or not images:
      return self
    tower = self.model.tower
    unit = np.lcm(GRID_STEP, tower.window or tower.merge)
    needed = np.max([self.look.patches(each) for each in images], axis=0)
    if (needed <= tower.grid).all():
      return self
    grid = tuple(int(side) for side in np.maximum(-(-needed // unit) * unit, tower.grid))
    return dataclasses.replace(
        self, model=self.model.clone(tower=tower.clone(grid=grid)),
        look=dataclasses.replace(self.look, grid=grid))


def load(source: str | pathlib.Path, *, dtype: str = 'float32', data_dir: str = '') -> Assistant:
  """A run of train.py, or a checkpoint of the transformers library's layout.

  Args:
    source: the workdir of a run that learned to answer questions; a folder with config.json,
      tokenizer.json and safetensors; or such a folder's name on the hub.
    dtype: of parameters and products, 'float32' or 'bfloat16'. A run keeps its own.
    data_dir: where a run's set is, if not where the run found it.

  Raises:
    ValueError, FileNotFoundError: nothing of both there, an architecture that is not known, a
      tokenizer that is another model's; or as `models.checkpoints.load_run` and
      `lib.tasks.trained.load_run`.
  """
  path = files.locate(source)
  if not path.is_dir():
    raise ValueError(f'{path} is a file: give the folder that it lies in, whose config.json and '
                     'tokenizer are needed as well')
  config = files.config(path)
  if 'model_type' in config:
    return _of_checkpoint(path, config, dtype)
  if 'model' in config:
    return of_run(runs.load_run(path, data_dir=data_dir))
  raise ValueError(f'{path} is no model: it needs the config.json of a run (train.py) or of a '
                   'checkpoint, which names its model_type')


def of_run(trained: runs.TrainedModel) -> Assistant:
  """A trained model."""
  info, model, config = trained.info, trained.model, trained.config
  reduce = {place: dict(given) for place, given in config.reduce.items()
            if given['method'] != 'none'}
  silent = tuple(each for each in (info.pad, info.end, info.image) if each is not None)
  tokens = WordTokenizer(info.words, silent) if info.words else HubTokenizer(info.tokenizer)
  made = functools.partial(Assistant, tokens=tokens, ends=(info.end,), reduce=reduce,
                           data=config.data)
  if isinstance(model, LM):
    return made(model.clone(plan=None, cache_plan=None), to_storage(trained.params, 'unstacked'))
  plain = model.clone(tower=model.tower.clone(plan=None), door=None,
                      lm=model.lm.clone(plan=None, cache_plan=None))
  side = info.image_shape[0]
  steps = Preprocess((side, side), Image.Resampling.BICUBIC.value, None, 1 / 255,
                     tuple(config.data.mean), tuple(config.data.std))
  return made(plain, to_storage(trained.params, 'unstacked'),
              look=Square(steps, model.tower.grid[0]))


def build(config: Mapping[str, Any], **settings: Any) -> LM | VLM:
  """The model that a checkpoint's config.json describes, with a tower or without.

  Args:
    config: the file's content.
    **settings: fields of LM, and of the tower, that differ: dtype, implementation.

  Raises:
    ValueError: an architecture that is not known.
  """
  kind = config.get('model_type')
  if kind in (*vlm_config.LLAVAS, *vlm_config.QWENS):
    return vlm_config.from_config(config, tower=settings, lm=settings)
  if kind in LM_FAMILIES:
    return lm_config.from_config(config, **settings)
  known = (*LM_FAMILIES, *vlm_config.LLAVAS, *vlm_config.QWENS)
  raise ValueError(f'model_type {kind!r} is unknown: known are {", ".join(known)}')


def _of_checkpoint(path: pathlib.Path, config: Mapping[str, Any], dtype: str) -> Assistant:
  if dtype not in DTYPES:
    raise ValueError(f'dtype {dtype!r} is unknown: choose one of {", ".join(DTYPES)}')
  chosen = DTYPES[dtype]
  model = build(config, dtype=chosen, implementation=pick(jax.default_backend(), chosen))
  tokens, ends = HubTokenizer.of(path), _ends(path, config)
  check_tokens(tokens, model, ends, path)
  look = anyres.read(path, config, grid=model.tower.grid) if isinstance(model, VLM) else None
  params = checkpoints.load(model, path, dtype=chosen, form='unstacked')
  return Assistant(model, params, tokens, ends, look, _chat(path))


def check_tokens(tokens: Tokenizer, model: LM | VLM, ends: Sequence[int],
                 source: Any = 'this folder') -> None:
  """Raises ValueError where a tokenizer is not a model's: with ids that the model does not have.

  A table may be larger than the tokenizer: many are padded.
  """
  count = model.vocabulary
  # A placeholder is never looked up: some releases have it behind the table.
  own = {model.image_token} if isinstance(model, VLM) else set()
  beyond = [each for each in range(count, tokens.size) if each not in own]
  if beyond:
    raise ValueError(f'the tokenizer of {source} has ids up to {tokens.size - 1} and the model '
                     f'{count} embeddings: put the tokenizer.json of this checkpoint there')
  for each in ends:
    if not 0 <= each < count:
      raise ValueError(f'the end token {each} of {source} is no id of the model, which has '
                       f'{count}: correct eos_token_id in generation_config.json or config.json')


def _ends(path: pathlib.Path, config: Mapping[str, Any]) -> tuple[int, ...]:
  """Ids that end an answer: as for generating, else as the model's config has them."""
  file = path / 'generation_config.json'
  settings = json.loads(file.read_text()) if file.exists() else {}
  for given in (settings, config, config.get('text_config') or {}):
    found = given.get('eos_token_id')
    if found is not None:
      return tuple(found) if isinstance(found, Sequence) else (found,)
  return ()


def _chat(path: pathlib.Path) -> Chat | None:
  """The chat template, if there is one."""
  jinja, *rest = (path / name for name in FILES)
  there = jinja.exists() or any(
      file.exists() and json.loads(file.read_text()).get('chat_template') for file in rest)
  return Chat(path) if there else None
