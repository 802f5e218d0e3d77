"""Texts as token ids and back: a checkpoint's chat template and tokenizer, or a set's words.

A template gives each image one placeholder, as models/backbones/vlm.py expects.

Axes: K texts, T tokens of a text.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ops import choices

if TYPE_CHECKING:
  import tokenizers

FILES = ('chat_template.jinja', 'chat_template.json', 'tokenizer_config.json')
CANONICAL = ('none', 'lower', 'words')


class Chat:
  """Turns messages into text, by a checkpoint's template.

  Args:
    source: the folder with chat_template.jinja, chat_template.json or tokenizer_config.json.
    name: which of several templates.

  Attributes:
    tokens: special tokens by the names that templates use: bos_token, eos_token and so on.
    source: the template.

  Raises:
    ValueError: no template there, none of that name, one that is no valid template, or the package
      that reads it is missing.
  """

  def __init__(self, source: str | pathlib.Path, *, name: str = 'default'):
    folder = pathlib.Path(source)
    self.tokens = _special_tokens(folder)
    self.source = _template(folder, name)
    try:
      import jinja2
      from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
      raise ValueError('chat templates need a package that is not installed: `pip install -r '
                       'requirements-hub.txt`') from error

    def fail(message: str) -> None:
      raise ValueError(f'the chat template refuses these messages: {message}')

    # A template is a program from somewhere else: it gets nothing but what templates rely on.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
    environment.globals['raise_exception'] = fail
    environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
    # Jinja's own escapes for HTML.
    environment.filters['tojson'] = _to_json
    try:
      self._template = environment.from_string(self.source)
    except jinja2.TemplateSyntaxError as error:
      raise ValueError(f'the chat template in {folder} is no valid template: {error}') from error

  def __call__(self, messages: Sequence[Mapping[str, Any]], *, answer: bool = True,
               **more: Any) -> str:
    """Returns the text of a conversation.

    Args:
      messages: each with a 'role' and a 'content', a string or a list of parts {'type': 'image'}
        and {'type': 'text', 'text': '…'}.
      answer: whether the text ends where the assistant begins to speak.
      **more: other variables of a template, as tools=[…].
    """
    return self._template.render(messages=messages, add_generation_prompt=answer,
                                 **(self.tokens | more))


class HubTokenizer:
  """Turns text into token ids and back, by a tokenizer.json.

  Args:
    content: of the file.

  Raises:
    ValueError: the package that reads it is missing.
  """

  def __init__(self, content: str):
    self._tokenizer = _parsed(content)

  @classmethod
  def of(cls, source: str | pathlib.Path) -> HubTokenizer:
    """Reads the tokenizer of a checkpoint.

    Args:
      source: the folder with tokenizer.json.

    Raises:
      ValueError: no such file, or the package that reads it is missing.
    """
    path = pathlib.Path(source) / 'tokenizer.json'
    if not path.exists():
      raise ValueError(f'there is no {path}: give the folder of a checkpoint that has one')
    return cls(path.read_text())

  def encode(self, text: str, *, special: bool) -> list[int]:
    """Returns the ids of a text.

    Args:
      text: the text.
      special: whether the tokenizer adds the tokens that start (and end) a text; False for text of
        a template that writes them out.
    """
    return self._tokenizer.encode(text, add_special_tokens=special).ids

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids, without special tokens."""
    return self._tokenizer.decode([int(each) for each in ids], skip_special_tokens=True)

  def id_of(self, token: str) -> int:
    """Returns the id of one token.

    Raises:
      ValueError: it has none.
    """
    number = self._tokenizer.token_to_id(token)
    if number is None:
      raise ValueError(f'{token!r} is no token of this tokenizer: choose one of its vocabulary')
    return number

  @property
  def size(self) -> int:
    """Size of the vocabulary: one more than the largest id."""
    return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


