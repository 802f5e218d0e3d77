"""A stack of equal blocks, cut into stages: the only place that knows where tokens change.

Axes: B batch, N slots now, L layers.

Parameters are stored once, stacked [L, ...], whatever the method and the schedule, so one
checkpoint serves all. They are read from either storage (models/storage.py): that stack, or a tuple
of L trees. Storage is not execution: a layer that runs alone on a slice of the stack pays a copy of
its weights on CPU, a run of equal layers as one `lax.scan` compiles once; `fastest_storage` picks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models import reduction
from models.blocks import ReducibleBlock, add
from models.memory import Recall
from models.plans.events import Plan
from models.plans.row_budgets import row_budgets
from models.reduction import BATCH_AXES, Event, Place, Reduced, Reduction
from models.storage import LayerSlice, Params, Weights, layer_of, unstack
from ops import choices
from ops import tokens as tk
from ops.assignments import Gather
from ops.kv_cache import KV
from ops.primitives.sparse_attention import Pattern
from ops.rope import Rope
from ops.signals import MLP_SIGNALS, NEXT_LAYER, Signals
from ops.tokens import TokenSet
from ops.unmerge import collapse

Array = jax.Array
# The auxiliary outputs of a model, by name (`Stack.__call__`).
Outputs = dict[str, Any]
REMAT = ('none', 'full', 'dots')
# Signals that are means over query rows of a method's choice (`rows`).
ROWS = frozenset({'row_attention', 'next_row_attention'})


@dataclasses.dataclass(frozen=True)
class Tap:
  """Reads something out of every layer as it runs (keys and values, for a cache).

  Attributes:
    needs: names of `Signals` fields that it reads.
    read: (first, tokens, signals) -> a tree of arrays, with the tokens and signals of a layer's
      attention; `first` is static, the first layer of the run that the layer is in.
    starts: layers at which `read` may return other shapes than in the layer above: no run crosses
      them.
    reduction: that whose `span` and `rows` the needs refer to, or None.
  """

  needs: frozenset[str]
  read: Callable[[int, TokenSet, Signals], Any]
  starts: tuple[int, ...] = ()
  reduction: Reduction | None = None


class Stack(nn.Module):
  """Runs L equal blocks, with a plan's reductions between them.

  A 'dropout' key turns training on: here, in the blocks and in learned methods.

  Attributes:
    block: an unbound `ReducibleBlock`.
    depth: L.
    plan: where to reduce tokens and how, or None.
    grid: (rows, columns) of the patch grid, passed to methods, or None.
    remat: 'none', 'full' (the backward pass recomputes each half of a block) or 'dots' (keeps its
      products).
    mesh: the device mesh; with it, reductions run batch-local inside shard_map.
    capture: whether to return every layer's features (for parity tests and pictures).
    layers: (start, stop) to run layers start to stop - 1 alone, None for all.
    causal: whether the blocks are causal, as `models.reduction.Place` has it.
    rope: how positions become rotations, passed to methods, or None.
    others: a block with the same parameters that runs some layers in place of `block`, and these
      layers; None for none.
  """

  block: ReducibleBlock
  depth: int
  plan: Plan | None = None
  grid: tuple[int, int] | None = None
  remat: str = 'none'
  mesh: Mesh | None = None
  capture: bool = False
  layers: tuple[int, int] | None = None
  causal: bool = False
  rope: Rope | None = None
  others: tuple[ReducibleBlock, tuple[int, ...]] | None = None

  @nn.compact
  def __call__(self, tokens: TokenSet, tap: Tap | None = None,
               recall: Recall | None = None) -> tuple[TokenSet, Outputs]:
    """Runs all layers.

    Args:
      tokens: as the blocks take them.
      tap: reads something out of every layer, or None.
      recall: lets some layers read a memory, or None.

    Returns:
      The final tokens, and a dict: 'before' and 'cuts' {layer: TokenSet before, and after, the
      cut}, 'expanded' {layer: TokenSet, all tokens that are back}, 'branches' {layer: TokenSet,
      those that ran a part of it}, 'overflow' {layer: int32[B], the tokens that an adaptive method
      wanted to keep beyond its capacity}, 'losses' {name: float32[B]} of learned methods, with
      `capture` 'hidden', the features after each layer, with a tap 'taps', the tree that it read in
      each layer, and 'budgets', for each event of the plan int32[B], the free tokens that each row
      keeps, or None where no row has padding.

    Raises:
      ValueError: for an unknown `remat`, or a learned method whose parameters are missing.
    """
    choices.check('remat=', self.remat, REMAT)
    weights = self._weights(tokens)
    key = self.make_rng('dropout') if self.has_rng('dropout') else None
    events = [self._of_row(event) for event in self.plan.events] if self.plan else []
    budgets = row_budgets(events, tokens)
    out: Outputs = {'before': {}, 'cuts': {}, 'expanded': {}, 'branches': {}, 'overflow': {},
                    'losses': {}, 'hidden': [], 'taps': [], 'budgets': budgets}
    signals = Signals()
    added, tokens = tokens.added, tokens.replace(added={})
    waiting = {}
    for event in self.plan.inserts if self.plan else ():
      tokens, waiting[event] = self.place.by_rows(functools.partial(_part, event))(tokens, signals)
    begins = (*(tap.starts if tap else ()), *added, *(recall.begins if recall else ()))
    for start, stop in self._stages(weights, begins):
      for event in self._events(start, 'before'):
        if event in waiting:
          tokens, signals = reduction.insert(tokens, waiting[event], self.place), Signals()
        else:
          tokens, signals = self._reduce(tokens, signals, event, weights, key, out)
      if start in added:
        tokens = add(tokens, collapse(added[start], tokens.owner, slots=tokens.slots))
      if stop - start > 1:
        tokens, hidden, taps = self._run(tokens, weights, start, stop, key, tap)
        out['hidden'] += hidden
        out['taps'] += taps
        continue
      tokens = self._divide_rows(tokens)
      if key is None:
        # Else a compiler may slice and convert this layer's weights early, and hold them meanwhile.
        tokens, weights = jax.lax.optimization_barrier((tokens, weights))
      tokens, signals = self._run_alone(tokens, signals, weights, start, key, tap, out, recall)
      out['hidden'] += [tokens.x] if self.capture else []
    return tokens, out

  def _run_alone(self, tokens: TokenSet, signals: Signals, weights: Weights, index: int,
                 key: Array | None, tap: Tap | None, out: Outputs,
                 recall: Recall | None) -> tuple[TokenSet, Signals]:
    """One layer with its cut, but for a cut before it."""
    layer = functools.partial(self._layer, layer_of(weights, index), index, key)
    if recall:
      tokens = recall.at('before', index, tokens)
      layer = functools.partial(layer, beside=recall.variables(index))
    needs = self._needs(index) | (tap.needs if tap else frozenset())
    mlp_needs = needs & MLP_SIGNALS
    inside = self._events(index, 'inside')
    branches = {event.parts: event for event in self._events(index, 'branch')}
    first = branches.get('both') or branches.get('attention')
    asking = self._asking(index)
    fewer: TokenSet | None = None  # Those that enter the MLP, where it is in a branch.
    if first:
      tokens, run = self._enter(first, tokens, signals, weights, key, out)
      change, seen = self._measured(layer, run.tokens, needs, tap, asking)
      tokens, attended = _add_back(tokens, run, change, first, 'attention'), add(run.tokens, change)
      fewer, signals = attended if first.parts == 'both' else None, Signals()
    elif inside:
      event, = inside
      told: list[tuple[TokenSet, Signals, Signals]] = []
      if tap and tap.reduction:
        asking = (*asking, tap.reduction)
      tokens, change = layer(
          'attend_and_cut', tokens, functools.partial(self._inside, event, key, out, told),
          **self._measure_args(needs - MLP_SIGNALS, tokens, asking))
      tokens, ((attended, seen, signals),) = add(tokens, change), told
    else:
      attend = layer
      if 'core' in branches:
        attend = functools.partial(layer, choose=functools.partial(
            self._choose, branches['core'], tokens, out))
      tokens, signals = self._attend(index, attend, tokens, needs, tap, asking)
      if not mlp_needs:
        tokens = self._watch(index, tokens, signals)
      tokens = recall.at('between', index, tokens) if recall else tokens
      attended, seen = tokens, signals
    for event in self._events(index, 'between'):
      tokens, signals = self._reduce(tokens, signals, event, weights, key, out)
    if 'mlp' in branches:
      first = branches['mlp']
      tokens, run = self._enter(first, tokens, signals, weights, key, out)
      fewer = run.tokens
    if first and fewer is not None:
      change, measured = layer('feed_forward', fewer, needs=mlp_needs)
      tokens = _add_back(tokens, run, change, first, 'mlp')
      seen = seen.replace(**{name: getattr(measured, name) for name in mlp_needs})
    else:
      tokens, signals = _feed(layer, tokens, signals, mlp_needs)
      if mlp_needs:
        tokens = self._watch(index, tokens, signals)
        seen = seen.replace(**{name: getattr(signals, name) for name in mlp_needs})
    if tap:
      out['taps'].append(tap.read(index, attended, seen))
    for event in self._events(index, 'after'):
      if event.since is not None:
        tokens, signals = self._expand(event, tokens, out), Signals()
        continue
      tokens, signals = self._reduce(tokens, signals, event, weights, key, out)
    return tokens, signals

  def _attend(self, index: int | Array, layer: Callable[..., Any], tokens: TokenSet,
              needs: frozenset[str], tap: Tap | None,
              asking: Sequence[Reduction] = ()) -> tuple[TokenSet, Signals]:
    """Attention of a layer, and the needed signals of it."""
    del index  # Of windows some layers are other than the rest.
    change, signals = self._measured(layer, tokens, needs, tap, asking)
    return add(tokens, change), signals

  def _measured(self, layer: Callable[..., Any], tokens: TokenSet, needs: frozenset[str],
                tap: Tap | None, asking: Sequence[Reduction]) -> tuple[Array, Signals]:
    """Returns what attention of a layer adds, and the needed signals of it."""
    hidden_in = tokens.x if 'hidden_in' in needs else None
    if tap and tap.reduction:
      asking = (*asking, tap.reduction)
    change, signals = layer('attend', tokens,
                            **self._measure_args(needs - MLP_SIGNALS, tokens, asking))
    return change, signals.replace(hidden_in=hidden_in)

  def _weights(self, tokens: TokenSet) -> Weights:
    """The blocks' parameters, stacked or as a tuple; fresh ones are stacked."""
    if not self.is_initializing():
      return self.get_variable('params', 'blocks')

    def init(key: Array) -> Params:
      return jax.vmap(lambda k: self.block.init(k, tokens)['params'])(
          jax.random.split(key, self.depth))

    return self.param('blocks', init)

  def step(self, carry: Any, states: tuple[Any, ...], method: str = 'step',
           recall: Recall | None = None, **settings: Any) -> tuple[Any, tuple[Any, ...]]:
    """Runs the blocks' own `step`, for decoding, or another method that goes by states.

    It runs layer by layer, so that no state is copied into a loop. Give weights as a tuple
    (`models.storage.unstack`): a layer of the stack may be copied first.

    Args:
      carry: passed from block to block; for 'step' float[B, D], int32[], the number of the step,
        and bool[B], rows that have a token, or None for all.
      states: one a layer.
      method: of the blocks, (carry, state, **settings) -> (carry, state).
      recall: lets some layers read a memory, or None.
      **settings: of all of them.

    Returns:
      The last carry, and the new states.
    """
    weights, new_states = self._weights(carry), []
    for layer, state in enumerate(states):
      event = self._decoding(layer) if method == 'step' else None
      variables = {'params': layer_of(weights, layer)}
      if recall:
        variables |= recall.variables(layer)
        settings['between'] = recall.between(layer)
      step = functools.partial(self.block.apply, variables, **settings)
      if event is None:
        carry, state = step(carry, state, method=method)
      else:
        carry, state = self._step_branch(event, step, carry, state)
      new_states.append(state)
    return carry, tuple(new_states)

  def _decoding(self, layer: int) -> Event | None:
    """The branch of a layer, where there is one."""
    return next(iter(self.plan.at(layer, 'branch')), None) if self.plan else None

  def _step_branch(self, event: Event, step: Callable[..., Any], carry: Any,
                   state: Any) -> tuple[Any, Any]:
    """Runs a layer that some decoded tokens skip."""
    method, (x, number, valid) = event.method, carry
    run = functools.partial(step, method='step')
    limit = method.decode_steps(event.layer, self.depth)
    if limit is not None:
      _, (_, told) = jax.eval_shape(run, carry, state)
      nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), told)
      return cast(tuple[Any, Any], jax.lax.cond(
          number < limit, run, lambda carry, state: (carry, (state, nothing)), carry, state))
    with jax.named_scope('reduction'):
      hidden = step(x, 0, method='entering')
      if isinstance(method, nn.Module):
        params: Params = self.get_variable('params', event.parameters)
        routed = method.apply({'params': params}, hidden, method='route')
      else:
        routed = method.route(hidden)
    if routed is None:
      return cast(tuple[Any, Any], run(carry, state))
    if not isinstance(state, KV) or state.upkeep:
      raise ValueError(f'{event.reduction.name} lets decoded tokens skip layer {event.layer}, of '
                       'which only a cache that is cut once, all heads alike, can leave them out: '
                       'choose another method on the cache')
    runs, gate = routed
    (ran, *_), (new, signals) = run(carry, state, gates=(
        gate if method.gated == 'both' else None, gate))
    new = new.unless(runs, state, compact=event.reduction.positions == 'compact')
    return (jnp.where(runs[:, None], ran, x), number, valid), (new, signals)

  def _stages(self, weights: Weights, begins: Collection[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of equal layers; a layer that is cut in or measured runs alone, and at
    some others a run begins."""
    alone = {layer for layer in range(self.depth)
             if isinstance(weights, tuple) or self._needs(layer)
             or self._events(layer) or (self.plan and self.plan.watching(layer))}
    start, end = self.layers or (0, self.depth)
    while start < end:
      stop = start + 1
      while (start not in alone and stop < end and stop not in alone and stop not in begins
             and self._block(stop) is self._block(start)):
        stop += 1
      yield start, stop
      start = stop

  def _block(self, layer: int | Array) -> ReducibleBlock:
    """The block that runs a layer, or a run of equal ones."""
    return self.others[0] if self.others and layer in self.others[1] else self.block

  def _events(self, layer: int, *sites: str) -> tuple[Event, ...]:
    """The plan's events at some sites of a layer, or all, that change something."""
    events = self.plan.at(layer, *sites) if self.plan else ()
    return tuple(event for event in events if not event.idle)

  def _of_row(self, event: Event) -> Event:
    """An event as it is for each row of the batch that layers see."""
    return event

  def _acting(self, layer: int) -> tuple[Reduction, ...]:
    """The methods that act on signals of a layer: an event before a layer reads the one above."""
    events = (*self._events(layer), *self._events(layer + 1))
    return tuple(event.reduction for event in events if event.reads == layer)

  def _asking(self, layer: int) -> tuple[Reduction, ...]:
    """The methods that read signals of a layer."""
    return (*self._acting(layer), *(self.plan.watching(layer) if self.plan else ()))

  def _needs(self, layer: int) -> frozenset[str]:
    """Signals that methods read of a layer."""
    watching = self.plan.watching(layer) if self.plan else ()
    return frozenset().union(*(acting.method.needs - NEXT_LAYER for acting in self._acting(layer)),
                             *(reduction.method.watch_needs for reduction in watching))

  def _measure_args(self, needs: frozenset[str], tokens: TokenSet,
                    asking: Sequence[Reduction]) -> dict[str, Any]:
    """Arguments of a block that measures: the signals' names, and the rows that some are of."""
    args: dict[str, Any] = {'needs': needs}
    if needs & {'window_attention', 'window_queries'}:
      args['span'] = min(tokens.slots, max(reduction.method.span for reduction in asking))
    if needs & ROWS:
      owners = {reduction.method: reduction for reduction in asking
                if (reduction.method.needs | reduction.method.watch_needs) & ROWS}
      if len(owners) > 1:
        raise ValueError(f'{" and ".join(type(owner).__name__ for owner in owners)} both ask for '
                         'attention rows of their own choice, which a layer measures for one: run '
                         'one of them')
      (method, owner), = owners.items()
      seen = owner.view(tokens)
      args |= {'rows': method.rows(seen), 'max_rows': method.max_rows(seen)}
    return args

  def _layer(self, params: Params | LayerSlice, index: int | Array, key: Array | None,
             method: str, tokens: TokenSet, *args: Any, block: ReducibleBlock | None = None,
             beside: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
    """Calls one method of the block with one layer's parameters and random key, and with variables
    beside the parameters."""
    block = block or self._block(index)
    if method != 'feed_forward':
      kwargs['proportional'] = bool(self.plan and self.plan.proportional)
    rngs = None if key is None else {'dropout': jax.random.fold_in(key, index)}

    def call(params: Params | LayerSlice, tokens: TokenSet) -> Any:
      # Here, so that the backward pass reads them anew instead of keeping them.
      params = params.read() if isinstance(params, LayerSlice) else params
      return block.apply({'params': params, **(beside or {})}, tokens, *args, method=method,
                         rngs=rngs, **kwargs)

    decides = method == 'attend_and_cut' or 'choose' in kwargs
    if self.remat != 'none' and not decides:  # A decision must be taken once.
      dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
      call = jax.checkpoint(call, policy=dots if self.remat == 'dots' else None)
    return call(params, tokens)

  def _run(self, tokens: TokenSet, weights: Weights, start: int, stop: int, key: Array | None,
           tap: Tap | None) -> tuple[TokenSet, list[Array], list[Any]]:
    """Layers start to stop - 1 as one loop."""
    needs = tap.needs if tap else frozenset()

    def body(tokens: TokenSet, item: tuple[Array, Params | None]) -> tuple[TokenSet, Any]:
      index, own = item
      tokens = self._divide_rows(tokens)
      params = layer_of(weights, index) if own is None else LayerSlice(weights, own, index)
      layer = functools.partial(self._layer, params, index, key, block=self._block(start))
      attended, signals = self._attend(index, layer, tokens, needs, tap)
      tokens, signals = _feed(layer, attended, signals, needs & MLP_SIGNALS)
      read = tap.read(start, attended, signals) if tap else None
      return tokens, (tokens.x if self.capture else None, read)

    # In training slices of the stack are inputs of the loop: the gradient of an index taken inside
    # would add a whole stack of zeros in every step. They are not read, or they would be copied.
    own = None if key is None else jax.tree.map(lambda leaf: leaf[start:stop], weights)
    tokens, (hidden, read) = jax.lax.scan(body, tokens, (jnp.arange(start, stop), own))
    taps = unstack(read, stop - start) if tap else ()
    return tokens, list(hidden) if self.capture else [], list(taps)

  def _divide_rows(self, tokens: TokenSet) -> TokenSet:
    """Keeps tokens divided by rows: left alone, the partitioner may divide features instead."""
    if self.mesh is None:
      return tokens
    return jax.lax.with_sharding_constraint(
        tokens, NamedSharding(self.mesh, PartitionSpec(BATCH_AXES)))

  @property
  def place(self) -> Place:
    """Describes these layers to reductions."""
    return Place(self.depth, self.grid, self.rope, self.mesh, self.causal)

  def _reduce(self, tokens: TokenSet, signals: Signals, event: Event, weights: Weights,
              key: Array | None, out: Outputs) -> tuple[TokenSet, Signals]:
    """An event outside attention, with the next layer's signals where the method reads them.

    Returns:
      The tokens that are left, and the signals of those tokens.
    """
    signals = self._ahead(tokens, signals, event, weights, key)
    reduced = self._decide(event, key, out, tokens, signals)
    return reduced.tokens, self._follow(signals, reduced)

  def _expand(self, event: Event, tokens: TokenSet, out: Outputs) -> TokenSet:
    """The tokens of before a cut, with what layers have made of them since."""
    if event.since not in out['before']:
      raise ValueError(f'expand={event.layer} of {event.reduction.name} needs the tokens of layer '
                       f'{event.since}, and of the layers {self.layers} alone run: set layers=None')
    expanded = reduction.expand(event, out['before'][event.since], out['cuts'][event.since], tokens,
                                self.place)
    out['expanded'][event.layer] = expanded
    return expanded

  def _ahead(self, tokens: TokenSet, signals: Signals, event: Event, weights: Weights,
             key: Array | None) -> Signals:
    """Signals with those of the next layer that an event's method reads."""
    ahead = event.method.needs & NEXT_LAYER
    if ahead:
      following = event.layer + (event.site == 'after')
      with jax.named_scope('signals'):
        probed = self._layer(layer_of(weights, following), following, key, 'probe', tokens,
                             **self._measure_args(ahead, tokens, (event.reduction,)))
      signals = signals.replace(**{name: getattr(probed, name) for name in ahead})
    return signals

  def _enter(self, event: Event, tokens: TokenSet, signals: Signals, weights: Weights,
             key: Array | None, out: Outputs) -> tuple[TokenSet, Reduced]:
    """All tokens, and those that run a branch."""
    run = self._decide(event, key, out, tokens, self._ahead(tokens, signals, event, weights, key))
    scale = run.assignment.skip_scale
    if scale is not None:
      skips = run.assignment.dst == run.assignment.src.shape[1]
      x = tokens.x * jnp.where(skips, scale, 1.0)[..., None].astype(tokens.x.dtype)
      tokens = tokens.replace(x=x)
    return tokens, run

  def _choose(self, event: Event, tokens: TokenSet, out: Outputs, signals: Signals) -> Pattern:
    """Decides who attends to whom in a branch of 'core'."""
    budget, event = self._budget(event, out), self._of_row(event)
    params = reduction.learned_parameters(self, event, tokens, signals, self.place)
    pattern = reduction.choose(event, tokens.replace(budget=budget), signals, self.place,
                               params=params)
    if pattern.wanted is not None:
      out['overflow'][event.layer] = jnp.maximum(pattern.wanted - event.slots_out, 0)
    return cast(Pattern, pattern)

  def _comes_back(self, event: Event) -> bool:
    """Whether what an event leaves out comes back in a later layer."""
    assert self.plan is not None
    return any(other.since is not None and other.since <= event.layer <= other.layer
               for other in self.plan.events)

  def _budget(self, event: Event, out: Outputs) -> Array | None:
    """The free tokens that each row keeps in an event of the plan."""
    assert self.plan is not None
    number = next(i for i, own in enumerate(self.plan.events) if own is event)
    return cast(Array | None, out['budgets'][number])

  def _follow(self, signals: Signals, reduced: Reduced) -> Signals:
    """Signals of the slots that are left, each its anchor's."""
    if self.plan is None or len(self.plan.reductions) == 1 or self.plan.masked:
      return signals  # Nobody reads them again; and under a mask the slots stay.
    return signals.of(reduced.assignment.src)

  def _inside(self, event: Event, key: Array | None, out: Outputs,
              told: list[tuple[TokenSet, Signals, Signals]], tokens: TokenSet, signals: Signals,
              attention: Array) -> tuple[TokenSet, Callable[[Array], Array], bool]:
    """An event between QK and AV: the attention map shrinks with the tokens.

    `told` gets the tokens that made keys, their signals, and those of the tokens that are left.
    """
    signals = signals.replace(hidden_in=tokens.x)
    tokens = self._watch(event.layer, tokens, signals)
    reduced = self._decide(event, key, out, tokens, signals)
    assignment = reduced.assignment
    told.append((tokens, signals, self._follow(signals, reduced)))
    if self.causal and not isinstance(assignment, Gather):
      raise ValueError(f'{event.reduction.name} joins tokens inside attention, where causal rows '
                       "would see later tokens through a group: set site='between'")
    return (reduced.tokens, functools.partial(tk.attend_after_cut, assignment, attention),
            not isinstance(assignment, Gather))

  def _watch(self, layer: int, tokens: TokenSet, signals: Signals) -> TokenSet:
    """Adds the stats that methods take down of a layer to those of the tokens."""
    for watching in self.plan.watching(layer) if self.plan else ():
      tokens = reduction.watch(watching, layer, tokens, signals, self.place)
    return tokens

  def _decide(self, event: Event, key: Array | None, out: Outputs, tokens: TokenSet,
              signals: Signals) -> Reduced:
    """Reduces the tokens, and records the event in `out`."""
    layer, budget, event = event.layer, self._budget(event, out), self._of_row(event)
    params = reduction.learned_parameters(self, event, tokens, signals, self.place)
    rng = None
    if params is not None and key is not None:
      rng = jax.random.fold_in(key, self.depth + layer)
    reduced = reduction.reduce(event, tokens, signals, self.place, budget=budget, params=params,
                               rng=rng)
    if event.kind == 'branch':
      out['branches'][layer] = reduced.tokens
    else:
      if self.causal and self._comes_back(event) and not isinstance(reduced.assignment, Gather):
        raise ValueError(f'{event.reduction.name} joins tokens in layer {layer}, and all are back '
                         'later, where causal attention would give earlier ones what later ones '
                         'know: choose a method that picks tokens')
      out['before'].setdefault(layer, tokens)
      out['cuts'][layer] = reduced.tokens
    if reduced.overflow is not None:
      out['overflow'][layer] = reduced.overflow + out['overflow'].get(layer, 0)
    out['losses'].update({f'{name}_{layer:02d}': value for name, value in reduced.losses.items()})
    return reduced


def _part(event: Event, tokens: TokenSet, signals: Signals) -> tuple[TokenSet, TokenSet]:
  """Tokens without those that join at an event, and these."""
  del signals
  kinds = event.reduction.of or tokens.of
  return tk.part(tokens, kinds, event.slots_out - event.slots_in)


def _add_back(tokens: TokenSet, run: Reduced, change: Array, event: Event, part: str) -> TokenSet:
  """All tokens, with what a part of a branch adds to those that ran it."""
  gate = run.assignment.gate if event.method.gated in ('both', part) else None
  if gate is not None:
    change = change * gate[..., None].astype(change.dtype)
  return add(tokens, run.assignment.restore(change))


def _feed(layer: Callable[..., Any], tokens: TokenSet, signals: Signals,
          needs: frozenset[str]) -> tuple[TokenSet, Signals]:
  """MLP of a layer, and the needed signals of it joined to others."""
  change, measured = layer('feed_forward', tokens, needs=needs)
  return add(tokens, change), signals.replace(**{name: getattr(measured, name) for name in needs})
