"""Tokens, and the three ways of making fewer of them.

Axes: B batch, N slots now, M slots after, T original tokens, D features.

Every reduction in the literature is a matrix W with x' = W x. An `Assignment` is that matrix in
one of three forms: `Gather` (rows with a single one), `Merge` (rows with disjoint supports) and
`Mix` (any rows). All three are applied, undone, exported and composed by the same few functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from ops.argmax import highest
from ops.attention import log_weight

Array = jax.Array

# Kinds of slots. SPECIAL covers [CLS], registers, distillation, newline and similar tokens.
SPECIAL, VISUAL, TEXT = 0, 1, 2
KINDS = {'special': SPECIAL, 'visual': VISUAL, 'text': TEXT}
# What a reduction sees padding of a kind as that it may not touch: such slots keep their place, so
# that a row with less text keeps no more of its other tokens.
FILLER = 3

PADDING_BIAS = -1e9


@struct.dataclass
class TokenSet:
  """The tokens that flow through a model.

  Attributes:
    x: float[B, N, D], features.
    pos: int32[B, N] or [B, N, P], position of the slot's anchor token. Carried, never derived
      again: RoPE, M-RoPE, the grid and the pictures read it. Special tokens hold -1.
    kind: int8[B, N], one of SPECIAL, VISUAL, TEXT.
    owner: int32[B, T], the slot that now holds original token t, -1 once it was dropped.
    valid: bool[B, N], False for a padding slot; None says that every slot is real, and keeps
      attention free of a mask.
    size: float32[B, N], how many original tokens a slot stands for; None says one each.
    stats: a method's memory between layers, {name: [B, N, ...]}; follows the slot's anchor.
    of: the kinds that the reduction at hand may touch. Static.
    protected: slots in every row that may not be touched (the [CLS] token and its like). Static.
    padding: where padding slots may be: 'anywhere', or 'last', behind all real ones of the row, so
      that causal attention by slot hides them without a mask. Static.
  """

  x: Array
  pos: Array
  kind: Array
  owner: Array
  valid: Array | None = None
  size: Array | None = None
  stats: dict[str, Array] = struct.field(default_factory=dict)
  of: tuple[int, ...] = struct.field(pytree_node=False, default=(VISUAL,))
  protected: int = struct.field(pytree_node=False, default=0)
  padding: str = struct.field(pytree_node=False, default='anywhere')

  @classmethod
  def create(cls, x: Array, *, pos: Array | None = None, kind: Array | None = None,
             **fields: Any) -> TokenSet:
    """Fresh tokens from features float[B, N, D]: one slot a token, visual, in raster order."""
    batch, slots, _ = x.shape
    iota = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, slots))
    if kind is None:
      kind = jnp.full((batch, slots), VISUAL, jnp.int8)
    return cls(x=x, pos=iota if pos is None else pos, kind=kind, owner=iota, **fields)

  @property
  def slots(self) -> int:
    """N, the number of slots."""
    return self.x.shape[1]

  @property
  def real(self) -> Array:
    """bool[B, N], True where a slot holds a token."""
    return jnp.ones(self.x.shape[:2], bool) if self.valid is None else self.valid

  @property
  def sizes(self) -> Array:
    """float32[B, N], original tokens a slot stands for, none where it is padding."""
    size = jnp.ones(self.x.shape[:2], jnp.float32) if self.size is None else self.size
    return size if self.valid is None else jnp.where(self.valid, size, 0.0)

  @property
  def free(self) -> Array:
    """bool[B, N], True where the reduction at hand may act: real, and of a kind in `of`."""
    allowed = jnp.zeros(self.kind.shape, bool)
    for kind in self.of:
      allowed |= self.kind == kind
    return self.real & allowed

  @property
  def kept(self) -> Array:
    """bool[B, N], True for real slots that the reduction at hand must leave alone."""
    return self.real & ~self.free


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


def _expand(mask: Array, like: Array) -> Array:
  return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def _hide(values: Array, valid: Array | None) -> Array:
  """Zeroes the rows of padding outputs, so that nothing odd ever sits in them."""
  return values if valid is None else jnp.where(_expand(valid, values), values, 0)


def _take_or_zero(values: Array, index: Array) -> Array:
  """`take`, with zeros where index equals the number of rows (no such row)."""
  rows = values.shape[1]
  picked = take(values, jnp.minimum(index, rows - 1))
  return jnp.where(_expand(index < rows, picked), picked, 0)


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
    return kept if self.policy is None else kept * _expand(self.policy, kept)


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
      weighted = values.astype(jnp.float32) * _expand(self.weight, values)
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
    return highest(jnp.abs(self.weights), axis=2).index

  @property
  def dst(self) -> Array:
    """int32[B, N], the output in which each slot weighs most, M where it weighs nothing.

    With a `share`, the output that gets most of its size.
    """
    shares = jnp.abs(self.matrix()) if self.share is None else self.shares()
    most, heaviest = highest(shares, axis=1)
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


def identity(tokens: TokenSet) -> Gather:
  """The assignment that changes nothing."""
  batch, slots = tokens.x.shape[:2]
  return Gather(jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, slots)), slots)


def decide(method: Callable[..., Assignment], tokens: TokenSet, signals: Any, *,
           keep: int) -> Assignment:
  """Asks a method, unless everything is to stay: then the answer is the identity."""
  return identity(tokens) if keep >= tokens.slots else method(tokens, signals, keep=keep)


def reduce(tokens: TokenSet, assignment: Assignment) -> TokenSet:
  """Carries out an assignment: TokenSet of N slots -> TokenSet of M slots."""
  src, dst = assignment.src, assignment.dst
  outputs = src.shape[1]
  valid = None if tokens.valid is None else take(tokens.valid, src)
  if assignment.valid is not None:
    valid = assignment.valid if valid is None else valid & assignment.valid
  size, plain = tokens.size, isinstance(assignment, Gather) and assignment.policy is None
  if size is not None or not plain:
    size = assignment.totals(tokens.sizes)
  features = getattr(assignment, 'features', None)
  x = assignment.apply(tokens.x if features is None else features)
  # Token t sat in slot owner[t]; it follows that slot, or is gone if the slot is.
  moved = take(dst, jnp.maximum(tokens.owner, 0))
  there = (tokens.owner >= 0) & (moved < outputs)
  if valid is not None:
    there &= take(valid, jnp.minimum(moved, outputs - 1))
  owner = jnp.where(there, moved, -1)
  return tokens.replace(
      x=x.astype(tokens.x.dtype), pos=take(tokens.pos, src), kind=take(tokens.kind, src),
      owner=owner, valid=valid, size=size, padding='anywhere',
      stats={name: take(value, src) for name, value in tokens.stats.items()})


def mask_only(tokens: TokenSet, assignment: Assignment) -> TokenSet:
  """`reduce` that keeps all N slots and marks the surplus as padding.

  Outputs of Gather and Merge stay in their anchor's slot, those of Mix take the first M slots. The
  real tokens equal those of `reduce`, in another order: the mode that trains hard decisions.
  """
  reduced = reduce(tokens, assignment)
  batch, slots = tokens.x.shape[:2]
  outputs = reduced.slots
  place = assignment.src
  if isinstance(assignment, Mix):
    place = jnp.broadcast_to(jnp.arange(outputs, dtype=jnp.int32), (batch, outputs))
  home = jnp.where(reduced.real, place, slots)
  start = jnp.full((batch, slots), outputs, jnp.int32)
  to = jnp.broadcast_to(jnp.arange(outputs, dtype=jnp.int32), (batch, outputs))
  back = jax.vmap(lambda d, i, t: d.at[i].set(t, mode='drop'))(start, home, to)
  here = back < outputs

  def spread(new: Array, old: Array) -> Array:
    picked = take(new, jnp.minimum(back, outputs - 1))
    return jnp.where(_expand(here, picked), picked, old)

  owner = jnp.where(reduced.owner >= 0, take(place, jnp.maximum(reduced.owner, 0)), -1)
  return tokens.replace(
      x=spread(reduced.x, jnp.zeros_like(tokens.x)), pos=spread(reduced.pos, tokens.pos),
      kind=spread(reduced.kind, tokens.kind), owner=owner, valid=here, padding='anywhere',
      size=None if reduced.size is None else spread(reduced.size, jnp.zeros((batch, slots))),
      stats={name: spread(value, tokens.stats[name]) for name, value in reduced.stats.items()})


def compose(first: Assignment, second: Assignment) -> Assignment:
  """One assignment that equals `first`, then `second` (M slots in, K out).

  Raises:
    ValueError: where no single assignment does: a maximum beside a sum, a `policy` beside anything
      but a Gather, a `share` beside a Mix, or `features` of the second's own or before a Merge.
  """
  valid = None if first.valid is None else take(first.valid, second.src)
  if second.valid is not None:
    valid = second.valid if valid is None else valid & second.valid
  src = take(first.src, second.src)
  features = getattr(first, 'features', None)
  if getattr(second, 'features', None) is not None:
    raise ValueError("the second has features of its own, which no matrix on the first one's input "
                     'gives: apply them one by one')
  policies = [getattr(part, 'policy', None) for part in (first, second)]
  if isinstance(first, Gather) and isinstance(second, Gather):
    policy = policies[1]
    if policies[0] is not None:
      policy = take(policies[0], second.src) * (1.0 if policy is None else policy)
    return Gather(src, first.slots, valid=valid, policy=policy, features=features)
  if any(policy is not None for policy in policies):
    raise ValueError('a soft decision composes only with another Gather: apply them one by one')
  shares = [getattr(part, 'share', None) for part in (first, second)]
  if isinstance(first, Mix) or isinstance(second, Mix):
    if any(share is not None for share in shares):
      raise ValueError('sizes shared out otherwise than features are no single Mix: apply them one '
                       'by one')
    weights = jnp.einsum('bkm,bmn->bkn', second.matrix(), first.matrix())
    return Mix(weights, valid=valid, features=features)
  if features is not None:
    raise ValueError('a Merge cannot start from other features than it gets: apply them one by one')
  ops = {part.op for part in (first, second) if isinstance(part, Merge)}
  if len(ops) > 1:
    raise ValueError("a merge with op='max' and one with op='sum' are no single merge: apply them "
                     'one by one')
  outputs = second.src.shape[1]
  joined = first.dst < first.src.shape[1]
  middle = jnp.minimum(first.dst, first.src.shape[1] - 1)
  if first.valid is not None:
    joined &= take(first.valid, middle)
  dst = jnp.where(joined, take(second.dst, middle), outputs)
  weight = _weight(first) * take(_weight(second), middle)
  share = shares[0]
  if shares[1] is not None:
    share = take(shares[1], middle) * (1.0 if share is None else share)
  return Merge(src, dst, weight, valid=valid, share=share, op=ops.pop())


def _weight(assignment: Gather | Merge) -> Array:
  """float32[B, N]: each input's factor in the output that it joins."""
  if isinstance(assignment, Merge):
    return assignment.weight
  return (assignment.dst < assignment.src.shape[1]).astype(jnp.float32)


