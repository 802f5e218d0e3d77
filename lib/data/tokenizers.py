"""Texts as token ids and back: a checkpoint's chat template and tokenizer, or a set's words.

A template gives each image one placeholder, as models/backbones/vlm.py expects.

Axes: K texts, T tokens of a text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import secrets
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from lib.data import templates
from models.checkpoints.json_files import (
    SHOWN,
    naming,
    needed,
    read_json_if_there,
    read_text,
    shown,
    value_of,
)
from ops import choices
from ops.values import OneOf

if TYPE_CHECKING:
  import tokenizers

FILES = ('chat_template.jinja', 'chat_template.json', 'tokenizer_config.json')
BY_HAND = 'write the whole prompt by hand (template=False, or --notemplate)'
CANONICAL = ('none', 'lower', 'words')
# Stands before each character of a special token's text that is meant as text; a private character.
ESCAPE = '\U0010fffd'
Side = Annotated[str, OneOf(('left', 'right'))]
Templates = str | Mapping[str, str] | tuple[Mapping[str, Any], ...]


class Chat:
  """Turns messages into text, by a checkpoint's template.

  Args:
    template: its text.
    tokens: special tokens by the names that templates use: bos_token, eos_token and so on.
    source: where it is from, for errors.

  Attributes:
    tokens, template: the same.

  Raises:
    ValueError: it is no valid template, or the package that reads templates is missing.
  """

  def __init__(self, template: str, tokens: Mapping[str, str], source: Any):
    self.template, self.tokens, self._source = template, dict(tokens), source
    if importlib.util.find_spec('jinja2') is None:
      raise ValueError('chat templates need a package that is not installed: `pip install -r '
                       'requirements-hub.txt`')
    self._render(None)

  @classmethod
  def of(cls, source: str | pathlib.Path, *, name: str = 'default') -> Chat:
    """Reads the template of a checkpoint.

    Args:
      source: the folder with chat_template.jinja, chat_template.json or tokenizer_config.json.
      name: which of several templates.

    Raises:
      ValueError: no template there, none of that name, a file of the wrong form; or as above.
    """
    folder = pathlib.Path(source)
    tokens = _special_tokens(folder)
    return cls(_template(folder, name), tokens, folder)

  def __call__(self, messages: Sequence[Mapping[str, Any]], *, answer: bool = True,
               **more: Any) -> str:
    """Returns the text of a conversation.

    Args:
      messages: each with a 'role' and a 'content', a string or a list of parts {'type': 'image'}
        and {'type': 'text', 'text': '…'}; None where there are 'tool_calls' instead.
      answer: whether the text ends where the assistant begins to speak.
      **more: other variables of a template, as tools=[…].

    Raises:
      ValueError: messages of another form, or a template that fails, refuses, or does not end.
    """
    for message in messages:
      if not _is_message(message):
        raise ValueError(f'{shown(message)} is no message: give a role, and as content a text, or '
                         'a list of parts with a type')
    return self._render({**self.tokens, **more, 'messages': list(messages),
                         'add_generation_prompt': answer})

  def _render(self, variables: Mapping[str, Any] | None) -> str:
    try:
      return templates.render(self.template, variables)
    except ValueError as error:
      other = 'take it away' if variables is None else BY_HAND
      raise ValueError(f'the chat template in {self._source} {error}; correct it, or '
                       f'{other}') from error


class HubTokenizer:
  """Turns text into token ids and back, by a tokenizer.json.

  Args:
    content: of the file.
    name: of the file, for errors.

  Raises:
    ValueError: another content, or the package that reads it is missing.
  """

  def __init__(self, content: str, name: Any = 'tokenizer.json'):
    self._tokenizer, self._name = _parsed(content, name), name
    self._special = {token.content: token for token in
                     self._tokenizer.get_added_tokens_decoder().values()
                     if token.special and token.content}
    longest_first = sorted(self._special, key=len, reverse=True)
    self._pattern = re.compile(f'(?<!{ESCAPE})(?:{"|".join(map(re.escape, longest_first))})')

  @classmethod
  def of(cls, source: str | pathlib.Path) -> HubTokenizer:
    """Reads the tokenizer of a checkpoint.

    Args:
      source: the folder with tokenizer.json.

    Raises:
      ValueError: no such file, another content, or the package that reads it is missing.
    """
    path = pathlib.Path(source) / 'tokenizer.json'
    if not os.path.lexists(path):
      raise ValueError(f'there is no {path}: give the folder of a checkpoint that has one')
    return cls(read_text(path), path)

  def encode(self, text: str, *, special: bool) -> list[int]:
    """Returns the ids of a text.

    Args:
      text: the text; special tokens that it writes out are these tokens, unless `literal` made
        them text.
      special: whether the tokenizer adds the tokens that start (and end) a text; False for text of
        a template that writes them out.

    Raises:
      ValueError: a text that this tokenizer cannot read.
    """
    if ESCAPE not in text or not self._special:
      return _ids(self._tokenizer, text, self._name, special=special)
    tokenizer, stand_ins, original = self._of_literals
    text = self._pattern.sub(lambda found: stand_ins[found[0]], text).replace(ESCAPE, '')
    ids = _ids(tokenizer, text, self._name, special=special)
    return [original.get(each, each) for each in ids]

  def literal(self, text: str) -> str:
    """Returns a text whose special tokens `encode` reads as the characters that they are made of.

    So that nobody ends a turn, or shows an image, by writing it. A template may put the text
    anywhere.
    """
    if not self._special:
      return text
    return self._pattern.sub(lambda found: ''.join(ESCAPE + letter for letter in found[0]),
                             text.replace(ESCAPE, ''))

  @functools.cached_property
  def _of_literals(self) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]]:
    """The tokenizer without special tokens, what stands for each that a template writes, its id."""
    tokenizer = type(self._tokenizer).from_str(self._tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    # Nobody can guess them.
    stand_ins = {content: f'\U0010fffc{secrets.token_hex(8)}{number}\U0010fffc'
                 for number, content in enumerate(self._special)}
    import tokenizers
    tokenizer.add_tokens([
        tokenizers.AddedToken(stand_ins[content], single_word=token.single_word,
                              lstrip=token.lstrip, rstrip=token.rstrip,
                              normalized=token.normalized)
        for content, token in self._special.items()])
    content_of = {stand_in: content for content, stand_in in stand_ins.items()}
    original = {number: self.id_of(content_of[token.content])
                for number, token in tokenizer.get_added_tokens_decoder().items()
                if token.content in content_of}
    return tokenizer, stand_ins, original

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

  def token(self, number: int) -> str:
    """Returns the token of an id, '' where there is none."""
    return (self._tokenizer.id_to_token(number) or '') if 0 <= number < self.size else ''

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
    ValueError: no such file, one of the wrong form, an unknown setting, or the package that reads
      it is missing.
  """

  def __init__(self, source: str | pathlib.Path, *, context: int, canonical: str = 'none'):
    choices.check('canonical=', canonical, CANONICAL)
    folder = pathlib.Path(source)
    self._file = folder / 'tokenizer.json'
    if not os.path.lexists(self._file):
      raise ValueError(f'there is no tokenizer.json in {folder}: give the folder of a checkpoint '
                       'that has one')
    self._tokenizer = _parsed(read_text(self._file), self._file)
    settings = read_json_if_there(folder / 'tokenizer_config.json')
    self._tokens = _special_tokens(folder)
    with naming(folder / 'tokenizer_config.json'):
      self._added = [value_of(settings, f'add_{end}_token', bool) for end in ('bos', 'eos')]
      self._side = value_of(settings, 'padding_side', Side)
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
      if self._side == 'left':
        ids[self._context - len(row):] = row
      else:
        ids[:len(row)] = row
    return filled

  def _encode(self, text: str) -> list[int]:
    if self._canonical != 'none':
      text = text.lower()
    if self._canonical == 'words':
      text = ' '.join(text.translate(str.maketrans('', '', string.punctuation)).split())
    if self._added == [None, None]:
      return _ids(self._tokenizer, text, self._file, special=True)
    first, last = ([self._end(name)] if wanted else []
                   for name, wanted in zip(('bos', 'eos'), self._added, strict=True))
    return [*first, *_ids(self._tokenizer, text, self._file, special=False), *last]

  def _end(self, name: str) -> int:
    """Returns the id of the token that starts ('bos') or ends ('eos') a text."""
    number = self._id(name)
    if number is None:
      raise ValueError(f'the tokenizer_config.json beside {self._file} says add_{name}_token, and '
                       f'names no {name}_token that the tokenizer has: correct one of them')
    return number

  def _id(self, name: str) -> int | None:
    """Returns the id of the token that the settings name as 'bos', 'eos' or 'pad'."""
    token = self._tokens.get(f'{name}_token')
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
      ValueError: a word that is not there, or one of `silent`.
    """
    del special
    ids = []
    for word in text.split():
      if word not in self.words:
        raise ValueError(f'{word!r} is no word of this model{choices.near(word, self.words)}: it '
                         f'has {", ".join(self.words)}; put spaces around each')
      if self.words.index(word) in self.silent:
        raise ValueError(f'{word!r} is no word of a text, but a mark of this model: leave it out')
      ids.append(self.words.index(word))
    return ids

  def literal(self, text: str) -> str:
    """Returns the text: marks are none of its words."""
    return text

  def token(self, number: int) -> str:
    """Returns the word of an id."""
    return self.words[number]

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids."""
    return ' '.join(self.words[each] for each in ids if each not in self.silent)

  @property
  def size(self) -> int:
    """Number of words."""
    return len(self.words)


