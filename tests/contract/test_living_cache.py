"""Caches that live: read in chunks, continued, shared, and kept within bounds while decoding.

Axes: B batch, N tokens of a prompt, C of a chunk, K kv heads, S slots of a cache.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_lm import PROMPT, ROOM, TINY, VALID, ids, planned, prefill, unstacked, with_cache

from lib.cost import lm as lm_cost
from models.backbones.lm import LM
from models.decoding.generator import Generator
from models.plan import make_method
from models.reduce_config import with_plans
from models.reduction import DECODED
from ops.kv_cache import Cache
from ops.reducers.cache import CACHE_REDUCERS
from ops.rope import Rope
from ops.signals import STATIC

STEPS, CAPACITY = 10, 7
SHALLOW = TINY.clone(depth=2)
SNAPKV = {'method': 'snapkv', 'args': {'window': 3, 'kernel': 3}}
# Settings of every way to let entries go while decoding, each with its capacity or budget.
EVICTING = {
    'h2o': {'method': 'h2o'}, 'tova': {'method': 'tova'}, 'knorm': {'method': 'knorm'},
    'keydiff': {'method': 'keydiff'},
    'streaming_llm': {'method': 'streaming_llm', 'args': {'sinks': 2}},
    'rkv': {'method': 'rkv', 'args': {'every': 3, 'window': 2, 'kernel': 3, 'mix': 0.4,
                                      'threshold': 0.1}},
    'periodic_knorm': {'method': 'periodic', 'args': {'every': 4}, 'keep_ratio': 1.0},
    'periodic_snapkv': {'method': 'periodic', 'args': {'every': 3, 'inner': SNAPKV}},
    'periodic_tova': {'method': 'periodic', 'args': {'every': 2, 'inner': {'method': 'tova'}}},
    'threshold': {'method': 'threshold', 'args': {'threshold': -4.5, 'window': 3}}}
SMALL = {'snapkv': SNAPKV['args'], 'finch': {'window': 3}, 'lagkv': {'sinks': 2, 'lag': 2},
         'cur': {'sinks': 2, 'window': 3}, 'two_stage': {'inner': SNAPKV},
         'periodic': {'every': 4, 'inner': SNAPKV},
         'cam': {'merged': 2, 'inner': {'method': 'streaming_llm', 'args': {'sinks': 2}}}}
CHUNKABLE = {'knorm': {}, 'streaming_llm': {'sinks': 2}, 'tova': {},
             'snapkv': {'window': 3, 'kernel': 3}, 'keydiff': {},
             'rkv': {'window': 3, 'kernel': 3}}


def long_but(short, cases):
  """Cases of which one runs in every test run."""
  return [pytest.param(case, marks=[] if case == short else pytest.mark.long) for case in cases]


@functools.cache
def extender(lm, **settings):
  return jax.jit(functools.partial(lm.apply, method='extend', **settings))


def extend(lm, tokens, cache, valid=None, *, weights=None, **settings):
  return extender(lm, **settings)(weights or unstacked(lm.depth), tokens, cache, valid)


def read_in_chunks(lm, tokens, sizes, valid=None, *, room=ROOM, weights=None):
  """Logits and cache of a prompt that is read in chunks of these sizes."""
  cache = lm.empty_cache(len(tokens), sum(sizes))
  ends = np.cumsum(sizes)
  for start, end in zip(ends - sizes, ends, strict=True):
    last = {'room': room} if end == ends[-1] else {}
    part = None if valid is None else jnp.asarray(valid[:, start:end])
    logits, cache = extend(lm, tokens[:, start:end], cache, part, weights=weights, **last)
  return logits, cache


def decoded(lm, cache, following, weights=None):
  """Logits [B, R, V] after each of the tokens that follow."""
  found = []
  for column in following.T:
    logits, cache = stepper(lm)(weights or unstacked(lm.depth), column, cache)
    found.append(logits)
  return np.stack(found, axis=1)


@functools.cache
def stepper(lm):
  return jax.jit(functools.partial(lm.apply, method='decode'))


def same_entries(found, wanted):
  """Heads hold the same entries: positions exactly, keys and values to 1e-5."""
  assert int(found.steps) == int(wanted.steps)
  for one, other in zip(found.layers, wanted.layers, strict=True):
    assert (one.filled, one.room) == (other.filled, other.room)
    np.testing.assert_array_equal(one.start, other.start)
    np.testing.assert_array_equal(one.valid, other.valid)
    np.testing.assert_array_equal(np.where(one.valid, one.pos, 0),
                                  np.where(other.valid, other.pos, 0))
    valid = np.asarray(one.valid).reshape(one.k.shape[0], -1, one.k.shape[2])[..., None]
    for a, b in ((one.k, other.k), (one.v, other.v)):
      np.testing.assert_allclose(np.where(valid, a, 0), np.where(valid, b, 0), atol=1e-5)


# -- chunks --------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize('case', long_but('knorm', ['plain', 'window', 'sections', *CHUNKABLE]))
def test_chunks_equal_the_whole(case):
  lm, sizes = SHALLOW, (4, 4, 4)
  if case == 'window':
    lm = SHALLOW.clone(window=5)
  elif case == 'sections':
    lm = SHALLOW.clone(rope=Rope(8, sections=(2, 1, 1)))
  elif case in CHUNKABLE:
    lm = with_cache(SHALLOW, method=case, args=CHUNKABLE[case], keep=6)
  tokens = ids()[:, :PROMPT]
  wanted, whole = prefill(lm, tokens)
  logits, cache = read_in_chunks(lm, tokens, sizes)
  np.testing.assert_allclose(logits, wanted, atol=1e-5)
  same_entries(cache, whole)
  following = ids()[:, PROMPT:]
  np.testing.assert_allclose(decoded(lm, cache, following), decoded(lm, whole, following),
                             atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize('case', ['plain', 'tova'])
def test_rows_of_chunks_are_rows_alone_whatever_their_padding(case):
  lm = SHALLOW if case == 'plain' else with_cache(SHALLOW, method=case, keep=6)
  tokens, following = ids()[:, :PROMPT], ids()[:, PROMPT:]
  logits, cache = read_in_chunks(lm, tokens, (7, 5), np.asarray(VALID))
  wanted, whole = prefill(lm, tokens, jnp.asarray(VALID))
  # The last row's tokens all lie in the first chunk, which the second says nothing after.
  np.testing.assert_allclose(logits[:2], wanted[:2], atol=1e-5)
  if case == 'plain':
    same_entries(cache, whole)
  rows = slice(None) if case != 'tova' else slice(2)
  found, after = decoded(lm, cache, following), decoded(lm, whole, following)
  np.testing.assert_allclose(found[rows], after[rows], atol=1e-5)


@pytest.mark.long
def test_one_context_serves_several_questions():
  lm = with_cache(SHALLOW, method='knorm', keep=6)
  rng = np.random.default_rng(5)
  questions = jnp.asarray(rng.integers(0, 29, (4, 5)), jnp.int32)
  lengths = np.array([5, 3, 4, 1])
  for right in (False, True):
    place = np.arange(5)[None]
    valid = place < lengths[:, None] if right else place >= 5 - lengths[:, None]
    _, context = prefill(lm, ids()[:1, :PROMPT], room=5 + ROOM)
    logits, cache = extend(lm, questions, context.take(jnp.zeros(4, jnp.int32)), jnp.asarray(valid))
    following = ids(PROMPT + ROOM, 4)[:, PROMPT:]
    found = np.concatenate([logits[:, None], decoded(lm, cache, following)], axis=1)
    for row, length in enumerate(lengths):
      _, own = prefill(lm, ids()[:1, :PROMPT], room=5 + ROOM)
      wanted = decoded(lm, own, jnp.concatenate(
          [questions[row][valid[row]], following[row]])[None])
      np.testing.assert_allclose(found[row], wanted[0, length - 1:], atol=1e-5)


@pytest.mark.long
def test_a_chunk_after_reduced_tokens_is_its_tokens_one_by_one():
  lm = planned(TINY, visual=0, token_kinds='text', method='tome', keep=8, layers=1,
               positions='compact')
  following = ids()[:, PROMPT:]
  _, cache = prefill(lm, ids()[:, :PROMPT])
  wanted = decoded(lm, cache, following)
  _, cache = stepper(lm)(unstacked(), following[:, 0], cache)
  logits, cache = extend(lm, following[:, 1:3], cache, logits='all')
  last, _ = stepper(lm)(unstacked(), following[:, 3], cache)
  np.testing.assert_allclose(logits, wanted[:, 1:3], atol=1e-5)
  np.testing.assert_allclose(last, wanted[:, 3], atol=1e-5)


@pytest.mark.long
def test_large_maps_are_formed_in_parts(monkeypatch):
  monkeypatch.setattr('ops.attention._WHOLE', 8)
  monkeypatch.setattr('ops.attention._PART', 20)
  wanted, _ = prefill(TINY, ids()[:, :PROMPT])
  logits, _ = read_in_chunks(TINY.clone(context=63), ids()[:, :PROMPT], (5, 7))
  np.testing.assert_allclose(logits, wanted, atol=1e-5)


@pytest.mark.long
def test_chunks_that_do_not_fit_are_refused_in_one_line():
  tokens = ids()
  _, cache = prefill(TINY, tokens[:, :PROMPT])
  with pytest.raises(ValueError, match=r'5 more tokens do not fit: .* room for 4'):
    extend(TINY, tokens[:, :5], cache)
  _, cache = extend(TINY, tokens[:, :3], cache)
  with pytest.raises(ValueError, match=r'2 more tokens do not fit: .* of which 3 are taken'):
    cache.check_room(2)
  cut = prefill(with_cache(keep=5, layers=1), tokens[:, :PROMPT])[1]
  with pytest.raises(ValueError, match='was cut already'):
    extend(TINY, tokens[:, :1], cut, room=1)
  late = with_cache(method='snapkv', args={'window': 4}, keep=6)
  with pytest.raises(ValueError, match='asks the last 4 tokens, and the last chunk has 3'):
    read_in_chunks(late, tokens[:, :PROMPT], (9, 3))
  with pytest.raises(ValueError, match='h2o needs received_attention of the whole prompt'):
    read_in_chunks(with_cache(method='h2o', keep=6), tokens[:, :PROMPT], (9, 3))
  with pytest.raises(ValueError, match='exceed the context of 64'):
    TINY.empty_cache(1, 65)


# -- eviction ------------------------------------------------------------------------------------


def evicting(name, lm=TINY, slots=PROMPT, **settings):
  return with_cache(lm, slots, **{'capacity': CAPACITY, **EVICTING[name], **settings})


def softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def pooled(rows, mix):
  """Each with its neighbours, zeros beyond the ends."""
  wide = np.pad(rows, ((0, 0), (1, 1)))
  return mix(np.stack([wide[:, i:i + rows.shape[1]] for i in range(3)]))


class Reference:
  """One kv head of one layer of one row, whose entries are lists of positions."""

  def __init__(self, name):
    self.name, self.entries, self.heavy, self.queries = name, [], {}, []

  def read(self, position, keys, weights, queries):
    """One more token: all keys [S, d], the weights [G, S] and queries [G, d] of its heads."""
    self.entries.append(position)
    self.keys, self.weights = keys, weights
    self.queries.append(queries)
    for entry in self.entries:
      self.heavy[entry] = self.heavy.get(entry, 0.0) + float(weights[:, entry].sum())

  def cut(self, mean_weights, *, prompt):
    """Lets entries go; `mean_weights` [S] are of the latest token, over all heads."""
    live, name = np.array(self.entries), self.name.removeprefix('periodic_')
    forced, keys = [], self.keys[live]
    norms = np.linalg.norm(keys, axis=1)
    if name == 'h2o':
      scores, forced = [self.heavy[entry] for entry in live], live[-(CAPACITY // 2):]
    elif name == 'tova':
      scores, forced = mean_weights[live], live[-1:] if prompt else []
    elif name in ('knorm', 'threshold'):
      scores, forced = -norms, live[-3:] if name == 'threshold' else []
    elif name == 'keydiff':
      units = keys / norms[:, None]
      anchor = units.mean(axis=0)
      scores = -units @ anchor / np.linalg.norm(anchor)
    elif name == 'streaming_llm':
      scores, forced = live, live[:2]
    elif name == 'snapkv':
      rows = np.stack([self.row(query, live, back) for back, query in
                       enumerate(self.queries[:-4:-1])]).mean(axis=0)
      rows[:, -3:] = 0
      scores, forced = pooled(rows, lambda x: x.mean(axis=0)).mean(axis=0), live[-3:]
      scores[-3:] = 0
    elif name == 'rkv':
      scores, forced = self.rkv(keys, norms), live[-2:]
    order = sorted(range(len(live)), key=lambda i: (live[i] not in forced, -scores[i], live[i]))
    kept = [i for i in order[:CAPACITY]
            if name != 'threshold' or live[i] in forced or scores[i] >= -4.5]
    self.entries = sorted(int(live[i]) for i in kept)

  def row(self, query, live, back):
    """Attention [G, n] of the query that many tokens ago."""
    logits = query @ self.keys[live].T / np.sqrt(query.shape[1])
    return softmax(np.where(live[None] <= live[-1] - back, logits, -np.inf))

  def rkv(self, keys, norms):
    logits = np.stack([(query @ keys[:-2].T).max(axis=0) for query in self.queries[-2:]])
    importance = np.zeros((1, len(keys)))
    importance[0, :-2] = softmax(logits / np.sqrt(keys.shape[1])).mean(axis=0)
    importance = pooled(importance, lambda x: x.max(axis=0))[0]
    cosine = (keys / norms[:, None]) @ (keys / norms[:, None]).T
    np.fill_diagonal(cosine, 0)
    for row in cosine:
      like = np.flatnonzero(row > 0.1)
      row[like[-1] if len(like) else 0] = 0
    return 0.4 * importance - 0.6 * softmax(cosine.mean(axis=0))


@functools.cache
def raw_stepper(lm):
  """As `decode`, with the signals of the layers."""

  def step(lm, ids, cache):
    (x, count, _), layers = lm.stack.step((lm._embedded(ids), cache.steps, None), cache.layers)
    kvs, signals = zip(*layers, strict=True)
    return lm.logits(lm.norm(x)), Cache(kvs, count + 1), signals

  return jax.jit(functools.partial(lm.apply, method=step))


def reference(name, tokens, steps, every, cut_prompt):
  """Logits [1 + steps, V] and entries [1 + steps, L, K] of one row, by a cache that hides."""
  prompt = len(tokens) - steps
  cache = SHALLOW.empty_cache(1, PROMPT + STEPS)
  heads = [[Reference(name) for _ in range(2)] for _ in range(SHALLOW.depth)]
  logits, entries = [], []
  for position, token in enumerate(tokens):
    layers = []
    for kv, refs in zip(cache.layers, heads, strict=True):
      valid = np.zeros((1, 2, PROMPT + STEPS), bool)
      for head, ref in enumerate(refs):
        valid[0, head, ref.entries] = True
      pos = np.broadcast_to(np.arange(PROMPT + STEPS, dtype=np.int32), valid.shape)
      layers.append(kv.replace(valid=jnp.asarray(valid), pos=jnp.asarray(pos)))
    out, cache, told = raw_stepper(SHALLOW)(unstacked(SHALLOW.depth), token[None], cache.replace(
        layers=tuple(layers)))
    for kv, refs, signals in zip(cache.layers, heads, told, strict=True):
      weights = np.asarray(signals.last_attention)[0]
      queries = np.asarray(signals.queries)[0, 0]
      decoded = position - prompt + 1
      for head, ref in enumerate(refs):
        own = slice(2 * head, 2 * head + 2)
        ref.read(position, np.asarray(kv.k)[0, head].astype(np.float64), weights[own], queries[own])
        due = decoded and decoded % every == 0 if decoded else cut_prompt
        if decoded >= 0 and due and (name == 'threshold' or len(ref.entries) > CAPACITY):
          ref.cut(weights.mean(axis=0), prompt=not decoded)
    if position >= prompt - 1:
      logits.append(np.asarray(out)[0])
      entries.append([[list(ref.entries) for ref in refs] for refs in heads])
  return np.stack(logits), entries


def held(kv, row):
  """The positions that each head of a row holds."""
  return [sorted(pos[valid].tolist()) for pos, valid in
          zip(np.asarray(kv.pos)[row], np.asarray(kv.valid)[row], strict=True)]


def distinct():
  """int32[3, N], rows of tokens that do not repeat: keys of equal tokens are equally long."""
  rng = np.random.default_rng(3)
  return jnp.asarray(np.stack([rng.permutation(29)[:PROMPT + STEPS] for _ in range(3)]), jnp.int32)


@pytest.mark.long
@pytest.mark.parametrize('name', EVICTING)
def test_eviction_equals_a_full_cache_that_hides_what_left(name):
  lm = evicting(name, SHALLOW)
  tokens, following = jnp.split(distinct(), [PROMPT], axis=1)
  every = EVICTING[name].get('args', {}).get('every', 1)
  logits, cache = prefill(lm, tokens, jnp.asarray(VALID))
  found, entries = [logits], [[[held(kv, row) for kv in cache.layers] for row in range(3)]]
  for column in following.T:
    logits, cache = stepper(lm)(unstacked(lm.depth), column, cache)
    found.append(logits)
    entries.append([[held(kv, row) for kv in cache.layers] for row in range(3)])
  for row in range(3):
    alone = jnp.concatenate([tokens[row][VALID[row]], following[row]])
    wanted, kept = reference(name, alone, STEPS, every, 'keep_ratio' not in EVICTING[name])
    assert [step[row] for step in entries] == kept
    np.testing.assert_allclose(np.stack(found)[:, row], wanted, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize('prompt', [4, PROMPT])
def test_positions_inside_the_cache_are_those_of_a_prompt_of_what_it_holds(prompt):
  """StreamingLLM's numbers: one layer, whose keys know nothing but their token and position."""
  lm = evicting('streaming_llm', TINY.clone(depth=1), prompt, positions='compact')
  tokens = distinct()
  _, cache = prefill(lm, tokens[:, :prompt], weights=unstacked(1))
  for position in range(prompt, PROMPT + STEPS):
    logits, cache = stepper(lm)(unstacked(1), tokens[:, position], cache)
    # A token sees what the one before it left, and itself.
    first = max(position + 2 - CAPACITY, 2)
    seen = [*range(min(2, position)), *range(first, position + 1)]
    if len(seen) in (6, 7):
      continue  # Each length is a program, and says no more.
    wanted, _ = prefill(lm.clone(cache_plan=None), tokens[:, np.array(seen)], weights=unstacked(1))
    np.testing.assert_allclose(logits, wanted, atol=1e-5)


