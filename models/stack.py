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
from collections.abc import Callable, Iterator
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.plan import Plan
from models.storage import LayerSlice, Params, Weights, layer_of, unstack
from ops import assignments, choices
from ops import tokens as tk
from ops.assignments import Assignment, Gather, Mix
from ops.budgets import Cut
from ops.primitives.select import ranks
from ops.reducers.method import Method, WatchingMethod
from ops.rope import Rope, sequence_index
from ops.signals import MLP_SIGNALS, NEXT_LAYER, STATIC, Signals
from ops.tokens import FIXED_PADDING, TokenSet

Array = jax.Array
# The auxiliary outputs of a model, by name (`Stack.__call__`).
Outputs = dict[str, Any]
REMAT = ('none', 'full', 'dots')
# Axes of a mesh (lib/runtime/sharding.py) that divide the rows of a batch.
BATCH_AXES = ('data', 'fsdp')
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
    method: the method whose `span` and `rows` the needs refer to, or None.
  """

  needs: frozenset[str]
  read: Callable[[int, TokenSet, Signals], Any]
  starts: tuple[int, ...] = ()
  method: Method | None = None


class Stack(nn.Module):
  """Runs L equal blocks, with a plan's reductions between them.

  A 'dropout' key turns training on: here, in the blocks and in learned methods.

  Attributes:
    block: an unbound module that offers `attend(tokens, needs=, proportional=)` to
      (tokens, signals), `feed(tokens)` to tokens, `inside(tokens, decide, needs=, proportional=)`
      to tokens, `probe(tokens, needs=, proportional=)` to signals, and a `__call__` that makes its
      parameters.
    depth: L.
    plan: where to reduce tokens and how, or None.
    grid: (rows, columns) of the patch grid, passed to methods, or None.
    remat: 'none', 'full' (the backward pass recomputes each half of a block) or 'dots' (keeps its
      products).
    mesh: the device mesh; with it, reductions run batch-local inside shard_map.
    capture: whether to return every layer's features (for parity tests and pictures).
    layers: (start, stop) to run layers start to stop - 1 alone, None for all.
    causal: whether the blocks are causal; then a slot takes the latest position of the tokens
      merged into it, so that no token sees a later one through a group, and slots stand in the
      order of their positions, padding last (in mode 'mask' they stay where they are).
    rope: how positions become rotations, passed to methods, or None.
  """

  block: nn.Module
  depth: int
  plan: Plan | None = None
  grid: tuple[int, int] | None = None
  remat: str = 'none'
  mesh: Mesh | None = None
  capture: bool = False
  layers: tuple[int, int] | None = None
  causal: bool = False
  rope: Rope | None = None

  @nn.compact
  def __call__(self, tokens: TokenSet, tap: Tap | None = None) -> tuple[TokenSet, Outputs]:
    """Runs all layers.

    Args:
      tokens: as the blocks take them.
      tap: reads something out of every layer, or None.

    Returns:
      The final tokens, and a dict: 'before' and 'cuts' {layer: TokenSet before, and after, the
      cut}, 'overflow' {layer: int32[B], the tokens that an adaptive method wanted to keep beyond
      its capacity}, 'losses' {name: float32[B]} of learned methods, with `capture` 'hidden', the
      features after each layer, and with a tap 'taps', the tree that it read in each layer.

    Raises:
      ValueError: for an unknown `remat`, or a learned method whose parameters are missing.
    """
    choices.check('remat=', self.remat, REMAT)
    weights = self._weights(tokens)
    if self.plan and self.plan.of is not None:
      tokens = tokens.replace(of=self.plan.of, protected=self.plan.protected)
    key = self.make_rng('dropout') if self.has_rng('dropout') else None
    out: Outputs = {'before': {}, 'cuts': {}, 'overflow': {}, 'losses': {}, 'hidden': [],
                           'taps': []}
    signals = Signals()
    for start, stop in self._stages(weights, tap):
      cut = self.plan.cut(start) if self.plan else None
      if self.plan and cut and self.plan.site == 'before':
        tokens = self._reduce(tokens, signals, cut, weights, key, out)
      if stop - start > 1:
        tokens, hidden, taps = self._run(tokens, weights, start, stop, key, tap)
        out['hidden'] += hidden
        out['taps'] += taps
        continue
      tokens = self._divide_rows(tokens)
      if key is None:
        # Else a compiler may slice and convert this layer's weights early, and hold them meanwhile.
        tokens, weights = jax.lax.optimization_barrier((tokens, weights))
      tokens, signals = self._run_alone(tokens, signals, weights, start, key, tap, out)
      out['hidden'] += [tokens.x] if self.capture else []
    return tokens, out

  def _run_alone(self, tokens: TokenSet, signals: Signals, weights: Weights, index: int,
                 key: Array | None, tap: Tap | None,
                 out: Outputs) -> tuple[TokenSet, Signals]:
    """One layer with its cut, but for a cut before it."""
    plan, cut = self.plan, self.plan.cut(index) if self.plan else None
    site = plan.site if plan and cut else None
    layer = functools.partial(self._layer, layer_of(weights, index), index, key)
    needs = self._needs(index) | (tap.needs if tap else frozenset())
    mlp_needs = needs & MLP_SIGNALS
    if cut and site == 'inside':
      tokens = layer('inside', tokens, functools.partial(self._inside, cut, key, out),
                     **self._measure_args(needs, tokens))
    else:
      tokens, signals = self._attend(layer, tokens, needs, tap)
      if not mlp_needs:
        tokens = self._watch(index, tokens, signals)
    attended = tokens
    if cut and site == 'between':
      tokens = self._reduce(tokens, signals, cut, weights, key, out)
    tokens, signals = _feed(layer, tokens, signals, mlp_needs)
    if mlp_needs:
      tokens = self._watch(index, tokens, signals)
    if tap:
      out['taps'].append(tap.read(index, attended, signals))
    if cut and site == 'after':
      tokens = self._reduce(tokens, signals, cut, weights, key, out)
    return tokens, signals

  def _attend(self, layer: Callable[..., Any], tokens: TokenSet, needs: frozenset[str],
              tap: Tap | None) -> tuple[TokenSet, Signals]:
    """Attention of a layer, and the needed signals of it."""
    hidden_in = tokens.x if 'hidden_in' in needs else None
    tokens, signals = layer('attend', tokens,
                            **self._measure_args(needs - MLP_SIGNALS, tokens, tap))
    return tokens, signals.replace(hidden_in=hidden_in)

  def _weights(self, tokens: TokenSet) -> Weights:
    """The blocks' parameters, stacked or as a tuple; fresh ones are stacked."""
    if not self.is_initializing():
      return self.get_variable('params', 'blocks')

    def init(key: Array) -> Params:
      return jax.vmap(lambda k: self.block.init(k, tokens)['params'])(
          jax.random.split(key, self.depth))

    return self.param('blocks', init)

  def step(self, carry: Any, states: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Runs the blocks' own `step`, for decoding.

    It runs layer by layer, so that no state is copied into a loop. Give weights as a tuple
    (`models.storage.unstack`): a layer of the stack may be copied first.

    Args:
      carry: passed from block to block.
      states: one a layer.

    Returns:
      The last carry, and the new states.
    """
    weights, new_states = self._weights(carry), []
    for layer, state in enumerate(states):
      carry, state = self.block.apply({'params': layer_of(weights, layer)}, carry, state,
                                      method='step')
      new_states.append(state)
    return carry, tuple(new_states)

  def _stages(self, weights: Weights, tap: Tap | None) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of equal layers; a layer that is cut in or measured runs alone."""
    begins = tap.starts if tap else ()
    alone = {layer for layer in range(self.depth)
             if isinstance(weights, tuple) or self._needs(layer)
             or (self.plan and (self.plan.cut(layer) or layer in self.plan.watch))}
    start, end = self.layers or (0, self.depth)
    while start < end:
      stop = start + 1
      while start not in alone and stop < end and stop not in alone and stop not in begins:
        stop += 1
      yield start, stop
      start = stop

  def _needs(self, layer: int) -> frozenset[str]:
    """Signals that the plan's method reads of a layer: a cut before a layer reads the one above."""
    if self.plan is None:
      return frozenset()
    cut = self.plan.cut(layer + 1 if self.plan.site == 'before' else layer)
    watch = self.plan.method.watch_needs if layer in self.plan.watch else frozenset()
    return watch | (self.plan.method.needs - NEXT_LAYER if cut else frozenset())

  def _measure_args(self, needs: frozenset[str], tokens: TokenSet,
                    tap: Tap | None = None) -> dict[str, Any]:
    """Arguments of a block that measures: the signals' names, and the rows that some are of."""
    args: dict[str, Any] = {'needs': needs}
    methods = [part.method for part in (self.plan, tap) if part and part.method]
    if 'window_attention' in needs:
      args['span'] = min(tokens.slots, max(method.span for method in methods))
    if needs & ROWS:
      owners = [method for method in methods if (method.needs | method.watch_needs) & ROWS]
      if len(owners) > 1:
        raise ValueError(f'{" and ".join(type(owner).__name__ for owner in owners)} both ask for '
                         'attention rows of their own choice, which a layer measures for one: run '
                         'one of them')
      args |= {'rows': owners[0].rows(tokens), 'max_rows': owners[0].max_rows(tokens)}
    return args

  def _layer(self, params: Params | LayerSlice, index: int | Array, key: Array | None,
             method: str, tokens: TokenSet, *args: Any, **kwargs: Any) -> Any:
    """Calls one method of the block with one layer's parameters and random key."""
    if method != 'feed':
      kwargs['proportional'] = bool(self.plan and self.plan.method.proportional)
    rngs = None if key is None else {'dropout': jax.random.fold_in(key, index)}

    def call(params: Params | LayerSlice, tokens: TokenSet) -> Any:
      # Here, so that the backward pass reads them anew instead of keeping them.
      params = params.read() if isinstance(params, LayerSlice) else params
      return self.block.apply({'params': params}, tokens, *args, method=method, rngs=rngs, **kwargs)

    if self.remat != 'none' and method != 'inside':  # A decision must be taken once.
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
      layer = functools.partial(self._layer, params, index, key)
      attended, signals = self._attend(layer, tokens, needs, tap)
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

  def _reduce(self, tokens: TokenSet, signals: Signals, cut: Cut, weights: Weights,
              key: Array | None, out: Outputs) -> TokenSet:
    """A cut outside attention, with the next layer's signals where the method reads them."""
    assert self.plan is not None
    assert self.plan is not None
    ahead = self.plan.method.needs & NEXT_LAYER
    if ahead:
      following = cut.layer + (self.plan.site == 'after')
      with jax.named_scope('signals'):
        probed = self._layer(layer_of(weights, following), following, key, 'probe', tokens,
                             **self._measure_args(ahead, tokens))
      signals = signals.replace(**{name: getattr(probed, name) for name in ahead})
    return self._decide(cut, key, out, tokens, signals)[0]

  def _inside(self, cut: Cut, key: Array | None, out: Outputs, tokens: TokenSet,
              signals: Signals,
              attention: Array) -> tuple[TokenSet, Callable[[Array], Array], bool]:
    """A cut between QK and AV: the attention map shrinks with the tokens."""
    assert self.plan is not None
    tokens = self._watch(cut.layer, tokens, signals)
    reduced, assignment = self._decide(cut, key, out, tokens, signals)
    if self.causal and not isinstance(assignment, Gather):
      raise ValueError(f'{self.plan.name} joins tokens inside attention, where causal rows would '
                       "see later tokens through a group: set site='between'")
    return (reduced, functools.partial(tk.attend_after_cut, assignment, attention),
            not isinstance(assignment, Gather))

  def _watch(self, layer: int, tokens: TokenSet, signals: Signals) -> TokenSet:
    """Adds the stats that the method's `watch` returns of a layer to those of the tokens."""
    if self.plan is None or layer not in self.plan.watch:
      return tokens
    method = cast(WatchingMethod, self.plan.method)
    with jax.named_scope('reduction'):
      stats = self.by_rows(method.watch)(
          tokens, self._signals_for(signals, method.watch_needs, layer))
    return tokens.replace(stats=tokens.stats | stats)

  def _signals_for(self, signals: Signals, needs: frozenset[str], layer: int,
                   slots: int | None = None) -> Signals:
    """The named signals alone, and those that are known without running a layer."""
    wanted = {name: getattr(signals, name) for name in needs - STATIC}
    return Signals(layer=layer, depth=self.depth, slots=slots).replace(
        **wanted, grid=self.grid, rope=self.rope)

  def by_rows(self, function: Any, whole: int = 0) -> Any:
    """Returns a function that runs on the rows of each device by itself, if there is a mesh.

    Args:
      function: of `whole` trees, which every device has whole, then tokens and signals.
      whole: how many.
    """
    if self.mesh is None:
      return function
    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        function, mesh=self.mesh, axis_names=set(BATCH_AXES), check_vma=False, out_specs=rows,
        in_specs=(PartitionSpec(),) * whole + (rows, rows))

  def _decide(self, cut: Cut, key: Array | None, out: Outputs, tokens: TokenSet,
              signals: Signals) -> tuple[TokenSet, Assignment]:
    """Asks the method, reduces the tokens, and records the cut in `out`."""
    assert self.plan is not None
    method = self.plan.method
    signals = self._signals_for(signals, method.needs, cut.layer, cut.slots_in)
    params, rng = None, None
    if isinstance(method, nn.Module):
      params = self._learned(cut, tokens, signals)
      rng = None if key is None else jax.random.fold_in(key, self.depth + cut.layer)
    apply = tk.reduce_masked if self.plan.mode == 'mask' else tk.reduce

    def decide(params: Params | None, rng: Array | None, tokens: TokenSet,
               signals: Signals) -> tuple[TokenSet, Assignment, dict[str, Array]]:
      losses = {}
      if rng is not None and self.mesh is not None:
        # Each device sees its own rows alone: with one key all would draw the same noise.
        rng = jax.random.fold_in(rng, jax.lax.axis_index(BATCH_AXES))

      def learned(tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
        assert isinstance(method, nn.Module)
        assert params is not None
        assignment, sown = method.apply(
            {'params': params}, tokens, signals, num_slots=num_slots, mutable=['losses'],
            rngs=None if rng is None else {'dropout': rng})
        losses.update({name: value for name, (value,) in sown.get('losses', {}).items()})
        return assignment

      assignment = tk.decide(method if params is None else learned, _mark_fixed_padding(tokens),
                             signals, num_slots=cut.slots_out)
      return apply(tokens, assignment), assignment, losses

    # The names let lib/cost/jaxpr.py tell the method's own products from the backbone's.
    with jax.named_scope('reduction'):
      reduced, assignment, losses = self.by_rows(decide, whole=2)(params, rng, tokens, signals)
    if self.causal:
      reduced, assignment = self._order_causally(tokens, reduced, assignment)
    out['before'][cut.layer], out['cuts'][cut.layer] = tokens, reduced
    if assignment.wanted is not None:
      out['overflow'][cut.layer] = jnp.maximum(assignment.wanted - cut.slots_out, 0)
    out['losses'].update({f'{name}_{cut.layer:02d}': value for name, value in losses.items()})
    return reduced, assignment

  def _order_causally(self, tokens: TokenSet, reduced: TokenSet,
                      assignment: Assignment) -> tuple[TokenSet, Assignment]:
    """Reduced tokens in the order of their positions, each at the latest of its group."""
    assert self.plan is not None
    if isinstance(assignment, Mix) or assignment.features is not None:
      raise ValueError(f'{self.plan.name} mixes all tokens into each, so causal attention would '
                       'see later ones: choose a method that picks or joins tokens')
    reduced = reduced.replace(pos=_latest_position(tokens, reduced))
    order = _position_order(reduced)
    if self.plan.mode == 'gather':
      sort = Gather(order, reduced.slots)
      reduced, assignment = tk.reduce(reduced, sort), tk.compose(assignment, sort)
      reduced = reduced.replace(padding='last')
      order = tk.identity(reduced).src
    if self.plan.positions == 'compact':
      reduced = reduced.replace(pos=ranks(order, reduced.slots))
    return reduced, assignment

  def _learned(self, cut: Cut, tokens: TokenSet, signals: Signals) -> Params:
    """Parameters of a learned method at one cut, 'reducer_<layer>', next to 'blocks'."""
    assert self.plan is not None
    name = f'reducer_{cut.layer:02d}'
    if self.is_initializing():
      method = self.plan.method
      assert isinstance(method, nn.Module)
      return self.param(name, lambda key: method.init(key, tokens, signals, num_slots=cut.slots_out)
                        .get('params', {}))
    if not self.has_variable('params', name):
      raise ValueError(f'{self.plan.name} in layer {cut.layer} needs learned parameters {name!r}, '
                       'which this checkpoint lacks: train with this plan, or start it from '
                       'fresh parameters')
    return self.get_variable('params', name)


def _feed(layer: Callable[..., Any], tokens: TokenSet, signals: Signals,
          needs: frozenset[str]) -> tuple[TokenSet, Signals]:
  """MLP of a layer, and the needed signals of it joined to others."""
  if not needs:
    return layer('feed', tokens), signals
  tokens, measured = layer('feed', tokens, needs=needs)
  return tokens, signals.replace(**{name: getattr(measured, name) for name in needs})


def _mark_fixed_padding(tokens: TokenSet) -> TokenSet:
  """Marks padding among fixed tokens as FIXED_PADDING, which a method must keep like real ones.

  Every row then has the same number of reducible tokens under the schedule, however much text it
  has.
  """
  if tokens.valid is None or not tokens.protected:
    return tokens
  free = tokens.replace(valid=None).free
  kind = jnp.where(tokens.valid | free, tokens.kind, FIXED_PADDING)
  return tokens.replace(kind=kind.astype(tokens.kind.dtype), valid=tokens.valid | ~free)


def _position_order(tokens: TokenSet) -> Array:
  """int32[B, N]: slots in the order of their positions, padding last."""
  position = jnp.where(tokens.real, sequence_index(tokens.pos), jnp.iinfo(jnp.int32).max)
  return jnp.argsort(position, axis=1, stable=True).astype(jnp.int32)


def _latest_position(tokens: TokenSet, reduced: TokenSet) -> Array:
  """int32[B, M(, P)]: position of each slot's latest token; the slot's own if it has none."""
  position = assignments.take(sequence_index(tokens.pos), jnp.maximum(tokens.owner, 0))
  slot = jnp.where(reduced.owner >= 0, reduced.owner, reduced.slots)
  latest = jax.vmap(lambda p, s: jax.ops.segment_max(p, s, num_segments=reduced.slots))(position,
                                                                                        slot)
  latest = jnp.maximum(latest, sequence_index(reduced.pos))
  if reduced.pos.ndim == 2:
    return latest
  # Positions of several numbers follow the first one, from the slot that had it.
  source = jnp.argmax(latest[:, :, None] == sequence_index(tokens.pos)[:, None], axis=2)
  return assignments.take(tokens.pos, source)
