"""Synthetic tokens and signals, and one compiled run of a method, for the contract's invariants.

Axes: B batch, N slots now, M slots after, T original tokens, D features, H heads, d features a
head, Q words of a prompt.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from models.plan import make_method, methods
from ops import assignments
from ops import tokens as tk
from ops.rope import Rope
from ops.signals import STATIC, Signals
from ops.tokens import SPECIAL, TEXT, VISUAL, TokenSet

BATCH, GRID, WIDTH, HEADS, HEAD = 3, (4, 5), 16, 2, 8
PROTECTED = 1
SLOTS = PROTECTED + GRID[0] * GRID[1]
ORIGINALS = 40
# Slots of a row with padding, or with text, around the same tokens.
WIDE = 24
TEXTS = WIDE - SLOTS
KEEP, KEEP_AGAIN, KEEP_TEXT = 13, 8, 13 + TEXTS
# Words of a prompt: so many in the first row, one less in the second, two less in the third.
WORDS = 4
GARBAGE = 1e3
# An image in small and two crops of it; other patches are of none that counts. To methods for
# videos all are frames.
TILING, CROP_GRID = (2, 1), (2, 2)
NUM_CROPS = WIDE // 4


@dataclasses.dataclass(frozen=True)
class Case:
  """What a host would give a method, in numpy: everything that a test may want to change.

  Attributes:
    x: float32[B, N, D].
    q, k, v: float32[B, N, H, d].
    hidden: float32[B, N, D].
    ahead: float32[B, H, N], logits of the next layer's received attention.
    pos, kind: int[B, N].
    owner: int32[B, T].
    size: float32[B, N] or None.
    valid: bool[B, N] or None.
    protected: kept slots in every row.
    budget: int32[B], free tokens that each row keeps, or None.
    text: float32[B, Q, D], and text_valid: bool[B, Q].
  """

  x: np.ndarray
  q: np.ndarray
  k: np.ndarray
  v: np.ndarray
  hidden: np.ndarray
  ahead: np.ndarray
  pos: np.ndarray
  kind: np.ndarray
  owner: np.ndarray
  size: np.ndarray | None
  valid: np.ndarray | None = None
  protected: int = PROTECTED
  budget: np.ndarray | None = None
  text: np.ndarray | None = None
  text_valid: np.ndarray | None = None

  def change(self, **fields: Any) -> Case:
    return dataclasses.replace(self, **fields)

  def rows(self, index: Any) -> Case:
    """Some rows of the batch, or all in another order."""
    arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    return self.change(**{name: value[index] for name, value in arrays.items()
                          if isinstance(value, np.ndarray)})

  @property
  def real(self) -> np.ndarray:
    return np.ones(self.x.shape[:2], bool) if self.valid is None else self.valid

  def tokens(self, dtype: Any = np.float32) -> TokenSet:
    pos = self.pos.astype(np.int32)
    stats = {'memo': pos.astype(np.float32), 'pair': np.stack([pos, -pos], axis=-1),
             'unit': (self.x[:, :, 0] > 0).astype(np.int32),
             'frame': np.where(self.kind == VISUAL, self.pos // (CROP_GRID[0] * CROP_GRID[1]), -1),
             'relevance': np.abs(self.x[:, :, 1])}
    return TokenSet(
        x=self.x.astype(dtype), pos=pos, kind=self.kind.astype(np.int8),
        owner=self.owner.astype(np.int32), valid=self.valid, size=self.size, stats=stats,
        protected=self.protected, budget=self.budget)

  def signals(self, needs: frozenset[str], dtype: Any = np.float32) -> Signals:
    """The named signals; attention is softmaxed over real keys, so padding gets none."""
    real = self.real[:, None, None]
    logits = np.einsum('bnhd,bmhd->bhnm', self.q, self.k) / np.sqrt(HEAD)
    attention = _softmax(np.where(real, logits, -np.inf))
    queries = self.real[:, None, :, None]
    known = {
        'queries': self.q.astype(dtype), 'keys': self.k.astype(dtype),
        'values': self.v.astype(dtype), 'hidden': self.hidden.astype(dtype),
        'attention': attention, 'cls_attention': attention[np.arange(len(self.x)), :, self.cls],
        'cls_logits': logits[np.arange(len(self.x)), :, self.cls],
        'last_attention': attention[np.arange(len(self.x)), :, self.last],
        'received_attention': np.where(queries, attention, 0).sum(2) / queries.sum(2)}
    known |= {'text': self.text.astype(dtype), 'text_valid': self.text_valid,
              'vision_features': known['hidden'], 'project': PROJECT}
    each, patch = CROP_GRID[0] * CROP_GRID[1], self.kind == VISUAL
    known |= {'crop': np.where(patch, self.pos // each, -1).astype(np.int32),
              'patch': np.where(patch, self.pos % each, -1).astype(np.int32),
              'tiling': np.tile(np.array(TILING, np.int32), (len(self.x), 1))}
    ahead = _softmax(np.where(real[:, 0], self.ahead, -np.inf))
    known['row_attention'] = known['received_attention']
    known['mlp_hidden'] = known['hidden']
    known['projected_norms'] = np.moveaxis(np.abs(self.v).sum(axis=3), 2, 1)
    known |= {'next_received_attention': ahead, 'next_last_attention': ahead,
              'next_row_attention': ahead, 'next_keys': self.k.astype(dtype),
              'next_queries': self.q.astype(dtype)}
    return Signals(**{name: known[name] for name in needs & known.keys()},
                   grid=GRID, crop_grid=CROP_GRID, num_crops=NUM_CROPS, layer=1, depth=4,
                   rope=Rope(HEAD))

  @property
  def told(self) -> dict[str, np.ndarray]:
    """What rows have beside their tokens."""
    return {'text': self.text, 'text_valid': self.text_valid}

  @property
  def cls(self) -> np.ndarray:
    """int[B], where the first special token sits."""
    return np.argmax(self.real & (self.kind == SPECIAL), axis=1)

  @property
  def last(self) -> np.ndarray:
    """int[B], where the last token sits."""
    return self.real.shape[1] - 1 - np.argmax(self.real[:, ::-1], axis=1)


def _project(kernel: Any, x: Any) -> Any:
  return nn.gelu(x.astype(jnp.float32) @ kernel[0]) @ kernel[1]


PROJECT = jax.tree_util.Partial(
    _project, np.random.default_rng(11).normal(size=(2, WIDTH, WIDTH)).astype(np.float32) / 4)


def _softmax(logits: np.ndarray) -> np.ndarray:
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def random_case(seed: int = 0, *, slots: int = SLOTS) -> Case:
  """A [CLS] token and a grid of patches; sizes count owners, and every slot has at least one."""
  rng = np.random.default_rng(seed)

  def normal(*shape: int) -> np.ndarray:
    return rng.normal(size=(BATCH, *shape)).astype(np.float32)

  extra = rng.integers(PROTECTED, slots, size=(BATCH, ORIGINALS - slots))
  owner = np.concatenate([np.tile(np.arange(slots), (BATCH, 1)), extra], axis=1)
  size = np.stack([np.bincount(row, minlength=slots) for row in owner]).astype(np.float32)
  pos = np.concatenate([np.full(PROTECTED, -1), np.arange(slots - PROTECTED)])
  kind = np.where(np.arange(slots) < PROTECTED, SPECIAL, VISUAL)
  return Case(
      x=normal(slots, WIDTH), q=2 * normal(slots, HEADS, HEAD), k=normal(slots, HEADS, HEAD),
      v=normal(slots, HEADS, HEAD), hidden=normal(slots, WIDTH), ahead=normal(HEADS, slots),
      pos=np.tile(pos, (BATCH, 1)), kind=np.tile(kind, (BATCH, 1)), owner=owner, size=size,
      text=normal(WORDS, WIDTH), text_valid=np.arange(WORDS) < WORDS - np.arange(BATCH)[:, None])


def spread(case: Case, places: list[np.ndarray], *, slots: int = WIDE) -> Case:
  """Rows among padding: row b's first tokens sit in slots places[b], the rest holds garbage."""

  def move(values: np.ndarray, fill: float) -> np.ndarray:
    out = np.full((BATCH, slots, *values.shape[2:]), fill, values.dtype)
    for row, place in enumerate(places):
      out[row, place] = values[row, :len(place)]
    return out

  owner = np.full_like(case.owner, -1)
  for row, place in enumerate(places):
    there = case.owner[row] < len(place)
    owner[row, there] = place[case.owner[row, there]]
  ahead = np.swapaxes(move(np.swapaxes(case.ahead, 1, 2), GARBAGE), 1, 2)
  return Case(
      x=move(case.x, GARBAGE), q=move(case.q, GARBAGE), k=move(case.k, GARBAGE),
      v=move(case.v, GARBAGE), hidden=move(case.hidden, GARBAGE), ahead=ahead,
      pos=move(case.pos, 3), kind=move(case.kind, VISUAL), owner=owner,
      size=move(case.size, GARBAGE), valid=move(np.ones(case.x.shape[:2], bool), False),
      protected=case.protected, **case.told)


