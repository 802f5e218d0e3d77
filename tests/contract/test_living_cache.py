"""Caches that live: read in chunks, continued, shared, and kept within bounds while decoding.

Axes: B batch, N tokens of a prompt, C of a chunk, K kv heads, S slots of a cache.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_lm import PROMPT, ROOM, TINY, VALID, ids, planned, prefill, unstacked, with_cache

from ops.rope import Rope

CHUNKABLE = {'knorm': {}, 'streaming_llm': {'sinks': 2}, 'tova': {},
             'snapkv': {'window': 3, 'kernel': 3}}


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


@pytest.mark.parametrize('case', ['plain', 'window', 'sections', *CHUNKABLE])
def test_chunks_equal_the_whole(case):
  lm, weights, sizes = TINY, None, (4, 5, 3)
  if case == 'window':
    lm = TINY.clone(window=5)
  elif case == 'sections':
    lm = TINY.clone(rope=Rope(8, sections=(2, 1, 1)))
  elif case in CHUNKABLE:
    lm = with_cache(method=case, args=CHUNKABLE[case], keep=6)
  tokens = ids()[:, :PROMPT]
  wanted, whole = prefill(lm, tokens, weights=weights)
  logits, cache = read_in_chunks(lm, tokens, sizes)
  np.testing.assert_allclose(logits, wanted, atol=1e-5)
  same_entries(cache, whole)
  following = ids()[:, PROMPT:]
  np.testing.assert_allclose(decoded(lm, cache, following), decoded(lm, whole, following),
                             atol=1e-5)


@pytest.mark.parametrize('case', ['plain', 'knorm', 'tova'])
def test_rows_of_chunks_are_rows_alone_whatever_their_padding(case):
  lm = TINY if case == 'plain' else with_cache(method=case, keep=6)
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


def test_one_context_serves_several_questions():
  lm = with_cache(method='knorm', keep=6)
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


def test_large_maps_are_formed_in_parts(monkeypatch):
  monkeypatch.setattr('ops.attention._WHOLE', 8)
  monkeypatch.setattr('ops.attention._PART', 20)
  wanted, _ = prefill(TINY, ids()[:, :PROMPT])
  logits, _ = read_in_chunks(TINY.clone(context=63), ids()[:, :PROMPT], (5, 7))
  np.testing.assert_allclose(logits, wanted, atol=1e-5)


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
