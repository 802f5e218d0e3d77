"""Prompts of Wikipedia's articles with a pass key somewhere in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

QUESTION = ('\n\nWhat is the pass key? Answer with the number alone.<|im_end|>\n'
            '<|im_start|>assistant\nThe pass key is ')
DIGITS = 5


@dataclasses.dataclass(frozen=True)
class Prompt:
  """Holds token ids: a prompt, what its article goes on with, a question, and the answer's text."""

  ids: list[int]
  behind: list[int]
  question: list[int]
  key: str


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
