"""Cuts the caches of prompts that were read once, by one method after another.

Cut caches are brought to few shapes, so that what runs on them is compiled few times: entries that
a method removes are gone up to a size, and those beyond are hidden. A hidden entry has no part in
any sum, so that what is computed is the same; tests compare with caches as they are.

Axes: B batch, N slots of a prompt, S slots of a cut cache, K kv heads, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from models.backbones.lm import LM
from models.plan import make_cache_plan
from models.plans.row_budgets import entry_budget
from models.reduction import Event, Place, Reduction, choose
from models.stack import Tap
from ops.caches.channels import KVChannels
from ops.caches.heads import KVHeads
from ops.kv_cache import KV, Cache, KVAnswer, LayerCache
from ops.primitives.kv_select import broadcast_to_heads, earliest, latest
from ops.reducers.base import CacheReducer
from ops.reducers.scoring import ScoringReducer
from ops.rope import Rope
from ops.signals import Signals
from ops.tokens import TEXT, TokenSet

Array = jax.Array
# Signals that a prompt tells of itself, and rows of those that are of the last queries.
NEEDS = frozenset({'keys', 'values', 'queries', 'plain_queries', 'last_attention',
                   'window_attention', 'received_attention', 'projected_norms', 'window_queries'})
SPAN = 32
GOLDEN = (5 ** 0.5 - 1) / 2


@dataclasses.dataclass(frozen=True)
class Everything(CacheReducer):
  """Asks for all that any method reads; it cuts nothing."""

  span = SPAN
  needs = NEEDS


@dataclasses.dataclass(frozen=True)
class Chance(ScoringReducer):
  """Ranks entries by the stat 'chance', float32[B, N, K], which is drawn for every layer and head.

  Attributes:
    sinks, recent: entries at the ends that stay in any case.
  """

  sinks: int = 0
  recent: int = 0

  def scores(self, tokens: TokenSet, signals: Signals) -> Array:
    """Returns float32[B, K, N], uniform."""
    return jnp.swapaxes(tokens.stats['chance'], 1, 2)

  def forced(self, tokens: TokenSet, num_slots: int) -> Array:
    """Names the ends."""
    return earliest(tokens, self.sinks) | latest(tokens, self.recent)


@dataclasses.dataclass(frozen=True)
class Even(ScoringReducer):
  """Keeps the first entry and others at nearly even distances, the same in all heads and layers."""

  def scores(self, tokens: TokenSet, signals: Signals) -> Array:
    """Returns float32[B, K, N], highest for the first, then by multiples of the golden ratio."""
    return broadcast_to_heads(1 - (tokens.pos * GOLDEN) % 1, signals.keys.shape[2])


# Rankings of a row that are no method of the registry, in place of that of its plan.
RANKINGS: Mapping[str, ScoringReducer] = {
    'chance': Chance(), 'chance within ends': Chance(sinks=4, recent=SPAN), 'even': Even()}


class Prompts(struct.PyTreeNode):
  """Holds prompts of N tokens each that were read.

  Attributes:
    tokens: without features.
    signals: of each layer.
    logits: float32[B, V], after the last token.
    chance: float32[L, B, N, K], for rankings by chance.
  """

  tokens: TokenSet
  signals: tuple[Signals, ...]
  logits: Array
  chance: Array


class Reader:
  """Reads prompts with a model, whose compiled programs it keeps."""

  def __init__(self, lm: LM) -> None:
    self.lm = lm
    self._read = jax.jit(functools.partial(lm.apply, method=_read))
    self._sizes: dict[Any, tuple[int, int]] = {}

  def __call__(self, weights: Any, ids: np.ndarray, seed: int) -> Prompts:
    """Reads ids int32[B, N]; `weights` are stacked, so that all layers share a program."""
    # One by one, and joined layer by layer: signals of long prompts are large, and no two of a
    # layer's are held any longer than needed.
    logits, parts = zip(*(self._read(weights, jnp.asarray(row[None])) for row in ids), strict=True)
    signals = tuple(jax.tree.map(lambda *each: jnp.concatenate(each),
                                 *(part.pop(0) for part in parts)) for _ in range(self.lm.depth))
    pos = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    tokens = TokenSet.create(jnp.zeros((*ids.shape, 1)), pos=pos, of=(TEXT,),
                             kind=jnp.full(ids.shape, TEXT, jnp.int8))
    chance = jax.random.uniform(jax.random.key(seed), (self.lm.depth, *ids.shape, self.lm.kv_heads))
    return Prompts(tokens, signals, jnp.concatenate(logits), chance)

  def plan(self, row: Mapping[str, Any], slots: int) -> tuple[Event | None, ...]:
    """Returns what a row does to the cache of each layer; None where it is left whole."""
    if row['where'] != 'cache':
      return (None,) * self.lm.depth
    plan = make_cache_plan(row['reduce'], self.lm.host(slots))
    if row['ranking'] in RANKINGS:
      plan = plan.with_method(cast(Any, RANKINGS[row['ranking']]))
    events = {event.layer: event for event in plan.events}
    # The same in layer 0, so that equal layers share a program.
    return tuple(event and dataclasses.replace(
        event, layer=0, step=event.step and dataclasses.replace(event.step, layer=0))
                 for event in map(events.get, range(self.lm.depth)))

  def cut(self, prompts: Prompts, events: Sequence[Event | None], sizes: Sequence[int],
          room: int) -> tuple[Cache, float]:
    """Cuts the caches of prompts.

    Args:
      prompts: of N tokens.
      events: one a layer, of `plan`.
      sizes: of caches, up to N; all layers get the least in which each has place.
      room: number of tokens to come.

    Returns:
      The caches, and what they keep of whole ones: the share of bytes as the methods store them,
      or that of entries where places stay empty.
    """
    stored = [self._stored(prompts, event) for event in events]
    size = min(size for size in sizes if size >= max(slots for _, slots in stored))
    share = sum(count for count, _ in stored) / (len(events) * self._stored(prompts, None)[0])
    layers = tuple(
        _cut(prompts.tokens.replace(stats={'chance': chance}), signals, event=event, size=size,
             room=room, rope=self.lm.rope)
        for event, signals, chance in zip(events, prompts.signals, prompts.chance, strict=True))
    entries = sum(float(layer.valid[..., :size].mean()) for layer in layers) / len(layers)
    share = min(share, entries * size / prompts.tokens.slots)
    return Cache(layers, jnp.zeros((), jnp.int32)), share

  def _stored(self, prompts: Prompts, event: Event | None) -> tuple[int, int]:
    """Bytes of a layer's cut cache, and the slots that it takes as a plain one."""
    key = event, prompts.tokens.pos.shape
    if key not in self._sizes:
      tokens = prompts.tokens.replace(stats={'chance': prompts.chance[0]})
      shapes, kept = jax.eval_shape(functools.partial(
          _shrunk, event=event, rope=self.lm.rope), tokens, prompts.signals[0])
      self._sizes[key] = (sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)),
                          kept.filled)
    return self._sizes[key]


