"""Texts as token ids and back: a checkpoint's chat template and tokenizer, or a set's words.

A template gives each image one placeholder, which is what models/backbones/vlm.py wants.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

FILES = ('chat_template.jinja', 'chat_template.json', 'tokenizer_config.json')


class Chat:
  """Messages to text, by a checkpoint's template.

  Args:
    source: the folder with chat_template.jinja, chat_template.json or tokenizer_config.json.
    name: which of several templates.

  Attributes:
    tokens: what templates call bos_token, eos_token and so on.
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
    """The text of a conversation.

    Args:
      messages: each with a 'role' and a 'content', a string or a list of parts {'type': 'image'}
        and {'type': 'text', 'text': '…'}.
      answer: whether the text ends where the assistant begins to speak.
      **more: what else a template reads, as tools=[…].
    """
    return self._template.render(messages=messages, add_generation_prompt=answer,
                                 **(self.tokens | more))


class HubTokenizer:
  """Text to token ids and back, by a tokenizer.json.

  Args:
    content: of the file.

  Raises:
    ValueError: the package that reads it is missing.
  """

  def __init__(self, content: str):
    try:
      import tokenizers
    except ImportError as error:
      raise ValueError('reading tokenizer.json needs a package that is not installed: `pip install '
                       '-r requirements-hub.txt`') from error
    self._tokenizer = tokenizers.Tokenizer.from_str(content)
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()

  @classmethod
  def of(cls, source: str | pathlib.Path) -> HubTokenizer:
    """Those of a checkpoint.

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
    """Ids of a text.

    Args:
      text: the text.
      special: whether the tokenizer adds what starts (and ends) a text; False for text of a
        template that writes it out.
    """
    return self._tokenizer.encode(text, add_special_tokens=special).ids

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids, without special tokens."""
    return self._tokenizer.decode([int(each) for each in ids], skip_special_tokens=True)

  def id_of(self, token: str) -> int:
    """The id of one token.

    Raises:
      ValueError: it has none.
    """
    found = self._tokenizer.token_to_id(token)
    if found is None:
      raise ValueError(f'{token!r} is no token of this tokenizer')
    return found

  @property
  def size(self) -> int:
    """One more than its largest id."""
    return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


@dataclasses.dataclass(frozen=True)
class WordTokenizer:
  """The words of a small set, each a token; the interface of `HubTokenizer`.

  Attributes:
    words: what the ids stand for.
    silent: ids that are left out of texts: padding, end, images.
  """

  words: tuple[str, ...]
  silent: tuple[int, ...] = ()

  def encode(self, text: str, *, special: bool = False) -> list[int]:
    """Ids of the words of a text, which single spaces part; there is nothing special to add.

    Raises:
      ValueError: a word that is not there.
    """
    del special
    found = []
    for word in text.split():
      if word not in self.words:
        near = difflib.get_close_matches(word, self.words, n=1)
        hint = f' (did you mean {near[0]!r}?)' if near else ''
        raise ValueError(f'{word!r} is no word of this model{hint}: it has '
                         f'{", ".join(self.words)}; put spaces around each')
      found.append(self.words.index(word))
    return found

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids."""
    return ' '.join(self.words[each] for each in ids if each not in self.silent)

  @property
  def size(self) -> int:
    """Number of words."""
    return len(self.words)


def _template(folder: pathlib.Path, name: str) -> str:
  """The text of a template, from the first file that has one."""
  loose = folder / 'chat_templates' / f'{name}.jinja'
  if loose.exists():
    return loose.read_text()
  for file in FILES:
    path = folder / file
    if not path.exists():
      continue
    if path.suffix == '.jinja' and name == 'default':
      return path.read_text()
    found = json.loads(path.read_text()).get('chat_template') if path.suffix == '.json' else None
    if isinstance(found, str):
      found = {'default': found}
    elif isinstance(found, list):
      found = {each['name']: each['template'] for each in found}
    if found and name in found:
      return found[name]
    if found:
      raise ValueError(f'{path} has no template {name!r}: it has {", ".join(found)}')
  raise ValueError(f'there is no chat template in {folder}: {", ".join(FILES)} were looked for; '
                   'write the prompt by hand')


def _special_tokens(folder: pathlib.Path) -> dict[str, str]:
  """What templates call bos_token, eos_token and so on."""
  path = folder / 'tokenizer_config.json'
  settings = json.loads(path.read_text()) if path.exists() else {}
  found = {}
  for key, value in settings.items():
    value = value.get('content') if isinstance(value, Mapping) else value
    if key.endswith('_token') and isinstance(value, str):
      found[key] = value
  return found


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                    sort_keys=sort_keys)
