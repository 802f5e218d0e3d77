"""Prompts of an exact length that hide keys among prose, and what is asked of them.

Axes: B prompts, N tokens of a prompt, C tokens of a question and its answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

DIGITS = 5
DOORS = ('red', 'blue', 'green', 'white', 'black', 'brown', 'yellow', 'silver')
Encode = Callable[[str], list[int]]


@dataclasses.dataclass(frozen=True)
class Asked:
  """Holds a prompt and a key that is asked for.

  Attributes:
    prompt: N ids; with `question` empty, they end with the question.
    question: ids that come behind the prompt.
    key: ids of the digits.
  """

  prompt: tuple[int, ...]
  question: tuple[int, ...]
  key: tuple[int, ...]


def pass_key(encode: Encode, hay: Sequence[int], length: int, depth: float,
             rng: np.random.Generator) -> Asked:
  """Hides one key at a depth from 0 to 1; the question ends the prompt."""
  key = _key(rng)
  tail = encode('\n\nWhat is the pass key? Answer with the number alone.<|im_end|>\n'
                '<|im_start|>assistant\nThe pass key is ')
  fact = encode(f' The pass key is {key}. Remember it: {key} is the pass key.')
  return Asked(_hidden(encode, hay, length, [(depth, fact)], tail), (), tuple(encode(key)))


def two_keys(encode: Encode, hay: Sequence[int], length: int, depth: float,
             rng: np.random.Generator) -> Asked:
  """Hides two keys; the one at this depth is asked for, and the question ends the prompt."""
  (door, other), key = rng.permutation(DOORS)[:2], _key(rng)
  facts = [(depth, _fact(encode, door, key)),
           (float(rng.uniform(0.1, 0.9)), _fact(encode, other, _key(rng)))]
  return Asked(_hidden(encode, hay, length, facts, _question(encode, door)), (),
               tuple(encode(key)))


def several(encode: Encode, hay: Sequence[int], length: int, depths: Sequence[float],
            rng: np.random.Generator) -> list[Asked]:
  """Hides a key at each depth; each is asked for by itself, behind the same prompt."""
  doors, keys = rng.permutation(DOORS)[:len(depths)], [_key(rng) for _ in depths]
  facts = [(depth, _fact(encode, door, key))
           for depth, door, key in zip(depths, doors, keys, strict=True)]
  prompt = _hidden(encode, hay, length, facts, [])
  return [Asked(prompt, tuple(_question(encode, door)), tuple(encode(key)))
          for door, key in zip(doors, keys, strict=True)]


def _key(rng: np.random.Generator) -> str:
  return ''.join(map(str, rng.integers(1, 10, DIGITS)))


def _fact(encode: Encode, door: str, key: str) -> list[int]:
  return encode(f' The key of the {door} door is {key}. Remember it: {key} opens the {door} door.')


def _question(encode: Encode, door: str) -> list[int]:
  return encode(f'\n\nWhat is the key of the {door} door? Answer with the number alone.<|im_end|>\n'
                f'<|im_start|>assistant\nThe key of the {door} door is ')


def _hidden(encode: Encode, hay: Sequence[int], length: int,
            facts: Sequence[tuple[float, list[int]]], tail: Sequence[int]) -> tuple[int, ...]:
  """A prompt of so many tokens: prose with facts behind sentences near their depths, and a tail."""
  head = encode('<|im_start|>user\n')
  count = length - len(head) - len(tail) - sum(len(fact) for _, fact in facts)
  if not 0 < count <= len(hay):
    raise ValueError(f'a prompt of {length} tokens takes {count} tokens of prose, and there are '
                     f'{len(hay)}: ask for another length')
  prose, (stop,) = list(hay[:count]), encode('.')
  ends = np.array([0, *(i + 1 for i, token in enumerate(prose) if token == stop)])
  # From the back, so that what was inserted moves no place.
  for depth, fact in sorted(facts, reverse=True):
    at = ends[np.argmin(abs(ends - depth * count))]
    prose[at:at] = fact
  return (*head, *prose, *tail)
