"""Text that sees images through summary tokens alone: the mask, and the cache that is left."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import recorded

from models.backbones.lm import LM
from models.plan import make_cache_plan
from ops.masks import around_summaries
from ops.rope import Rope

MARK = 9
# The mark in two places, padded; none; once and near the end, padded on the left.
IDS = np.array([[1, 2, 3, 4, MARK, MARK, 5, 6, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8, 1, 2],
                [0, 1, 2, 3, 4, 5, 6, MARK, 7, 8]])
VALID = np.array([[1] * 8 + [0] * 2, [1] * 10, [0] + [1] * 9], bool)


@functools.cache
def model(**settings):
  lm = LM(vocabulary=10, width=16, mlp=16, heads=2, kv_heads=1, head_width=8, context=32,
          rope=Rope(8), **{'depth': 2, 'mask': 'summary', 'summary_token': MARK, **settings})
  return lm, jax.jit(lm.init)(jax.random.key(0), IDS, VALID)


@functools.cache
def program(lm, **settings):
  return jax.jit(functools.partial(lm.apply, **settings))


def test_the_mask_is_the_released_one():
  raw = recorded.arrays('learned/voco_mask')
  marked = jnp.asarray(raw['marker'] == 32000)
  place = jnp.broadcast_to(jnp.arange(14, dtype=jnp.int32), marked.shape)
  before, behind = around_summaries(place, marked)
  causal = np.tril(np.ones((1, 14, 14), bool))
  np.testing.assert_array_equal(causal & ~(behind[:, :, None] & before[:, None]),
                                causal & (raw['mask'][:, 0] > 0))


@pytest.mark.long
def test_text_knows_what_came_before_through_the_summary_alone():
  lm, params = model(depth=1)
  other = IDS.copy()
  other[:, 1:4] = 8
  one, two = (np.asarray(program(lm)(params, ids, VALID)[0]) for ids in (IDS, other))
  np.testing.assert_array_equal(one[0, 6:8], two[0, 6:8])
  np.testing.assert_array_equal(one[2, 8:], two[2, 8:])
  assert np.abs(one - two)[0, 4:6].min(axis=0).max() > 1e-4
  assert np.abs(one - two)[1, 6:].max() > 1e-4
  # In two layers the summary has passed it on.
  lm, params = model()
  one, two = (np.asarray(program(lm)(params, ids, VALID)[0]) for ids in (IDS, other))
  assert np.abs(one - two)[0, 6:8].max() > 1e-5


@pytest.mark.long
@pytest.mark.parametrize('row', [0, pytest.param(2, marks=pytest.mark.long)])
def test_a_row_is_the_row_alone(row):
  lm, params = model()
  whole, _ = program(lm)(params, IDS, VALID)
  alone, _ = program(lm)(params, IDS[row][VALID[row]][None])
  np.testing.assert_allclose(whole[row][VALID[row]], alone[0], atol=1e-5)


@pytest.mark.long
def test_decoding_needs_the_entries_behind_alone():
  """Token for token what the whole cache gives, whose other entries are hidden."""
  lm, params = model()
  plan = make_cache_plan({'method': 'voco', 'keep': 5}, lm.host(10))
  rows = np.array([0, 2])
  caches = {}
  for name, each in (('whole', lm), ('cut', lm.clone(cache_plan=plan))):
    logits, cache = program(each, room=3, method='prefill')(params, IDS[rows], VALID[rows])
    told = [logits]
    for _ in range(3):
      logits, cache = program(lm, method='decode')(params, jnp.argmax(told[-1], axis=1), cache)
      told.append(logits)
    caches[name] = cache.layers[0].k.shape[2], np.stack(told)
  assert (caches['whole'][0], caches['cut'][0]) == (13, 8)
  np.testing.assert_allclose(caches['cut'][1], caches['whole'][1], atol=1e-5)
  np.testing.assert_array_equal(caches['cut'][1].argmax(axis=2), caches['whole'][1].argmax(axis=2))
  # And what reading the answer with its prompt gives.
  prompt = np.concatenate([IDS[:1, :8], caches['whole'][1][:3, 0].argmax(axis=1)[None]], axis=1)
  again, _ = program(lm)(params, prompt)
  np.testing.assert_allclose(again[0, -3:], caches['whole'][1][1:, 0], atol=1e-5)


def test_what_does_not_go_together_is_refused():
  with pytest.raises(ValueError, match='do not go together'):
    model(mask='causal')
  with pytest.raises(ValueError, match='do not go together'):
    model(summary_token=None)
  lm, params = model()
  tokens = lm.apply(params, IDS, VALID, method='embed')
  with pytest.raises(ValueError, match="the stat 'summary'"):
    lm.apply(params, tokens.replace(stats={}))