def restore(tokens: TokenSet, values: Array, *, fill: float = 0.0) -> Array:
  """Back to the original tokens: values [B, N, ...] -> [B, T, ...], dropped ones hold `fill`."""
  picked = take(values, jnp.maximum(tokens.owner, 0))
  return jnp.where(_expand(tokens.owner >= 0, picked), picked, jnp.asarray(fill, picked.dtype))


def regroup(assignment: Assignment, attention: Array) -> Array:
  """An attention map after a cut inside attention: float32[B, H, N, N] -> [B, H, M, K].

  Query rows follow the assignment. Keys follow it where slots are joined: a group is attended with
  the sum of what its members were (K = M; MCTF, arXiv:2403.10030, Sec. 3.4). Where slots are only
  picked, the dropped ones are still keys of this layer (K = N; ATS, arXiv:2111.15667, Sec. 3.2).
  """
  if isinstance(assignment, Gather):
    # Picked where they lie: a transposed copy would be the largest buffer of the layer.
    rows = jnp.take_along_axis(attention, assignment.src[:, None, :, None], axis=2)
    valid = assignment.valid
    return rows if valid is None else jnp.where(valid[:, None, :, None], rows, 0)
  # Keys first: under op='max' the order matters.
  return assignment.apply_by_head(assignment.totals_by_key(attention.astype(jnp.float32)))


