"""Measures what reductions cost a pretrained language model.

  python -m tools.real.study --config=configs/real_language.py
  python -m tools.real.study --config=configs/real_language.py:quick

A row measures one reduction on the prompts of one draw, which all rows of that measure, length and
draw share: these are read once, with everything that any method asks of them, so that rows of one
draw should follow each other. Methods on the cache then cut the caches, those in the model read the
prompts anew, and the model goes on from what is left. `measure` of a row is one of
  perplexity   nll, kl, agreement and same, each a list by text: mean NLL of the tokens behind the
               prefix; KL divergence of the next-token distributions from the unreduced model's, in
               nats; of the tokens that the unreduced model adds greedily, the share that is still
               the likeliest in its place, and the share before the first that is not, where
               decoding greedily parts from the unreduced model
  recall       told and nll by kind of prompt, lists by `depths`: whether all digits of a key are
               the likeliest in their places, so that greedy decoding tells it, and their mean NLL.
               The question ends the prompt in `pass_key` and `two_keys` (two are hidden), and is
               read behind the cut cache in `several` (as many keys as depths, asked one by one)
  windows      nll by window of an article, where a cache is kept at a capacity from token to token
  latency      milliseconds to the first token and for a later one, and both as shares of the
               unreduced model's, which takes turns with the others; caches are really cut
and all but `windows` have `kept`, the share of the prompt's cache that is left.

Axes: B batch, N slots of a prompt, C tokens behind it, V vocabulary.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from lib.data import gguf_tokenizer
from lib.data.real import language_model
from lib.data.real.articles import articles, reference_topics
from lib.report.rows import Row
from lib.runtime import timing
from lib.studies import haystack
from lib.studies.cut_caches import Prompts, Reader, plain
from models.checkpoints import gguf, load
from models.checkpoints.lm_config import from_config
from models.plan import make_cache_plan, make_plan
from models.storage import to_storage
from ops import choices
from ops.kv_cache import KV, Cache

Array = jax.Array
WINDOWS = 4  # Of one article, in `windows`.


class Subject:
  """Holds a model, and the prompts of one draw that it has read."""

  def __init__(self, config: Any) -> None:
    folder = pathlib.Path(config.folder)
    file = language_model(folder)
    self.config, self.lm = config, from_config(gguf.config(file))
    self.stacked = {'params': load(self.lm, file)}
    self.weights = {'params': to_storage(self.stacked['params'], storage='unstacked')}
    self.encode = functools.partial(gguf_tokenizer.tokenizer(file).encode, special=False)
    self.reader = Reader(self.lm)
    self.corpora = (articles(folder / 'articles'), reference_topics())
    self.extend = jax.jit(functools.partial(self.lm.apply, logits='all', method='extend'))
    self.go_on = jax.jit(self._go_on, static_argnames='count')
    self._prefills: dict[str, Callable[..., tuple[Array, Cache]]] = {}
    self._draw: tuple[Any, Any] = (None, None)

  def measure(self, row: Row) -> Row:
    """Returns the figures of a row."""
    choices.check('measure ', row['measure'], MEASURES)
    key = row['measure'], row['length'], row['draw']
    if self._draw[0] != key:
      self._draw = None, None  # The last one's prompts leave before others are read.
      self._draw = key, MEASURES[row['measure']](self, row['length'], row['draw'])
    return {name: jax.tree.map(lambda x: round(float(x), 5), plain_lists(value))
            for name, value in self._draw[1](row).items()}

  def texts(self, length: int, draw: int, corpora: Sequence[int] = (0, 1)) -> np.ndarray:
    """Returns texts of so many tokens, int32[B, length], `config.texts` of each corpus.

    Raises:
      ValueError: a corpus has too few.
    """
    return np.array([text for corpus in corpora
                     for text in self._texts(corpus, length)[
                         draw * self.config.texts:(draw + 1) * self.config.texts]], np.int32)

  def reduced(self, row: Row, prompts: Prompts, ids: np.ndarray,
              room: int) -> tuple[Array, Cache, float]:
    """Returns logits after prompts int32[B, N], their reduced cache, and what it keeps."""
    slots = ids.shape[1]
    sizes = sorted({int(share * slots) for share in self.config.shares} | {slots})
    if row['where'] != 'model':
      events = self.reader.plan(row, slots)
      return (prompts.logits, *self.reader.cut(prompts, events, sizes, room))
    logits, cache = self._prefill(row, slots)(self.stacked, jnp.asarray(ids))
    share = sum(layer.filled for layer in cache.layers) / (slots * self.lm.depth)
    return logits, cache.replace(layers=tuple(
        plain(cast(KV, layer), slots, room) for layer in cache.layers)), share

  def _prefill(self, row: Row, slots: int) -> Callable[..., tuple[Array, Cache]]:
    """Reads prompts under a row's plan; compiled once for all draws."""
    key = json.dumps([row['reduce'], slots], sort_keys=True)
    if key not in self._prefills:
      lm = self.lm.clone(plan=make_plan(row['reduce'], self.lm.host(slots)))
      self._prefills[key] = jax.jit(functools.partial(lm.apply, room=0, method='prefill'))
    return self._prefills[key]

  @functools.cache  # noqa: B019  One subject lives as long as the command.
  def _texts(self, corpus: int, length: int) -> list[list[int]]:
    config = self.config
    order = np.random.default_rng(config.seed).permutation(len(self.corpora[corpus]))
    wanted = config.texts * config.draws
    found: list[list[int]] = []
    for index in order:
      # No token of these is longer than 16 letters on average over a text.
      if len(found) < wanted and len(
          ids := self.encode(self.corpora[corpus][index][:16 * length])) >= length:
        found.append(ids[:length])
    if len(found) < wanted:
      raise ValueError(f'a corpus has {len(found)} texts of {length} tokens, and '
                       f'config.draws={config.draws} of config.texts={config.texts} are asked for: '
                       'ask for fewer, or for shorter ones')
    return found

  def _go_on(self, weights: Any, first: Array, cache: Cache, *, count: int) -> Array:
    """int32[B, count], tokens that are added greedily behind the first, int32[B]."""

    def step(carry: tuple[Array, Cache], _: None) -> tuple[tuple[Array, Cache], Array]:
      logits, cache = cast(tuple[Array, Cache], self.lm.apply(weights, *carry, method='decode'))
      ids = jnp.argmax(logits, axis=1).astype(jnp.int32)
      return (ids, cache), ids

    return jax.lax.scan(step, (first, cache), None, length=count)[1].T