def word_numbers(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> np.ndarray:
  """Numbers the words of a text: int32[T], the same for the tokens of one word, ascending.

  Two tokens that follow each other are of one word where they read as one, of letters, digits and
  underscores; what has no text of its own, such as a special token, is a word. As the stat 'unit',
  it tells ops/reducers/language/subtoken_merge.py what to merge:

    unit = word_numbers(assistant.tokens.decode, ids)[None]
    tokens = lm.apply(variables, ids[None], method='embed')
    logits, _ = reduced.apply(variables, tokens.replace(stats={'unit': unit}))

  Args:
    decode: as of a tokenizer here.
    ids: T tokens.
  """
  alone = [decode([one]).strip() for one in ids]
  # Pieces of a word keep their mark where nothing is in front of them.
  begins = [not (before and own and re.fullmatch(r'(##)?\w+', decode([first, second]).strip()))
            for before, own, first, second in zip(alone, alone[1:], ids, ids[1:], strict=False)]
  return np.cumsum([0, *begins][:len(ids)], dtype=np.int32)


def _parsed(content: str, name: Any) -> tokenizers.Tokenizer:
  """Reads the content of a tokenizer.json.

  Raises:
    ValueError: another content, or the package that reads it is missing.
  """
  try:
    import tokenizers
  except ImportError as error:
    raise ValueError('reading tokenizer.json needs a package that is not installed: `pip install '
                     '-r requirements-hub.txt`') from error
  with worded(f'{name} is no tokenizer that can be read', 'fetch it again'), _without_stderr():
    tokenizer = tokenizers.Tokenizer.from_str(content)
    # Both would hide that a text has too many tokens, or too few.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Some faults come out only now.
    tokenizer.encode('')
  return tokenizer


def _ids(tokenizer: tokenizers.Tokenizer, text: str, name: Any, *, special: bool) -> list[int]:
  """Returns the ids of a text.

  Raises:
    ValueError: half a character in the text, or a tokenizer that cannot read it.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'the text has half a character, {text[error.start]!r}: give whole ones, in '
                     'UTF-8') from error
  with worded(f'{name} cannot read this text', 'fetch the file again, or change the text'):
    return tokenizer.encode(text, add_special_tokens=special).ids


@contextlib.contextmanager
def worded(what: str, advice: str) -> Iterator[None]:
  """Turns what the library raises into one line."""
  try:
    yield
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:  # Plain Exceptions, and panics, which are none.
    reason = ' '.join(str(error).split())[:SHOWN]
    raise ValueError(f'{what} ({reason}): {advice}') from error


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
  """Silences what the library itself writes on the screen: a panic's stack."""
  try:
    kept = os.dup(2)
  except OSError:  # There is no such screen.
    yield
    return
  with open(os.devnull, 'wb') as nothing:
    os.dup2(nothing.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)


def has_template(folder: pathlib.Path) -> bool:
  """Returns whether a checkpoint has a chat template.

  Raises:
    ValueError: a file of the wrong form.
  """
  jinja, *others = (folder / file for file in FILES)
  return os.path.lexists(jinja) or any(map(_templates, others))


def _template(folder: pathlib.Path, name: str) -> str:
  """Returns the text of a template, from the first file that has one."""
  loose = folder / 'chat_templates' / f'{name}.jinja'
  if os.path.lexists(loose):
    return read_text(loose)
  jinja, *others = (folder / file for file in FILES)
  if os.path.lexists(jinja) and name == 'default':
    return read_text(jinja)
  for path in others:
    sources = _templates(path)
    if sources:
      choices.check_key(f'{path} has no template ', name, sources)
      return sources[name]
  raise ValueError(f'there is no chat template in {folder}: {", ".join(FILES)} were looked for; '
                   'write the prompt by hand')


def _templates(path: pathlib.Path) -> dict[str, str]:
  """Returns the templates of a JSON file by name; {} where it has none."""
  with naming(path):
    content = value_of(read_json_if_there(path), 'chat_template', Templates)
    if isinstance(content, list):
      with naming('chat_template'):
        return {needed(each, 'name', str): needed(each, 'template', str) for each in content}
  return {'default': content} if isinstance(content, str) else content or {}


def _special_tokens(folder: pathlib.Path) -> dict[str, str]:
  """Returns special tokens by the names that templates use: bos_token, eos_token and so on."""
  path, tokens = folder / 'tokenizer_config.json', {}
  settings = read_json_if_there(path)
  for key in settings:
    if key.endswith('_token') and not key.startswith('add_'):
      with naming(path):
        token = value_of(settings, key, str | Mapping[str, Any])
        if isinstance(token, Mapping):
          with naming(key):
            token = needed(token, 'content', str)
      if token is not None:
        tokens[key] = token
  return tokens


def _is_message(message: Any) -> bool:
  if not isinstance(message, Mapping) or not isinstance(message.get('role'), str):
    return False
  content = message.get('content')
  if isinstance(content, list | tuple):
    return all(isinstance(part, Mapping) and isinstance(part.get('type'), str)
               and (part['type'] != 'text' or isinstance(part.get('text'), str))
               for part in content)
  return isinstance(content, str) or (content is None and bool(message.get('tool_calls')))
