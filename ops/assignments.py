"""The three ways of making fewer tokens, as matrices W with x' = W x.

Axes: B batch, N slots now, M slots after, D features, H heads."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct

from ops.argmax import max_and_index

Array = jax.Array


class Assignment(Protocol):
  """What a method answers: which input slots make up each output slot.

  Attributes:
    src: int32[B, M], the slot that anchors each output: gives it position and kind.
    dst: int32[B, N], the output that each input joins most, M where it joins none.
    valid: bool[B, M] or None, False where an output is padding (fewer tokens than slots).
  """

  src: Array
  dst: Array
  valid: Array | None

  def apply(self, values: Array) -> Array:
    """[B, N, ...] -> [B, M, ...]: W times values."""

  def matrix(self) -> Array:
    """float32[B, M, N]: W itself, for tests, exports and pictures."""

  def restore(self, values: Array) -> Array:
    """[B, M, ...] -> [B, N, ...]: every input slot gets its output's value, dropped ones zero."""

  def totals(self, sizes: Array) -> Array:
    """float32[B, N, ...] -> [B, M, ...]: values added up, whatever the weights."""


def take(values: Array, index: Array) -> Array:
  """Picks rows: values [B, N, ...], index int[B, M] -> [B, M, ...]."""
  index = index.reshape(index.shape + (1,) * (values.ndim - 2))
  return jnp.take_along_axis(values, index, axis=1)


def expand_like(mask: Array, like: Array) -> Array:
  """Adds axes of one to a mask until it has as many as `like`."""
  return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def _hide(values: Array, valid: Array | None) -> Array:
  """Zeroes the rows of padding outputs, so that nothing odd ever sits in them."""
  return values if valid is None else jnp.where(expand_like(valid, values), values, 0)


def _take_or_zero(values: Array, index: Array) -> Array:
  """`take`, with zeros where index equals the number of rows (no such row)."""
  rows = values.shape[1]
  picked = take(values, jnp.minimum(index, rows - 1))
  return jnp.where(expand_like(index < rows, picked), picked, 0)


def _one_hot_rows(index: Array, rows: int) -> Array:
  """int[B, N] -> float32[B, rows, N], column n has its one in row index[n]."""
  return (index[:, None, :] == jnp.arange(rows)[None, :, None]).astype(jnp.float32)


@struct.dataclass
class Gather:
  """Keeps some slots as they are: pruning and reordering.

  Attributes:
    src: int32[B, M], the slot kept in each output; distinct among valid outputs.
    slots: N, the number of input slots. Static.
    valid: bool[B, M] or None, False where an output is padding.
    policy: float32[B, M] or None, a soft decision (1 keep, 0 drop) that scales the size of each
      output: where attention is proportional to size, gradients reach the decision through it.
    features: float[B, N, D] or None, what `reduce` keeps in place of the tokens' own features
      (methods that refine what they keep).
    wanted: int32[B] or None, the outputs that an adaptive method would have filled, had it had
      room: what exceeds M is overflow.
  """

  src: Array
  slots: int = struct.field(pytree_node=False)
  valid: Array | None = None
  policy: Array | None = None
  features: Array | None = None
  wanted: Array | None = None

  @property
  def dst(self) -> Array:
    """int32[B, N], the output that keeps each slot, M where none does."""
    batch, outputs = self.src.shape
    index = self.src if self.valid is None else jnp.where(self.valid, self.src, self.slots)
    to = jnp.broadcast_to(jnp.arange(outputs, dtype=jnp.int32), (batch, outputs))
    start = jnp.full((batch, self.slots), outputs, jnp.int32)
    return jax.vmap(lambda d, i, t: d.at[i].set(t, mode='drop'))(start, index, to)

  def apply(self, values: Array) -> Array:
    """[B, N, ...] -> [B, M, ...]: the kept rows, bit for bit."""
    return _hide(take(values, self.src), self.valid)

  def matrix(self) -> Array:
    """float32[B, M, N], a single one in every valid row."""
    ones = (self.src[:, :, None] == jnp.arange(self.slots)[None, None]).astype(jnp.float32)
    return _hide(ones, self.valid)

  def restore(self, values: Array) -> Array:
    """[B, M, ...] -> [B, N, ...]: kept slots get their value back, dropped ones zero."""
    return _take_or_zero(values, self.dst)

  def totals(self, sizes: Array) -> Array:
    """float32[B, N, ...] -> [B, M, ...]: the kept rows, times `policy` where there is one."""
    kept = self.apply(sizes)
    return kept if self.policy is None else kept * expand_like(self.policy, kept)


