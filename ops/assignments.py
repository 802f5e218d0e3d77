"""The three ways of making fewer tokens, as matrices W with x' = W x.

Axes: B batch, N slots now, M slots after, D features, H heads, K keys of an attention map.
"""

from __future__ import annotations

from typing import Protocol, cast

import chex
import jax
import jax.numpy as jnp
from flax import struct

from ops.argmax import max_and_index
from ops.moves.rows import expand_like, put, take, take_or_zero
from ops.moves.segments import add_up

Array = jax.Array


class Extras(Protocol):
  """Members of an assignment that most assignments leave at None.

  A class that inherits them declares those that it has as fields, and has None for the others.
  """

  @property
  def valid(self) -> Array | None:
    """bool[B, M], False where an output is padding (fewer tokens than slots); None for all real."""
    return None

  @property
  def size_weights(self) -> Array | None:
    """The part of each slot's size that its outputs get (see the class); None for the rule."""
    return None

  @property
  def policy(self) -> Array | None:
    """float32[B, M], a soft decision (1 keep, 0 drop) that scales the size of each output."""
    return None

  @property
  def features(self) -> Array | None:
    """float[B, N, D] that `reduce` works on in place of the tokens' own features."""
    return None

  @property
  def wanted(self) -> Array | None:
    """int32[B], the outputs that an adaptive method would have filled, had it had room."""
    return None

  @property
  def behind(self) -> Array | None:
    """bool[B, N], anchors whose outputs stand behind all others that are not fixed; None for none.

    It counts where tokens are numbered anew in causal order; else each stands at its own position.
    """
    return None

  @property
  def gate(self) -> Array | None:
    """float[B, M], the factor of a branch's change before it is added back; None for 1."""
    return None

  @property
  def skip_scale(self) -> Array | None:
    """float[B, N], the factor of the features of slots that skip a branch; None for 1."""
    return None


class Assignment(Extras, Protocol):
  """Says which input slots make up each output slot: the answer of a method."""

  @property
  def src(self) -> Array:
    """int32[B, M], the slot that anchors each output: gives it position and kind."""
    ...

  @property
  def dst(self) -> Array:
    """int32[B, N], the output that each input joins most, M where it joins none."""
    ...

  def apply(self, values: Array) -> Array:
    """Multiplies by W: [B, N, ...] -> [B, M, ...]."""
    ...

  def matrix(self) -> Array:
    """Returns W itself, float32[B, M, N], for tests, exports and pictures."""
    ...

  def restore(self, values: Array) -> Array:
    """Gives every input slot its output's value, dropped ones zero: [B, M, ...] -> [B, N, ...]."""
    ...

  def totals(self, sizes: Array) -> Array:
    """Adds values up, whatever the weights: float32[B, N, ...] -> [B, M, ...]."""
    ...

  def apply_by_head(self, values: Array) -> Array:
    """Multiplies by W in every head: [B, H, N, K] -> [B, H, M, K]."""
    ...

  def reduce_keys(self, attention: Array) -> Array:
    """Reduces the keys of a map, for a cut inside attention: float[B, H, N, N] -> [B, H, N, K].

    K = M where slots are merged, N where they are picked: dropped slots are keys of this layer.
    """
    ...

  def where_not(self, rows: Array, other: Gather, x: Array) -> Assignment:
    """Returns the same with some rows of another.

    Args:
      rows: bool[B, 1], True where the other one stands.
      other: of as many slots and outputs, with `valid`.
      x: float[B, N, D], the tokens' own features.
    """
    ...


def _hide(values: Array, valid: Array | None) -> Array:
  """Zeroes the rows of padding outputs, so that no garbage is left in them."""
  return values if valid is None else jnp.where(expand_like(valid, values), values, 0)


def _choose_valid(rows: Array, other: Gather, valid: Array | None) -> Array:
  """Which outputs are real, bool[B, M], of another assignment in some rows."""
  return jnp.where(rows, cast(Array, other.valid), True if valid is None else valid)


def _one_hot_rows(index: Array, rows: int) -> Array:
  """Puts a one into row index[n] of column n: int[B, N] -> float32[B, rows, N]."""
  return (index[:, None, :] == jnp.arange(rows)[None, :, None]).astype(jnp.float32)


@jax.custom_vjp
def pick(values: Array, kept: Gather) -> Array:
  """Picks rows as `Gather.apply`. Its gradient picks too, where JAX's own would add rows up."""
  return _hide(take(values, kept.src), kept.valid)


