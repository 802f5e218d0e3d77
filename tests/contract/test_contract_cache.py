"""The contract of methods on the cache: every one of them against every invariant that fits.

An invariant is a function of a method's name. The terminal summary of
tests/contract/test_contract.py is of the methods on tokens; these have no sizes, owners or kinds to
look after.

Axes: B batch, N entries now, M entries after, H heads, K kv heads, d features a head.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.plan import make_method
from ops import signals
from ops.caches.blank import KVBlank
from ops.caches.channels import KVChannels
from ops.caches.heads import KVHeads
from ops.caches.merge import KVMerge
from ops.kv_cache import KVGather
from ops.primitives import kv_select
from ops.reducers.base import CacheReducer
from ops.reducers.cache import CACHE_REDUCERS
from ops.rope import Rope
from ops.tokens import TEXT, VISUAL, TokenSet

BATCH, LENGTH, WIDE, HEADS, KV, WIDTH, KEEP = 3, 20, 24, 4, 2, 8, 11
LEFT, RIGHT = np.arange(WIDE - LENGTH, WIDE), np.arange(LENGTH)
HOLES = np.setdiff1d(np.arange(WIDE), [0, 5, 13, 14])
GARBAGE = 1e3
# Small windows and few sinks, so that there is something left to choose.
SNAPKV = {'window': 3, 'kernel': 3}
HELD = {'inner': {'method': 'snapkv', 'args': SNAPKV}}
SETTINGS = {'snapkv': SNAPKV, 'streaming_llm': {'sinks': 2}, 'h2o': {'recent': 4},
            'expected_attention': {'sinks': 2, 'future': 8}, 'lagkv': {'sinks': 2, 'lag': 4},
            'cur': {'sinks': 2, 'window': 4},
            'compactor': {'sinks': 2, 'recent': 1, 'chunk': 4, 'sketch': 4},
            'duo_attention': {'sinks': 2, 'recent': 3, 'length': 20}, 'finch': {'window': 3},
            'simlayerkv': {'first': 2, 'recent': 6, 'threshold': 0.4},
            **dict.fromkeys(('adakv', 'criticalkv', 'criticaladakv', 'pyramidkv', 'two_stage',
                             'periodic'), HELD),
            'chunkkv': {**HELD, 'length': 3}, 'chunk': {**HELD, 'length': 8},
            'think': {**HELD, 'window': 3}, 'cam': {**HELD, 'merged': 4},
            'rkv': {'window': 3, 'kernel': 3},
            'threshold': {**HELD, 'threshold': -1e9, 'window': 4},
            'still': {'window': 4}, 'corematching_cache': {'variant': 'hidden', 'back': 2}}
# Heads of these keep different numbers.
SHARING = {'adakv', 'criticaladakv', 'duo_attention'}
# Where all is equal, the sums and the pools of these still go by place.
BY_PLACE = {'streaming_llm', 'voco', 'observed_attention', 'h2o', 'snapkv', 'finch', 'lagkv',
            'simlayerkv', 'cur', 'rkv', 'compactor', 'duo_attention', 'still',
            *(name for name in SETTINGS if 'inner' in SETTINGS[name])}


def method(name):
  return make_method(name, SETTINGS.get(name, {}), CACHE_REDUCERS)


def projections(seed=0):
  """Queries before rotation, keys, values: float32[B, N, H or K, d]."""
  rng = np.random.default_rng(seed)
  return tuple(rng.normal(size=(BATCH, LENGTH, heads, WIDTH)).astype(np.float32)
               for heads in (HEADS, KV, KV))


def spread(values, places, fill):
  """Row b's entries in slots places[b] of WIDE, `fill` elsewhere."""
  out = np.full((BATCH, WIDE, *values.shape[2:]), fill, values.dtype)
  for row, place in enumerate(places):
    out[row, place] = values[row, :len(place)]
  return out


