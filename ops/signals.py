"""Signals: what a host can tell a method about the tokens, computed only when asked for.

Axes: B batch, N slots now, D features, H heads, d features a head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from ops import attention

Array = jax.Array


@struct.dataclass
class Signals:
  """What a host measured in the layer where a reduction acts. None: nobody asked for it.

  Attributes:
    keys, queries, values: float[B, N, H, d], per head.
    cls_attention: float32[B, H, N], the attention row of the [CLS] token.
    received_attention: float32[B, H, N], mean over real queries of the attention each key gets.
    attention: float32[B, H, N, N], the whole map; only a method that acts inside attention may ask.
    next_received_attention: as received_attention, by the next layer's queries and keys.
    hidden: float[B, N, D], the features that entered the layer, after its first norm.
    grid: (rows, columns) of the patch grid. Static.
    layer: index of the layer at hand. Static.
    depth: number of layers. Static.
  """

  keys: Array | None = None
  queries: Array | None = None
  values: Array | None = None
  cls_attention: Array | None = None
  received_attention: Array | None = None
  attention: Array | None = None
  next_received_attention: Array | None = None
  hidden: Array | None = None
  grid: tuple[int, int] | None = struct.field(pytree_node=False, default=None)
  layer: int = struct.field(pytree_node=False, default=0)
  depth: int = struct.field(pytree_node=False, default=1)


NAMES = tuple(Signals.__dataclass_fields__)


@jax.named_scope('signals')
def measure(needs: frozenset[str], *, q: Array, k: Array, v: Array, lse: Array | None,
            bias: Array | None = None, hidden: Array | None = None,
            query_valid: Array | None = None, cls_slot: int = 0) -> Signals:
  """Computes the named signals of one attention layer, beside fused attention.

  Args:
    needs: names of `Signals` fields.
    q, k, v: float[B, N, H, d].
    lse: float32[B, N, H], log-sum-exp of the scaled and biased logits (`attention.attend`), or None
      to normalise each row by itself.
    bias: float32[B, N] or None, what was added to the logits of each key.
    hidden: float[B, N, D], the layer's normed input.
    query_valid: bool[B, N] or None, queries that count in received attention.
    cls_slot: where the [CLS] token sits.
  """
  given = {'keys': k, 'queries': q, 'values': v, 'hidden': hidden}
  found = {name: value for name, value in given.items() if name in needs}
  if 'cls_attention' in needs:
    row = slice(cls_slot, cls_slot + 1)
    found['cls_attention'] = attention.rows(
        q[:, row], k, None if lse is None else lse[:, row], bias=bias)[:, :, 0]
  if 'received_attention' in needs:
    found['received_attention'] = attention.received(q, k, lse, bias=bias,
                                                     query_valid=query_valid)
  return Signals(**found)


@jax.named_scope('signals')
def measure_map(needs: frozenset[str], attention_map: Array, *, q: Array, k: Array, v: Array,
                hidden: Array | None = None, query_valid: Array | None = None,
                cls_slot: int = 0) -> Signals:
  """`measure` for a method inside attention, where the whole map float32[B, H, N, N] exists."""
  given = {'keys': k, 'queries': q, 'values': v, 'hidden': hidden, 'attention': attention_map}
  found = {name: value for name, value in given.items() if name in needs}
  if 'cls_attention' in needs:
    found['cls_attention'] = attention_map[:, :, cls_slot]
  if 'received_attention' in needs:
    count = query_valid if query_valid is not None else jnp.ones(attention_map.shape[::3], bool)
    count = count[:, None, :, None].astype(jnp.float32)
    total = jnp.sum(attention_map * count, axis=2)
    found['received_attention'] = total / jnp.maximum(jnp.sum(count, axis=2), 1.0)
  return Signals(**found)