# Slots that are kept are kept once, so that each finds its one gradient.
pick.defvjp(lambda values, kept: (pick(values, kept), kept),
            lambda kept, grad: (kept.restore(grad), None))


class Gather(Extras, struct.PyTreeNode):
  """Keeps some slots as they are: pruning and reordering.

  Attributes:
    src: int32[B, M], the slot kept in each output; distinct among valid outputs.
    slots: N, the number of input slots. Static.
    valid: bool[B, M] or None, False where an output is padding.
    policy: float32[B, M] or None, a soft decision (1 keep, 0 drop) that scales the size of each
      output: where attention is proportional to size, gradients reach the decision through it.
    features: float[B, N, D] or None, features that `reduce` keeps in place of the tokens' own
      (for methods that refine what they keep).
    wanted: int32[B] or None, the outputs that an adaptive method would have filled, had it had
      room; the number beyond M is overflow.
    gate: float[B, M] or None, what a branch's change of each output is multiplied with.
    skip_scale: float[B, N] or None, what the features of slots that skip a branch are multiplied
      with.
  """

  src: Array
  slots: int = struct.field(pytree_node=False)
  valid: Array | None = None
  policy: Array | None = None
  features: Array | None = None
  wanted: Array | None = None
  gate: Array | None = None
  skip_scale: Array | None = None

  @property
  def dst(self) -> Array:
    """Returns the output that keeps each slot, int32[B, N], M where none does."""
    batch, outputs = self.src.shape
    index = self.src if self.valid is None else jnp.where(self.valid, self.src, self.slots)
    to = jnp.broadcast_to(jnp.arange(outputs, dtype=jnp.int32), (batch, outputs))
    start = jnp.full((batch, self.slots), outputs, jnp.int32)
    return put(start, index, to)

  def apply(self, values: Array) -> Array:
    """Picks the kept rows, bit for bit: [B, N, ...] -> [B, M, ...]."""
    chex.assert_axis_dimension(values, 1, self.slots)
    return pick(values, self)

  def matrix(self) -> Array:
    """Returns W, float32[B, M, N], with a single one in every valid row."""
    ones = (self.src[:, :, None] == jnp.arange(self.slots)[None, None]).astype(jnp.float32)
    return _hide(ones, self.valid)

  def restore(self, values: Array) -> Array:
    """Gives kept slots their value back, dropped ones zero: [B, M, ...] -> [B, N, ...]."""
    return take_or_zero(values, self.dst)

  def totals(self, sizes: Array) -> Array:
    """Picks rows, times `policy` where there is one: float32[B, N, ...] -> [B, M, ...]."""
    picked = self.apply(sizes)
    return picked if self.policy is None else picked * expand_like(self.policy, picked)

  def apply_by_head(self, values: Array) -> Array:
    """Picks rows in every head, bit for bit: [B, H, N, K] -> [B, H, M, K]."""
    # Picked where they lie: a transposed copy would be the largest buffer of the layer.
    rows = jnp.take_along_axis(values, self.src[:, None, :, None], axis=2)
    return rows if self.valid is None else jnp.where(self.valid[:, None, :, None], rows, 0)

  def reduce_keys(self, attention: Array) -> Array:
    """Returns the map as it is, float[B, H, N, N]: dropped slots are still keys of this layer."""
    return attention

  def where_not(self, rows: Array, other: Gather, x: Array) -> Gather:
    """Returns the same with some rows of another, bool[B, 1]."""
    policy, features = self.policy, self.features
    return self.replace(
        src=jnp.where(rows, other.src, self.src), valid=_choose_valid(rows, other, self.valid),
        policy=None if policy is None else jnp.where(rows, 1.0, policy),
        features=None if features is None else jnp.where(rows[:, :, None], x, features))