@functools.cache
def compiled(name, keep, padded, dtype):
  """(queries, keys, values, pos, valid) -> the answer, compiled once a shape."""
  made = method(name)

  @jax.jit
  def answer(q, k, v, pos, valid):
    batch, length = pos.shape
    kind = jnp.where(pos % 3 == 0, VISUAL, TEXT).astype(jnp.int8)
    tokens = TokenSet.create(jnp.zeros((batch, length, 1), dtype), pos=pos, kind=kind,
                             valid=valid if padded else None)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    rope = Rope(WIDTH)
    told = signals.measure(
        made.needs - signals.STATIC, q=rope.rotate(q, pos), k=rope.rotate(k, pos), v=v, lse=None,
        bias=None if not padded else jnp.where(valid, 0.0, -1e9), positions=pos, span=made.span,
        query_valid=tokens.valid)
    kernel = jnp.asarray(np.random.default_rng(9).normal(size=(HEADS, WIDTH, 6)), dtype)
    told = told.replace(plain_queries=q, rope=rope, mlp_hidden=v.reshape(batch, length, -1),
                        projected_norms=signals.projected_norms(v, kernel))
    return entries(made(tokens, told, num_slots=keep), length)

  return answer


def entries(answer, slots):
  """The entries that an answer of any kind keeps of each head, in its order: int32[B, K, S].

  Where a place stays empty there is -1.
  """
  if isinstance(answer, KVHeads | KVBlank):
    blank = isinstance(answer, KVBlank)
    mask = jnp.repeat(answer.stays[:, None], KV, axis=1) if blank else answer.mask(slots)
    order = jnp.argsort(~mask, axis=2, stable=True)
    return jnp.where(jnp.take_along_axis(mask, order, axis=2), order, -1).astype(jnp.int32)
  if isinstance(answer, KVMerge | KVChannels):
    answer = answer.kept if isinstance(answer, KVMerge) else answer.entries
  return answer.src if answer.valid is None else jnp.where(answer.valid, answer.src, -1)


def run(name, qkv, *, places=None, keep=KEEP, dtype=jnp.float32, rows=slice(None)):
  """A method's answer as numpy; with places, of rows among padding full of garbage."""
  iota = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
  valid = np.ones((BATCH, LENGTH), bool)
  if places is not None:
    qkv = [spread(x, places, GARBAGE) for x in qkv]
    # Padding repeats positions, as left-padded prompts do.
    iota, valid = spread(iota, places, 0), spread(valid, places, False)
  return np.asarray(compiled(name, keep, places is not None, dtype)(
      *(x[rows] for x in (*qkv, iota, valid))))


def chosen(src, row, place=RIGHT):
  """The real entries that each head of a row keeps, numbered from 0, in the answer's order.

  What it names beyond these is padding, and stays padding.
  """
  number = np.full(WIDE + 1, -1)
  number[place] = np.arange(len(place))
  return [head[head >= 0] for head in number[src[row]]]


def distinct(src):
  """No head has an entry twice."""
  return all(len(set(head[head >= 0])) == (head >= 0).sum() for row in src for head in row)


def declares(name):
  """Its attributes make sense, and its docstring starts with a sentence and names a paper."""
  made = method(name)
  assert isinstance(made, CacheReducer) or made.site == 'cache'
  assert made.site == 'cache'
  assert 'keys' in made.needs <= set(signals.NAMES)
  assert (type(made).__doc__ or '').split('\n')[0].endswith('.')
  assert 'arXiv:' in type(made).__doc__ or 'openreview.net/forum?id=' in type(made).__doc__
  assert hash(made) == hash(method(name))
  for slots in (1, LENGTH, 600):
    assert 1 <= made.min_slots(slots, 0) <= slots


def shapes(name):
  """int32, no entry twice in a head, for every count it claims to reach, and no more than that.

  Each head has as many, but for those that share entries among heads, and adaptive methods.
  """
  for keep in (method(name).min_slots(LENGTH, 0), KEEP, LENGTH):
    src = run(name, projections(), keep=keep)
    assert src.dtype == np.int32
    assert src.max() < LENGTH
    assert distinct(src)
    filled = (src >= 0).sum(axis=2)
    if method(name).adaptive:
      assert (filled > 0).all()
      assert (filled <= keep).all()
    elif name in SHARING:
      np.testing.assert_array_equal(filled.sum(axis=1), KV * keep)
    else:
      np.testing.assert_array_equal(filled, keep)


def padding(name):
  """Padding full of 1e3 changes nothing: left, right or between."""
  without = run(name, projections())
  for places in ([LEFT, RIGHT, HOLES], [HOLES, LEFT, RIGHT]):
    out = run(name, projections(), places=places)
    for row in range(BATCH):
      for got, wanted in zip(chosen(out, row, places[row]), chosen(without, row), strict=True):
        np.testing.assert_array_equal(got, wanted)


