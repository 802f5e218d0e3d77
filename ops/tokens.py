"""Tokens, and the three ways of making fewer of them.

Axes: B batch, N slots now, M slots after, T original tokens, D features.

Every reduction in the literature is a matrix W with x' = W x. An `Assignment` is that matrix in
one of three forms: `Gather` (rows with a single one), `Merge` (rows with disjoint supports) and
`Mix` (any rows). All three are applied, undone, exported and composed by the same few functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from ops.assignments import Assignment, Gather, Merge, Mix
from ops.attention import HIDDEN_LOGIT, log_weight
from ops.moves.rows import expand_like, put, take

Array = jax.Array

# Kinds of slots. SPECIAL covers [CLS], registers, distillation, newline and similar tokens.
SPECIAL, VISUAL, TEXT = 0, 1, 2
KINDS = {'special': SPECIAL, 'visual': VISUAL, 'text': TEXT}


class TokenSet(struct.PyTreeNode):
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
    held: bool[B, N], True for slots that no reduction may touch, whatever their kind (the last
      token of a prompt, which predicts); None for none.
    stats: a method's memory between layers, {name: [B, N, ...]}; follows the slot's anchor.
    places: int32[B, T], positions of the original tokens, where attention runs among these
      (ops/unmerge.py); else None.
    added: {layer: float[B, T, D]}, features of original tokens that are added to their slots before
      a layer runs (to a slot of several their mean), as a stack is given them; it lets go of them.
    budget: int32[B], how many of its free tokens each row keeps in the reduction at hand, at most
      those it has; None for as many as fit. Reductions fill no more slots than that in any row.
    of: the kinds that the reduction at hand may touch. Static.
    protected: slots in every row that may not be touched (the [CLS] token and its like). Static.
    texts: slots of kind TEXT that a row has at most, where that is known; else None. Static.
    padding: where padding slots may be: 'anywhere', or 'last', behind all real ones of the row, so
      that causal attention by slot hides them without a mask. Static.
  """

  x: Array
  pos: Array
  kind: Array
  owner: Array
  valid: Array | None = None
  size: Array | None = None
  held: Array | None = None
  places: Array | None = None
  budget: Array | None = None
  stats: dict[str, Array] = struct.field(default_factory=dict)
  added: dict[int, Array] = struct.field(default_factory=dict)
  of: tuple[int, ...] = struct.field(pytree_node=False, default=(VISUAL,))
  protected: int = struct.field(pytree_node=False, default=0)
  texts: int | None = struct.field(pytree_node=False, default=None)
  padding: str = struct.field(pytree_node=False, default='anywhere')

  @classmethod
  def create(cls, x: Array, *, pos: Array | None = None, kind: Array | None = None,
             **fields: Any) -> TokenSet:
    """Fresh tokens from features float[B, N, D]: one slot a token, visual, in raster order."""
    chex.assert_rank(x, 3)
    batch, slots, _ = x.shape
    iota = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, slots))
    if kind is None:
      kind = jnp.full((batch, slots), VISUAL, jnp.int8)
    tokens = cls(x=x, pos=iota if pos is None else pos, kind=kind, owner=iota, **fields)
    by_slot = {name: getattr(tokens, name) for name in ('pos', 'kind', 'valid', 'size', 'stats')}
    chex.assert_tree_shape_prefix(by_slot, (batch, slots))
    return tokens

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
    if self.held is not None:
      allowed &= ~self.held
    return self.real & allowed

  @property
  def fixed(self) -> Array:
    """bool[B, N], True for real slots that the reduction at hand must leave alone."""
    return self.real & ~self.free


def num_kept(tokens: TokenSet, num_slots: int) -> Array:
  """Counts the free tokens that a reduction to M slots leaves in each row, int32[B, 1]."""
  num_free = count(tokens.free)
  if tokens.budget is not None:
    return jnp.minimum(tokens.budget[:, None], num_free)
  return jnp.clip(num_slots - count(tokens.fixed), 0, num_free)


def filled(tokens: TokenSet, num_slots: int) -> Array | None:
  """Names the slots that a reduction fills, bool[B, M]; None where rows have no count of their own.

  Fixed tokens and those that stay come first, so the slots filled are the first ones.
  """
  if tokens.budget is None:
    return None
  return jnp.arange(num_slots, dtype=jnp.int32)[None] < num_left(tokens, num_slots)


