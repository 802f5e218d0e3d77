"""Asks a method, and carries its answer out: the one place where tokens are reduced.

A stack calls it at its sites, the projector once, a language model once a layer for its cache;
tools and tests call the same. It knows parameters, mesh, mode, causal order, losses and overflow; a
method knows none of them.

Axes: B batch, N slots before, M slots after, T original tokens, P numbers in a position.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ops import attention
from ops import tokens as tk
from ops.assignments import Assignment, Gather, Mix
from ops.budgets import Step
from ops.kv_cache import KV, Recent
from ops.moves.rows import expand_like, take
from ops.primitives.select import ranks
from ops.reducers.method import EvictingMethod, Method, WatchingMethod
from ops.rope import Rope, sequence_index
from ops.signals import STATIC, Signals, by_head, latest
from ops.tokens import TEXT, TokenSet

Array = jax.Array
Params = Mapping[str, Any]

# Axes of a mesh (lib/runtime/sharding.py) that divide the rows of a batch.
BATCH_AXES = ('data', 'fsdp')


@dataclasses.dataclass(frozen=True)
class Reduction:
  """Holds a method, and how its answers are carried out: what one config says, but for the counts.

  Attributes:
    name: the method's name in `models.plan.methods()`.
    method: the method itself: a frozen dataclass, or a Flax module without parameters yet.
    mode: 'gather' really removes slots; 'mask' keeps them as padding (to train hard decisions).
    watch: layers that the method measures in addition to those it acts in.
    of: kinds that it may touch (ops/tokens.py), None for what the tokens say themselves.
    positions: one of `models.plans.events.POSITIONS`.
    capacity: of a cache, entries that a head may hold while a model decodes; 0 lets it grow.
    holds: one of `models.plans.events.HOLDS`.
  """

  name: str
  method: Method
  mode: str = 'gather'
  watch: tuple[int, ...] = ()
  of: tuple[int, ...] | None = None
  positions: str = 'keep'
  holds: str = 'none'
  capacity: int = 0

  def asks(self, event: Event) -> bool:
    """Returns whether the method is asked of a prompt, and not only of what is decoded."""
    return not self.capacity or event.slots_out < event.slots_in

  @property
  def held(self) -> int:
    """Returns how many tokens of a row it holds, of those that its budget counts."""
    return int(self.holds == 'last' and (self.of is None or TEXT in self.of))

  @property
  def learned(self) -> bool:
    """Returns whether the method has parameters."""
    return isinstance(self.method, nn.Module)

  def view(self, tokens: TokenSet) -> TokenSet:
    """Returns the tokens with the kinds that the method may touch."""
    return tokens if self.of is None else tokens.replace(of=self.of)


@dataclasses.dataclass(frozen=True)
class Event:
  """Says what changes at one place of a model.

  Attributes:
    layer: at or behind which it happens.
    site: where in the layer, one of `models.plans.events.SITES`; 'cache' on the cache of the layer.
    slots_in, slots_out: tokens before and after it, protected ones included.
    reduction: the method that decides.
    protected: slots that it must leave alone, padding among them; None for what the tokens say.
    several: whether the plan has other reductions too.
    step: what the budget asked, by which shorter rows find their own counts; None for all alike.
    kind: 'cut', there are fewer tokens from here on; 'insert', tokens join that have waited;
      'branch', a part of the layer runs on fewer tokens, and what it adds to them is added to the
      residual stream: all tokens stay; or 'expand', the tokens of before a cut are back.
    parts: which part of the layer a branch is, one of `models.plans.events.PARTS`.
    since: of an expansion, the layer of the cut.
  """

  layer: int
  site: str
  slots_in: int
  slots_out: int
  reduction: Reduction
  protected: int | None = None
  several: bool = False
  step: Step | None = None
  kind: str = 'cut'
  parts: str = ''
  since: int | None = None

  def kept(self, now: Array, start: Array, most: int, fixed: int = 0) -> Array:
    """Returns how many of the tokens that its budget counts each row keeps, int32[B].

    Args:
      now: int32[B], tokens that it counts.
      start: int32[B], those that entered the first layer.
      most: the largest that `start` can be.
      fixed: slots that stay and are not counted, at most, where `protected` does not say it.
    """
    if self.step is None:
      return jnp.minimum(now, self.slots_out - (self.protected or 0))
    fixed = fixed if self.protected is None else self.protected
    # Worked out on the host, exactly: products of a ratio may not fit into int32.
    counts = np.arange(most + 1)
    asked = np.minimum(self.step.keep(counts, counts), np.iinfo(np.int32).max)
    least = np.array([self.method.min_slots(int(n) + fixed, fixed + self.reduction.held) - fixed
                      for n in counts])
    index = start if self.step.of == 'start' else now
    kept: Array = self.step.kept(jnp.asarray(asked, jnp.int32)[index], now,
                                 jnp.asarray(least, jnp.int32)[now])
    return kept

  def view(self, tokens: TokenSet) -> TokenSet:
    """Returns the tokens with the kinds and the protected slots that the method is to see."""
    tokens = self.reduction.view(tokens)
    return tokens if self.protected is None else tokens.replace(protected=self.protected)

  @property
  def method(self) -> Method:
    """Returns the method that decides."""
    return self.reduction.method

  @property
  def reads(self) -> int | None:
    """Returns the layer whose signals the method reads: the one above where this one begins.

    An expansion reads none.
    """
    if self.kind == 'expand':
      return None
    begins = self.site == 'before' or self.parts in ('both', 'attention')
    return self.layer - begins

  @property
  def idle(self) -> bool:
    """Returns whether a branch leaves a prompt's layer as it is: its method need not be asked."""
    method = self.method
    return self.kind == 'branch' and self.slots_in == self.slots_out and not (
        self.reduction.learned or method.adaptive or self.parts == 'core')

  @property
  def parameters(self) -> str:
    """Returns the name of a learned method's parameters at this place.

    Of several reductions they have the method's name behind the layer; those that all layers share
    have it alone.
    """
    if self.method.tied:
      return f'reducer_{self.reduction.name}'
    return f'reducer_{self.layer:02d}' + (f'_{self.reduction.name}' if self.several else '')