def with_text(case: Case, places: list[np.ndarray]) -> Case:
  """The same tokens with text between them: row b's text sits in slots places[b]."""
  inverse = [np.setdiff1d(np.arange(WIDE), place) for place in places]
  wide, other = spread(case, inverse), random_case(99, slots=WIDE)
  text = ~wide.real

  def fill(name: str) -> np.ndarray:
    mask = text.reshape(text.shape + (1,) * (getattr(wide, name).ndim - 2))
    return np.where(mask, getattr(other, name), getattr(wide, name))

  owner = np.concatenate([wide.owner, np.stack(places)], axis=1)
  ahead = np.where(text[:, None], other.ahead, wide.ahead)
  return wide.change(
      **{name: fill(name) for name in ('x', 'q', 'k', 'v', 'hidden')}, ahead=ahead, owner=owner,
      kind=np.where(text, TEXT, wide.kind), pos=np.where(text, 100 + np.arange(WIDE), wide.pos),
      size=np.where(text, 1, wide.size).astype(np.float32), valid=None,
      protected=PROTECTED + TEXTS)


def alike(case: Case, value: float) -> Case:
  """All tokens the same: features of one value, equal attention for all, one token a slot."""
  same = {name: np.full_like(getattr(case, name), value)
          for name in ('x', 'q', 'k', 'v', 'hidden', 'text')}
  return case.change(**same, ahead=np.zeros_like(case.ahead), size=np.ones_like(case.size))


