"""Models that answer, as one thing to talk to: texts and images in, texts out.

  assistant = load('runs/scenes')                      # a run of train.py
  assistant = load('llava-1.5-7b-hf', dtype='bfloat16')     # a checkpoint's folder
  prompt = assistant.prompt('What is on the table?', images=1)
  generator = assistant.generator({'language': {'method': 'fastv', ...}})
  images = assistant.encode_images([[image]])
  answer = assistant.text(generator([prompt], images, new_tokens=64)[0])
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import ml_collections
import numpy as np
from PIL import Image

from lib.cost.vlm import kv_bytes_of, macs_of
from lib.data import anyres, gguf_tokenizer
from lib.data.anyres import Patches, Square
from lib.data.pictures import Picture, batch_pictures
from lib.data.preprocess import Preprocess
from lib.data.tokenizers import BY_HAND, Chat, HubTokenizer, WordTokenizer, has_template
from lib.tasks.trained import TrainedModel, load_run
from models import checkpoints
from models.backbones.images import Images
from models.backbones.lm import LM
from models.backbones.vlm import VLM
from models.build import DTYPES
from models.checkpoints import files, gguf, lm_config, vlm_config
from models.checkpoints.json_files import naming, read_json_if_there, value_of
from models.decoding.generator import Generator
from models.decoding.kvzip import KVzip, check_text_alone
from models.families import LM_FAMILIES
from models.plan import reduction_settings
from models.reduce_config import Reductions, check_components, with_plans, without_plans
from models.storage import to_storage
from ops import choices
from ops.attention import pick

IMAGE_PLACEHOLDER = '<image>'
# As KVzip asks.
REPEAT = 'Repeat the previous context exactly'
REPEAT_PART = '\n\nRepeat the part of the previous context exactly, starting with'
NO_TEMPLATE = '\n'
# A Qwen tower's grid grows by so many patches: images of similar sizes share a program.
GRID_STEP = 8


class Tokenizer(Protocol):
  """Turns text into ids and back; lib/data/tokenizers.py has two."""

  @property
  def size(self) -> int:
    """Size of the vocabulary: one more than the largest id."""

  def encode(self, text: str, *, special: bool) -> list[int]:
    """Returns the ids of a text, with those that start it if `special`."""

  def literal(self, text: str) -> str:
    """Returns a text of which `encode` takes nothing for a special token."""

  def token(self, number: int) -> str:
    """Returns the token of an id, '' where there is none."""

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids."""