@dataclasses.dataclass(frozen=True)
class Place:
  """Describes where methods act: what a host knows of itself before anything runs.

  Attributes:
    depth: number of layers.
    grid: (rows, columns) of the tokens, or None.
    rope: how positions become rotations, or None.
    mesh: the devices; with it, methods run on the rows of each device by themselves.
    causal: whether a token sees only those before it; then a slot takes the latest position of the
      tokens merged into it, or one behind all others before that, so that no token sees a later one
      through a group, and slots stand in the order of their positions, padding last (in mode 'mask'
      they stay where they are).
    one_sequence, crop_grid, num_crops: as in `Signals`.
  """

  depth: int
  grid: tuple[int, int] | None = None
  rope: Rope | None = None
  mesh: Mesh | None = None
  causal: bool = False
  one_sequence: bool = True
  crop_grid: tuple[int, int] | None = None
  num_crops: int = 1

  def by_rows(self, function: Any, whole: int = 0, rows: int = 2) -> Any:
    """Returns a function that runs on the rows of each device by itself, if there is a mesh.

    Args:
      function: of `whole` trees, which every device has whole, then `rows` that are divided: tokens
        and signals.
      whole, rows: how many.
    """
    if self.mesh is None:
      return function
    divided = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        function, mesh=self.mesh, axis_names=set(BATCH_AXES), check_vma=False, out_specs=divided,
        in_specs=(PartitionSpec(),) * whole + (divided,) * rows)

  def signals(self, signals: Signals, needs: frozenset[str], layer: int,
              slots: int | None = None) -> Signals:
    """Returns the named signals alone, and those that are known without running a layer."""
    wanted = {name: getattr(signals, name) for name in (needs - STATIC) | (needs & {'project'})}
    return Signals(layer=layer, depth=self.depth, slots=slots).replace(
        **wanted, grid=self.grid, rope=self.rope, one_sequence=self.one_sequence,
        crop_grid=self.crop_grid, num_crops=self.num_crops)