@struct.dataclass
class Outcome:
  """All that a method's answer leads to; leaves are numpy arrays.

  Attributes:
    assignment: the answer itself.
    src, dst: as in Assignment.
    matrix: float32[B, M, N].
    applied: float[B, M, D], the assignment applied to the features.
    totals: float32[B, M], the sizes added up.
    restored: float[B, N], a constant 2.5 applied, then restored.
    reduced, masked: the tokens after `reduce` and `reduce_masked`.
  """

  assignment: Any
  src: Any
  dst: Any
  matrix: Any
  applied: Any
  totals: Any
  restored: Any
  reduced: TokenSet
  masked: TokenSet


def outcome(tokens: TokenSet, assignment: assignments.Assignment) -> Outcome:
  const = jnp.full(tokens.x.shape[:2], 2.5)
  return Outcome(
      assignment=assignment, src=assignment.src, dst=assignment.dst, matrix=assignment.matrix(),
      applied=assignment.apply(tokens.x), totals=assignment.totals(tokens.sizes),
      restored=assignment.restore(assignment.apply(const)), reduced=tk.reduce(tokens, assignment),
      masked=tk.reduce_masked(tokens, assignment))


# Settings other than the defaults, at which a method does to tokens as random as these, and as few,
# what it does to an image: thresholds that some of them pass. What pools over neighbours makes the
# ends of a row unlike its middle, and so has no ties.
SETTINGS: dict[str, dict[str, Any]] = {
    'dtop': {'classes': 3, 'threshold': 0.225, 'spared': 1}, 'dymu': {'threshold': 0.4},
    'globalcom2': {'temperature': 2.0},
    'vidcom2': {'temperature': 1.0},
    'fastvid': {'segments': 2, 'threshold': -1.0, 'context': 0.5, 'every': 2},
    'holitom': {'threshold': 0.0, 'share': 0.3},
    'prunevid': {'threshold': -0.1, 'few': 1},
    'adatoken_3d': {'share': 0.5}, 'mustdrop': {'overall': 0.05, 'single': 0.3},
    'gemfilter': {'kernel': 1}, 'explained': {'kernel': 1},
    'pact': {'keep': 0.7, 'cutoff': 0.7, 'coefficient': 1.0},
    'duet_zip': {'contextual': 2, 'width': 2}, 'holov': {'chunks': 4},
    'token_corr': {'threshold': 0.25, 'partners': 6}, 'vflowopt': {'cell': 2.5},
    'recoverable': {'variant': 'paper', 'peers': 3, 'neighbours': 4},
    'visiontrim': {'variant': 'paper', 'complement': 3}}

# Those that mix tokens into some outputs, and leave others as they are.
MIX_SOME = ('recoverable', 'visiontrim')
# Those that divide tokens by their place first, and then choose in each part.
PARTED = {'vispruner': 'every other token goes first', 'flashvlm': 'every other token goes first',
          'holov': 'shares tokens among chunks'}


@functools.cache
def method(name: str) -> Any:
  return make_method(name, SETTINGS.get(name, {}))


def names() -> list[str]:
  # What keeps its slots as padding answers for all of them: tests/contract/test_exits.py has those.
  return [name for name in methods() if not method(name).mode]


def budget(name: str, slots: int, keep: int, protected: int = PROTECTED) -> int:
  """`keep`, or the fewest that the method can leave."""
  return max(keep, method(name).min_slots(slots, protected))


def learned(name: str) -> bool:
  """Whether a method has parameters."""
  return isinstance(method(name), nn.Module)


