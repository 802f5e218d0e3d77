"""A stack of equal blocks, cut into stages: the only place that knows where tokens change.

Axes: B batch, N slots now, L layers.

Parameters are stored once, stacked [L, ...], whatever the method and the schedule, so one
checkpoint serves all. They are read in either of two forms: that stack, or a tuple of L trees
(`unstack`). Storage is not execution: a layer that runs alone on a slice of the stack pays a copy
of its weights on CPU, a run of equal layers as one `lax.scan` compiles once; `best_form` picks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.plan import Plan
from ops import tokens as tk
from ops.schedule import Cut
from ops.signals import Signals
from ops.tokens import Assignment, Gather, TokenSet

Array = jax.Array
REMAT = ('none', 'full', 'dots')
BATCH_AXES = ('data', 'fsdp')
# Signals that are known without a layer, and those that the next layer gives.
STATIC = frozenset({'grid', 'layer', 'depth'})
AHEAD = frozenset({'next_received_attention'})


def unstack(stacked: Any, depth: int) -> tuple[Any, ...]:
  """A [L, ...] tree as a tuple of L trees."""
  return tuple(jax.tree.map(lambda leaf: leaf[layer], stacked) for layer in range(depth))


def restack(layers: tuple[Any, ...]) -> Any:
  """A tuple of L trees as one [L, ...] tree."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def best_form(plan: Plan | None, *, platform: str) -> str:
  """'stacked' or 'unstacked', whichever inference runs faster, as measured.

  On CPU a run over part of the stack, or a layer alone on a slice of it, copies its weights
  (ViT-S/16, batch 8: three cuts cost 258 ms with a tuple and 297 ms with the stack, twelve 237 and
  336 ms); without cuts the two are equal and the stack compiles faster. A GPU copies in a scan and
  not in static slices; a TPU in neither (read off the compiled programs).
  """
  if platform == 'cpu':
    return 'unstacked' if plan and plan.cuts else 'stacked'
  return 'stacked' if platform == 'tpu' else 'unstacked'


