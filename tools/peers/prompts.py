"""Prompts of Wikipedia's articles with a pass key somewhere in them."""

from __future__ import annotations

import bz2
import dataclasses
import html
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np

QUESTION = ('\n\nWhat is the pass key? Answer with the number alone.<|im_end|>\n'
            '<|im_start|>assistant\nThe pass key is ')
DIGITS = 5
# What is not read as text, from the inside out.
_MARKUP = (r'<!--.*?-->', r'<ref[^>]*/>', r'<ref.*?</ref>', r'<[^>]*>', r'\{\{[^{}]*\}\}',
           r'\{\|.*?\|\}', r"'''?", r'\[https?:[^\] ]* ?', r'\[\[(?:File|Image):[^\[\]]*\]\]')
_LINK = r'\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]'


@dataclasses.dataclass(frozen=True)
class Prompt:
  """Holds token ids: a prompt, what its article goes on with, a question, and the answer's text."""

  ids: list[int]
  behind: list[int]
  question: list[int]
  key: str


def articles(folder: pathlib.Path) -> list[str]:
  """Reads the articles' first paragraphs, without markup; short ones are left out.

  Raises:
    ValueError: they are not there.
  """
  found = sorted((folder / 'articles').glob('*.bz2'))
  if not found:
    raise ValueError(f'there are no articles in {folder / "articles"}: '
                     '`python -m tools.real.fetch` fetches them')
  pages = re.findall(r'<text[^>]*>(.*?)</text>', bz2.decompress(found[0].read_bytes()).decode(),
                     re.DOTALL)
  return [text for page in pages if len(text := plain(html.unescape(page[:60000]))) > 8000]


def plain(text: str) -> str:
  """Takes the markup off a text."""
  for pattern in (*_MARKUP[:4], *_MARKUP[4:5] * 4, *_MARKUP[5:]):
    text = re.sub(pattern, '', text, flags=re.DOTALL)
  text = re.sub(_LINK, r'\1', text)
  lines = [line.strip() for line in text.splitlines()]
  return '\n'.join(line for line in lines if len(line) > 60 and line[0] not in '|!*#:=[{')


def prompts(texts: Sequence[str], encode: Callable[[str], list[int]], *, length: int, behind: int,
            count: int, seed: int = 0) -> list[Prompt]:
  """Makes prompts of exactly so many tokens.

  Args:
    texts: the articles.
    encode: text -> ids.
    length: of a prompt.
    behind: tokens that are kept behind it.
    count: how many prompts.
    seed: of keys and their places.

  Raises:
    ValueError: too few texts are long enough.
  """
  rng, made = np.random.default_rng(seed), []
  for text in texts:
    key = ''.join(map(str, rng.integers(1, 10, DIGITS)))
    needle = encode(f' The pass key is {key}. Remember it: {key} is the pass key.')
    start = encode('<|im_start|>user\n')
    ids = encode(text)
    room = length - len(start) - len(needle)
    if room < 1 or len(ids) < room + behind:
      continue
    place = int(rng.integers(room // 10, room * 9 // 10 + 1))
    made.append(Prompt([*start, *ids[:place], *needle, *ids[place:room]], ids[room:room + behind],
                       encode(QUESTION), key))
    if len(made) == count:
      return made
  raise ValueError(f'{len(made)} articles are of {length + behind} tokens, and {count} are asked '
                   'for: ask for fewer, or shorter ones')
