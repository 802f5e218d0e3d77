"""KVzip: rows of a batch against themselves alone, what a generator makes of it, and refusals."""

import functools

import jax
import numpy as np
import pytest
from helpers.tiny_lm import TINY, ids, unstacked, with_cache

from models.decoding.generator import MIN_ROOM, Generator
from models.decoding.kvzip import KVzip
from models.decoding.sampling import padded

SMALL = KVzip(0.5, (1, 2), (3, 4, 5), (6,), sinks=1, piece=5, behind=2)


@functools.cache
def decoder(lm):
  return jax.jit(functools.partial(lm.apply, method='decode'))


def answers(method, tokens, valid, later, room=3):
  lm = TINY.clone(depth=2)
  logits, cache = method(lm, unstacked(2), tokens, valid, room=room)
  found = [logits]
  for column in later.T:
    logits, cache = decoder(lm)(unstacked(2), column, cache)
    found.append(logits)
  return np.stack(found, axis=1), cache


@pytest.mark.long
@pytest.mark.parametrize('across', ['layers', 'heads'])
def test_a_padded_row_is_the_row_alone(across):
  method = KVzip(**{**vars(SMALL), 'across': across})
  tokens, later = np.asarray(ids()[:, :12]), np.asarray(ids()[:, 12:14])
  valid = np.stack([np.ones(12, bool), np.arange(12) >= 3, np.arange(12) < 6])
  together, _ = answers(method, tokens, valid, later)
  for row in (1, 2):
    alone, cache = answers(method, tokens[row][valid[row]][None], None, later[row:row + 1])
    np.testing.assert_allclose(together[row], alone[0], atol=2e-5)
    held = sum(int(kv.prompt.valid.sum()) if across == 'heads' else int(kv.valid[..., :-3].sum())
               for kv in cache.layers)
    assert held == 2 * 2 * valid[row].sum() // 2


@pytest.mark.long
def test_what_is_kept_whole_is_the_whole_cache():
  method = KVzip(**{**vars(SMALL), 'keep_ratio': 1.0})
  tokens, later = np.asarray(ids()[:, :12]), np.asarray(ids()[:, 12:14])
  found, _ = answers(method, tokens, None, later)
  lm = TINY.clone(depth=2)
  logits, cache = jax.jit(functools.partial(lm.apply, room=3, method='prefill'))(
      unstacked(2), tokens)
  np.testing.assert_allclose(found[:, 0], logits, atol=1e-5)
  for step, column in enumerate(later.T):
    logits, cache = decoder(lm)(unstacked(2), column, cache)
    np.testing.assert_allclose(found[:, step + 1], logits, atol=1e-5)


@pytest.mark.parametrize(('lm', 'method', 'message'), [
    (with_cache(keep_ratio=0.5), SMALL, 'KVzip cuts a whole cache: give a model without plans'),
    (TINY.clone(context=20), SMALL, '12 tokens and 11 that repeat some of them exceed')],
    ids=['plan', 'context'])
def test_what_cannot_be_repeated_fails_in_a_line(lm, method, message):
  with pytest.raises(ValueError, match=message) as caught:
    method(lm, {}, np.asarray(ids()[:, :12]), room=3)
  assert '\n' not in str(caught.value)


@pytest.mark.long
def test_a_generator_decodes_behind_what_is_left():
  lm, params = TINY.clone(depth=2), unstacked(2)['params']
  prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9]]
  half = Generator(lm, params, buckets=(8,), kvzip=SMALL)
  found = half(prompts, new_tokens=4)
  # The last token is picked, and never read.
  logits, _ = answers(SMALL, *padded(prompts, 8), np.asarray(found)[:, :-1], room=MIN_ROOM)
  assert logits.argmax(axis=2).tolist() == found
  scores = half.score(prompts, found)
  assert all(score.greedy for score in scores)
  assert all(score.log_likelihood < 0 for score in scores)


def test_models_that_see_repeat_nothing():
  with pytest.raises(ValueError, match='KVzip has a model repeat text, and this one sees images'):
    Generator(None, {}, kvzip=SMALL)


def test_a_request_has_words():
  with pytest.raises(ValueError, match='ask and ask_part are requests to repeat the context'):
    KVzip(0.5, (), (1,))