def methods_that_evict():
  """Every method that can, with small windows; and the ways to hold others."""
  made = {name: EVICTING.get(name, {'method': name, 'args': SMALL.get(name, {})})
          for name, method in CACHE_REDUCERS.items() if hasattr(method, 'evict')}
  ready = {}
  for name, settings in (made | EVICTING).items():
    method = make_method(settings['method'], settings.get('args', {}), CACHE_REDUCERS)
    if method.evict_needs - STATIC <= DECODED:
      ready[name] = settings | {'capacity': max(method.min_capacity, CAPACITY), 'positions': 'keep'}
  return ready


@pytest.mark.long
@pytest.mark.parametrize('name', long_but('tova', methods_that_evict()))
def test_rows_do_not_depend_on_each_other_and_nothing_grows(name):
  settings = methods_that_evict()[name]
  lm = with_cache(SHALLOW, **settings)
  tokens, following = jnp.split(distinct(), [PROMPT], axis=1)
  order = np.array([2, 0, 1])
  _, cache = prefill(lm, tokens, jnp.asarray(VALID))
  _, other = prefill(lm, tokens[order], jnp.asarray(VALID[order]))
  shapes = jax.tree.map(lambda x: x.shape, cache)
  found = decoded(lm, cache, following)
  np.testing.assert_array_equal(found[order], decoded(lm, other, following[order]))
  assert np.isfinite(found).all()
  for column in following.T:
    _, cache = stepper(lm)(unstacked(lm.depth), column, cache)
  assert jax.tree.map(lambda x: x.shape, cache) == shapes
  for kv in cache.layers:
    assert (np.asarray(kv.valid).sum(axis=2) < settings['capacity'] + kv.upkeep.method.every).all()
  # Padding on the other side: the slots differ, and what they hold does not.
  sides = np.array([0, 8, 5])
  turned = np.stack([np.roll(row, shift) for row, shift in zip(tokens, sides, strict=True)])
  valid = np.stack([np.roll(row, shift) for row, shift in zip(VALID, sides, strict=True)])
  _, other = prefill(lm, jnp.asarray(turned), jnp.asarray(valid))
  np.testing.assert_allclose(decoded(lm, other, following), found, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize('name', ['streaming_llm', 'periodic_knorm', 'threshold'])
def test_a_thousand_tokens_take_no_more_memory_and_no_more_programs(name):
  lm = evicting(name, TINY.clone(context=4096), positions='compact')
  step = jax.jit(functools.partial(lm.apply, method='decode'), donate_argnums=2)
  _, cache = prefill(lm, ids()[:, :PROMPT])
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), cache)
  token = ids()[:, 0]
  for _ in range(1000):
    logits, cache = step(unstacked(), token, cache)
    token = jnp.argmax(logits, axis=1).astype(jnp.int32)
  assert step._cache_size() == 1
  assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == shapes
  assert np.isfinite(logits).all()
  every = EVICTING[name].get('args', {}).get('every', 1)
  for kv in cache.layers:
    assert kv.k.shape[2] == max(CAPACITY, PROMPT if 'periodic' in name else 0) + every
    counts = np.asarray(kv.valid).sum(axis=2)
    assert (counts <= CAPACITY).all()
    assert (counts > 2).all()
    assert int(jnp.max(kv.pos)) <= kv.k.shape[2]