def plain_lists(value: Any) -> Any:
  """Returns a tree of arrays as one of lists and numbers."""
  return jax.tree.map(lambda x: np.asarray(x).tolist(), value)


def perplexity(subject: Subject, length: int, draw: int) -> Callable[[Row], Row]:
  """Reads texts; what it returns measures how well they go on."""
  behind, greedy = subject.config.behind, subject.config.greedy
  ids = subject.texts(length + behind + 1, draw)
  prefix, chunk, targets = ids[:, :length], ids[:, length:-1], jnp.asarray(ids[:, length + 1:])
  prompts = subject.reader(subject.stacked, prefix, draw)
  whole = {'where': '', 'ranking': '', 'reduce': {}}
  logits, cache, _ = subject.reduced(whole, prompts, prefix, behind)
  wanted, _ = subject.extend(subject.weights, chunk, cache)
  first = jnp.argmax(logits, axis=1).astype(jnp.int32)
  added = jnp.concatenate([first[:, None], subject.go_on(
      subject.weights, first, cache, count=greedy)], axis=1)

  def measure(row: Row) -> Row:
    _, cache, kept = subject.reduced(row, prompts, prefix, behind)
    logits, _ = subject.extend(subject.weights, chunk, cache)
    nll, kl = _compared(logits, targets, wanted)
    # As long as all have been told alike, this is what decoding would add.
    told, _ = subject.extend(subject.weights, added[:, :-1], cache)
    alike = jnp.argmax(told, axis=2) == added[:, 1:]
    return {'nll': nll, 'kl': kl, 'agreement': alike.mean(axis=1), 'kept': kept,
            'same': jnp.cumprod(alike, axis=1).mean(axis=1)}

  return measure


def recall(subject: Subject, length: int, draw: int) -> Callable[[Row], Row]:
  """Reads prompts that hide keys; what it returns measures which are told."""
  config, encode = subject.config, subject.encode
  rng = np.random.default_rng([config.seed, length, draw])
  prose = subject.corpora[0]
  depths, asked = tuple(config.depths), dict[str, list[haystack.Asked]]()
  makers = {'pass_key': haystack.pass_key, 'two_keys': haystack.two_keys}
  if length > config.longest_pass_key:  # Each prompt takes memory, and two keys say more.
    del makers['pass_key']

  def hay() -> list[int]:
    """Words from anywhere, and enough of them."""
    start, text = int(rng.integers(len(prose))), ''
    for article in (*prose[start:], *prose[:start]):
      text += article + '\n'
      if len(text) > 8 * length:
        break
    return encode(text)

  for kind, make in makers.items():
    asked[kind] = [make(encode, hay(), length, depth, rng) for depth in depths]
  asked['several'] = haystack.several(encode, hay(), length, depths, rng)
  within = [each for kind in makers for each in asked[kind]]
  ids = np.array([each.prompt for each in (*within, asked['several'][0])], np.int32)
  prompts = subject.reader(subject.stacked, ids, draw)
  keys = np.array([each.key for each in (*within, *asked['several'])], np.int32)
  inside, apart = jnp.arange(len(within)), jnp.full(len(depths), len(within))
  most = max(len(each.question) for each in asked['several']) + haystack.DIGITS - 1
  behind = [(*each.question, *each.key[:-1]) for each in asked['several']]
  valid = np.arange(most)[None] < np.array([[len(each)] for each in behind])
  chunk = np.array([[*each, *[0] * (most - len(each))] for each in behind], np.int32)
  # Where the digits are told: by the last token of the question, and by each digit but the last.
  places = np.array([[len(each.question) - 1 + i for i in range(haystack.DIGITS)]
                     for each in asked['several']])

  def measure(row: Row) -> Row:
    first, cache, kept = subject.reduced(row, prompts, ids, most)
    rest, _ = subject.extend(subject.weights, keys[:len(within), :-1], cache.take(inside))
    after, _ = subject.extend(subject.weights, chunk, cache.take(apart), valid)
    logits = jnp.concatenate([
        jnp.concatenate([first[inside, None], rest], axis=1),
        jnp.take_along_axis(after, jnp.asarray(places[..., None]), axis=1)])
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(keys[..., None]), axis=2)
    told = jnp.all(jnp.argmax(logits, axis=2) == keys, axis=1)
    parts = {kind: slice(i * len(depths), (i + 1) * len(depths)) for i, kind in enumerate(asked)}
    return {'told': {kind: told[part].astype(int) for kind, part in parts.items()},
            'nll': {kind: nll.mean(axis=(1, 2))[part] for kind, part in parts.items()},
            'depths': depths, 'kept': kept}

  return measure