class Stack(nn.Module):
  """L equal blocks with a plan's reductions between them.

  Training is what a 'dropout' key turns on, here, in the blocks and in learned methods.

  Attributes:
    block: an unbound module that offers `attend(tokens, needs=, proportional=)` to
      (tokens, signals), `feed(tokens)` to tokens, `inside(tokens, decide, needs=, proportional=)`
      to tokens, `look(tokens, needs=, proportional=)` to signals, and a `__call__` that makes its
      parameters.
    depth: L.
    plan: what to reduce where, or None.
    grid: (rows, columns) of the patch grid, told to methods, or None.
    remat: 'none', 'full' (the backward pass recomputes each half of a block) or 'dots' (keeps its
      products).
    mesh: the device mesh; with it, reductions run batch-local inside shard_map.
    capture: whether to return every layer's features (for parity tests and pictures).
  """

  block: nn.Module
  depth: int
  plan: Plan | None = None
  grid: tuple[int, int] | None = None
  remat: str = 'none'
  mesh: Mesh | None = None
  capture: bool = False

  @nn.compact
  def __call__(self, tokens: TokenSet) -> tuple[TokenSet, dict[str, Any]]:
    """Runs all layers.

    Returns:
      The final tokens, and a dict: 'cuts' {layer: TokenSet after the cut}, 'losses' {name:
      float32[B]} of learned methods, and with `capture` 'hidden', the features after each layer.

    Raises:
      ValueError: for an unknown `remat`, or a learned method whose parameters are missing.
    """
    if self.remat not in REMAT:
      raise ValueError(f'remat={self.remat!r} is unknown: choose one of {", ".join(REMAT)}')
    weights = self._weights(tokens)
    key = self.make_rng('dropout') if self.has_rng('dropout') else None
    out: dict[str, Any] = {'cuts': {}, 'losses': {}, 'hidden': []}
    signals = Signals()
    for start, stop in self._stages(weights):
      cut = self.plan.cut(start) if self.plan else None
      if cut and self.plan.site == 'before':
        tokens = self._reduce(tokens, signals, cut, weights, key, out)
      if stop - start > 1:
        tokens, hidden = self._run(tokens, weights, start, stop, key)
        out['hidden'] += hidden
        continue
      tokens = self._rows(tokens)
      if key is None:
        # Else a compiler may slice and convert this layer's weights early, and hold them meanwhile.
        tokens, weights = jax.lax.optimization_barrier((tokens, weights))
      layer = functools.partial(self._layer, _pick(weights, start), start, key)
      needs = self._needs(start)
      if cut and self.plan.site == 'inside':
        tokens = layer('inside', tokens, functools.partial(self._inside, cut, key, out),
                       needs=needs)
      else:
        tokens, signals = layer('attend', tokens, needs=needs)
      if cut and self.plan.site == 'between':
        tokens = self._reduce(tokens, signals, cut, weights, key, out)
      tokens = layer('feed', tokens)
      if cut and self.plan.site == 'after':
        tokens = self._reduce(tokens, signals, cut, weights, key, out)
      out['hidden'] += [tokens.x] if self.capture else []
    return tokens, out

  def _weights(self, tokens: TokenSet) -> Any:
    """The blocks' parameters, stacked or as a tuple; they are born stacked."""
    if not self.is_initializing():
      return self.get_variable('params', 'blocks')

    def init(key: Array) -> Any:
      return jax.vmap(lambda k: self.block.init(k, tokens)['params'])(
          jax.random.split(key, self.depth))

    return self.param('blocks', init)

  def _stages(self, weights: Any) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of layers with one token count; a layer with a cut runs alone."""
    alone = {layer for layer in range(self.depth)
             if isinstance(weights, tuple) or self._needs(layer)
             or (self.plan and self.plan.cut(layer))}
    start = 0
    while start < self.depth:
      stop = start + 1
      while start not in alone and stop < self.depth and stop not in alone:
        stop += 1
      yield start, stop
      start = stop

  def _needs(self, layer: int) -> frozenset[str]:
    """What the plan's method wants to know of a layer: a cut before a layer reads the one above."""
    cut = self.plan and self.plan.cut(layer + 1 if self.plan.site == 'before' else layer)
    return self.plan.method.needs - AHEAD if cut else frozenset()

  def _layer(self, params: Any, index: Any, key: Array | None, method: str, tokens: TokenSet,
             *args: Any, **kwargs: Any) -> Any:
    """Calls one method of the block with one layer's parameters and random key."""
    if method != 'feed':
      kwargs['proportional'] = bool(self.plan and self.plan.method.proportional)
    rngs = None if key is None else {'dropout': jax.random.fold_in(key, index)}

    def call(params: Any, tokens: TokenSet) -> Any:
      return self.block.apply({'params': params}, tokens, *args, method=method, rngs=rngs, **kwargs)

    if self.remat != 'none' and method != 'inside':  # A decision must be taken once.
      dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
      call = jax.checkpoint(call, policy=dots if self.remat == 'dots' else None)
    return call(params, tokens)

  def _run(self, tokens: TokenSet, weights: Any, start: int, stop: int,
           key: Array | None) -> tuple[TokenSet, list[Array]]:
    """Layers start to stop - 1 as one loop."""

    def body(tokens: TokenSet, item: Any) -> tuple[TokenSet, Array | None]:
      index, params = item
      tokens = self._rows(tokens)
      layer = functools.partial(self._layer, params or _pick(weights, index), index, key)
      tokens, _ = layer('attend', tokens, needs=frozenset())
      tokens = layer('feed', tokens)
      return tokens, tokens.x if self.capture else None

    # In training slices of the stack are inputs of the loop: the gradient of an index taken inside
    # would add a whole stack of zeros in every step. Otherwise the index saves copying the slices.
    run = None if key is None else jax.tree.map(lambda leaf: leaf[start:stop], weights)
    tokens, hidden = jax.lax.scan(body, tokens, (jnp.arange(start, stop), run))
    return tokens, list(hidden) if self.capture else []

  def _rows(self, tokens: TokenSet) -> TokenSet:
    """Keeps tokens divided by rows: left alone, the partitioner may divide features instead."""
    if self.mesh is None:
      return tokens
    return jax.lax.with_sharding_constraint(
        tokens, NamedSharding(self.mesh, PartitionSpec(BATCH_AXES)))

  def _reduce(self, tokens: TokenSet, signals: Signals, cut: Cut, weights: Any,
              key: Array | None, out: dict[str, Any]) -> TokenSet:
    """A cut between layers: decide, reduce, remember."""
    ahead = self.plan.method.needs & AHEAD
    if ahead:
      following = cut.layer + (self.plan.site == 'after')
      with jax.named_scope('signals'):
        seen = self._layer(_pick(weights, following), following, key, 'look', tokens, needs=ahead)
      signals = signals.replace(**{name: getattr(seen, name) for name in ahead})
    return self._decide(cut, key, out, tokens, signals)[0]

  def _inside(self, cut: Cut, key: Array | None, out: dict[str, Any], tokens: TokenSet,
              signals: Signals, attention: Array) -> tuple[TokenSet, Array, bool]:
    """A cut between QK and AV: the attention map shrinks with the tokens."""
    reduced, assignment = self._decide(cut, key, out, tokens, signals)
    with jax.named_scope('reduction'):
      attention = tk.regroup(assignment, attention)
    return reduced, attention, not isinstance(assignment, Gather)

  def _decide(self, cut: Cut, key: Array | None, out: dict[str, Any], tokens: TokenSet,
              signals: Signals) -> tuple[TokenSet, Assignment]:
    """Runs the method on the rows at hand, batch-local when there is a mesh."""
    wanted = {name: getattr(signals, name) for name in self.plan.method.needs - STATIC}
    signals = Signals(**wanted, grid=self.grid, layer=cut.layer, depth=self.depth)
    method = self.plan.method
    params, rng = None, None
    if isinstance(method, nn.Module):
      params = self._learned(cut, tokens, signals)
      rng = None if key is None else jax.random.fold_in(key, self.depth + cut.layer)
    apply = tk.mask_only if self.plan.mode == 'mask' else tk.reduce

    def decide(params: Any, rng: Any, tokens: TokenSet, signals: Signals) -> Any:
      losses = {}
      if rng is not None and self.mesh is not None:
        # Each device sees its own rows alone: with one key all would draw the same noise.
        rng = jax.random.fold_in(rng, jax.lax.axis_index(BATCH_AXES))

      def learned(tokens: TokenSet, signals: Signals, *, keep: int) -> Assignment:
        assignment, sown = method.apply(
            {'params': params}, tokens, signals, keep=keep, mutable=['losses'],
            rngs=None if rng is None else {'dropout': rng})
        losses.update({name: value for name, (value,) in sown.get('losses', {}).items()})
        return assignment

      assignment = tk.decide(method if params is None else learned, tokens, signals, keep=cut.keep)
      return apply(tokens, assignment), assignment, losses

    if self.mesh is not None:
      rows = PartitionSpec(BATCH_AXES)
      decide = jax.shard_map(decide, mesh=self.mesh, axis_names=set(BATCH_AXES), check_vma=False,
                             in_specs=(PartitionSpec(), PartitionSpec(), rows, rows),
                             out_specs=rows)
    # The names let lib/jaxpr_cost.py tell the method's own products from the backbone's.
    with jax.named_scope('reduction'):
      reduced, assignment, losses = decide(params, rng, tokens, signals)
    out['cuts'][cut.layer] = reduced
    out['losses'].update({f'{name}_{cut.layer:02d}': value for name, value in losses.items()})
    return reduced, assignment

  def _learned(self, cut: Cut, tokens: TokenSet, signals: Signals) -> Any:
    """Parameters of a learned method at one cut; they sit beside the blocks."""
    name = f'reducer_{cut.layer:02d}'
    if self.is_initializing():
      method = self.plan.method
      return self.param(name, lambda key: method.init(key, tokens, signals, keep=cut.keep)
                        .get('params', {}))
    if not self.has_variable('params', name):
      raise ValueError(f'{self.plan.name} in layer {cut.layer} needs learned parameters {name!r}, '
                       'which this checkpoint lacks: train with this plan, or start it from '
                       'fresh parameters')
    return self.get_variable('params', name)


def _pick(weights: Any, layer: int) -> Any:
  """One layer's parameters from either form."""
  if isinstance(weights, tuple):
    return weights[layer]
  return jax.tree.map(lambda leaf: leaf[layer], weights)