@pytest.mark.long
@pytest.mark.parametrize(('name', 'rows', 'kv_heads'), [
    ('h2o', 3, 2), ('knorm', 1, 1), ('keydiff', 3, 1), ('streaming_llm', 1, 2),
    ('periodic_knorm', 3, 2)])
def test_a_step_copies_no_cache(name, rows, kv_heads):
  """The buffers are written in place, and nothing as large as a layer's keys is made beside them.
  """
  lm = LM(vocabulary=64, width=32, depth=3, mlp=64, heads=4, kv_heads=kv_heads, head_width=16,
          context=4096, rope=Rope(16))
  shapes = jax.eval_shape(lm.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))['params']
  blocks = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
                        shapes['stack']['blocks'])
  weights = {'params': {**shapes, 'stack': {'blocks': (blocks,) * 3}}}
  lm = evicting(name, lm, 1024, capacity=768)
  _, cache = jax.eval_shape(functools.partial(lm.apply, room=0, method='prefill'), weights,
                            jax.ShapeDtypeStruct((rows, 1024), jnp.int32))
  compiled = jax.jit(functools.partial(lm.apply, method='decode'), donate_argnums=2).lower(
      weights, jax.ShapeDtypeStruct((rows,), jnp.int32), cache).compile()
  memory = compiled.memory_analysis()
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
  keys = cache.layers[0].keys.size
  assert memory.alias_size_in_bytes >= held
  assert memory.temp_size_in_bytes < 4 * keys
  made = re.findall(r'= f32\[([\d,]+)\]\S* (?:copy|transpose|broadcast|select|concatenate)\(',
                    compiled.as_text())
  assert all(np.prod([int(n) for n in shape.split(',')]) < keys for shape in made)