@dataclasses.dataclass(frozen=True)
class Reduced:
  """Holds what became of the tokens.

  Attributes:
    tokens: M slots (N in mode 'mask').
    assignment: what the method answered, in causal order where there is one.
    losses: {name: float32[B]} of a learned method.
    overflow: int32[B], tokens that an adaptive method wanted to keep beyond its capacity, or None.
  """

  tokens: TokenSet
  assignment: Assignment
  losses: dict[str, Array]
  overflow: Array | None


def reduce(event: Event, tokens: TokenSet, signals: Signals, place: Place, *,
           budget: Array | None = None, params: Params | None = None,
           rng: Array | None = None) -> Reduced:
  """Asks the method of an event, and reduces the tokens.

  Args:
    event: a cut, or a branch: then the tokens are those that run it.
    tokens: N slots.
    signals: at least those that the method needs.
    place: where this happens.
    budget: int32[B], free tokens that each row keeps; None for as many as fit.
    params: of a learned method.
    rng: turns training of a learned method on.
  """
  reduction = event.reduction
  apply = tk.reduce_masked if reduction.mode == 'mask' else tk.reduce
  answer = _call if event.kind == 'branch' else ask  # A branch may gate even where all tokens run.

  def decide(params: Params | None, rng: Array | None, project: Any, tokens: TokenSet,
             signals: Signals) -> tuple[TokenSet, Assignment, dict[str, Array]]:
    assignment, losses = answer(
        reduction.method, tokens, signals.replace(project=project), params, _own(rng, place),
        num_slots=event.slots_out)
    return apply(tokens, assignment), assignment, losses

  seen = event.view(tokens).replace(budget=budget)
  signals = place.signals(signals, reduction.method.needs, event.layer, event.slots_in)
  # The names let lib/cost/jaxpr.py tell the method's own products from the backbone's.
  with jax.named_scope('reduction'):
    reduced, assignment, losses = place.by_rows(decide, whole=3)(
        params, rng, signals.project, seen, signals.replace(project=None))
  if place.causal:
    if event.kind == 'branch' and not isinstance(assignment, Gather):
      raise ValueError(f'{reduction.name} joins tokens in a branch, where causal attention would '
                       'give earlier ones what later ones know: choose a method that picks tokens')
    reduced, assignment = _order_causally(reduction, seen, reduced, assignment)
  overflow = None
  if assignment.wanted is not None:
    room = tk.num_left(seen, event.slots_out)
    overflow = jnp.maximum(assignment.wanted - (room if isinstance(room, int) else room[:, 0]), 0)
  return Reduced(reduced.replace(of=tokens.of, protected=tokens.protected), assignment, losses,
                 overflow)


def insert(tokens: TokenSet, joining: TokenSet, place: Place) -> TokenSet:
  """Returns tokens with others that have waited, in causal order where there is one.

  Args:
    tokens: N slots.
    joining: I slots of the same rows, which have not run (`ops.tokens.part`).
    place: where this happens.

  Returns:
    N + I slots.
  """
  def join(tokens: TokenSet, joining: TokenSet) -> TokenSet:
    joined = tk.join(tokens, joining)
    if not place.causal:
      return joined
    ordered = tk.reduce(joined, Gather(_position_order(joined), joined.slots))
    return ordered.replace(padding='last')

  with jax.named_scope('reduction'):
    inserted: TokenSet = place.by_rows(join)(tokens, joining)
    return inserted