@struct.dataclass
class Merge:
  """Adds slots together, each into at most one output.

  `weight` is final: a size-weighted mean, a sum and a non-convex ensemble differ only in it. The
  sum is a segment sum: on CPU 1.4 to 3.4 times as fast as a one-hot product at 197 to 577 slots,
  and gathering the anchors first gains too little to pay for its second code path.

  Attributes:
    src: int32[B, M], the slot that gives an output its position and kind.
    dst: int32[B, N], the output that each slot joins, M for none.
    weight: float32[B, N], the slot's factor in its output.
    valid: bool[B, M] or None, False where an output is padding.
    share: float32[B, N] or None, the part of each slot's size that its output gets; all of it
      where None.
    wanted: int32[B] or None, as in `Gather`.
    op: 'sum', or 'max' for the elementwise maximum of the members (weights unused). Static.
  """

  src: Array
  dst: Array
  weight: Array
  valid: Array | None = None
  share: Array | None = None
  wanted: Array | None = None
  op: str = struct.field(pytree_node=False, default='sum')

  @classmethod
  def mean(cls, src: Array, dst: Array, weight: Array, *, valid: Array | None = None) -> Merge:
    """A merge whose outputs are means of their members, weighted by float[B, N] (often sizes)."""
    weight = weight.astype(jnp.float32)
    plain = cls(src, dst, jnp.ones_like(weight))
    total = _take_or_zero(plain.apply(weight), dst)
    return cls(src, dst, weight / jnp.where(total == 0, 1.0, total), valid=valid)

  def apply(self, values: Array) -> Array:
    """[B, N, ...] -> [B, M, ...]: weighted sums (or maxima) of each output's members."""
    outputs = self.src.shape[1]
    if self.op == 'max':
      merged = jax.vmap(lambda v, d: jax.ops.segment_max(v, d, num_segments=outputs))(
          values, self.dst)
      # The maximum of no members is -inf, which attention would turn into NaN.
      merged = _hide(merged, self.totals(jnp.ones_like(self.weight)) > 0)
    else:
      # float32 sums: a group of hundreds of bf16 terms would lose its small members.
      weighted = values.astype(jnp.float32) * expand_like(self.weight, values)
      merged = jax.vmap(lambda v, d: jax.ops.segment_sum(v, d, num_segments=outputs))(
          weighted, self.dst).astype(values.dtype)
    return _hide(merged, self.valid)

  def matrix(self) -> Array:
    """float32[B, M, N], each column with one weight at most."""
    if self.op != 'sum':
      raise ValueError(f"a merge with op={self.op!r} is not a matrix; only op='sum' is")
    return _hide(_one_hot_rows(self.dst, self.src.shape[1]) * self.weight[:, None, :], self.valid)

  def restore(self, values: Array) -> Array:
    """[B, M, ...] -> [B, N, ...]: every member gets its output's value, dropped ones zero."""
    return _take_or_zero(values, self.dst)

  def totals(self, sizes: Array) -> Array:
    """float32[B, N, ...] -> [B, M, ...]: sums of each output's members, by `share` if given."""
    return self._by_share().apply(sizes)

  def totals_by_key(self, attention: Array) -> Array:
    """`totals` along the last axis: float32[B, H, N, N] -> [B, H, N, M]."""
    # A product takes the map as it lies; sums of segments would need it transposed, and back.
    return jnp.einsum('bhnk,bmk->bhnm', attention, self._by_share().matrix(), precision='highest')

  def apply_by_head(self, values: Array) -> Array:
    """`apply` for every head: float[B, H, N, K] -> [B, H, M, K]."""
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

  def _by_share(self) -> Merge:
    share = jnp.ones_like(self.weight) if self.share is None else self.share
    return self.replace(weight=share, op='sum')