@dataclasses.dataclass(frozen=True)
class Assistant:
  """Holds a model with its tokenizer, image processor and chat template.

  Attributes:
    model: without reductions.
    params: its parameters, blocks as a tuple: that decodes without copying them.
    tokens: text to ids and back.
    ends: ids that end an answer.
    look: an image to a Picture; None for a model that sees none.
    chat: the template of conversations, or None.
    reduce: reductions that it was trained with, by component; {} for none.
    data: `config.data` of its run, whose test split has questions; None for a checkpoint.
  """

  model: LM | VLM
  params: Any
  tokens: Tokenizer
  ends: tuple[int, ...]
  look: Callable[[Image.Image], Picture] | None = None
  chat: Chat | None = None
  reduce: Mapping[str, Reductions] = dataclasses.field(default_factory=dict)
  data: ml_collections.ConfigDict | None = None

  def generator(self, reduce: Mapping[str, Any] | None = None,
                **settings: Any) -> Generator:
    """Makes a generator of answers.

    Args:
      reduce: reductions by component, one of `models.reduce_config.COMPONENTS`, as in
        `config.reduce`; those that the model was trained with where None.
      **settings: as of `Generator`.

    Raises:
      ValueError: an unknown component; or, once it runs, as `with_plans`.
    """
    reduce = self.reduce if reduce is None else reduce
    check_components(reduce)
    return Generator(self.model, self.params, ends=self.ends,
                     plans=with_plans(self.model, **reduce, macs=macs_of, kv_bytes=kv_bytes_of),
                     **settings)

  def kvzip(self, keep_ratio: float, **settings: Any) -> KVzip:
    """Makes what cuts the cache of a prompt by how the model repeats it, for `generator(kvzip=)`.

    Args:
      keep_ratio: the share of entries that stay.
      **settings: other fields of KVzip. Requests are in English, as published; behind them stands
        what a chat template has behind a message, or a new line.

    Raises:
      ValueError: as `KVzip`, or a model that sees images.
    """
    check_text_alone(self.model)
    behind = NO_TEMPLATE
    if self.chat is not None:
      _, _, behind = self.chat([{'role': 'user', 'content': REPEAT}]).rpartition(REPEAT)
    encode = functools.partial(self.tokens.encode, special=False)
    asked = {'ask': tuple(encode(f'\n\n{REPEAT}.')), 'ask_part': tuple(encode(REPEAT_PART)),
             'opening': tuple(encode(behind))}
    return KVzip(keep_ratio, **{**asked, **settings})

  def prompt(self, text: str, *, images: int = 0, template: bool = True) -> list[int]:
    """Returns the ids of a user's message.

    Args:
      text: the words. Special tokens among them are text, and end no turn, unless `template` is
        False.
      images: number of images that go with it. They stand where the text has '<image>', or the
        model's own placeholders, if it has as many; in front where it has none.
      template: whether to wrap the text in the chat template, if there is one. False for a text
        that writes all out that the model reads, special tokens among it.

    Raises:
      ValueError: images for a model that sees none, another number of '<image>' than of images, a
        text that this tokenizer cannot encode, or a template that leaves it out.
    """
    pieces = self._around_images(text, images)
    if not template:
      ids = self.encode(text)
      in_place = isinstance(self.model, VLM) and ids.count(self.model.image_token) == images
      return ids if in_place or not images else self._joined(pieces)
    pieces = [self.tokens.literal(piece) for piece in pieces]
    if self.chat is None:
      return self._joined(pieces)
    parts: list[dict[str, str]] = [{'type': 'text', 'text': pieces[0]}]
    for piece in pieces[1:]:
      parts += [{'type': 'image'}, {'type': 'text', 'text': piece}]
    parts = [part for part in parts if part.get('text') != '']
    # Templates read one of both forms, or both, and may pass over the other in silence.
    for content in (parts,) if images else (pieces[0], parts):
      whole = self.chat([{'role': 'user', 'content': content}])
      if all(piece.strip() in whole for piece in pieces):
        return self.encode(whole)
    raise ValueError(f'the chat template leaves out what is asked: {BY_HAND}')

  def _around_images(self, text: str, images: int) -> list[str]:
    """Returns what stands before, between and after the images."""
    if not isinstance(self.model, VLM):
      if images:
        raise ValueError('this model reads text alone: leave the images out, or load a '
                         'vision-language model')
      return [text]
    for mark in (IMAGE_PLACEHOLDER, self.tokens.token(self.model.image_token)):
      if images and mark and text.count(mark) == images:
        return text.split(mark)
    if IMAGE_PLACEHOLDER in text:
      raise ValueError(f'the text has {text.count(IMAGE_PLACEHOLDER)} {IMAGE_PLACEHOLDER} and '
                       f'{images} images are given: write one for each image, or none to put the '
                       'images in front')
    return [''] * images + [text]

  def _joined(self, pieces: Sequence[str]) -> list[int]:
    """Returns the ids of pieces with an image between each two."""
    ids = self.encode(pieces[0])
    for piece in pieces[1:]:
      ids += [self.model.image_token, *self.tokens.encode(piece, special=False)]
    return ids

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a whole text; tokens that start texts are added unless it has them."""
    start = self.chat.tokens.get('bos_token', '') if self.chat else ''
    return self.tokens.encode(text, special=not (start and text.startswith(start)))

  def text(self, ids: Sequence[int]) -> str:
    """Returns the text of an answer, without the token that ended it."""
    return self.tokens.decode([each for each in ids if each not in self.ends])

  def encode_images(self, rows: Sequence[Sequence[Image.Image | Picture]],
                    **fixed: int) -> Images | None:
    """Turns the images of rows, in the order of their placeholders, into the model's input.

    Args:
      rows: the images of each row, upright (`lib.data.image_files` reads photos so), or Pictures
        that `look` made of them.
      **fixed: crops, images and tokens, as `lib.data.pictures.batch_pictures` takes them.

    Raises:
      ValueError: images for a model that sees none, or that do not fit into its grid
        (`with_grid_for`).
    """
    if not any(rows):
      return None
    if self.look is None:
      raise ValueError('this model reads text alone: leave the images out, or load a '
                       'vision-language model')
    prepared = [[each if isinstance(each, Picture) else self.look(each) for each in row]
                for row in rows]
    patches, _ = self.model.passed_on
    return batch_pictures(prepared, patches=patches, **fixed)

  def with_grid_for(self, images: Sequence[Image.Image]) -> Assistant:
    """Returns the same with a grid that these images fit into; itself where none is needed."""
    if not isinstance(self.look, Patches) or not images:
      return self
    tower = self.model.tower
    unit = np.lcm(GRID_STEP, tower.window or tower.merge)
    needed = np.max([self.look.patches(each) for each in images], axis=0)
    if (needed <= tower.grid).all():
      return self
    rows, columns = np.maximum(-(-needed // unit) * unit, tower.grid).tolist()
    grid = rows, columns
    return dataclasses.replace(
        self, model=self.model.clone(tower=tower.clone(grid=grid)),
        look=dataclasses.replace(self.look, grid=grid))


def load(source: str | pathlib.Path, *, dtype: str = 'float32', data_dir: str = '') -> Assistant:
  """Loads a run of train.py, or a checkpoint of the transformers library's layout.

  Args:
    source: the workdir of a run that learned to answer questions; a folder with config.json,
      tokenizer.json and safetensors; such a folder's name on the hub; or a .gguf file, which holds
      all of it.
    dtype: of parameters and products, 'float32' or 'bfloat16'. A run keeps its own.
    data_dir: where a run's set is, if not where the run found it.

  Raises:
    ValueError, FileNotFoundError: neither of both, an unknown architecture, a tokenizer that is
      another model's; or as `models.checkpoints.load_run` and
      `lib.tasks.trained.load_run`.
  """
  path = files.locate(source)
  if path.suffix == gguf.SUFFIX:
    return _of_gguf(path, dtype)
  if not path.is_dir():
    raise ValueError(f'{path} is a file: give the folder that it lies in, whose config.json and '
                     'tokenizer are needed as well')
  config = files.config(path)
  if 'model_type' in config:
    return _of_checkpoint(path, config, dtype)
  if 'model' in config:
    return of_run(load_run(path, data_dir=data_dir))
  raise ValueError(f'{path} is no model: it needs the config.json of a run (train.py) or of a '
                   'checkpoint, which names its model_type')


def of_run(trained: TrainedModel) -> Assistant:
  """Makes an assistant of a trained model."""
  info, model, config = trained.info, trained.model, trained.config
  reduce = {component: settings for component, component_config in config.reduce.items()
            if (settings := reduction_settings(component_config))}
  silent = tuple(each for each in (info.pad, info.end, info.image) if each is not None)
  tokens: Tokenizer
  if info.words:
    tokens = WordTokenizer(info.words, silent)
  elif info.tokenizer:
    tokens = HubTokenizer(info.tokenizer)
  else:  # That of the pretrained language model.
    path = pathlib.Path(config.model.lm)
    tokens = (gguf_tokenizer.tokenizer(path) if path.suffix == gguf.SUFFIX else
              HubTokenizer.of(path))
  params = to_storage(trained.params, 'unstacked')
  chat = Chat(info.chat, {}, 'the run') if info.chat else None
  make = functools.partial(Assistant, params=params, tokens=tokens, ends=(info.end,), chat=chat,
                           reduce=reduce, data=config.data)
  if isinstance(model, LM):
    return make(without_plans(model))
  assert info.image_shape is not None
  side = info.image_shape[0]
  steps = Preprocess((side, side), Image.Resampling.BICUBIC.value, None, 1 / 255,
                     tuple(config.data.mean), tuple(config.data.std))
  return make(without_plans(model), look=Square(steps, model.passed_on[0]))


def build(config: Mapping[str, Any], **settings: Any) -> LM | VLM:
  """Builds the model that a checkpoint's config.json describes, with a tower or without.

  Args:
    config: the file's content.
    **settings: fields of LM, and of the tower, that differ: dtype, implementation.

  Raises:
    ValueError: an unknown architecture.
  """
  kind = config.get('model_type')
  choices.check('model_type ', kind, (*LM_FAMILIES, *vlm_config.LLAVAS, *vlm_config.QWENS))
  if kind in (*vlm_config.LLAVAS, *vlm_config.QWENS):
    return vlm_config.from_config(config, tower=settings, lm=settings)
  return lm_config.from_config(config, **settings)


def _of_checkpoint(path: pathlib.Path, config: Mapping[str, Any], dtype: str) -> Assistant:
  choices.check('dtype ', dtype, DTYPES)
  kind = DTYPES[dtype]
  model = build(config, dtype=kind, implementation=pick(jax.default_backend(), kind))
  tokens, ends = HubTokenizer.of(path), _ends(path, config)
  check_tokens(tokens, model, ends, path)
  look = anyres.read(path, config, grid=model.tower.grid) if isinstance(model, VLM) else None
  model = checkpoints.tied_as_stored(model, path)
  params = checkpoints.load(model, path, dtype=kind, storage='unstacked')
  return Assistant(model, params, tokens, ends, look,
                   Chat.of(path) if has_template(path) else None)


def _of_gguf(path: pathlib.Path, dtype: str) -> Assistant:
  choices.check('dtype ', dtype, DTYPES)
  kind = DTYPES[dtype]
  model = lm_config.from_config(gguf.config(path), dtype=kind,
                                implementation=pick(jax.default_backend(), kind))
  tokens, ends = gguf_tokenizer.tokenizer(path), gguf_tokenizer.ends(path)
  check_tokens(tokens, model, ends, path)
  params = checkpoints.load(model, path, dtype=kind, storage='unstacked')
  return Assistant(model, params, tokens, ends, chat=gguf_tokenizer.chat(path))


def check_tokens(tokens: Tokenizer, model: LM | VLM, ends: Sequence[int],
                 source: Any = 'this folder') -> None:
  """Raises ValueError where a tokenizer has ids that the model does not have.

  A table may be larger than the tokenizer: many are padded.
  """
  count = model.vocabulary
  # A placeholder is never looked up: some releases have it behind the table.
  own = isinstance(model, VLM) and count <= model.image_token < tokens.size
  if tokens.size - own > count:
    raise ValueError(f'the tokenizer of {source} has ids up to {tokens.size - 1} and the model '
                     f'{count} embeddings: put the tokenizer.json of this checkpoint there')
  for each in ends:
    if not 0 <= each < count:
      raise ValueError(f'the end token {each} of {source} is no id of the model, which has '
                       f'{count}: correct eos_token_id in generation_config.json or config.json')


def _ends(path: pathlib.Path, config: Mapping[str, Any]) -> tuple[int, ...]:
  """Returns the ids that end an answer: as for generating, else as the model's config has them."""
  file, own = path / 'generation_config.json', path / 'config.json'
  for name, source in ((file, read_json_if_there(file)), (own, config),
                       (own, config.get('text_config') or {})):
    with naming(name):
      ends = value_of(source, 'eos_token_id', int | tuple[int, ...])
    if ends not in (None, []):
      return tuple(ends) if isinstance(ends, list) else (ends,)
  return ()
