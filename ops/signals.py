"""Signals: measurements that a host gives to a method, computed only on request.

Axes: B batch, N slots now, D features, H heads, K kv heads, d features a head, W last rows, F MLP
width, T words of a prompt, C features of a vision tower.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ops import attention
from ops.moves.rows import take
from ops.rope import Rope

Array = jax.Array
# The value of a signal that nobody asked for. Typed so that a method may read without a check what
# its `needs` names, and hosts measure.
_UNMEASURED: Any = None


def _signal(axes: str, stage: str = 'attention') -> Any:
  """A signal that is measured: by a layer's attention, its 'mlp', the 'next' layer, a 'projector'.
  """
  return dataclasses.field(default=_UNMEASURED, metadata={'axes': tuple(axes), 'stage': stage})


def _static(default: Any = _UNMEASURED) -> Any:
  """A signal that is known without running a layer."""
  return struct.field(pytree_node=False, default=default)


class Signals(struct.PyTreeNode):
  """Holds the measurements of the layer where a reduction acts; None where no method asked.

  In a language model attention is causal by position, keys and queries are rotated, and keys and
  values have K heads, each for H / K of the queries' in order.

  Attributes:
    keys, queries, values: float[B, N, H, d], per head.
    plain_queries, plain_keys: float[B, N, H, d], before they are rotated.
    cls_attention: float32[B, H, N], the attention row of the [CLS] token.
    cls_logits: float32[B, H, N], the same before the softmax, scaled.
    received_attention: float32[B, H, N], mean over real queries of the attention each key gets.
    attention: float32[B, H, N, N], the whole map; only a method that acts inside attention may ask.
    last_attention: float32[B, H, N], the attention row of the last real token.
    window_attention: float32[B, H, W, N], rows of the last W real tokens in the order of their
      positions, zeros (first) where a row has fewer; W is the method's `span`.
    window_queries: float[B, W, H, d], the queries of the same W tokens, in the same order.
    projected_norms: float32[B, H, N], the L1 norm of what the output projection of a head makes of
      each value.
    row_attention: float32[B, H, N], mean over the rows that the method's `rows` names.
    next_received_attention, next_last_attention, next_row_attention, next_keys, next_queries,
      next_hidden: the same by the next layer's norm, queries and keys, on today's tokens.
    hidden: float[B, N, D], the features that entered the layer, after its first norm.
    hidden_in: float[B, N, D], the features that entered the layer, as they came.
    attention_out: float[B, N, D], what attention adds to them.
    mlp_in, mlp_out: float[B, N, D], what enters the MLP (normed), and what it adds.
    mlp_hidden: float[B, N, F], the inner activations of the MLP.
    text: float[B, T, D], the embedded ids of the row's prompt in their order: those of its question
      where a host is told which they are, else all. Zeros where there is none.
    text_valid: bool[B, T], False for image placeholders, padding and what is not asked.
    vision_features: float[B, N, C], what the projector made each token of; zeros for newlines.
    crop: int32[B, N], which crop of its image each token is a patch of: 0 for the whole image in
      small, where there are several, and -1 for newlines. Frames of a video are crops, in the order
      of time, and so are rows of a tower that merges patches or frames.
    patch: int32[B, N], which patch (or cell of merged ones) of its crop it is, in raster order, the
      nearest where it is interpolated; -1 for newlines. Where frames are pooled it is not the place
      among the frame's tokens: that is their order (ops/primitives/crops/frames.py).
    tiling: int32[B, 2], rows and columns of the crops that an image is cut into; 0 for one crop.
    project: the projector itself in float32, as a function float[..., C] -> float32[..., D].
    grids: int32[B, 2], (rows, columns) of each row's own grid, where images have their own.
    rope: how positions become rotations (ops/rope.py). Static.
    grid: (rows, columns) of the patch grid. Static.
    crop_grid: (rows, columns) of the patches (or cells) of a crop: it has no more tokens. Static.
    num_crops: F, the most crops that an image can have. Static.
    layer: index of the layer at hand. Static.
    depth: number of layers. Static.
    slots: tokens that the schedule has here, before the cut (in training a soft method may hold
      more); None where there is no schedule. Static.
    one_sequence: whether the tokens are those of one sequence of the tower's, special ones
      included: attention over them is that of the layer, and [CLS] is the first special one. False
      for visual tokens of several crops, each of which was measured beside others alone. Static.
  """

  keys: Array = _signal('BNHd')
  queries: Array = _signal('BNHd')
  values: Array = _signal('BNHd')
  cls_attention: Array = _signal('BHN')
  cls_logits: Array = _signal('BHN')
  received_attention: Array = _signal('BHN')
  attention: Array = _signal('BHNN')
  next_received_attention: Array = _signal('BHN', 'next')
  hidden: Array = _signal('BND')
  plain_queries: Array = _signal('BNHd')
  plain_keys: Array = _signal('BNHd')
  projected_norms: Array = _signal('BHN')
  last_attention: Array = _signal('BHN')
  window_attention: Array = _signal('BHWN')
  window_queries: Array = _signal('BWHd')
  row_attention: Array = _signal('BHN')
  next_last_attention: Array = _signal('BHN', 'next')
  next_row_attention: Array = _signal('BHN', 'next')
  next_keys: Array = _signal('BNHd', 'next')
  next_queries: Array = _signal('BNHd', 'next')
  next_hidden: Array = _signal('BND', 'next')
  hidden_in: Array = _signal('BND')
  attention_out: Array = _signal('BND')
  mlp_in: Array = _signal('BND', 'mlp')
  mlp_out: Array = _signal('BND', 'mlp')
  mlp_hidden: Array = _signal('BNF', 'mlp')
  text: Array = _signal('BTD', 'projector')
  text_valid: Array = _signal('BT', 'projector')
  vision_features: Array = _signal('BNC', 'projector')
  crop: Array = _signal('BN', 'projector')
  patch: Array = _signal('BN', 'projector')
  tiling: Array = _signal('B2', 'projector')
  project: Callable[[Array], Array] = _UNMEASURED
  grids: Array = _signal('BA')
  rope: Rope = _static()
  grid: tuple[int, int] = _static()
  crop_grid: tuple[int, int] = _static()
  num_crops: int = _static()
  layer: int = _static(0)
  depth: int = _static(1)
  slots: int | None = _static(None)
  one_sequence: bool = _static(True)

  def map_slots(self, change: Callable[[Array, int], Array]) -> Signals:
    """Returns the signals with every measured one changed along its slots.

    Whole maps, and what has no slots, are let go.

    Args:
      change: (values, the axis of their N slots, from 0) -> values.
    """
    changed: dict[str, Array | None] = {}
    for name, axes in AXES.items():
      value = getattr(self, name)
      if value is not None:
        changed[name] = change(value, axes.index('N')) if axes.count('N') == 1 else None
    return self.replace(**changed)

  def of(self, index: Array) -> Signals:
    """Returns the signals of the slots int32[B, M]; what `map_slots` lets go is gone."""
    def pick(values: Array, axis: int) -> Array:
      return jnp.moveaxis(take(jnp.moveaxis(values, axis, 1), index), 1, axis)

    return self.map_slots(pick)


_MEASURED = tuple(field for field in dataclasses.fields(Signals) if 'stage' in field.metadata)
# Axes of every signal that is measured, and the names of all.
AXES: dict[str, tuple[str, ...]] = {field.name: field.metadata['axes'] for field in _MEASURED}
NAMES = tuple(field.name for field in dataclasses.fields(Signals))
# Known without a layer; given by the next layer; and given by a layer's MLP.
STATIC = frozenset(NAMES) - AXES.keys()
TEXT_SIGNALS = frozenset({'text', 'text_valid'})
CROP_SIGNALS = frozenset({'crop', 'patch', 'tiling', 'crop_grid', 'num_crops'})
NEXT_LAYER, MLP_SIGNALS = (
    frozenset(field.name for field in _MEASURED if field.metadata['stage'] == stage)
    for stage in ('next', 'mlp'))


@jax.named_scope('signals')
def measure(needs: frozenset[str], *, q: Array, k: Array, v: Array, lse: Array | None,
            bias: Array | None = None, hidden: Array | None = None,
            query_valid: Array | None = None, cls_slot: int = 0,
            positions: Array | None = None, last: Array | None = None, window: int | None = None,
            pairs: attention.Exceptions | None = None, rows: Array | None = None,
            max_rows: int | None = None, span: int = 0,
            received: Callable[..., Array] = attention.received) -> Signals:
  """Computes the named signals of one attention layer, beside fused attention.

  Args:
    needs: names of `Signals` fields.
    q, k, v: float[B, N, H, d].
    lse: float32[B, N, H], log-sum-exp of the scaled and biased logits
      (`attention.attend_after_cut`), or None to normalise each row by itself.
    bias: float32[B, N] or None, what was added to the logits of each key.
    hidden: float[B, N, D], the layer's normed input.
    query_valid: bool[B, N] or None, queries that count in received attention.
    cls_slot: where the [CLS] token sits.
    positions: int32[B, N] where attention is causal by them (`attention.attend_after_cut`), else
      None.
    last: int32[B, N], the positions of the queries, where those in `positions` int32[B, S] are of
      S keys, of which the N queries are some.
    window, pairs: of causal attention, as `attention.attend` has them.
    rows: bool[B, N], the queries of row_attention.
    max_rows: how many there are at most, None for N.
    span: W, rows of window_attention and window_queries.
    received: what adds up the columns of the map, as `attention.received` does.
  """
  inputs = {'keys': k, 'queries': q, 'values': v, 'hidden': hidden}
  measured: dict[str, Any] = {name: value for name, value in inputs.items() if name in needs}
  last = positions if last is None else last
  if 'cls_attention' in needs:
    row = slice(cls_slot, cls_slot + 1)
    measured['cls_attention'] = attention.rows(
        q[:, row], k, None if lse is None else lse[:, row], bias=bias, positions=positions,
        last=None if last is None else last[:, row])[:, :, 0]
  if 'cls_logits' in needs:
    measured['cls_logits'] = jnp.einsum(
        'bhd,bnhd->bhn', q[:, cls_slot], k, precision='highest',
        preferred_element_type=jnp.float32) * q.shape[3] ** -0.5
  if 'received_attention' in needs:
    measured['received_attention'] = received(
        q, k, lse, bias=bias, positions=positions, last=last, query_valid=query_valid,
        window=window, pairs=pairs)

  def attention_rows(index: Array) -> Array:
    """Attention rows of the queries at int[B, R], float32[B, H, R, N]."""
    return attention.rows(take(q, index), k, _take(lse, index), bias=bias,
                          last=_take(last, index), positions=positions, window=window,
                          pairs=pairs and pairs.of(index))

  if needs & {'last_attention', 'window_attention', 'window_queries'}:
    by_position = latest(last, query_valid, q.shape[:2])
    if 'last_attention' in needs:
      measured['last_attention'] = attention_rows(by_position[:, -1:])[:, :, 0]
    if 'window_attention' in needs:
      index = by_position[:, -span:]
      real = jnp.ones(index.shape, bool) if query_valid is None else take(query_valid, index)
      measured['window_attention'] = jnp.where(real[:, None, :, None], attention_rows(index), 0.0)
    if 'window_queries' in needs:
      measured['window_queries'] = take(q, by_position[:, -span:])
  if 'row_attention' in needs:
    if rows is None:
      raise ValueError("row_attention is a mean over the rows that a method names: give rows, as "
                       "the method's `rows` returns them")
    if query_valid is not None:
      rows = rows & query_valid
    index = jnp.argsort(~rows, axis=1, stable=True)[:, :max_rows]
    measured['row_attention'] = attention.received(
        take(q, index), k, _take(lse, index), bias=bias, query_valid=take(rows, index),
        last=_take(last, index), positions=positions, window=window,
        pairs=pairs and pairs.of(index))
  return Signals(**measured)


def by_head(signals: Signals, heads: int) -> Signals:
  """Returns the signals with the heads that share keys as rows of a batch: [B * K, ...].

  Args:
    signals: whose features have H or K heads.
    heads: K.
  """
  folded = {}
  for name, axes in AXES.items():
    value = getattr(signals, name)
    if value is not None and 'H' in axes:
      axis = axes.index('H')
      value = jnp.moveaxis(value, axis, 1)
      value = value.reshape(value.shape[0] * heads, -1, *value.shape[2:])
      folded[name] = jnp.moveaxis(value, 1, axis)
  return signals.replace(**folded)


def _take(values: Array | None, index: Array) -> Array | None:
  """Picks rows as `take`, of None none."""
  return None if values is None else take(values, index)


def projected_norms(v: Array, kernel: Array, order: int = 1) -> Array:
  """L1 norms, or L2 norms, of values after the output projection, float32[B, H, N].

  Args:
    v: float[B, N, K, d].
    kernel: float[H, d, D] of the projection.
    order: of the norm, 1 or 2.
  """
  heads = jnp.repeat(jnp.moveaxis(v, 2, 0), len(kernel) // v.shape[2], axis=0)

  def norms(head: tuple[Array, Array]) -> Array:
    # One head after another: of all together the products would be as large as the MLP's.
    product = jnp.einsum('bnd,de->bne', *head, preferred_element_type=jnp.float32)
    return jnp.linalg.norm(product, ord=order, axis=2)

  return jnp.moveaxis(jax.lax.map(norms, (heads, kernel.astype(v.dtype))), 0, 1)


def latest(positions: Array | None, valid: Array | None, shape: tuple[int, ...]) -> Array:
  """int32[B, N]: slots in the order of their positions, padding first, so that the last is last."""
  if positions is None:
    positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
  if valid is not None:
    positions = jnp.where(valid, positions, jnp.iinfo(jnp.int32).min)
  return jnp.argsort(positions, axis=1, stable=True)


# What `measure_map` tells; every other signal is read as beside fused attention.
MAP_SIGNALS = frozenset({'keys', 'queries', 'values', 'hidden', 'attention', 'cls_attention',
                         'received_attention'})


@jax.named_scope('signals')
def measure_map(needs: frozenset[str], attention_map: Array, *, q: Array, k: Array, v: Array,
                hidden: Array | None = None, query_valid: Array | None = None,
                cls_slot: int = 0) -> Signals:
  """`measure` for a method inside attention, where the whole map float32[B, H, N, N] exists."""
  inputs = {'keys': k, 'queries': q, 'values': v, 'hidden': hidden, 'attention': attention_map}
  measured: dict[str, Any] = {name: value for name, value in inputs.items() if name in needs}
  if 'cls_attention' in needs:
    measured['cls_attention'] = attention_map[:, :, cls_slot]
  if 'received_attention' in needs:
    count = query_valid if query_valid is not None else jnp.ones(attention_map.shape[::3], bool)
    count = count[:, None, :, None].astype(jnp.float32)
    total = jnp.sum(attention_map * count, axis=2)
    measured['received_attention'] = total / jnp.maximum(jnp.sum(count, axis=2), 1.0)
  return Signals(**measured)
