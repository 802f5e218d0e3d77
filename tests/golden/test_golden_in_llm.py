"""Methods in a language model against released code: exact indices, 1e-5 for floats.

Here scores and choices; tests/golden/test_golden_lm_methods.py runs whole models.

Axes: B batch, N slots, V visual tokens, H heads.
"""


import jax.numpy as jnp
import numpy as np
import pytest
from helpers import recorded

from ops import tokens as tk
from ops.reducers.language.fastv import FastV
from ops.reducers.language.gemfilter import GemFilter
from ops.reducers.language.pyramiddrop import PyramidDrop
from ops.signals import Signals
from ops.tokens import TEXT, VISUAL, TokenSet


def load(name):
  return recorded.arrays(f'in_llm/{name}')


def prompt(x, start, visual):
  """float[N, D] as one row: text, `visual` visual tokens from `start` on, text."""
  slots = np.arange(len(x))
  kind = np.where((slots >= start) & (slots < start + visual), VISUAL, TEXT).astype(np.int8)
  return TokenSet.create(jnp.asarray(x)[None], kind=jnp.asarray(kind)[None],
                         protected=len(x) - visual)


def test_fastv():
  raw = load('fastv')
  tokens = prompt(raw['hs_layer3_in_full'], 35, 576)
  told = Signals(last_attention=jnp.asarray(raw['last_row_attn_heads'])[None])
  np.testing.assert_allclose(told.last_attention.mean(axis=1)[0, 35:611], raw['image_score'],
                             atol=1e-5, rtol=0)
  reduced = tk.reduce(tokens, FastV()(tokens, told, num_slots=332))
  np.testing.assert_array_equal(reduced.pos[0], raw['keep_index'])
  np.testing.assert_array_equal(reduced.pos, raw['position_ids_last'])
  np.testing.assert_array_equal(reduced.x[0], raw['hs_layer3_in_full'][raw['keep_index']])


@pytest.mark.parametrize('stage', [0, 1])
def test_pyramiddrop(stage):
  raw = load('pyramiddrop')
  visual, start, text = (int(x) for x in raw['V_PRE_TXT'])
  now, keep = [visual, visual // 2, visual // 4][stage:stage + 2]
  scores = np.full(start + now + text, 9.0, np.float32)  # Text stays whatever its score.
  scores[start:start + now] = raw[f'score_stage{stage}']
  tokens = prompt(np.zeros((len(scores), 1), np.float32), start, now)
  told = Signals(next_last_attention=jnp.asarray(scores)[None, None])
  reduced = tk.reduce(tokens, PyramidDrop()(tokens, told, num_slots=keep + start + text))
  chosen = np.asarray(reduced.pos[0][np.asarray(reduced.kind[0]) == VISUAL]) - start
  np.testing.assert_array_equal(chosen, np.sort(raw[f'topk_stage{stage}']))
  assert reduced.slots == raw['layer_in_len'][raw['layer_list'][stage]]


def gemfilter(raw, places=None):
  """Returns what GemFilter keeps of the recorded prompt, and its scores, with padding around."""
  query, key = (raw[name].swapaxes(1, 2) for name in ('query', 'key'))
  length, valid = query.shape[1], None
  if places is not None:
    length, valid = 70, np.isin(np.arange(70), places)[None]
    wide = [np.full((1, length, *x.shape[2:]), 1e3, np.float32) for x in (query, key)]
    for out, x in zip(wide, (query, key), strict=True):
      out[:, places] = x
    query, key = wide
  tokens = TokenSet.create(jnp.zeros((1, length, 1)), valid=None if valid is None
                           else jnp.asarray(valid), of=(TEXT,),
                           kind=jnp.full((1, length), TEXT, jnp.int8))
  told, method = Signals(queries=jnp.asarray(query), keys=jnp.asarray(key)), GemFilter()
  return np.asarray(method(tokens, told, num_slots=int(raw['topk'])).src[0]), np.asarray(
      method.scores(tokens, told)[0])


def test_gemfilter():
  raw = load('gemfilter')
  kept, scores = gemfilter(raw)
  np.testing.assert_array_equal(kept, raw['selected_sorted'])
  np.testing.assert_array_equal(np.argsort(-scores)[:len(kept)], raw['indices'][0, 0])
  # Sums of 8 heads and 16 features, of a size up to 30: relative above a size of 1.
  np.testing.assert_allclose(np.sort(scores)[::-1], raw['all_sorted_values'][0, 0], atol=1e-5,
                             rtol=1e-5)


def test_gemfilter_pools_over_neighbours_whatever_padding_lies_between():
  raw = load('gemfilter')
  places = np.setdiff1d(np.arange(70), [0, 7, 8, 30, 55, 69])
  (kept, scores), (wide, among) = gemfilter(raw), gemfilter(raw, places)
  np.testing.assert_array_equal(wide, places[kept])
  np.testing.assert_array_equal(among[places], scores)
