"""The three ways of making fewer tokens, as matrices W with x' = W x.

Axes: B batch, N slots now, M slots after, D features, H heads, K keys of an attention map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import chex
import jax
import jax.numpy as jnp
from flax import struct

from ops.argmax import max_and_index

Array = jax.Array
T = TypeVar('T')
# Numbers in a row from which a CPU is faster at one row after another.
LARGE = 2 ** 20


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


# Both as the primitive itself: every cut has dozens of them, and what jax.numpy puts around it, as
# for indices below 0, takes longer to trace than the pick.
def take(values: Array, index: Array) -> Array:
  """Picks rows: values [B, N, ...], index int[B, M], 0 to N - 1 -> [B, M, ...].

  One of both may have a batch of one, which is then that of all rows. What lies beyond the end
  gives NaN, in integers the least (unsigned: the greatest), never another token.
  """
  if len(values) != len(index):
    batch = max(len(values), len(index))
    values, index = (jnp.broadcast_to(each, (batch, *each.shape[1:])) for each in (values, index))
  numbers = jax.lax.GatherDimensionNumbers(
      offset_dims=tuple(range(2, values.ndim)), collapsed_slice_dims=(1,), start_index_map=(1,),
      operand_batching_dims=(0,), start_indices_batching_dims=(0,))
  return jax.lax.gather(values, index[..., None], numbers, (1, 1, *values.shape[2:]),
                        mode='fill')


def put(values: Array, index: Array, new: Array) -> Array:
  """Writes entries: values [B, N], index int[B, M], new [B, M] -> [B, N].

  Args:
    index: 0 or more; N and more are entries of nowhere. Of one twice, either is written.
  """
  numbers = jax.lax.ScatterDimensionNumbers(
      update_window_dims=(), inserted_window_dims=(1,), scatter_dims_to_operand_dims=(1,),
      operand_batching_dims=(0,), scatter_indices_batching_dims=(0,))
  return jax.lax.scatter(values, index[..., None], new.astype(values.dtype), numbers, mode='drop')


def by_row(function: Callable[..., T], *rows: Any) -> T:
  """Returns what a function of one row makes of each: a CPU takes one row after another.

  What a row is compared with then stays in its cache: greedy selections of a batch of 16 images
  take 2 to 8 times as long otherwise.

  Args:
    function: of arrays [...], without control over other rows.
    *rows: its arrays [B, ...], or trees of them.
  """
  # Asked for when it is compiled, which may be for other devices than this process has.
  return cast(T, jax.lax.platform_dependent(
      *rows, cpu=lambda *rows: jax.lax.map(lambda row: function(*row), rows),
      default=jax.vmap(function)))


def by_large_row(function: Callable[..., T], *rows: Any) -> T:
  """Returns what `by_row` does; rows of few numbers are taken together on CPUs too."""
  numbers = sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(rows))
  return by_row(function, *rows) if numbers >= LARGE else jax.vmap(function)(*rows)


def expand_like(mask: Array, like: Array) -> Array:
  """Adds axes of one to a mask until it has as many as `like`."""
  return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def _hide(values: Array, valid: Array | None) -> Array:
  """Zeroes the rows of padding outputs, so that no garbage is left in them."""
  return values if valid is None else jnp.where(expand_like(valid, values), values, 0)


def _take_or_zero(values: Array, index: Array) -> Array:
  """Picks rows as `take`, with zeros where an index equals the number of rows (no such row)."""
  rows = values.shape[1]
  picked = take(values, jnp.minimum(index, rows - 1))
  return jnp.where(expand_like(index < rows, picked), picked, 0)


def _choose_valid(rows: Array, other: Gather, valid: Array | None) -> Array:
  """Which outputs are real, bool[B, M], of another assignment in some rows."""
  return jnp.where(rows, cast(Array, other.valid), True if valid is None else valid)


def _one_hot_rows(index: Array, rows: int) -> Array:
  """Puts a one into row index[n] of column n: int[B, N] -> float32[B, rows, N]."""
  return (index[:, None, :] == jnp.arange(rows)[None, :, None]).astype(jnp.float32)


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
    return _hide(take(values, self.src), self.valid)

  def matrix(self) -> Array:
    """Returns W, float32[B, M, N], with a single one in every valid row."""
    ones = (self.src[:, :, None] == jnp.arange(self.slots)[None, None]).astype(jnp.float32)
    return _hide(ones, self.valid)

  def restore(self, values: Array) -> Array:
    """Gives kept slots their value back, dropped ones zero: [B, M, ...] -> [B, N, ...]."""
    return _take_or_zero(values, self.dst)

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

  `weight` is final: a size-weighted mean, a sum and a non-convex ensemble differ only in it. The
  sum is a segment sum: on CPU 1.4 to 3.4 times as fast as a one-hot product at 197 to 577 slots,
  and gathering the anchors first gains too little to pay for its second code path.

  Attributes:
    src: int32[B, M], the slot that gives an output its position and kind.
    dst: int32[B, N], the output that each slot joins, M for none.
    weight: float32[B, N], the slot's factor in its output.
    valid: bool[B, M] or None, False where an output is padding.
    size_weights: float32[B, N] or None, the part of each slot's size that its output gets; all of
      it where None.
    wanted: int32[B] or None, as in `Gather`.
    behind: bool[B, N] or None, as in `Extras`.
    op: 'sum', or 'max' for the elementwise maximum of the members (weights unused). Static.
  """

  src: Array
  dst: Array
  weight: Array
  valid: Array | None = None
  size_weights: Array | None = None
  wanted: Array | None = None
  behind: Array | None = None
  op: str = struct.field(pytree_node=False, default='sum')

  @classmethod
  def mean(cls, src: Array, dst: Array, weight: Array, *, valid: Array | None = None) -> Merge:
    """Makes a merge whose outputs are means of their members, weighted by float[B, N]."""
    chex.assert_equal_shape((dst, weight))
    weight = weight.astype(jnp.float32)
    plain = cls(src, dst, jnp.ones_like(weight))
    total = _take_or_zero(plain.apply(weight), dst)
    return cls(src, dst, weight / jnp.where(total == 0, 1.0, total), valid=valid)

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
      # float32 sums: a group of hundreds of bf16 terms would lose its small members.
      def of_row(values: Array, dst: Array, weight: Array) -> Array:
        weighted = values.astype(jnp.float32) * expand_like(weight, values)
        return jax.ops.segment_sum(weighted, dst, num_segments=outputs)

      merged = by_large_row(of_row, values, self.dst, self.weight).astype(values.dtype)
    return _hide(merged, self.valid)

  def matrix(self) -> Array:
    """Returns W, float32[B, M, N], with at most one weight in each column."""
    if self.op != 'sum':
      raise ValueError(f"a merge with op={self.op!r} is not a matrix; only op='sum' is")
    return _hide(_one_hot_rows(self.dst, self.src.shape[1]) * self.weight[:, None, :], self.valid)

  def restore(self, values: Array) -> Array:
    """Gives every member its output's value, dropped ones zero: [B, M, ...] -> [B, N, ...]."""
    return _take_or_zero(values, self.dst)

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
    batch, heads, _, width = values.shape
    outputs = self.src.shape[1]
    # The heads' slots in a row, as one segment sum: one a head takes three times as long on CPU.
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