def expand(event: Event, before: TokenSet, after: TokenSet, now: TokenSet,
           place: Place) -> TokenSet:
  """Returns the tokens of before a cut, with features of now.

  Args:
    event: an expansion.
    before: N slots, as they entered the cut.
    after: M slots, as they left it.
    now: K slots.
    place: where this happens.

  Returns:
    N slots. What methods have taken down meanwhile follows the original tokens; a token that has
    been dropped keeps what it had, or 0.
  """
  def back(before: TokenSet, after: TokenSet, now: TokenSet) -> TokenSet:
    merge, stats = tk.became(before, now), {}
    there = merge.dst < now.slots
    for name, value in now.stats.items():
      new = merge.restore(value)
      old = before.stats.get(name, jnp.zeros_like(new))
      stats[name] = jnp.where(expand_like(there, new), new, old)
    return before.replace(x=event.method.expand(before, after, now), stats=stats)

  view = event.reduction.view
  with jax.named_scope('reduction'):
    tokens: TokenSet = place.by_rows(back, rows=3)(view(before), view(after), now)
  return tokens.replace(of=now.of)


def choose(event: Event, tokens: TokenSet, signals: Signals, place: Place, *,
           params: Params | None = None) -> Any:
  """Asks the method of an event and returns its answer, for a host that carries it out itself.

  Args:
    event: of a cache, whose methods answer with an `ops.kv_cache.KVAnswer`; or of a branch of
      'core', which answer with an `ops.primitives.sparse_attention.Pattern`.
    tokens, signals, place, params: as in `reduce`.
  """
  method = event.method

  def decide(params: Params | None, tokens: TokenSet, signals: Signals) -> Any:
    return _call(method, tokens, signals, params, None, num_slots=event.slots_out)[0]

  signals = place.signals(signals, method.needs, event.layer, event.slots_in)
  with jax.named_scope('reduction'):
    return place.by_rows(decide, whole=1)(params, event.view(tokens), signals)


# Signals of a token that is decoded, and of those that a cache keeps in mind.
DECODED = frozenset({'keys', 'values', 'last_attention', 'window_attention', 'window_queries'})
OF_RECENT = frozenset({'window_attention', 'window_queries'})


def cache_needs(reduction: Reduction) -> frozenset[str]:
  """Returns the signals of a prompt that a reduction of the cache reads, for decoding too."""
  method, needs = reduction.method, reduction.method.needs
  if reduction.capacity:
    method = cast(EvictingMethod, method)
    needs |= method.update_needs
    needs |= {'window_queries'} if method.evict_needs & OF_RECENT else set()
  return needs - STATIC


def start_upkeep(event: Event, kv: KV, tokens: TokenSet, signals: Signals, place: Place) -> KV:
  """Returns a prompt's cache with what the method of an event takes down of it for decoding.

  Args:
    event: of a cache.
    kv: of N slots, not yet cut.
    tokens, signals: of the prompt.
    place: as in `reduce`.
  """
  method = cast(EvictingMethod, event.method)
  heads = 1 if method.shared else kv.k.shape[1]
  if method.evict_needs & OF_RECENT:
    index = latest(sequence_index(tokens.pos), tokens.valid, tokens.x.shape[:2])[:, -method.span:]
    pos = take(jnp.where(tokens.real, sequence_index(tokens.pos), -1), index)
    kv = kv.replace(recent=Recent(signals.window_queries, pos))
  if not method.tracks:
    return kv
  told = by_head(place.signals(signals, method.update_needs, event.layer), heads)
  entries = _entries(kv, method)
  queries = jnp.repeat(jnp.sum(tokens.real, axis=1, dtype=jnp.int32), heads)
  stats = place.by_rows(method.update, rows=3)(entries, told, queries)
  return kv.replace(stats={name: _each_head(x, kv) for name, x in stats.items()})