class Merge(Extras, struct.PyTreeNode):
  """Adds slots together, each into at most one output.

  `weight` is final: a size-weighted mean, a sum and a non-convex ensemble differ only in it. How
  the sums are taken depends on the device (ops/moves/segments.py).

  Attributes:
    src: int32[B, M], the slot that gives an output its position and kind.
    dst: int32[B, N], the output that each slot joins, M for none.
    weight: float32[B, N], the slot's factor in its output.
    valid: bool[B, M] or None, False where an output is padding.
    size_weights: float32[B, N] or None, the part of each slot's size that its output gets; all of
      it where None.
    wanted: int32[B] or None, as in `Gather`.
    behind: bool[B, N] or None, as in `Extras`.
    most_moved: how many slots of a row at most join an output that another slot gives its position;
      None where it is not known. Static.
    op: 'sum', or 'max' for the elementwise maximum of the members (weights unused). Static.
  """

  src: Array
  dst: Array
  weight: Array
  valid: Array | None = None
  size_weights: Array | None = None
  wanted: Array | None = None
  behind: Array | None = None
  most_moved: int | None = struct.field(pytree_node=False, default=None)
  op: str = struct.field(pytree_node=False, default='sum')

  @classmethod
  def mean(cls, src: Array, dst: Array, weight: Array, *, valid: Array | None = None,
           most_moved: int | None = None) -> Merge:
    """Makes a merge whose outputs are means of their members, weighted by float[B, N]."""
    chex.assert_equal_shape((dst, weight))
    weight = weight.astype(jnp.float32)
    plain = cls(src, dst, jnp.ones_like(weight), most_moved=most_moved)
    total = take_or_zero(plain.apply(weight), dst)
    return plain.replace(weight=weight / jnp.where(total == 0, 1.0, total), valid=valid)

  def apply(self, values: Array) -> Array:
    """Takes weighted sums (or maxima) of each output's members: [B, N, ...] -> [B, M, ...]."""
    chex.assert_equal_shape_prefix((values, self.dst), 2)
    outputs = self.src.shape[1]
    if self.op == 'max':
      merged = jax.vmap(lambda v, d: jax.ops.segment_max(v, d, num_segments=outputs))(
          values, self.dst)
      # The maximum of no members is -inf, which attention would turn into NaN.
      merged = _hide(merged, self.totals(jnp.ones_like(self.weight)) > 0)
    else:
      merged = add_up(values, self.weight, self.dst, self.src, most_moved=self.most_moved)
    return _hide(merged, self.valid)

  def matrix(self) -> Array:
    """Returns W, float32[B, M, N], with at most one weight in each column."""
    if self.op != 'sum':
      raise ValueError(f"a merge with op={self.op!r} is not a matrix; only op='sum' is")
    return _hide(_one_hot_rows(self.dst, self.src.shape[1]) * self.weight[:, None, :], self.valid)

  def restore(self, values: Array) -> Array:
    """Gives every member its output's value, dropped ones zero: [B, M, ...] -> [B, N, ...]."""
    return take_or_zero(values, self.dst)

  def totals(self, sizes: Array) -> Array:
    """Sums each output's members, by `size_weights` if given: [B, N, ...] -> [B, M, ...]."""
    return self._by_size_weights().apply(sizes)

  def reduce_keys(self, attention: Array) -> Array:
    """Adds up the attention of each output's members: float[B, H, N, N] -> float32[B, H, N, M]."""
    attention = attention.astype(jnp.float32)
    # A product takes the map as it lies; sums of segments would need it transposed, and back.
    matrix = self._by_size_weights().matrix()
    return jnp.einsum('bhnk,bmk->bhnm', attention, matrix, precision='highest')

  def apply_by_head(self, values: Array) -> Array:
    """Applies W in every head: float[B, H, N, K] -> [B, H, M, K]."""
    if self.op == 'max':
      return self._as_one(values)
    mixed = Mix(self.replace(valid=None).matrix(), self.valid)
    return cast(Array, jax.lax.platform_dependent(
        values, tpu=mixed.apply_by_head, default=self._as_one))

  def _as_one(self, values: Array) -> Array:
    """Applies W in every head, all heads' slots in a row as one sum.

    One a head takes three times as long on CPU.
    """
    batch, heads, _, width = values.shape
    outputs = self.src.shape[1]
    number = jnp.arange(heads, dtype=jnp.int32)[None, :, None]
    dst = self.dst[:, None]
    dst = jnp.where(dst < outputs, dst + outputs * number, heads * outputs)
    flat = Merge(jnp.zeros((batch, heads * outputs), jnp.int32), dst.reshape(batch, -1),
                 jnp.tile(self.weight, (1, heads)), op=self.op,
                 valid=None if self.valid is None else jnp.tile(self.valid, (1, heads)))
    return flat.apply(values.reshape(batch, -1, width)).reshape(batch, heads, outputs, width)

  def where_not(self, rows: Array, other: Gather, x: Array) -> Merge:
    """Returns the same with some rows of another, bool[B, 1]."""
    sizes, behind = self.size_weights, self.behind
    return self.replace(
        src=jnp.where(rows, other.src, self.src), dst=jnp.where(rows, other.dst, self.dst),
        weight=jnp.where(rows, 1.0, self.weight), valid=_choose_valid(rows, other, self.valid),
        behind=None if behind is None else behind & ~rows,
        size_weights=None if sizes is None else jnp.where(rows, 1.0, sizes))

  def _by_size_weights(self) -> Merge:
    weight = jnp.ones_like(self.weight) if self.size_weights is None else self.size_weights
    return self.replace(weight=weight, op='sum')