class TextTowerTokenizer:
  """Turns texts into token ids of one length, by a checkpoint's tokenizer.json.

  Args:
    source: the folder with tokenizer.json, and tokenizer_config.json where there is one: it names
      the padding token and its side, and which of the first and the end token to add.
    context: T; the tower's own.
    canonical: change of a text before it is read: 'none'; 'lower' (SigLIP 2); or 'words', lower
      case without punctuation and with single spaces (SigLIP, arXiv:2303.15343, as released).

  Raises:
    ValueError: no such file, an unknown setting, or the package that reads it is missing.
  """

  def __init__(self, source: str | pathlib.Path, *, context: int, canonical: str = 'none'):
    choices.check('canonical=', canonical, CANONICAL)
    folder = pathlib.Path(source)
    if not (folder / 'tokenizer.json').exists():
      raise ValueError(f'there is no tokenizer.json in {folder}: give the folder of a checkpoint '
                       'that has one')
    self._tokenizer = _parsed((folder / 'tokenizer.json').read_text())
    settings = folder / 'tokenizer_config.json'
    self._settings = json.loads(settings.read_text()) if settings.exists() else {}
    self._context, self._canonical = context, canonical

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """Returns ids int32[K, T].

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
    for ids, row in zip(filled, rows, strict=True):
      if self._settings.get('padding_side') == 'left':
        ids[self._context - len(row):] = row
      else:
        ids[:len(row)] = row
    return filled

  def _encode(self, text: str) -> list[int]:
    if self._canonical != 'none':
      text = text.lower()
    if self._canonical == 'words':
      text = ' '.join(text.translate(str.maketrans('', '', string.punctuation)).split())
    added = [self._settings.get(f'add_{end}_token') for end in ('bos', 'eos')]
    if added == [None, None]:
      return self._tokenizer.encode(text).ids
    first, last = ([cast(int, self._id(end))] if wanted else []
                   for end, wanted in zip(('bos', 'eos'), added, strict=True))
    return [*first, *self._tokenizer.encode(text, add_special_tokens=False).ids, *last]

  def _id(self, name: str) -> int | None:
    """Returns the id of the token that the settings name as 'bos', 'eos' or 'pad'."""
    token = self._settings.get(f'{name}_token')
    token = token['content'] if isinstance(token, dict) else token
    return None if token is None else self._tokenizer.token_to_id(token)

  def _pad(self, rows: Sequence[Sequence[int]]) -> int:
    pad = self._id('pad')
    if pad is None and any(len(row) < self._context for row in rows):
      raise ValueError('shorter texts need padding, and tokenizer_config.json names no pad_token '
                       'that the tokenizer has: add it there')
    return pad or 0


@dataclasses.dataclass(frozen=True)
class WordTokenizer:
  """Makes each word of a small set a token; has the interface of `HubTokenizer`.

  Attributes:
    words: the word of each id.
    silent: ids that are left out of texts: padding, end, images.
  """

  words: tuple[str, ...]
  silent: tuple[int, ...] = ()

  def encode(self, text: str, *, special: bool = False) -> list[int]:
    """Returns the ids of the words of a text, parted by spaces; there is nothing special to add.

    Raises:
      ValueError: a word that is not there.
    """
    del special
    ids = []
    for word in text.split():
      if word not in self.words:
        raise ValueError(f'{word!r} is no word of this model{choices.near(word, self.words)}: it '
                         f'has {", ".join(self.words)}; put spaces around each')
      ids.append(self.words.index(word))
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids."""
    return ' '.join(self.words[each] for each in ids if each not in self.silent)

  @property
  def size(self) -> int:
    """Number of words."""
    return len(self.words)


def _parsed(content: str) -> tokenizers.Tokenizer:
  """Reads the content of a tokenizer.json.

  Raises:
    ValueError: the package that reads it is missing.
  """
  try:
    import tokenizers
  except ImportError as error:
    raise ValueError('reading tokenizer.json needs a package that is not installed: `pip install '
                     '-r requirements-hub.txt`') from error
  tokenizer = tokenizers.Tokenizer.from_str(content)
  # Both would hide that a text has too many tokens, or too few.
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return tokenizer


def _template(folder: pathlib.Path, name: str) -> str:
  """Returns the text of a template, from the first file that has one."""
  loose = folder / 'chat_templates' / f'{name}.jinja'
  if loose.exists():
    return loose.read_text()
  for file in FILES:
    path = folder / file
    if not path.exists():
      continue
    if path.suffix == '.jinja' and name == 'default':
      return path.read_text()
    templates = _templates(path)
    if templates:
      choices.check_key(f'{path} has no template ', name, templates)
      return templates[name]
  raise ValueError(f'there is no chat template in {folder}: {", ".join(FILES)} were looked for; '
                   'write the prompt by hand')


def _templates(path: pathlib.Path) -> dict[str, str]:
  """Returns the templates of a JSON file by name; {} where it has none."""
  content = json.loads(path.read_text()).get('chat_template') if path.suffix == '.json' else None
  if isinstance(content, list):
    return {each['name']: each['template'] for each in content}
  return {'default': content} if isinstance(content, str) else content or {}


def _special_tokens(folder: pathlib.Path) -> dict[str, str]:
  """Returns special tokens by the names that templates use: bos_token, eos_token and so on."""
  path = folder / 'tokenizer_config.json'
  settings = json.loads(path.read_text()) if path.exists() else {}
  tokens = {}
  for key, value in settings.items():
    value = value.get('content') if isinstance(value, Mapping) else value
    if key.endswith('_token') and isinstance(value, str):
      tokens[key] = value
  return tokens


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                    sort_keys=sort_keys)
