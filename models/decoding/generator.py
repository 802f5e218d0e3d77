"""Decoding: batches of prompts of any length, end tokens, scores, and few compilations.

  generator = Generator(lm, params, ends=(2,), buckets=(128, 512, 2048))
  for tokens in generator.stream(prompts, new_tokens=64):   # int32[B] a step, -1 once a row ended
    ...
  answers = generator(prompts, new_tokens=64, sampling=Sampling(temperature=0.7, top_p=0.9))

  plans = with_plans(vlm, projector=config.reduce.projector, language=config.reduce.language)
  generator = Generator(vlm, params, plans=plans)
  for tokens in generator.stream(prompts, images, new_tokens=64):  # models.backbones.images.Images
    ...

A prompt of a vision-language model has one placeholder an image; its slots are those of its ids,
and the context is for visual tokens as well.

Axes: B batch, N slots of a prompt, V vocabulary.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.typing import ArrayLike

from models.backbones.images import Images, Layout, image_counts
from models.backbones.lm import LM
from models.backbones.vlm import VLM
from models.decoding.kvzip import KVzip, check_text_alone
from models.decoding.sampling import SIDES, Sampling, padded, sample
from models.reduce_config import ModelWithPlans, with_plans
from models.storage import Params
from ops import splice
from ops.kv_cache import Cache
from ops.moves.rows import take

Array = jax.Array

ENDED = -1
BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096)
# A cache has room for a power of two of tokens, at least this many.
MIN_ROOM = 16
# Up to so many slots, padding costs less than another program.
MIN_SLOTS = 16
# Lengths between a power of two and the next that prompts without a bucket are padded to.
STEPS = 16


@dataclasses.dataclass(frozen=True)
class Score:
  """The likelihood of an answer.

  Attributes:
    log_likelihood: natural logarithm, summed over its tokens.
    greedy: whether greedy decoding gives exactly these tokens.
  """

  log_likelihood: float
  greedy: bool


class Generator:
  """Decodes answers with a model.

  Prompts are padded to the next of some lengths, and the cache to a power of two, so that a
  program compiled once serves many prompts.

  Attributes:
    compilations: {(function, batch, slots, room): how often it was compiled}; each is logged. Slots
      are of ids; those of 'decode' are entries of the first layer's cache.
    plans: the model with its plans for prompts of any number of slots.
  """

  def __init__(self, lm: LM | VLM, params: Params, *, ends: Sequence[int] = (),
               buckets: Sequence[int] = BUCKETS, side: str = 'left',
               plans: ModelWithPlans | None = None, kvzip: KVzip | None = None):
    """Prepares functions; nothing is compiled yet.

    Args:
      lm: an LM or a VLM.
      params: its parameters; with the blocks as a tuple (`checkpoints.load(storage='unstacked')`)
        decoding copies no weights.
      ends: token ids that end an answer.
      buckets: slots of ids that prompts are padded to (`padded_length`); the context limits them.
      side: where padding goes, a name in `SIDES`; in a VLM of the ids alone, see its `pad_side`.
      plans: the model with its plans for prompts of any number of slots
        (`models.reduce_config.with_plans`), None for `lm` as it is.
      kvzip: cuts the cache of a prompt of text, where there are no plans. It compiles for each
        length of prompts, and its programs are not counted.

    Raises:
      ValueError: for no bucket or an unknown side, or KVzip with a model that sees images.
    """
    if kvzip is not None:
      check_text_alone(lm)
    if not buckets or side not in SIDES:
      raise ValueError(f'buckets={tuple(buckets)} and side={side!r} are impossible: give at least '
                       f'one length, and one of {", ".join(SIDES)}')
    self.compilations: collections.Counter[tuple[str, int, int, int]] = collections.Counter()
    self._lm, self._params, self._ends = lm, params, np.asarray(ends, np.int32)
    self._buckets, self._side, self._kvzip = sorted(buckets), side, kvzip
    self.plans = plans or with_plans(lm)
    self._prefill = functools.cache(self._make_prefill)
    self._first = jax.jit(lambda logits, keys, sampling: sample(logits, _folded(keys, 0), sampling),
                          static_argnums=2)
    self._step = jax.jit(self._make_step(), static_argnames='sampling', donate_argnames='cache')
    self._score_all, self._follow = self._make_score_all(), self._make_follow()
    self._score_token = jax.jit(_likelihood)

  def slots(self, longest: int, new_tokens: int, *, visual: int = 0) -> tuple[int, int]:
    """Returns the slots for prompts up to a length, and the cache's room for an answer.

    Args:
      longest: number of ids of the longest prompt.
      new_tokens: the most to decode; 0 to read alone.
      visual: slots that images take in addition.

    Raises:
      ValueError: where all together exceed the context.
    """
    context = self._lm.context - visual
    if longest + new_tokens > context:
      with_visual = f' with {visual} visual ones' if visual else ''
      raise ValueError(f'a prompt of {longest} tokens{with_visual} and {new_tokens} new ones are '
                       f'impossible: they may be {self._lm.context} (the context) together at '
                       'most; shorten the prompt, or ask for fewer')
    room = max(MIN_ROOM, 1 << (new_tokens - 1).bit_length()) if new_tokens else 0
    room = min(room, context - longest)
    behind = max(room, self._kvzip.slots(longest)) if self._kvzip else room
    return min(padded_length(longest, self._buckets), max(context - behind, longest)), room

  def stream(self, prompts: Sequence[Sequence[int]], images: Images | None = None, *,
             new_tokens: int, sampling: Sampling | None = None,
             seeds: int | Sequence[int] = 0) -> Iterator[np.ndarray]:
    """Yields one token a row and step, until all rows have ended or `new_tokens` are made.

    It may be left at any point: the next prompts start anew.

    Args:
      prompts: token ids, of any lengths; of a VLM with one placeholder an image.
      images: of all rows, in the order of the placeholders. Batches of the same shapes
        (lib/data/pictures.py, `batch_pictures`) share one program.
      new_tokens: the most to decode.
      sampling: greedy by default.
      seeds: of all rows, or one a row: a row's answer then does not depend on the others.

    Yields:
      int32[B], `ENDED` for rows that gave an end token before.

    Raises:
      ValueError: prompts that do not fit, ids that the model does not have, images that are not as
        many as placeholders, or seeds that are not one a row.
    """
    sampling = sampling or Sampling()
    if new_tokens < 1:
      raise ValueError(f'new_tokens={new_tokens} leaves nothing to decode: ask for one at least')
    prefill = self._prepare(prompts, new_tokens, images)
    keys = _keys(seeds, len(prompts))
    logits, cache = prefill()
    tokens = self._first(logits, keys, sampling)
    ended = np.zeros(len(prompts), bool)
    for step in range(1, new_tokens + 1):
      current = tokens
      if step < new_tokens:
        # Started before the current token is read: the device does not wait for the caller.
        tokens, cache = self._step(self._params, current, keys, step, cache=cache,
                                   sampling=sampling)
      answered = np.where(ended, ENDED, np.asarray(current))
      yield answered
      ended |= np.isin(answered, self._ends)
      if ended.all():
        return

  def __call__(self, prompts: Sequence[Sequence[int]], images: Images | None = None, *,
               new_tokens: int, sampling: Sampling | None = None,
               seeds: int | Sequence[int] = 0) -> list[list[int]]:
    """Returns whole answers, each with the end token that it stopped at.

    Arguments are those of `stream`.
    """
    steps = list(self.stream(prompts, images, new_tokens=new_tokens, sampling=sampling,
                             seeds=seeds))
    return [[int(token) for token in row if token != ENDED] for row in np.stack(steps, axis=1)]

  def score(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]],
            images: Images | None = None) -> list[Score]:
    """Returns how likely given answers are.

    A reduction acts on the prompt alone, as when the answer is decoded. Without reductions prompt
    and answer are read in one pass; with them, and where tokens of the prompt see later ones, the
    answer is read token by token.

    Args:
      prompts, images: as of `stream`.
      answers: token ids after each prompt, at least one.

    Raises:
      ValueError: as `stream`; an empty answer, or not one a prompt.
    """
    if len(answers) != len(prompts) or not all(map(len, answers)):
      raise ValueError(f'answers of {list(map(len, answers))} tokens do not fit {len(prompts)} '
                       'prompts: give one a prompt, none of them empty')
    plain = self.plans.plain and self._lm.is_causal and self._kvzip is None
    score = self._score_in_one_pass if plain else self._score_by_decoding
    likely, best = score(prompts, answers, images)
    return [Score(float(np.sum(row[:len(answer)], dtype=np.float64)),
                  bool(first[:len(answer)].all()))
            for row, first, answer in zip(likely, best, answers, strict=True)]

  def _score_in_one_pass(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]],
                         images: Images | None) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of likelihoods, and whether no token was likelier: [B, longest answer]."""
    layout = None if images is None else images.layout
    # Nothing follows the last token, so it need not be read.
    both = [[*prompt, *answer][:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    slots, _ = self.slots(max(map(len, both)), 0, visual=self.plans.visual_slots(layout))
    ids, valid = padded(both, slots, side='right')
    self._check(ids, valid, images)
    following = self._following(answers)
    starts = np.asarray([len(prompt) for prompt in prompts])[:, None]
    indices = starts + np.arange(following.shape[1])[None]
    likely, best = self._score_all(self._params, ids, valid, following, indices,
                                   *self._extra_inputs(images))
    return np.asarray(likely), np.asarray(best)

  def _score_by_decoding(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]],
                         images: Images | None) -> tuple[np.ndarray, np.ndarray]:
    """The same, token by token after a reduced prompt."""
    steps = max(map(len, answers))
    # Nothing follows the last token, so it need not be read.
    prefill = self._prepare(prompts, steps - 1, images)
    following = self._following(answers)
    logits, cache = prefill()
    scores = [self._score_token(logits, following[:, 0])]
    for step in range(1, steps):
      logits, cache = self._follow(self._params, following[:, step - 1], cache=cache)
      scores.append(self._score_token(logits, following[:, step]))
    likely, best = (np.stack(part, axis=1) for part in zip(*scores, strict=True))
    return likely, best

  def _prepare(self, prompts: Sequence[Sequence[int]], new_tokens: int,
               images: Images | None) -> Callable[[], tuple[Array, Cache]]:
    """Checks prompts, and returns the function that reads them."""
    layout = None if images is None else images.layout
    slots, room = self.slots(max(map(len, prompts), default=0), new_tokens,
                             visual=self.plans.visual_slots(layout))
    ids, valid = padded(prompts, slots, side=self._side)
    self._check(ids, valid, images)
    return functools.partial(self._prefill(slots, room, layout), self._params, ids, valid,
                             *self._extra_inputs(images))

  def _following(self, answers: Sequence[Sequence[int]]) -> np.ndarray:
    """int32[B, longest answer]: tokens to score, padded with 0."""
    following, _ = padded(answers, max(map(len, answers)), side='right')
    self._check_ids(following, following >= 0)
    return following

  def _extra_inputs(self, images: Images | None) -> tuple[Images | None, ...]:
    """Arguments that a VLM takes after ids and mask."""
    return (images,) if isinstance(self._lm, VLM) else ()

  def _check(self, ids: np.ndarray, valid: np.ndarray, images: Images | None) -> None:
    """Raises for ids and images that do not fit; a device would not: it reads past the table."""
    if isinstance(self._lm, VLM):
      # The id at a placeholder is never looked up.
      self._check_ids(ids, valid & (ids != self._lm.image_token))
      counts = np.zeros((len(ids), 0), int) if images is None else image_counts(images)
      if len(counts) != len(ids):
        raise ValueError(f'images of {len(counts)} rows do not fit {len(ids)} prompts: give a row '
                         'of images, which may be empty, for each')
      splice.check(ids, valid, counts, image=self._lm.image_token)
      return
    self._check_ids(ids, valid)
    if images is not None:
      raise ValueError('this model reads text alone: leave the images out, or load a '
                       'vision-language model')

  def _check_ids(self, ids: np.ndarray, valid: np.ndarray) -> None:
    unknown = valid & ((ids < 0) | (ids >= self._lm.vocabulary))
    if unknown.any():
      row = int(unknown.any(axis=1).argmax())
      raise ValueError(f'row {row} has the token {ids[row][unknown[row]][0]}, and the model those '
                       f'from 0 to {self._lm.vocabulary - 1}: encode prompts with the tokenizer of '
                       'this checkpoint')

  def _count(self, name: str, batch: int, slots: int, room: int) -> None:
    """Counts a compilation: it runs while a function is traced."""
    self.compilations[name, batch, slots, room] += 1
    logging.info('compiling %s for %d rows, %d slots and room for %d tokens; %d programs so far',
                 name, batch, slots, room, sum(self.compilations.values()))

  def _make_prefill(self, slots: int, room: int,
                    layout: Layout | None) -> Callable[..., tuple[Array, Cache]]:
    lm, kvzip = self.plans(slots, layout), self._kvzip
    if kvzip is not None:
      return lambda params, ids, valid: kvzip(cast(LM, lm), {'params': params}, ids, valid,
                                              room=room)

    def prefill(params: Params, ids: Array, valid: Array,
                *images: Images | None) -> tuple[Array, Cache]:
      self._count('prefill', len(ids), slots, room)
      return cast(tuple[Array, Cache], lm.apply({'params': params}, ids, valid, *images, room=room,
                                                method='prefill'))

    return jax.jit(prefill)

  def _make_score_all(self) -> Callable[..., tuple[Array, Array]]:
    lm = self._lm

    def score(params: Params, ids: Array, valid: Array, following: Array, indices: Array,
              *images: Images | None) -> tuple[Array, Array]:
      self._count('score', ids.shape[0], ids.shape[1], 0)
      logits, out = lm.apply({'params': params}, ids, valid, *images)
      slot = indices
      if images:
        real = out['sequence'].real
        end = 1 + jnp.max(jnp.where(real, jnp.arange(real.shape[1])[None], -1), axis=1)
        slot = jnp.take_along_axis(out['slot'], jnp.minimum(indices, ids.shape[1] - 1), axis=1)
        slot = jnp.where(indices < valid.sum(axis=1)[:, None], slot, end[:, None])
      # The prediction of a token stands in the slot before it.
      return _likelihood(take(logits, jnp.clip(slot - 1, 0, logits.shape[1] - 1)), following)

    return jax.jit(score)

  def _make_follow(self) -> Callable[..., tuple[Array, Cache]]:
    lm = self._lm

    def follow(params: Params, tokens: Array, *, cache: Cache) -> tuple[Array, Cache]:
      self._count('follow', len(tokens), cache.layers[0].filled, cache.room)
      return cast(tuple[Array, Cache],
                  lm.apply({'params': params}, tokens, cache, method='decode'))

    return jax.jit(follow, donate_argnames='cache')

  def _make_step(self) -> Callable[..., tuple[Array, Cache]]:
    lm = self._lm

    def step(params: Params, tokens: Array, keys: Array, number: Array, *, cache: Cache,
             sampling: Sampling) -> tuple[Array, Cache]:
      self._count('decode', len(tokens), cache.layers[0].filled, cache.room)
      logits, cache = cast(tuple[Array, Cache],
                           lm.apply({'params': params}, tokens, cache, method='decode'))
      return sample(logits, _folded(keys, number), sampling), cache

    return step