def num_left(tokens: TokenSet, num_slots: int) -> Array | int:
  """Counts the slots that a reduction fills, fixed tokens included.

  Returns:
    M itself, which rows with fewer tokens do not reach; int32[B, 1] where rows have budgets.
  """
  if tokens.budget is None:
    return num_slots
  return count(tokens.fixed) + num_kept(tokens, num_slots)


def of_kept(tokens: TokenSet, num_slots: int, rule: Callable[[int], int]) -> Array | int:
  """Applies a rule of whole numbers to how many free tokens stay.

  Args:
    tokens: N slots.
    num_slots: M.
    rule: count -> number, worked out on the host, exactly.

  Returns:
    The number; int32[B, 1] where rows have budgets.
  """
  most = max(num_slots - tokens.protected, 0)
  if tokens.budget is None:
    return rule(most)
  return jnp.asarray([rule(kept) for kept in range(most + 1)], jnp.int32)[
      num_kept(tokens, num_slots)]


def count(flags: Array) -> Array:
  """Counts what is True in each row, bool[B, N] -> int32[B, 1]."""
  return jnp.sum(flags, axis=1, keepdims=True, dtype=jnp.int32)


def part(tokens: TokenSet, kinds: tuple[int, ...], number: int) -> tuple[TokenSet, TokenSet]:
  """Parts tokens by kind.

  Args:
    tokens: N slots.
    kinds: of the second part.
    number: I, slots of these kinds in every row, padding included.

  Returns:
    The others, N - I slots, and those, I slots; each knows its own of the original tokens.
  """
  chosen = jnp.zeros(tokens.kind.shape, bool)
  for kind in kinds:
    chosen |= tokens.kind == kind
  order = jnp.argsort(chosen, axis=1, stable=True).astype(jnp.int32)
  rest = tokens.slots - number
  parts = (reduce(tokens, Gather(src, tokens.slots)) for src in (order[:, :rest], order[:, rest:]))
  first, second = (each.replace(padding=tokens.padding) for each in parts)
  return first, second


def join(first: TokenSet, second: TokenSet) -> TokenSet:
  """Joins the slots of two parts of the same original tokens, the first one's in front.

  Args:
    first, second: N and I slots; what methods took down of the first alone is 0 in the second.

  Returns:
    N + I slots.
  """
  def both(name: str, default: Callable[[TokenSet], Array]) -> Array | None:
    values = [getattr(each, name) for each in (first, second)]
    if all(value is None for value in values):
      return None
    return jnp.concatenate([default(each) if value is None else value
                            for each, value in zip((first, second), values, strict=True)], axis=1)

  def concatenated(one: Array, other: Array) -> Array:
    return jnp.concatenate([one, other], axis=1)

  stats = {name: concatenated(value, second.stats.get(name, jnp.zeros(
      (*second.kind.shape, *value.shape[2:]), value.dtype))) for name, value in first.stats.items()}
  later = jnp.where(second.owner >= 0, second.owner + first.slots, -1)
  return first.replace(
      x=concatenated(first.x, second.x.astype(first.x.dtype)),
      pos=concatenated(first.pos, second.pos), kind=concatenated(first.kind, second.kind),
      owner=jnp.where(first.owner >= 0, first.owner, later), stats=stats, padding='anywhere',
      valid=both('valid', lambda each: each.real), size=both('size', lambda each: each.sizes),
      held=both('held', lambda each: jnp.zeros(each.kind.shape, bool)))


def identity(tokens: TokenSet) -> Gather:
  """The assignment that changes nothing."""
  batch, slots = tokens.x.shape[:2]
  return Gather(jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, slots)), slots)


def decide(method: Callable[..., Assignment], tokens: TokenSet, signals: object, *,
           num_slots: int) -> Assignment:
  """Asks a method, unless everything is to stay: then the answer is the identity.

  So it is in every row by itself where rows have budgets.
  """
  if num_slots >= tokens.slots:
    return identity(tokens)
  return whole_rows(method(tokens, signals, num_slots=num_slots), tokens, num_slots)


