"""Measures what methods on the cache cost a real language model, in perplexity and in recall.

  python -m tools.real.study --config=configs/real_language.py \
      --config.weights=SmolLM2-135M-Instruct.Q4_1.gguf --config.text=articles.txt

Prompts are read once, with everything that any method asks of them; each method then cuts the
caches, and the model goes on from there. Writes a row of JSON a method and budget to `config.out`:
  perplexity      of the tokens behind a prefix of `config.prefix` tokens
  recall          pass keys told right, of `config.pass_keys`, behind a prompt that ends with the
                  question
  recall_context  the same where the cache is cut before the question is read
  memory          bytes of the cache of the prefix, as a share of the whole one's
The text is plain, an empty line between articles.

Axes: B batch, N slots of a prompt, C tokens behind it.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from lib.data import gguf_tokenizer
from lib.report.rows import Row
from models.backbones.lm import LM
from models.checkpoints import gguf, load
from models.checkpoints.lm_config import from_config
from models.plan import make_cache_plan
from models.plans.row_budgets import entry_budget
from models.reduction import Event, Place, Reduction, choose
from models.stack import Tap
from models.storage import to_storage
from ops.kv_cache import KV, Cache, LayerCache
from ops.primitives.kv_select import broadcast_to_heads
from ops.reducers.base import CacheReducer
from ops.reducers.scoring import ScoringReducer
from ops.rope import Rope
from ops.signals import Signals
from ops.tokens import TEXT, TokenSet

Array = jax.Array
# Signals that a prompt tells of itself, and rows of those that are of the last queries.
NEEDS = frozenset({'keys', 'values', 'queries', 'plain_queries', 'last_attention',
                   'window_attention', 'received_attention', 'projected_norms', 'window_queries'})
SPAN = 64
DIGITS = 5
QUESTION = ('\n\nWhat is the pass key? Answer with the number alone.<|im_end|>\n'
            '<|im_start|>assistant\nThe pass key is ')


@dataclasses.dataclass(frozen=True)
class Everything(CacheReducer):
  """Asks for all that any method reads; it cuts nothing."""

  span = SPAN
  needs = NEEDS


@dataclasses.dataclass(frozen=True)
class Chance(ScoringReducer):
  """Ranks entries by chance, the same in all heads, and keeps the last."""

  def scores(self, tokens: TokenSet, signals: Signals) -> Array:
    """Returns float32[B, K, N], uniform."""
    return broadcast_to_heads(jax.random.uniform(jax.random.key(0), tokens.pos.shape),
                              signals.keys.shape[2])


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Holds prompts that were read.

  Attributes:
    tokens: N slots.
    signals: of each layer.
    logits: float32[B, V], after the last token.
  """

  tokens: TokenSet
  signals: list[Signals]
  logits: Array