def padded_length(longest: int, buckets: Sequence[int]) -> int:
  """Returns the slots of prompts up to a length: at most twice as many, or `MIN_SLOTS`.

  The next bucket, where it is no more than that. Else, as beyond the last bucket, the next multiple
  of a sixteenth of the power of two below the length (of 8, for short ones): at most 16 programs
  for every doubling of the length.

  Args:
    longest: tokens of the longest prompt.
    buckets: rising numbers of slots.
  """
  bucket = next((bucket for bucket in buckets if bucket >= longest), None)
  if bucket is not None and bucket <= max(2 * longest, MIN_SLOTS):
    return bucket
  longest = max(longest, MIN_SLOTS)
  step = max(8, (1 << longest.bit_length() - 1) // STEPS)
  return -(-longest // step) * step


def _likelihood(logits: Array, tokens: Array) -> tuple[Array, Array]:
  """Logarithm of a token's likelihood, and whether greedy decoding gives it: [...] of [..., V]."""
  log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  likely = jnp.take_along_axis(log_probabilities, tokens[..., None], axis=-1)[..., 0]
  return likely, jnp.argmax(logits, axis=-1) == tokens


def _keys(seeds: int | Sequence[int], rows: int) -> Array:
  """One random key a row."""
  for seed in [seeds] if isinstance(seeds, int) else seeds:
    # Larger ones would lose their upper bits, or overflow.
    if not -2 ** 31 <= seed < 2 ** 31:
      raise ValueError(f'seed={seed} is impossible: give a whole number of 32 bits')
  if isinstance(seeds, int):
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seeds)))(jnp.arange(rows))
  if len(seeds) != rows:
    raise ValueError(f'{len(seeds)} seeds do not fit {rows} prompts: give one number, or one a '
                     'prompt')
  return jax.vmap(jax.random.key)(jnp.asarray(seeds))


def _folded(keys: Array, number: ArrayLike) -> Array:
  """The keys of a step."""
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