def whole_rows(answer: Assignment, tokens: TokenSet, num_slots: int) -> Assignment:
  """Returns an answer where rows that lose nothing stay as they are, real slots first."""
  if tokens.budget is None:
    return answer
  order = jnp.argsort(~tokens.real, axis=1, stable=True)[:, :answer.src.shape[1]]
  whole = Gather(order.astype(jnp.int32), tokens.slots, valid=take(tokens.real, order))
  stays = num_kept(tokens, num_slots) == count(tokens.free)
  return answer.where_not(stays, whole, tokens.x)


def reduce(tokens: TokenSet, assignment: Assignment) -> TokenSet:
  """Carries out an assignment: TokenSet of N slots -> TokenSet of M slots."""
  src, dst = assignment.src, assignment.dst
  outputs = src.shape[1]
  valid = None if tokens.valid is None else take(tokens.valid, src)
  if assignment.valid is not None:
    valid = assignment.valid if valid is None else valid & assignment.valid
  size, sizes_stay = tokens.size, isinstance(assignment, Gather) and assignment.policy is None
  if size is not None or not sizes_stay:
    size = assignment.totals(tokens.sizes)
  features = assignment.features
  x = assignment.apply(tokens.x if features is None else features)
  # Token t sat in slot owner[t]; it follows that slot, or is gone if the slot is.
  moved = take(dst, jnp.maximum(tokens.owner, 0))
  survives = (tokens.owner >= 0) & (moved < outputs)
  if valid is not None:
    survives &= take(valid, jnp.minimum(moved, outputs - 1))
  owner = jnp.where(survives, moved, -1)
  return tokens.replace(
      x=x.astype(tokens.x.dtype), pos=take(tokens.pos, src), kind=take(tokens.kind, src),
      owner=owner, valid=valid, size=size, padding='anywhere', budget=None,
      held=None if tokens.held is None else take(tokens.held, src),
      stats={name: take(value, src) for name, value in tokens.stats.items()})


def reduce_masked(tokens: TokenSet, assignment: Assignment) -> TokenSet:
  """`reduce` that keeps all N slots and marks the surplus as padding.

  Outputs of Gather and Merge stay in their anchor's slot, those of Mix take the first M slots. The
  real tokens equal those of `reduce`, in another order: the mode that trains hard decisions.
  """
  reduced = reduce(tokens, assignment)
  batch, slots = tokens.x.shape[:2]
  outputs = reduced.slots
  slot_of_output = assignment.src
  if isinstance(assignment, Mix):
    slot_of_output = jnp.broadcast_to(jnp.arange(outputs, dtype=jnp.int32), (batch, outputs))
  target = jnp.where(reduced.real, slot_of_output, slots)
  start = jnp.full((batch, slots), outputs, jnp.int32)
  number = jnp.broadcast_to(jnp.arange(outputs, dtype=jnp.int32), (batch, outputs))
  output_of_slot = put(start, target, number)
  filled = output_of_slot < outputs

  def spread(new: Any, old: Array) -> Array:
    picked = take(new, jnp.minimum(output_of_slot, outputs - 1))
    return jnp.where(expand_like(filled, picked), picked, old)

  owner = jnp.where(reduced.owner >= 0,
                    take(slot_of_output, jnp.maximum(reduced.owner, 0)), -1)
  return tokens.replace(
      x=spread(reduced.x, jnp.zeros_like(tokens.x)), pos=spread(reduced.pos, tokens.pos),
      kind=spread(reduced.kind, tokens.kind), owner=owner, valid=filled, padding='anywhere',
      budget=None, held=None if tokens.held is None else spread(reduced.held, tokens.held),
      size=None if reduced.size is None else spread(reduced.size, jnp.zeros((batch, slots))),
      stats={name: spread(value, tokens.stats[name]) for name, value in reduced.stats.items()})