def ask(name: str, params: Any, tokens: TokenSet, signals: Signals, *, num_slots: int,
        rng: Any = None) -> tuple[assignments.Assignment, dict[str, Any]]:
  """A method's own answer, and its losses; with a key, as in training."""
  made = method(name)
  if not learned(name):
    return made(tokens, signals, num_slots=num_slots), {}
  answer, sown = made.apply({'params': params}, tokens, signals, num_slots=num_slots,
                            mutable=['losses'],
                            rngs=None if rng is None else {'dropout': rng})
  return answer, {key: value for key, (value,) in sown.get('losses', {}).items()}


def parameters(name: str, tokens: TokenSet, signals: Signals, *, num_slots: int,
               scale: float = 0.3) -> Any:
  """Random parameters of a learned method ({} of others): none is zero, as after training."""
  if not learned(name):
    return {}
  shapes = jax.eval_shape(functools.partial(method(name).init, num_slots=num_slots),
                          jax.random.key(0),
                          tokens, signals).get('params', {})
  rng = np.random.default_rng(7)
  return jax.tree.map(lambda s: (scale * rng.normal(size=s.shape)).astype(s.dtype), shapes)


TRACES: dict[tuple[Any, ...], int] = {}


@functools.cache
def compiled(name: str, keep: int) -> Any:
  """(params, tokens, signals) -> the method's answer, compiled once a shape."""

  def answer(params: Any, tokens: TokenSet, signals: Signals) -> assignments.Assignment:
    shape = (name, keep, *tokens.x.shape, tokens.valid is None, tokens.size is None,
             tokens.budget is None, tokens.protected)
    TRACES[shape] = TRACES.get(shape, 0) + 1
    return ask(name, params, tokens, signals, num_slots=keep)[0]

  return jax.jit(answer)


# Apart from the methods, so that all methods share what is compiled here.
follow = jax.jit(outcome)


@jax.jit
def _composed(tokens: TokenSet, first: assignments.Assignment,
              second: assignments.Assignment) -> tuple[Any, ...]:
  both = tk.compose(first, second)
  return both, both.matrix(), both.apply(tokens.x), tk.reduce(tokens, both)


def composed(tokens: TokenSet, first: assignments.Assignment,
             second: assignments.Assignment) -> tuple[Any, ...]:
  """The composition of two answers, its matrix, what it makes of the features, and of tokens."""
  return jax.tree.map(np.asarray, _composed(tokens, first, second))


def run(name: str, case: Case, keep: int, *, scale: float = 0.3) -> Outcome:
  """Runs a method on a case, as the stack does; `scale` is of a learned method's parameters."""
  keep = budget(name, case.x.shape[1], keep, case.protected)
  tokens, signals = case.tokens(), case.signals(method(name).needs)

  def asked(tokens: TokenSet, signals: Signals, *, num_slots: int) -> assignments.Assignment:
    params = parameters(name, tokens, signals, num_slots=num_slots, scale=scale)
    return compiled(name, num_slots)(params, tokens, signals)

  answer = tk.decide(asked, tokens, signals, num_slots=keep)
  return jax.tree.map(np.asarray, follow(tokens, answer))


@functools.cache
def base(name: str, seed: int = 0) -> Outcome:
  """The run that most invariants look at: no padding, sizes above one."""
  return run(name, random_case(seed), KEEP)


@functools.cache
def gradients(name: str, dtype: Any) -> Any:
  """case -> (reduced tokens, gradients of a sum over them), compiled once."""
  keep = budget(name, WIDE, KEEP)
  weights = np.random.default_rng(3).normal(size=(BATCH, 1, WIDTH)).astype(np.float32)

  def loss(inputs: Any, tokens: TokenSet, signals: Signals, rng: Any) -> Any:
    params, x, floats = inputs
    answer, losses = ask(name, params, tokens.replace(x=x), signals.replace(**floats),
                         num_slots=keep,
                         rng=rng)
    reduced = tk.reduce(tokens.replace(x=x), answer)
    real = jnp.where(reduced.real[..., None], reduced.x.astype(jnp.float32), 0.0)
    total = jnp.sum(real * weights) + jnp.sum(jnp.where(reduced.real, reduced.sizes, 0.0))
    return total + sum(jnp.sum(value) for value in losses.values()), reduced

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))

  def call(case: Case) -> tuple[Any, Any]:
    needs = method(name).needs
    tokens, signals = case.tokens(dtype), case.signals(needs, dtype)
    params = parameters(name, tokens, signals, num_slots=keep)
    floats = {key: value for key in needs - STATIC
              if jnp.issubdtype((value := getattr(signals, key)).dtype, jnp.floating)}
    rng = jax.random.key(5) if learned(name) else None
    (value, reduced), grads = step((params, tokens.x, floats), tokens, signals, rng)
    return (value, reduced.x, reduced.sizes), grads

  return call