class Mix(Extras, struct.PyTreeNode):
  """Mixes every output from any of the slots: soft, many-to-many.

  Attributes:
    weights: float32[B, M, N], W itself.
    valid: bool[B, M] or None, False where an output is padding.
    features: float[B, N, D] or None, features that `reduce` mixes in place of the tokens' own (for
      methods that normalise first).
    size_weights: float32[B, M, N] or None, the part of each slot's size that each output gets; in
      proportion to the weights where None.
    wanted: int32[B] or None, as in `Gather`.
  """

  weights: Array
  valid: Array | None = None
  features: Array | None = None
  size_weights: Array | None = None
  wanted: Array | None = None

  @property
  def src(self) -> Array:
    """Returns the slot that weighs most in each output, int32[B, M]."""
    return max_and_index(jnp.abs(self.weights), axis=2).index

  @property
  def dst(self) -> Array:
    """Returns the output in which each slot weighs most, int32[B, N], M where it weighs nothing.

    With `size_weights`, the output that gets most of its size.
    """
    shares = jnp.abs(self.matrix()) if self.size_weights is None else self.shares()
    most, heaviest = max_and_index(shares, axis=1)
    return jnp.where(most > 0, heaviest, self.weights.shape[1])

  def apply(self, values: Array) -> Array:
    """Multiplies by W: [B, N, ...] -> [B, M, ...]."""
    flat = values.reshape((*values.shape[:2], -1))
    # Adding bf16 up in float32 is what backends do anyway. Asked for by name, XLA's on CPU refuses
    # where the weights are a transpose.
    mixed = jnp.einsum('bmn,bnd->bmd', self.weights.astype(flat.dtype), flat)
    return _hide(mixed.reshape(mixed.shape[:2] + values.shape[2:]), self.valid)

  def matrix(self) -> Array:
    """Returns W, float32[B, M, N], with zero rows for padding outputs."""
    return _hide(self.weights, self.valid)

  def where_not(self, rows: Array, other: Gather, x: Array) -> Mix:
    """Returns the same with some rows of another, bool[B, 1]."""
    features, sizes, matrix, several = (
        self.features, self.size_weights, other.matrix(), rows[:, :, None])
    return self.replace(
        weights=jnp.where(several, matrix, self.weights),
        valid=_choose_valid(rows, other, self.valid),
        features=None if features is None else jnp.where(several, x, features),
        size_weights=None if sizes is None else jnp.where(several, matrix, sizes))

  def shares(self) -> Array:
    """Returns how each input divides itself among the outputs, float32[B, M, N].

    Columns add up to 1, unless `size_weights` say otherwise.
    """
    if self.size_weights is not None:
      return _hide(self.size_weights, self.valid)
    size = jnp.abs(self.matrix())
    return size / jnp.maximum(jnp.sum(size, axis=1, keepdims=True), 1e-20)

  def restore(self, values: Array) -> Array:
    """Gives every slot the outputs in its `shares`: [B, M, ...] -> [B, N, ...]."""
    flat = values.reshape((*values.shape[:2], -1))
    out = jnp.einsum('bmn,bmd->bnd', self.shares().astype(flat.dtype), flat)
    return out.reshape(out.shape[:2] + values.shape[2:])

  def apply_by_head(self, values: Array) -> Array:
    """Applies W in every head: float[B, H, N, K] -> [B, H, M, K]."""
    mixed = jnp.einsum('bmn,bhnk->bhmk', self.weights.astype(values.dtype), values)
    return mixed if self.valid is None else jnp.where(self.valid[:, None, :, None], mixed, 0)

  def reduce_keys(self, attention: Array) -> Array:
    """Adds up the attention of each output's members: float[B, H, N, N] -> float32[B, H, N, M]."""
    attention = attention.astype(jnp.float32)
    return jnp.einsum('bhnk,bmk->bhnm', attention, self.shares(), precision='highest')

  def totals(self, sizes: Array) -> Array:
    """Divides values among the outputs by `shares`: float32[B, N, ...] -> [B, M, ...]."""
    return jnp.einsum('bmn,bn...->bm...', self.shares(), sizes)