def compose(first: Assignment, second: Assignment) -> Assignment:
  """Composes two assignments, `first`, then `second` (M slots in, K out).

  Raises:
    ValueError: where no single assignment does: a maximum beside a sum, a `policy` beside anything
      but a Gather, `size_weights` beside a Mix, or `features` of the second's own or before a
      Merge. A branch's factors are the first one's.
  """
  valid = None if first.valid is None else take(first.valid, second.src)
  if second.valid is not None:
    valid = second.valid if valid is None else valid & second.valid
  src = take(first.src, second.src)
  features = first.features
  if second.features is not None:
    raise ValueError("the second has features of its own, which no matrix on the first one's input "
                     'gives: apply them one by one')
  policies = [part.policy for part in (first, second)]
  if isinstance(first, Gather) and isinstance(second, Gather):
    policy = policies[1]
    if policies[0] is not None:
      policy = take(policies[0], second.src) * (1.0 if policy is None else policy)
    gate = None if first.gate is None else take(first.gate, second.src)
    return Gather(src, first.slots, valid=valid, policy=policy, features=features,
                  wanted=first.wanted, gate=gate, skip_scale=first.skip_scale)
  if any(policy is not None for policy in policies):
    raise ValueError('a soft decision composes only with another Gather: apply them one by one')
  size_weights = [part.size_weights for part in (first, second)]
  if isinstance(first, Mix) or isinstance(second, Mix):
    if any(part is not None for part in size_weights):
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
  sized = size_weights[0]
  if size_weights[1] is not None:
    sized = take(size_weights[1], middle) * (1.0 if sized is None else sized)
  return Merge(src, dst, weight, valid=valid, size_weights=sized, op=ops.pop())


def _weight(assignment: Assignment) -> Array:
  """Returns each input's factor in the output that it joins, float32[B, N]: of no Mix."""
  if isinstance(assignment, Merge):
    return assignment.weight
  return (assignment.dst < assignment.src.shape[1]).astype(jnp.float32)


def restore(tokens: TokenSet, values: Array, *, fill: float = 0.0) -> Array:
  """Scatters values to the original tokens, [B, N, ...] -> [B, T, ...]; dropped ones get `fill`."""
  picked = take(values, jnp.maximum(tokens.owner, 0))
  return jnp.where(expand_like(tokens.owner >= 0, picked), picked, jnp.asarray(fill, picked.dtype))


def became(before: TokenSet, now: TokenSet) -> Merge:
  """Reads out of owners what has become of earlier slots, whatever reductions came between.

  Args:
    before: N slots.
    now: M slots of the same original tokens, later.

  Returns:
    The merge in which a slot of `now` is the mean, by size, of the earlier slots that it stands
    for.
  """
  slots, outputs = before.slots, now.slots
  index = jnp.where(before.owner >= 0, before.owner, slots)
  dst = jax.vmap(lambda n, i: jax.ops.segment_max(n, i, num_segments=slots))(now.owner, index)
  dst = jnp.where(dst >= 0, dst, outputs)
  return Merge.mean(jnp.zeros(now.pos.shape[:2], jnp.int32), dst, before.sizes, valid=now.valid)


def expand(before: TokenSet, now: TokenSet) -> Array:
  """Brings features back to earlier slots, each with the change that its slot has gone through.

  The mean of what a slot stands for becomes what the slot has become; a token that was dropped
  stays as it was. So the layers between are one branch of the residual stream.

  Args:
    before: N slots.
    now: M slots of the same original tokens, some layers later.

  Returns:
    float[B, N, D].
  """
  merge, x = became(before, now), before.x.astype(jnp.float32)
  change = now.x.astype(jnp.float32) - merge.apply(x)
  return (x + merge.restore(change)).astype(now.x.dtype)


def reduce_attention_map(assignment: Assignment, attention: Array) -> Array:
  """An attention map after a cut inside attention: float32[B, H, N, N] -> [B, H, M, K].

  Query rows follow the assignment. Keys follow it where slots are joined: a group is attended with
  the sum of what its members were (K = M; MCTF, arXiv:2403.10030, Sec. 3.4). Where slots are only
  picked, the dropped ones are still keys of this layer (K = N; ATS, arXiv:2111.15667, Sec. 3.2).
  """
  # Keys first: under op='max' the order matters.
  return assignment.apply_by_head(assignment.reduce_keys(attention))


def attend_after_cut(assignment: Assignment, attention: Array, values: Array) -> Array:
  """Computes attention after a cut inside attention: the reduced map times the values.

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
  linear = isinstance(assignment, Mix) or (isinstance(assignment, Merge) and assignment.op == 'sum')
  with jax.named_scope('reduction'):
    if linear:
      values = assignment.restore(values)
      if isinstance(assignment, Merge) and assignment.size_weights is not None:
        values = values * expand_like(assignment.size_weights, values).astype(values.dtype)
    else:
      attention = reduce_attention_map(assignment, attention)
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
    bias = jnp.where(tokens.valid, 0.0 if bias is None else bias, HIDDEN_LOGIT)
  return bias