def short(name):
  """A row with fewer entries than places to keep loses none of them."""
  places = [LEFT[:5], RIGHT[:1], HOLES[:9]]
  out = run(name, projections(), places=places)
  for row, place in enumerate(places):
    if name == 'corematching_cache':  # Its entries alone say how many stay; text does.
      for found in chosen(out, row, place):
        assert set(found) >= {entry for entry in range(len(place)) if entry % 3}
      continue
    for found in chosen(out, row, place):
      np.testing.assert_array_equal(np.sort(found), np.arange(len(place)))


def alone(name):
  """A row alone, and rows in another order, give what they give together."""
  together = run(name, projections())
  np.testing.assert_array_equal(run(name, projections(), rows=[1, 2, 0]), together[[1, 2, 0]])
  for row in range(BATCH):
    np.testing.assert_array_equal(run(name, projections(), rows=[row]), together[[row]])


def finite(name):
  """Zeros, equal entries and bfloat16 give a choice like any other."""
  for dtype in (jnp.float32, jnp.bfloat16):
    for scale in (0.0, 1.0, 1e3):
      qkv = [np.full_like(x, scale) for x in projections()]
      for places in (None, [LEFT, RIGHT[:4], HOLES]):
        src = run(name, qkv, places=places, dtype=dtype)
        assert distinct(src)
        assert (src >= 0).any()


def ties(name):
  """Among equals the lowest entries come first."""
  src = run(name, [np.zeros_like(x) for x in projections()])
  made = method(name)
  last = int(name == 'tova')
  if name not in BY_PLACE:
    np.testing.assert_array_equal(np.sort(src, axis=2)[0, 0],
                                  [*range(KEEP - last), *range(LENGTH - last, LENGTH)])
  np.testing.assert_array_equal(src, np.broadcast_to(src[:1, :1] if name not in SHARING
                                                     else src[:1], src.shape))
  assert made.drops


def content(name):
  """Selections depend on the contents, or the method says that it goes by place alone."""
  src = [run(name, projections(seed)) for seed in range(3)]
  same = all((one == src[0]).all() for one in src)
  assert same == (name in ('streaming_llm', 'voco'))


INVARIANTS = (declares, shapes, padding, short, alone, finite, ties, content)
# These choose no entries when a prompt is read (tests/ops/test_best_pages.py).
READING = {'quest'}
PAIRS = [(check, name) for name in CACHE_REDUCERS for check in INVARIANTS
         if check is declares or name not in READING]


# What takes longest to compile.
LONG = {name for name in SETTINGS if 'inner' in SETTINGS[name]} | {
    'simlayerkv', 'corematching_cache', 'cur', 'compactor', 'duo_attention', 'finch', 'lagkv',
    'keydiff'}


@pytest.mark.parametrize(('check', 'name'), [
    pytest.param(check, name, id=f'{check.__name__}-{name}',
                 marks=[pytest.mark.long] if name in LONG and check is not declares else [])
    for check, name in PAIRS])
def test_contract(check, name):
  check(name)


class Broken(CacheReducer):
  """Keeps the entries whose keys are longest; arXiv:0000.00000."""

  def __call__(self, tokens, told, *, num_slots):
    return kv_select.keep_best(tokens, self.scores(told.keys), num_slots=num_slots)

  def scores(self, keys):
    return jnp.sum(keys * keys, axis=3).swapaxes(1, 2)


class CouplesRows(Broken):
  def scores(self, keys):
    return super().scores(keys) - 2 * jnp.roll(super().scores(keys), 1, axis=0)


class KeepsPadding(Broken):
  def __call__(self, tokens, told, *, num_slots):
    return super().__call__(tokens.replace(valid=None), told, num_slots=num_slots)


class Repeats(Broken):
  def __call__(self, tokens, told, *, num_slots):
    src = super().__call__(tokens, told, num_slots=num_slots).src
    return KVGather(src.at[:, :, -1].set(src[:, :, 0]))


class HighestTies(Broken):
  def scores(self, keys):
    return super().scores(keys) + 1e-3 * jnp.arange(keys.shape[1])[None, None]


@pytest.mark.parametrize(('broken', 'caught'), [
    (CouplesRows, (alone,)), (KeepsPadding, (padding, short)), (Repeats, (shapes, short)),
    (HighestTies, (ties,))], ids=lambda value: getattr(value, '__name__', ''))
def test_broken_methods_are_caught(broken, caught, monkeypatch):
  monkeypatch.setitem(CACHE_REDUCERS, broken.__name__, broken)
  for check in caught:
    with pytest.raises(AssertionError):
      check(broken.__name__)