@pytest.mark.parametrize(('settings', 'message'), [
    ({'method': 'streaming_llm', 'capacity': 4}, 'capacity=4 is too small for streaming_llm, which '
     'keeps 5 entries at least'),
    ({'method': 'h2o', 'args': {'recent': 9}, 'capacity': 9}, 'set capacity=10 or more'),
    ({'method': 'periodic', 'args': {'inner': SNAPKV}, 'capacity': 3}, 'set capacity=4 or more'),
    ({'method': 'threshold', 'capacity': 64}, 'set capacity=129 or more'),
    ({'method': 'knorm', 'capacity': 6, 'keep_ratio': 0.75}, 'knorm leaves 9 entries of a prompt '
     'in layer 0, more than capacity=6'),
    ({'method': 'expected_attention', 'capacity': 8}, 'expected_attention needs plain_queries, '
     'which a decoded token does not tell'),
    ({'method': 'adakv', 'capacity': 8}, 'adakv lets no entries go while a model decodes: choose '
     'one of .*h2o'),
    ({'method': 'rkv', 'capacity': 16, 'positions': 'compact'}, "choose 'keep'"),
    ({'method': 'h2o', 'capacity': 0}, 'capacity')])
def test_capacities_that_cannot_be_kept_are_refused_when_the_model_is_made(settings, message):
  with pytest.raises(ValueError, match=message):
    with_cache(**settings)


