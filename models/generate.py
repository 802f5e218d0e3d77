"""Decoding: sampling, end tokens, batches of prompts of any length, and few compilations.

  generator = Generator(lm, params, ends=(2,), buckets=(128, 512, 2048))
  for tokens in generator.stream(prompts, new_tokens=64):   # int32[B] a step, -1 once a row ended
    ...
  answers = generator(prompts, new_tokens=64, sampling=Sampling(temperature=0.7, top_p=0.9))

Axes: B batch, N slots of a prompt, V vocabulary.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from models.lm import LM
from models.plan import make_cache_plan, make_plan
from ops.cache import Cache

Array = jax.Array

SIDES = ('left', 'right')
ENDED = -1
# A cache has room for a power of two of tokens, and for so many at least.
LEAST_ROOM = 16


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is picked from its logits; as it stands, greedily.

  Attributes:
    temperature: divides the logits; 0 picks the largest.
    top_k: only among so many of the largest, 0 for all.
    top_p: only among the fewest of the largest whose probabilities reach this sum (nucleus
      sampling, arXiv:1904.09751), after top_k. Tokens as likely as the last of them join.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self) -> None:
    if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise ValueError(f'{self} is impossible: temperature and top_k are not negative, and top_p '
                       'lies in (0, 1]')


def sample(logits: Array, keys: Array, sampling: Sampling) -> Array:
  """Picks one token a row.

  Args:
    logits: float32[B, V].
    keys: B random keys; a row's token depends on its own.
    sampling: static.

  Returns:
    int32[B].
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits.astype(jnp.float32) / sampling.temperature
  if sampling.top_k or sampling.top_p < 1:
    ranked = jnp.sort(logits, axis=-1, descending=True)
    if 0 < sampling.top_k < logits.shape[-1]:
      ranked = jnp.where(jnp.arange(logits.shape[-1])[None] < sampling.top_k, ranked, -jnp.inf)
    chances = jax.nn.softmax(ranked, axis=-1)
    # What the larger ones reach without it decides about a token, so that the first always stays.
    inside = (jnp.cumsum(chances, axis=-1) - chances < sampling.top_p) & (chances > 0)
    least = jnp.min(jnp.where(inside, ranked, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits >= least, logits, -jnp.inf)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def padded(prompts: Sequence[Sequence[int]], slots: int, *, side: str = 'left',
           fill: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Prompts of any lengths as ids int32[B, N] and valid bool[B, N].

  Raises:
    ValueError: no prompt, an empty one, one that is longer than `slots`, or an unknown side.
  """
  if side not in SIDES:
    raise ValueError(f'side={side!r} is unknown: choose one of {", ".join(SIDES)}')
  lengths = [len(prompt) for prompt in prompts]
  if not lengths or min(lengths) == 0 or max(lengths) > slots:
    raise ValueError(f'prompts of {lengths} tokens do not fit into {slots} slots: give at least '
                     'one, none of them empty or longer')
  ids, valid = np.full((len(lengths), slots), fill, np.int32), np.zeros((len(lengths), slots), bool)
  for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
    place = slice(slots - length, slots) if side == 'left' else slice(length)
    ids[row, place], valid[row, place] = prompt, True
  return ids, valid


def fitted(lm: LM, *, language: Mapping[str, Any] | None = None,
           cache: Mapping[str, Any] | None = None, **counts: int) -> Callable[[int], LM]:
  """A model for prompts of any number of slots: its plans count slots, so each needs its own.

  Args:
    lm: without plans.
    language, cache: `config.reduce.language` and `.cache`, or None.
    **counts: slots by kind, as visual=576; the others are text.
  """

  @functools.cache
  def fit(slots: int) -> LM:
    host = lm.host(slots, **counts)
    plan = make_plan(language, host) if language else None
    kept = make_cache_plan(cache, host, plan=plan) if cache else None
    return lm.clone(plan=plan, cache_plan=kept)

  return fit


class Generator:
  """A model ready to answer.

  Prompts are padded to the next of a few lengths, and the cache to a power of two, so that a
  program compiled once serves many prompts.

  Attributes:
    compilations: {(function, batch, slots, room): how often it was compiled}; each is logged.
  """

  def __init__(self, lm: Any, params: Any, *, ends: Sequence[int] = (),
               buckets: Sequence[int] = (64, 256, 1024, 4096), side: str = 'left',
               fit: Callable[[int], Any] | None = None):
    """Nothing is compiled yet.

    Args:
      lm: an LM, or what has its `prefill`, `decode` and `context`.
      params: its parameters; with the blocks as a tuple (`weights.load(form='unstacked')`) decoding
        copies no weights.
      ends: token ids that end an answer.
      buckets: slots that prompts are padded to; the context limits them.
      side: where padding goes.
      fit: slots -> the model with its plans for a prompt of so many (`fitted`), None for `lm`.

    Raises:
      ValueError: for no bucket or an unknown side.
    """
    if not buckets or side not in SIDES:
      raise ValueError(f'buckets={tuple(buckets)} and side={side!r} are impossible: give at least '
                       f'one length, and one of {", ".join(SIDES)}')
    self.compilations: collections.Counter[tuple[str, int, int, int]] = collections.Counter()
    self._lm, self._params, self._ends = lm, params, np.asarray(ends, np.int32)
    self._buckets, self._side = sorted(buckets), side
    self._fit = fit or (lambda slots: lm)
    self._prefill = functools.cache(self._make_prefill)
    self._first = jax.jit(lambda logits, keys, sampling: sample(logits, _folded(keys, 0), sampling),
                          static_argnums=2)
    self._step = jax.jit(self._make_step(), static_argnames='sampling', donate_argnames='cache')

  def slots(self, longest: int, new_tokens: int) -> tuple[int, int]:
    """Slots for prompts up to a length, and room for what follows.

    Raises:
      ValueError: where both together exceed the context; nothing to decode.
    """
    context = self._lm.context
    if new_tokens < 1 or longest + new_tokens > context:
      raise ValueError(f'a prompt of {longest} tokens and {new_tokens} new ones are impossible: '
                       f'ask for one at least, and for {context} (the context) together at most')
    room = max(LEAST_ROOM, 1 << (new_tokens - 1).bit_length())
    room = min(room, context - longest)
    found = [bucket for bucket in self._buckets if bucket >= longest]
    return min(found[0] if found else context, context - room), room

  def stream(self, prompts: Sequence[Sequence[int]], *inputs: Any, new_tokens: int,
             sampling: Sampling | None = None,
             seeds: int | Sequence[int] = 0) -> Iterator[np.ndarray]:
    """Yields one token a row and step, until all rows have ended or `new_tokens` are made.

    It may be left at any point: the next prompts start anew.

    Args:
      prompts: token ids, of any lengths.
      *inputs: what the model's `prefill` takes beside ids and mask (images).
      new_tokens: the most to decode.
      sampling: greedy by default.
      seeds: of all rows, or one a row: a row's answer then does not depend on the others.

    Yields:
      int32[B], `ENDED` for rows that gave an end token before.

    Raises:
      ValueError: prompts that do not fit, or seeds that are not one a row.
    """
    sampling = sampling or Sampling()
    slots, room = self.slots(max(map(len, prompts), default=0), new_tokens)
    ids, valid = padded(prompts, slots, side=self._side)
    keys = _keys(seeds, len(ids))
    logits, cache = self._prefill(slots, room)(self._params, ids, valid, *inputs)
    tokens = self._first(logits, keys, sampling)
    ended = np.zeros(len(ids), bool)
    for step in range(1, new_tokens + 1):
      made = tokens
      if step < new_tokens:
        # Started before the last token is looked at: the device does not wait for whoever reads.
        tokens, cache = self._step(self._params, made, keys, step, cache=cache, sampling=sampling)
      found = np.where(ended, ENDED, np.asarray(made))
      yield found
      ended |= np.isin(found, self._ends)
      if ended.all():
        return

  def __call__(self, prompts: Sequence[Sequence[int]], *inputs: Any, new_tokens: int,
               sampling: Sampling | None = None,
               seeds: int | Sequence[int] = 0) -> list[list[int]]:
    """Whole answers, each with the end token that it stopped at; arguments as of `stream`."""
    steps = list(self.stream(prompts, *inputs, new_tokens=new_tokens, sampling=sampling,
                             seeds=seeds))
    return [[int(token) for token in row if token != ENDED] for row in np.stack(steps, axis=1)]

  def _count(self, name: str, batch: int, slots: int, room: int) -> None:
    """Runs while a function is traced, which is once a compilation."""
    self.compilations[name, batch, slots, room] += 1
    logging.info('compiling %s for %d rows, %d slots and room for %d tokens; %d programs so far',
                 name, batch, slots, room, sum(self.compilations.values()))

  def _make_prefill(self, slots: int, room: int) -> Callable[..., tuple[Array, Cache]]:
    lm = self._fit(slots)

    def prefill(params: Any, ids: Array, valid: Array, *inputs: Any) -> tuple[Array, Cache]:
      self._count('prefill', len(ids), slots, room)
      return lm.apply({'params': params}, ids, valid, *inputs, room=room, method='prefill')

    return jax.jit(prefill)

  def _make_step(self) -> Callable[..., tuple[Array, Cache]]:
    lm = self._lm

    def step(params: Any, tokens: Array, keys: Array, number: Array, *, cache: Cache,
             sampling: Sampling) -> tuple[Array, Cache]:
      self._count('decode', len(tokens), cache.layers[0].filled, cache.room)
      logits, cache = lm.apply({'params': params}, tokens, cache, method='decode')
      return sample(logits, _folded(keys, number), sampling), cache

    return step


def _keys(seeds: int | Sequence[int], rows: int) -> Array:
  if isinstance(seeds, int):
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seeds)))(jnp.arange(rows))
  if len(seeds) != rows:
    raise ValueError(f'{len(seeds)} seeds do not fit {rows} prompts: give one number, or one a '
                     'prompt')
  return jax.vmap(jax.random.key)(jnp.asarray(seeds))


def _folded(keys: Array, number: Any) -> Array:
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