def keep_up(kv: KV, signals: Signals, valid: Array | None, layer: int, place: Place) -> KV:
  """Asks the method that keeps a cache within bounds, after one more token a row.

  Args:
    kv: of one layer, with `upkeep`.
    signals: `queries` float[B, 1, H, d] and `last_attention` float32[B, H, S] of the token.
    valid: bool[B], rows that have one more token, or None for all.
    layer: of the cache.
    place: as in `reduce`.
  """
  assert kv.upkeep is not None
  method, capacity = cast(EvictingMethod, kv.upkeep.method), kv.upkeep.capacity
  kv = kv.remember(signals.queries[:, 0], valid)
  heads = 1 if method.shared else kv.k.shape[1]
  told = place.signals(signals.replace(
      keys=jnp.swapaxes(kv.k, 1, 2), values=jnp.swapaxes(kv.v, 1, 2),
      received_attention=signals.last_attention,
      window_queries=None if kv.recent is None else kv.recent.queries),
      (method.update_needs | method.evict_needs | OF_RECENT) - {'window_attention'}, layer)
  since = cast(Array, kv.since)
  read = jnp.ones_like(since) if valid is None else valid.astype(jnp.int32)
  due = since >= method.every
  read, due_rows, window = jax.tree.map(lambda x: jnp.repeat(x, heads, axis=0),
                                        (read, due, kv.recent and kv.recent.pos))

  def ask(tokens: TokenSet, told: Signals, queries: Array, due: Array,
          window: Array | None) -> tuple[dict[str, Array], Array, Array | None]:
    if method.tracks:
      stats = method.update(tokens, told, queries)
      tokens = tokens.replace(stats=jax.tree.map(
          lambda new, old: jnp.where(queries[:, None] > 0, new, old), stats, tokens.stats))

    def evict() -> Array:
      seen = told
      if window is not None and 'window_attention' in method.evict_needs:
        seen = told.replace(window_attention=_window_attention(tokens, told, window))
      stays = method.evict(tokens, seen, num_slots=capacity)
      return jnp.where(due[:, None], stays, tokens.real)

    if hasattr(method, 'absorb'):
      stays = evict()
      return tokens.stats, stays, method.absorb(tokens, told, stays)
    if method.every == 1:
      return tokens.stats, evict(), None
    return tokens.stats, jax.lax.cond(jnp.any(due), evict, lambda: tokens.real), None

  with jax.named_scope('reduction'):
    stats, stays, given = place.by_rows(ask, rows=5)(
        _entries(kv, method), by_head(told, heads), read, due_rows, window)
    kv = kv.replace(stats={name: _each_head(x, kv) for name, x in stats.items()},
                    since=jnp.where(due, 0, since))
    stays = _each_head(stays, kv)
    if given is not None:
      kv = kv.absorb(stays, _each_head(given, kv))
    return kv.drop(stays)


def _entries(kv: KV, method: EvictingMethod) -> TokenSet:
  """The entries of a cache as tokens of R rows, as `EvictingMethod` has them."""
  shape = kv.k.shape[:3]

  def rows(x: Array) -> Array:
    x = jnp.broadcast_to(x.reshape(shape[0], -1, shape[2]), shape)
    return x[:, 0] if method.shared else x.reshape(-1, shape[2])

  pos = rows(kv.pos)
  stats = {name: rows(kv.stats[name]) if kv.stats else jnp.zeros(pos.shape, jnp.float32)
           for name in method.tracks}
  return TokenSet.create(jnp.zeros((*pos.shape, 1)), pos=pos, valid=rows(kv.valid), stats=stats,
                         kind=jnp.full(pos.shape, TEXT, jnp.int8), of=(TEXT,))


def _each_head(x: Array, kv: KV) -> Array:
  """[R, S] as [B, K, S]."""
  shape = kv.k.shape[:3]
  return jnp.broadcast_to(x.reshape(shape[0], -1, shape[2]), shape)