@pytest.mark.long
@pytest.mark.parametrize(('name', 'positions'), [('h2o', 'compact'), ('periodic_snapkv', 'keep')])
def test_a_cache_that_evicts_reads_a_chunk_token_by_token(name, positions):
  lm = evicting(name, SHALLOW, positions=positions)
  tokens, following = jnp.split(distinct(), [PROMPT], axis=1)
  place, lengths = np.arange(5)[None], np.array([[5], [2], [4]])
  for valid in (place < lengths, place >= 5 - lengths):
    _, cache = prefill(lm, tokens, jnp.asarray(VALID))
    found, cache = extend(lm, following[:, :5], cache, jnp.asarray(valid), logits='all')
    after = decoded(lm, cache, following[:, 5:])
    for row in range(3):
      _, cache = prefill(lm, tokens[row:row + 1], jnp.asarray(VALID[row:row + 1]))
      own = jnp.concatenate([following[row, :5][valid[row]], following[row, 5:]])[None]
      wanted, count = decoded(lm, cache, own)[0], int(lengths[row, 0])
      np.testing.assert_allclose(found[row][valid[row]], wanted[:count], atol=1e-5)
      np.testing.assert_allclose(after[row], wanted[count:], atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(('name', 'positions'), [
    ('h2o', 'keep'), ('h2o', 'compact'), ('periodic_snapkv', 'keep'),
    ('periodic_knorm', 'compact')])
def test_what_is_set_aside_is_what_the_cost_says(name, positions):
  lm = evicting(name, positions=positions)
  _, cache = jax.eval_shape(functools.partial(lm.apply, room=0, method='prefill'), unstacked(),
                            ids()[:1, :PROMPT])
  found = [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kv))
           for kv in cache.layers]
  assert [layer.allocated_bytes for layer in lm_cost.of(lm, PROMPT).layers] == found


@pytest.mark.long
def test_answers_are_decoded_within_the_capacity():
  lm, weights = TINY.clone(context=256), unstacked()
  config = {'method': 'h2o', 'capacity': CAPACITY}
  generator = Generator(lm, weights['params'], plans=with_plans(lm, cache=config), buckets=(16,))
  prompts = [row[valid].tolist() for row, valid in
             zip(np.asarray(ids()[:, :PROMPT]), VALID, strict=True)]
  answers = generator(prompts, new_tokens=40)
  # The cache of any answer is as long, and so are the programs.
  assert [len(row) for row in generator(prompts, new_tokens=90)] == [90] * 3
  assert sum(count for (name, *_), count in generator.compilations.items() if name == 'decode') == 1
  assert answers == [generator([prompt], new_tokens=40)[0] for prompt in prompts]
