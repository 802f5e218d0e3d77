"""The tokenizer and the chat template inside a GGUF file.

Both kinds of tokenizer that language models in this format have are rebuilt as what a
tokenizer.json describes: byte-level BPE with merges ('gpt2'), and SentencePiece with scores
('llama').
"""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lib.data.tokenizers import Chat, HubTokenizer, worded
from models.checkpoints import gguf
from ops import choices

# How texts are split before they are merged, by the name in `tokenizer.ggml.pre`; of each the
# pattern, and whether digits are split off first. The patterns are those of the models' own
# tokenizers.
_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}|"
           r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_SPLITS = {
    'gpt-2': (_GPT2, False), 'smollm': (_GPT2, True),
    'llama-bpe': (_LLAMA3.replace('DIGITS', '1,3'), False),
    'llama3': (_LLAMA3.replace('DIGITS', '1,3'), False),
    'qwen2': (_LLAMA3.replace('{DIGITS}', ''), False)}
# Kinds of tokens, as the format numbers them.
_CONTROL, _USER_DEFINED = 3, 4
_SPACE = '▁'


def tokenizer(path: pathlib.Path) -> HubTokenizer:
  """Reads the tokenizer of a file.

  Raises:
    ValueError: a kind, or a way of splitting texts, that is not known here; a file without a
      tokenizer, or one that contradicts itself.
  """
  content = gguf.vocabulary(path)
  kind = content.get('model')
  if kind not in _BUILD:
    raise ValueError(f'{path} holds {f"a tokenizer of kind {kind!r}" if kind else "no tokenizer"}, '
                     f'and known are {", ".join(_BUILD)}: use another file')
  missing = [key for key in ('tokens', 'token_type', _BUILD[kind][1]) if key not in content]
  if missing or len(content['tokens']) != len(content['token_type']):
    raise ValueError(f'{path} does not say {" and ".join(missing) or "of what type each token is"} '
                     'of its tokenizer: fetch it again')
  if kind == 'gpt2':
    choices.check_key(f'{path} splits texts in a way that is not read here: ',
                      content.get('pre', 'default'), _SPLITS)
  if importlib.util.find_spec('tokenizers') is None:
    raise ValueError(f'the tokenizer of {path} needs a package that is not installed: `pip install '
                     '-r requirements-hub.txt`')
  with worded(f'the tokenizer of {path} contradicts itself', 'fetch the file again'):
    made = _with_special_tokens(_BUILD[kind][0](content), content)
  return HubTokenizer(made.to_str(), path)


def _with_special_tokens(made: Any, content: Mapping[str, Any]) -> Any:
  """The tokenizer with the tokens that no text is split into, and the one that starts texts."""
  import tokenizers
  for number, special in ((_CONTROL, True), (_USER_DEFINED, False)):
    added = [tokenizers.AddedToken(token, special=special, normalized=False)
             for token, each in zip(content['tokens'], content['token_type'], strict=True)
             if each == number]
    (made.add_special_tokens if special else made.add_tokens)(added)
  bos = _token(content, 'bos')
  if content.get('add_bos_token', content['model'] == 'llama') and bos:
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=[bos, '$A'], special_tokens=[(bos, content['bos_token_id'])])
  return made


def chat(path: pathlib.Path) -> Chat | None:
  """Reads the chat template of a file, None where it has none.

  Raises:
    ValueError: as `Chat`.
  """
  content = gguf.vocabulary(path)
  template = gguf.field(path, 'tokenizer.chat_template')
  if template is None:
    return None
  tokens = {f'{name}_token': token for name in ('bos', 'eos') if (token := _token(content, name))}
  return Chat(template, tokens, path)


def ends(path: pathlib.Path) -> tuple[int, ...]:
  """Returns the ids that end an answer: the end of a text, and of a turn."""
  content = gguf.vocabulary(path)
  found = (content.get(f'{name}_token_id') for name in ('eos', 'eot'))
  return tuple(dict.fromkeys(each for each in found if each is not None))


def _token(content: Mapping[str, Any], name: str) -> str:
  number = content.get(f'{name}_token_id')
  tokens = content['tokens']
  return tokens[number] if number is not None and 0 <= number < len(tokens) else ''


def _byte_level(content: Mapping[str, Any]) -> Any:
  """Byte-level BPE, merges in their order."""
  from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
  split = content.get('pre', 'default')
  pattern, digits = _SPLITS[split]
  made = Tokenizer(models.BPE(
      vocab={token: i for i, token in enumerate(content['tokens'])},
      merges=[tuple(pair.split(' ')) for pair in content['merges']],
      ignore_merges=pattern != _GPT2))
  made.pre_tokenizer = pre_tokenizers.Sequence([
      *[pre_tokenizers.Digits(individual_digits=True)] * digits,
      pre_tokenizers.Split(Regex(pattern), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  made.decoder = decoders.ByteLevel()
  return made


def _sentence_piece(content: Mapping[str, Any]) -> Any:
  """SentencePiece's BPE: of all pairs that make a token, the one of the highest score first."""
  from tokenizers import Tokenizer, decoders, models, normalizers
  vocabulary = {token: i for i, token in enumerate(content['tokens'])}
  pairs = sorted(_pairs(content['tokens'], vocabulary),
                 key=lambda pair: (-content['scores'][vocabulary[''.join(pair)]],
                                   vocabulary[pair[0]], vocabulary[pair[1]]))
  unknown = content.get('unknown_token_id', 0)
  made = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, byte_fallback=True, fuse_unk=True,
                              unk_token=content['tokens'][unknown]))
  prefix = content.get('add_space_prefix', True)
  made.normalizer = normalizers.Sequence([
      *[normalizers.Prepend(_SPACE)] * prefix, normalizers.Replace(' ', _SPACE)])
  made.decoder = decoders.Sequence([
      decoders.Replace(_SPACE, ' '), decoders.ByteFallback(), decoders.Fuse(),
      *[decoders.Strip(' ', 1, 0)] * prefix])
  return made


def _pairs(tokens: Sequence[str], known: Mapping[str, int]) -> Iterator[tuple[str, str]]:
  """Yields every two tokens that make a third."""
  for token in tokens:
    for cut in range(1, len(token)):
      if token[:cut] in known and token[cut:] in known:
        yield token[:cut], token[cut:]


# How each kind is rebuilt, and what a file must say for it.
_BUILD = {'gpt2': (_byte_level, 'merges'), 'llama': (_sentence_piece, 'scores')}