def _window_attention(tokens: TokenSet, signals: Signals, window: Array) -> Array:
  """float32[R, G, W, S], rows of the latest queries, at int32[R, W]; zeros for those not there."""
  rows = attention.rows(
      signals.window_queries, signals.keys, None, positions=tokens.pos, last=jnp.maximum(window, 0),
      bias=jnp.where(tokens.real, 0.0, attention.HIDDEN_LOGIT))
  return jnp.where((window >= 0)[:, None, :, None], rows, 0.0)


def watch(reduction: Reduction, layer: int, tokens: TokenSet, signals: Signals,
          place: Place) -> TokenSet:
  """Returns the tokens with the stats that a method takes down of a layer that it watches."""
  method = cast(WatchingMethod, reduction.method)
  with jax.named_scope('reduction'):
    stats = place.by_rows(method.watch)(
        reduction.view(tokens), place.signals(signals, method.watch_needs, layer))
  return tokens.replace(stats=tokens.stats | stats)


def learned_parameters(host: nn.Module, event: Event, tokens: TokenSet, signals: Signals,
                       place: Place) -> Params | None:
  """Returns a learned method's parameters at a place, which its host holds; None for any other.

  They are made while the host's are.

  Args:
    host: the Flax module that is being run.
    event, tokens, signals, place: as in `reduce`.

  Raises:
    ValueError: the host has parameters, but none for this method here.
  """
  method, name = event.method, event.parameters
  if not isinstance(method, nn.Module):
    return None
  if host.is_initializing() and not host.has_variable('params', name):
    seen = event.view(tokens)
    asked = place.signals(signals, method.needs, event.layer, event.slots_in)
    return cast(Params, host.param(name, lambda key: method.init(
        key, seen, asked, num_slots=event.slots_out).get('params', {})))
  if not host.has_variable('params', name):
    raise ValueError(f'{event.reduction.name} in layer {event.layer} needs learned parameters '
                     f'{name!r}, which this checkpoint lacks: train with this plan, or start it '
                     'from fresh parameters')
  return cast(Params, host.get_variable('params', name))


class ReducerParameters(nn.Module):
  """Holds the parameters of learned methods for a host that makes its own in `setup`."""

  @nn.compact
  def __call__(self, event: Event, tokens: TokenSet, signals: Signals,
               place: Place) -> Params | None:
    """Returns the parameters of a learned method at a place, as `learned_parameters`."""
    return learned_parameters(self, event, tokens, signals, place)