def windows(subject: Subject, length: int, draw: int) -> Callable[[Row], Row]:
  """Takes windows of articles; what it returns reads them with caches of a capacity."""
  texts = subject.texts(WINDOWS * length + 1, draw, (0,))
  inputs, targets = (jnp.asarray(x.reshape(-1, length)) for x in (texts[:, :-1], texts[:, 1:]))
  logits, _ = jax.jit(subject.lm.apply)(subject.stacked, inputs)

  def measure(row: Row) -> Row:
    own = logits
    if row['reduce']:
      # As long as the capacity is not reached nothing leaves.
      start = row['reduce']['capacity']
      lm = subject.lm.clone(cache_plan=make_cache_plan(row['reduce'], subject.lm.host(start)))
      _, cache = jax.jit(functools.partial(lm.apply, room=0, method='prefill'))(
          subject.stacked, inputs[:, :start])
      later, _ = jax.jit(functools.partial(lm.apply, logits='all', method='extend'))(
          subject.weights, inputs[:, start:], cache)
      own = jnp.concatenate([logits[:, :start], later], axis=1)
    return {'nll': _compared(own, targets, logits)[0]}

  return measure


def latency(subject: Subject, length: int, draw: int) -> Callable[[Row], Row]:
  """Times all rows of this measure and length in turns; what it returns picks one's times."""
  config = subject.config
  ids = jnp.asarray(subject.texts(length, draw)[:1])
  rows = {json.dumps(row['reduce']): row for row in config.rows
          if (row['measure'], row['length'], row['draw']) == ('latency', length, draw)}
  first, later, sizes = {}, {}, {}
  for key, row in rows.items():
    plan = make_cache_plan(row['reduce'], subject.lm.host(length)) if row['reduce'] else None
    prefill = functools.partial(jax.jit(functools.partial(
        subject.lm.clone(cache_plan=plan).apply, room=config.greedy, method='prefill')),
                                subject.stacked, ids)
    # What is still being computed would count as the first candidate's time.
    logits, cache = jax.block_until_ready(prefill())
    sizes[key] = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    first[key] = prefill
    later[key] = functools.partial(subject.go_on, subject.weights,
                                   jnp.argmax(logits, axis=1).astype(jnp.int32), cache,
                                   count=config.greedy)
  firsts = timing.interleave(first, rounds=config.rounds, warmup=0)
  laters = timing.interleave(later, rounds=config.rounds, warmup=1)
  whole = json.dumps({})

  def measure(row: Row) -> Row:
    key = json.dumps(row['reduce'])
    return {'first_ms': firsts[key].median_ms, 'later_ms': laters[key].median_ms / config.greedy,
            'first_share': 1 / timing.speedup(firsts[whole], firsts[key]).median,
            'later_share': 1 / timing.speedup(laters[whole], laters[key]).median,
            'kept': sizes[key] / sizes[whole]}

  return measure


MEASURES: Mapping[str, Callable[[Subject, int, int], Callable[[Row], Row]]] = {
    'perplexity': perplexity, 'recall': recall, 'windows': windows, 'latency': latency}


@jax.jit
def _compared(logits: Array, targets: Array, wanted: Array) -> tuple[Array, Array]:
  """Mean NLL of targets int32[B, C], and KL divergence from the wanted logits: float32[B]."""
  own, reference = jax.nn.log_softmax(logits), jax.nn.log_softmax(wanted)
  nll = -jnp.take_along_axis(own, targets[..., None], axis=2)[..., 0]
  kl = jnp.sum(jnp.exp(reference) * (reference - own), axis=2)
  return nll.mean(axis=1), kl.mean(axis=1)