def plain(layer: KV, size: int, room: int) -> KV:
  """Returns a layer's cache with S slots, the entries of each head by themselves, and room."""
  shape = layer.k.shape[:3]

  def each_head(x: Array) -> Array:
    return jnp.broadcast_to(x.reshape(shape[0], -1, shape[2]), shape)

  layer = layer.replace(pos=each_head(layer.pos), valid=each_head(layer.valid),
                        bias=None if layer.bias is None else each_head(layer.bias))
  return layer.with_room(size - layer.filled).replace(filled=size).with_room(room)


def _read(lm: LM, ids: Array) -> tuple[Array, list[Signals]]:
  tap = Tap(NEEDS, lambda first, tokens, signals: signals,
            reduction=Reduction('everything', cast(Any, Everything())))
  tokens, out = lm.stack(lm.embed(ids), tap)
  return lm.logits(lm.norm(tokens.x[:, -1])), out['taps']


@functools.partial(jax.jit, static_argnames=('event', 'size', 'room', 'rope'))
def _cut(tokens: TokenSet, signals: Signals, *, event: Event | None, size: int, room: int,
         rope: Rope) -> KV:
  return plain(_shrunk(tokens, signals, event=event, rope=rope)[1], size, room)


def _shrunk(tokens: TokenSet, signals: Signals, *, event: Event | None,
            rope: Rope) -> tuple[LayerCache, KV]:
  """A layer's cache as an event's method stores it, and as a plain one that is read alike."""
  kv, answer = _asked(tokens, signals, event, rope)
  if event is None or answer is None:
    return kv, kv
  how: dict[str, Any] = {'positions': event.reduction.positions, 'rope': rope}
  if isinstance(answer, KVHeads):
    pos = jnp.repeat(kv.pos[:, None], kv.k.shape[1], axis=1)
    return answer.shrink(kv, **how), kv.replace(pos=pos, valid=answer.mask(kv.filled))
  if isinstance(answer, KVChannels):
    width = jnp.arange(kv.k.shape[3])[None, None, None]
    there = jnp.any(answer.channels[..., None] == width, axis=2)
    keys = kv.k * there[:, :, None]
    whole = KV.create(keys, kv.v, pos=kv.pos, valid=kv.valid, start=kv.start, filled=kv.filled)
    entries = answer.entries
    return answer.shrink(kv, **how), whole if entries is None else entries.shrink(whole, **how)
  cut = cast(KV, answer.shrink(kv, **how))
  return cut, cut


def _asked(tokens: TokenSet, signals: Signals, event: Event | None,
           rope: Rope) -> tuple[KV, KVAnswer | None]:
  """A layer's whole cache, and what a method makes of it."""
  kv = KV.create(jnp.swapaxes(signals.keys, 1, 2), jnp.swapaxes(signals.values, 1, 2),
                 pos=tokens.pos, valid=tokens.real, filled=tokens.slots,
                 start=jnp.full(tokens.pos.shape[:1], tokens.slots, jnp.int32))
  if event is None:
    return kv, None
  own = tokens.replace(budget=entry_budget(event, tokens))
  if event.method.span:
    signals = signals.replace(window_attention=signals.window_attention[:, :, -event.method.span:],
                              window_queries=signals.window_queries[:, -event.method.span:])
  return kv, choose(event, own, signals, Place(1, rope=rope))