def attend(assignment: Assignment, attention: Array, values: Array) -> Array:
  """What tokens read by the map of a cut inside attention: `regroup`'s map times their values.

  Where slots are joined, every old key reads its group's value by the old map, and the rows are
  joined after that: sums may be taken in any order, and a row of values is shorter than one of the
  map.

  Args:
    assignment: the cut.
    attention: float32[B, H, N, N], before it.
    values: float[B, M, H, d] of the groups, or [B, N, H, d] where slots are only picked.

  Returns:
    float[B, M, H, d].
  """
  linear = not isinstance(assignment, Gather) and getattr(assignment, 'op', 'sum') == 'sum'
  with jax.named_scope('reduction'):
    if linear:
      values = assignment.restore(values)
      if isinstance(assignment, Merge) and assignment.share is not None:
        values = values * _expand(assignment.share, values).astype(values.dtype)
    else:
      attention = regroup(assignment, attention)
  mixed = jnp.einsum('bhnm,bmhd->bnhd', attention.astype(values.dtype), values)
  with jax.named_scope('reduction'):
    return assignment.apply(mixed) if linear else mixed


def key_bias(tokens: TokenSet, *, proportional: bool) -> Array | None:
  """float32[B, N] to add to attention logits, or None where there is nothing to add.

  log(size) makes a slot count as many times as it has tokens (ToMe, arXiv:2210.09461, Sec. 3).
  A slot of size 0 keeps a finite bias and its gradient. Padding is pushed out by a
  finite amount, so that a row of padding alone stays finite.
  """
  bias = None
  if proportional and tokens.size is not None:
    bias = log_weight(tokens.size)
  if tokens.valid is not None:
    bias = jnp.where(tokens.valid, 0.0 if bias is None else bias, PADDING_BIAS)
  return bias