class Subject:
  """Holds a model, and prompts that it has read."""

  def __init__(self, config: Any) -> None:
    path = pathlib.Path(config.weights)
    self.lm = from_config(gguf.config(path))
    stacked = {'params': load(self.lm, path)}
    self.weights = {'params': to_storage(stacked['params'], storage='unstacked')}
    self._tokens, text = gguf_tokenizer.tokenizer(path), pathlib.Path(config.text).read_text()
    self._encode = functools.partial(self._tokens.encode, special=False)
    articles = [article for article in text.split('\n\n') if article.strip()]
    self._extend = jax.jit(functools.partial(self.lm.apply, logits='all', method='extend'))
    self._decode = jax.jit(functools.partial(self.lm.apply, method='decode'))
    total = config.prefix + config.behind
    ids = [ids[:total] for article in articles if len(ids := self._encode(article)) >= total]
    if len(ids) < config.texts:
      raise ValueError(f'{config.text} has {len(ids)} articles of {total} tokens, and '
                       f'config.texts={config.texts} are asked for: give a longer text')
    together = np.array(ids[:config.texts], np.int32)
    self.behind = jnp.asarray(together[:, config.prefix:])
    self.prefix = self._read(stacked, together[:, :config.prefix])
    self.keys, asked = self._pass_keys(articles[-config.pass_keys:], config)
    self.question = np.tile(self._encode(QUESTION), (config.pass_keys, 1)).astype(np.int32)
    whole, context = ([self._encode(prompt + tail) for prompt in asked] for tail in (QUESTION, ''))
    # Of one length, so that both run the same programs.
    length = max(map(len, whole))
    self.whole, self.context = (self._read(stacked, *_padded(rows, length))
                                for rows in (whole, context))

  def measure(self, head: Row) -> Row:
    """Returns the figures of a row."""
    row: Mapping[str, Any] = head
    full = _bytes(self._layers(self.prefix, None))
    layers = self._layers(self.prefix, row)
    logits, _ = self._extend(self.weights, self.behind, _cache(layers, self.behind.shape[1]))
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]),
                                     self.behind[:, 1:, None], axis=2)
    room = self.question.shape[1] + DIGITS
    told = self._answers(self.whole.logits, _cache(self._layers(self.whole, row), room))
    after, cache = self._extend(self.weights, jnp.asarray(self.question),
                                _cache(self._layers(self.context, row), room))
    recalled = self._answers(after[:, -1], cache)
    return {'perplexity': round(float(jnp.exp(-likelihood.mean())), 2),
            'recall': f'{told} of {len(self.keys)}',
            'recall_context': f'{recalled} of {len(self.keys)}',
            'memory': round(_bytes(layers) / full, 3)}

  def _pass_keys(self, articles: Sequence[str], config: Any) -> tuple[list[str], list[str]]:
    """Pass keys, and prompts that hold them somewhere among words."""
    rng, keys, prompts = np.random.default_rng(config.seed), [], []
    for article in articles:
      key = ''.join(map(str, rng.integers(1, 10, DIGITS)))
      words = article.split()[:config.words]
      place = int(rng.integers(len(words) // 10, len(words) * 9 // 10))
      words.insert(place, f'The pass key is {key}. Remember it: {key} is the pass key.')
      keys.append(key)
      prompts.append('<|im_start|>user\n' + ' '.join(words))
    return keys, prompts

  def _read(self, weights: Any, ids: np.ndarray, valid: np.ndarray | None = None) -> Prompts:
    tap = Tap(NEEDS, lambda first, tokens, signals: signals,
              reduction=Reduction('everything', cast(Any, Everything())))

    def run(lm: LM, ids: Array, valid: Array | None) -> Any:
      tokens, out = lm.stack(lm.embed(ids, valid), tap)
      last = jnp.argmax(jnp.where(tokens.real, tokens.pos, -1), axis=1)
      return lm._logits(lm.norm(tokens.x[jnp.arange(len(last)), last])), out['taps']

    logits, signals = jax.jit(functools.partial(self.lm.apply, method=run))(
        weights, jnp.asarray(ids), None if valid is None else jnp.asarray(valid))
    pos = np.maximum(np.cumsum(np.ones_like(ids) if valid is None else valid, axis=1) - 1, 0)
    tokens = TokenSet.create(jnp.zeros((*ids.shape, 1)), pos=jnp.asarray(pos, jnp.int32),
                             kind=jnp.full(ids.shape, TEXT, jnp.int8), of=(TEXT,),
                             valid=None if valid is None else jnp.asarray(valid))
    return Prompts(tokens, signals, logits)

  def _layers(self, prompts: Prompts, row: Mapping[str, Any] | None) -> tuple[LayerCache, ...]:
    """The caches of prompts, cut as a row says; None for whole ones."""
    events: dict[int, Event] = {}
    if row and row['reduce']:
      plan = make_cache_plan(row['reduce'], self.lm.host(prompts.tokens.slots))
      if row['ranking'] == 'chance':
        plan = plan.with_method(cast(Any, Chance()))
      events = {event.layer: event for event in plan.events}
    return tuple(
        _cut(prompts.tokens, signals, rope=self.lm.rope,
             event=event and _anywhere(event))
        for layer, signals in enumerate(prompts.signals) for event in (events.get(layer),))

  def _answers(self, logits: Array, cache: Cache) -> int:
    """Counts the pass keys that a model tells when it goes on."""
    told = []
    for _ in range(DIGITS + 1):
      ids = jnp.argmax(logits, axis=1).astype(jnp.int32)
      told.append(ids)
      if len(told) <= DIGITS:
        logits, cache = self._decode(self.weights, ids, cache)
    rows = np.stack(told, axis=1).tolist()
    return sum(key in re.sub(r'\D', '', self._tokens.decode(row))
               for key, row in zip(self.keys, rows, strict=True))


def _anywhere(event: Event) -> Event:
  """The same in layer 0, so that equal layers share a program."""
  step = event.step and dataclasses.replace(event.step, layer=0)
  return dataclasses.replace(event, layer=0, step=step)


def _cache(layers: Sequence[LayerCache], room: int) -> Cache:
  return Cache(tuple(layer.with_room(room) for layer in layers), jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames=('event', 'rope'))
def _cut(tokens: TokenSet, signals: Signals, *, event: Event | None, rope: Rope) -> LayerCache:
  """A layer's cache, cut as an event says."""
  start = jnp.max(jnp.where(tokens.real, tokens.pos, -1), axis=1) + 1
  kv = KV.create(jnp.swapaxes(signals.keys, 1, 2), jnp.swapaxes(signals.values, 1, 2),
                 pos=tokens.pos, valid=tokens.real, start=start, filled=tokens.slots)
  if event is None:
    return kv
  own = tokens.replace(budget=entry_budget(event, tokens))
  if event.method.span:
    signals = signals.replace(window_attention=signals.window_attention[:, :, -event.method.span:],
                              window_queries=signals.window_queries[:, -event.method.span:])
  answer = choose(event, own, signals, Place(1, rope=rope))
  return cast(LayerCache, answer.shrink(kv, positions=event.reduction.positions, rope=rope))


def _padded(rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
  """Rows as int32[B, N], padded on the right, and which of them are real."""
  ids = np.array([[*row, *[0] * (length - len(row))] for row in rows], np.int32)
  return ids, np.arange(length)[None] < np.array([[len(row)] for row in rows])


def _bytes(tree: Any) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