def ask(method: Callable[..., Assignment], tokens: TokenSet, signals: Signals,
        params: Params | None = None, rng: Array | None = None, *,
        num_slots: int) -> tuple[Assignment, dict[str, Array]]:
  """Asks a method, unless everything is to stay: then the answer is the identity.

  Args:
    method: the method, learned or not.
    tokens, signals: as it takes them.
    params: of a learned method.
    rng: turns its training on.
    num_slots: M.

  Returns:
    Its assignment, and the losses {name: float32[B]} that a learned method sows.
  """
  losses: dict[str, Array] = {}

  def call(tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    answer, sown = _call(method, tokens, signals, params, rng, num_slots=num_slots)
    losses.update(sown)
    return cast(Assignment, answer)

  return tk.decide(call, tokens, signals, num_slots=num_slots), losses


def _call(method: Callable[..., Any], tokens: TokenSet, signals: Signals, params: Params | None,
          rng: Array | None, *, num_slots: int) -> tuple[Any, dict[str, Array]]:
  if not isinstance(method, nn.Module):
    return method(tokens, signals, num_slots=num_slots), {}
  answer, sown = method.apply(
      {'params': params or {}}, tokens, signals, num_slots=num_slots, mutable=['losses'],
      rngs=None if rng is None else {'dropout': rng})
  return answer, {name: value for name, (value,) in sown.get('losses', {}).items()}


def _own(rng: Array | None, place: Place) -> Array | None:
  """A device's own key: each sees its rows alone, and with one key all would draw the same."""
  if rng is None or place.mesh is None:
    return rng
  return jax.random.fold_in(rng, jax.lax.axis_index(BATCH_AXES))


def _order_causally(reduction: Reduction, tokens: TokenSet, reduced: TokenSet,
                    assignment: Assignment) -> tuple[TokenSet, Assignment]:
  """Reduced tokens in the order of the latest position in each group, and there or at anchors."""
  if isinstance(assignment, Mix) or assignment.features is not None:
    raise ValueError(f'{reduction.name} mixes all tokens into each, so causal attention would '
                     'see later ones: choose a method that picks or joins tokens')
  anchors, reduced = reduced.pos, reduced.replace(pos=_latest_position(tokens, reduced))
  if assignment.behind is not None and reduction.positions == 'compact':
    reduced = reduced.replace(pos=_behind(tokens, reduced, assignment))
  order = _position_order(reduced)
  if reduction.positions == 'anchor':
    reduced = reduced.replace(pos=_at_anchors(anchors, order))
  if reduction.mode == 'gather':
    sort = Gather(order, reduced.slots)
    reduced, assignment = tk.reduce(reduced, sort), tk.compose(assignment, sort)
    reduced = reduced.replace(padding='last')
    order = tk.identity(reduced).src
  if reduction.positions == 'compact':
    reduced = reduced.replace(pos=ranks(order, reduced.slots))
  return reduced, assignment


def _position_order(tokens: TokenSet) -> Array:
  """int32[B, N]: slots in the order of their positions, padding last."""
  position = jnp.where(tokens.real, sequence_index(tokens.pos), jnp.iinfo(jnp.int32).max)
  return jnp.argsort(position, axis=1, stable=True).astype(jnp.int32)


def _at_anchors(anchors: Array, order: Array) -> Array:
  """int32[B, M(, P)]: positions of anchors, each behind those of the slots before it in an order.

  Nothing stands between most anchors and the latest token of their groups; then they stay.
  """
  place = jnp.broadcast_to(jnp.arange(order.shape[1], dtype=jnp.int32)[None], order.shape)
  # The least growing sequence of whole numbers that is nowhere below.
  growing = jax.lax.cummax(take(sequence_index(anchors), order) - place, axis=1) + place
  own = take(growing, ranks(order, order.shape[1]))
  return own if anchors.ndim == 2 else anchors.at[:, :, 0].set(own)


def _behind(tokens: TokenSet, reduced: TokenSet, assignment: Assignment) -> Array:
  """int32[B, M]: positions of slots, of those that stand behind others that of the last free one.

  They tie with it: behind it by their slots, they are to be numbered anew.
  """
  behind = cast(Array, assignment.behind)
  if reduced.slots < tokens.slots:
    behind = take(behind, assignment.src)
  last = jnp.max(jnp.where(tokens.free, sequence_index(tokens.pos), -1), axis=1, keepdims=True)
  return jnp.where(behind & reduced.real, last, reduced.pos)


def _latest_position(tokens: TokenSet, reduced: TokenSet) -> Array:
  """int32[B, M(, P)]: position of each slot's latest token; the slot's own if it has none."""
  position = take(sequence_index(tokens.pos), jnp.maximum(tokens.owner, 0))
  slot = jnp.where(reduced.owner >= 0, reduced.owner, reduced.slots)
  latest = jax.vmap(functools.partial(jax.ops.segment_max, num_segments=reduced.slots))(
      position, slot)
  latest = jnp.maximum(latest, sequence_index(reduced.pos))
  if reduced.pos.ndim == 2:
    return latest
  # Positions of several numbers follow the first one, from the slot that had it.
  source = jnp.argmax(latest[:, :, None] == sequence_index(tokens.pos)[:, None], axis=2)
  return take(tokens.pos, source)