@struct.dataclass
class Mix:
  """Makes every output from any of the slots: soft, many-to-many.

  Attributes:
    weights: float32[B, M, N], W itself.
    valid: bool[B, M] or None, False where an output is padding.
    features: float[B, N, D] or None, what `reduce` mixes in place of the tokens' own features
      (methods that normalise first).
    share: float32[B, M, N] or None, the part of each slot's size that each output gets; in
      proportion to the weights where None.
  """

  weights: Array
  valid: Array | None = None
  features: Array | None = None
  share: Array | None = None

  @property
  def src(self) -> Array:
    """int32[B, M], the slot that weighs most in each output."""
    return max_and_index(jnp.abs(self.weights), axis=2).index

  @property
  def dst(self) -> Array:
    """int32[B, N], the output in which each slot weighs most, M where it weighs nothing.

    With a `share`, the output that gets most of its size.
    """
    shares = jnp.abs(self.matrix()) if self.share is None else self.shares()
    most, heaviest = max_and_index(shares, axis=1)
    return jnp.where(most > 0, heaviest, self.weights.shape[1])

  def apply(self, values: Array) -> Array:
    """[B, N, ...] -> [B, M, ...]: W times values."""
    flat = values.reshape((*values.shape[:2], -1))
    # Adding bf16 up in float32 is what backends do anyway. Asked for by name, XLA's on CPU refuses
    # where the weights are a transpose.
    mixed = jnp.einsum('bmn,bnd->bmd', self.weights.astype(flat.dtype), flat)
    return _hide(mixed.reshape(mixed.shape[:2] + values.shape[2:]), self.valid)

  def matrix(self) -> Array:
    """float32[B, M, N], W with zero rows for padding outputs."""
    return _hide(self.weights, self.valid)

  def shares(self) -> Array:
    """float32[B, M, N]: how each input divides itself among the outputs.

    Columns add up to 1, unless a `share` of its own says otherwise.
    """
    if self.share is not None:
      return _hide(self.share, self.valid)
    size = jnp.abs(self.matrix())
    return size / jnp.maximum(jnp.sum(size, axis=1, keepdims=True), 1e-20)

  def restore(self, values: Array) -> Array:
    """[B, M, ...] -> [B, N, ...]: every slot gets the outputs in its shares."""
    flat = values.reshape((*values.shape[:2], -1))
    out = jnp.einsum('bmn,bmd->bnd', self.shares().astype(flat.dtype), flat)
    return out.reshape(out.shape[:2] + values.shape[2:])

  def apply_by_head(self, values: Array) -> Array:
    """`apply` for every head: float[B, H, N, K] -> [B, H, M, K]."""
    mixed = jnp.einsum('bmn,bhnk->bhmk', self.weights.astype(values.dtype), values)
    return mixed if self.valid is None else jnp.where(self.valid[:, None, :, None], mixed, 0)

  def totals_by_key(self, attention: Array) -> Array:
    """`totals` along the last axis: float32[B, H, N, N] -> [B, H, N, M]."""
    return jnp.einsum('bhnk,bmk->bhnm', attention, self.shares(), precision='highest')

  def totals(self, sizes: Array) -> Array:
    """float32[B, N, ...] -> [B, M, ...]: values divided among the outputs by `shares`."""
    return jnp.einsum('bmn,bn...->bm...', self.shares(), sizes)
