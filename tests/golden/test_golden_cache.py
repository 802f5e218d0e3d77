"""Methods on caches of keys and values against released code: exact indices, 1e-5 for floats.

Queries are worked out here from the recorded hidden states and weights; keys and values are the
recorded ones.

Axes: B batch, N entries, H heads, K kv heads, d features a head.
"""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import recorded
from helpers.golden_vit import arrays

from ops import signals
from ops.reducers.cache.compactor import Compactor
from ops.reducers.cache.duo_attention import DuoAttention
from ops.reducers.cache.expected_attention import ExpectedAttention, mean_rotation
from ops.reducers.cache.h2o import H2O
from ops.reducers.cache.knorm import KNorm
from ops.reducers.cache.observed_attention import ObservedAttention
from ops.reducers.cache.snapkv import SnapKV
from ops.reducers.cache.streaming_llm import StreamingLLM
from ops.reducers.cache.tova import TOVA
from ops.reducers.scoring import ScoringReducer
from ops.rope import Rope
from ops.tokens import TEXT, TokenSet

N, HEADS, KV, WIDTH = 48, 4, 2, 16
ROPE = Rope(WIDTH)


def load(name):
  return recorded.arrays(f'in_llm/{name}')


def close(got, want):
  np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


def text(batch, length, *, valid=None):
  """Text alone, all of it free to go."""
  kind = jnp.full((batch, length), TEXT, jnp.int8)
  return TokenSet.create(jnp.zeros((batch, length, 1)), kind=kind, valid=valid, of=(TEXT,))


@functools.cache
def layer(index, needs, span=0):
  """Signals of one layer of the recorded model, by ops/signals.py."""
  raw = load('kvpress_base')
  hidden = raw[f'hs_in_l{index}'].astype(np.float64)
  name = f'w/model.layers.{index}.'
  hidden = hidden / np.sqrt((hidden ** 2).mean(-1, keepdims=True) + 1e-5)
  hidden = hidden * raw[f'{name}input_layernorm.weight']
  plain = (hidden @ raw[f'{name}self_attn.q_proj.weight'].T).reshape(1, N, HEADS, WIDTH)
  keys, values = (raw[f'{part}_l{index}'].swapaxes(0, 1)[None] for part in ('keys', 'values'))
  return arrays(measure(needs, plain.astype(np.float32), keys, values, span))


@functools.partial(jax.jit, static_argnums=(0, 4))
def measure(needs, plain, keys, values, span):
  pos = jnp.arange(N, dtype=jnp.int32)[None]
  found = signals.measure(needs, q=ROPE.rotate(plain, pos), k=keys, v=values, lse=None,
                          positions=pos, span=span)
  return found.replace(plain_queries=plain, rope=ROPE)


@functools.partial(jax.jit, static_argnums=(0, 4))
def choose(method, told, keys, values, num_slots):
  """The choice, the scores where there are some, and what stays of the cache."""
  tokens = text(1, keys.shape[2])
  kept = method(tokens, told, num_slots=num_slots)
  scores = method.scores(tokens, told) if isinstance(method, ScoringReducer) else None
  return kept.src, scores, kept.apply(keys), kept.apply(values)


def chosen(method, told, index, num_slots=24):
  base = load('kvpress_base')
  cache = (base[f'{part}_l{index}'][None] for part in ('keys', 'values'))
  return arrays(choose(method, told, *cache, num_slots))


def same_order(method, told, name, index, scores=None):
  """The recorded choice in its order; where scores tie, the release leaves the order open."""
  raw = load(f'kvpress_{name}')
  want, recorded = raw[f'kept_idx_l{index}'], raw[f'score_l{index}']
  src, own, *cache = chosen(method, told, index, want.shape[1])
  got, scores = src[0], own if scores is None else scores
  np.testing.assert_array_equal(np.sort(got, axis=1), np.sort(want, axis=1))
  if scores is not None:
    close(np.take_along_axis(recorded, got, axis=1), np.take_along_axis(recorded, want, axis=1))
  for part, mine in zip(('keys', 'values'), cache, strict=True):
    mine = mine[0]
    order_got, order_want = np.argsort(got, axis=1), np.argsort(want, axis=1)
    close(np.take_along_axis(mine, order_got[..., None], axis=1),
          np.take_along_axis(raw[f'{part}_l{index}'], order_want[..., None], axis=1))
  return None if scores is None else (scores[0], recorded)


@pytest.mark.parametrize('index', [0, 1])
def test_the_recorded_layer_is_the_one_worked_out_here(index):
  raw = load('kvpress_base')
  told = layer(index, frozenset({'last_attention', 'window_attention', 'received_attention'}), 8)
  attention = raw[f'attn_l{index}']
  close(told.last_attention[0], attention[:, -1])
  close(told.window_attention[0], attention[:, -8:])
  close(told.received_attention[0], attention.mean(axis=1))


@pytest.mark.parametrize('index', [0, 1])
def test_streaming_llm(index):
  told = layer(index, frozenset({'keys'}))
  same_order(StreamingLLM(), told, 'streaming_llm', index)
  src, *_ = chosen(StreamingLLM(), told, index)
  np.testing.assert_array_equal(src[0, 0], [*range(4), *range(28, 48)])


@pytest.mark.parametrize('index', [0, 1])
def test_knorm(index):
  told = layer(index, KNorm().needs)
  close(*same_order(KNorm(), told, 'knorm', index))


@pytest.mark.parametrize('index', [0, 1])
def test_tova(index):
  told = layer(index, TOVA.needs)
  scores = told.last_attention.mean(axis=1)
  mine, recorded = same_order(TOVA(), told, 'tova', index, scores)
  for head in range(KV):
    close(mine[:-1], recorded[head, :-1])


@pytest.mark.parametrize('index', [0, 1])
def test_observed_attention(index):
  told, method = layer(index, ObservedAttention.needs), ObservedAttention()
  close(*same_order(method, told, 'observed_attention_h2o', index))


@pytest.mark.parametrize('name', ['snapkv', 'snapkv_sdpa'])
@pytest.mark.parametrize('index', [0, 1])
def test_snapkv_of_kvpress(name, index):
  method = SnapKV(window=8, variant='kvpress')
  told = layer(index, SnapKV.needs, 8)
  mine, recorded = same_order(method, told, name, index)
  close(mine[:, :-8], recorded[:, :-8])
  np.testing.assert_array_equal(chosen(method, told, index)[0][0, :, 8:],
                                load(f'kvpress_{name}')[f'kept_idx_l{index}'][:, 8:])


def test_snapkv_as_released():
  raw = load('snapkv_official_avgpool')
  window, capacity, kernel = (int(x) for x in raw['window_capacity_kernel'])
  q, k, v = (raw[name].swapaxes(1, 2) for name in ('query', 'key', 'value'))
  told = jax.jit(functools.partial(signals.measure, SnapKV.needs, lse=None, span=window))(
      q=q, k=k, v=v, positions=np.arange(48, dtype=np.int32)[None])
  method = SnapKV(window=window, kernel=kernel)
  src, _, keys, values = arrays(choose(method, told, raw['key'], raw['value'], capacity))
  np.testing.assert_array_equal(src[0], raw['kept_idx'])
  np.testing.assert_array_equal(keys, raw['keys_out'])
  np.testing.assert_array_equal(values, raw['values_out'])


def test_snapkv_pools_maxima():
  told = layer(0, SnapKV.needs, 8)
  rows = told.window_attention[0].mean(axis=1)[:, :-8]
  wide = np.pad(rows, ((0, 0), (2, 2)))
  want = np.stack([wide[:, i:i + 40] for i in range(5)]).max(axis=0)
  got = chosen(SnapKV(window=8, pool='max'), told, 0)[1][0]
  close(got[:, :40], want.reshape(KV, 2, 40).mean(axis=1))
  np.testing.assert_array_equal(got[:, 40:], 0)


@pytest.mark.parametrize(('name', 'args'), [
    ('expected_attention', {'future': 16}),
    ('expected_attention_nocov_eps', {'future': 16, 'covariance': 'none', 'epsilon': 0.01})])
@pytest.mark.parametrize('index', [0, 1])
def test_expected_attention(name, args, index):
  method, told = ExpectedAttention(**args), layer(index, ExpectedAttention.needs)
  mine, recorded = same_order(method, told, name, index)
  close(mine[:, 4:], recorded[:, 4:])


# Presses of kvpress 0.5.5 on the recorded model and ids (tests/fixtures/in_llm/kvpress_more.npz):
# scores and what stays of each layer; sketches are those that are drawn here.
MORE = {
    'leverage': Compactor(by='leverage', sinks=0, recent=0),
    'non_causal': Compactor(by='attention', chunk=16, sinks=0, recent=0),
    'compactor': Compactor(chunk=16).with_ratio(Fraction(1, 2)),
    'expected_attention_no_value': ExpectedAttention(future=16, weigh='none'),
}


@pytest.mark.parametrize('name', MORE)
def test_more_presses(name):
  raw, method = load('kvpress_more'), MORE[name]
  for index in (0, 1):
    src, scores, *_ = chosen(method, layer(index, method.needs), index)
    np.testing.assert_array_equal(np.sort(src[0], axis=1),
                                  np.sort(raw[f'{name}_kept_l{index}'], axis=1))
    scored = slice(method.sinks, N - getattr(method, 'recent', 0))
    close(scores[0, :, scored], raw[f'{name}_score_l{index}'][:, scored])


@pytest.mark.parametrize('index', [0, 1])
def test_how_far_back_heads_look(index):
  """As kvpress has it of the recorded ids alone; what stays is then by the budget."""
  told = layer(index, DuoAttention.needs)
  for length in (500, 64):
    far = jax.jit(DuoAttention(length=length).far)(text(1, N), told)
    close(far[0], load('kvpress_more')[f'duo_heads_{length}'][index])
  method = DuoAttention(sinks=2, recent=3, length=500)
  keep = jax.jit(functools.partial(method, num_slots=30))(text(1, N), told).mask(N)[0]
  best = int(np.argmax(load('kvpress_more')['duo_heads_500'][index]))
  assert keep[best].all()
  np.testing.assert_array_equal(np.flatnonzero(keep[1 - best]), [0, 1, *range(N - 10, N)])


@functools.cache
def parts_of_a_row(padding):
  """Attention scores of 10 tokens in parts of 4, as the paper has them, behind some padding."""
  rng, (heads, width) = np.random.default_rng(3), (2, WIDTH)
  made = [rng.normal(size=(1, 10, n, width)).astype(np.float32) for n in (2 * heads, heads, heads)]
  q, k, v = (np.pad(x, ((0, 0), (padding, 0), (0, 0), (0, 0)), constant_values=9.0) for x in made)
  valid = np.arange(10 + padding)[None] >= padding
  tokens = text(1, 10 + padding, valid=valid)
  told = signals.Signals(queries=q, keys=k, values=v)
  method = Compactor(variant='paper', chunk=4, sinks=0, recent=0)
  return made, np.asarray(jax.jit(method._attention)(tokens, told))[0, :, padding:]


def test_the_last_part_is_as_short_as_it_is_in_the_paper():
  (q, k, v), found = parts_of_a_row(0)
  want = np.zeros((KV, 10))
  for start in (0, 4, 8):
    part = slice(start, min(start + 4, 10))
    for head in range(4):
      logits = q[0, part, head] @ k[0, part, head // 2].T / WIDTH ** 0.5
      weights = np.exp(logits)
      want[head // 2, part] += (weights / weights.sum(axis=1, keepdims=True)).sum(axis=0) / 2
  want = np.pad(want * np.linalg.norm(v[0], axis=2).T, ((0, 0), (1, 1)))
  close(found, (want[:, :-2] + want[:, 1:-1] + want[:, 2:]) / 3)
  close(parts_of_a_row(3)[1], found)


def test_the_mean_rotation_is_the_mean_of_what_is_turned():
  x = np.random.default_rng(0).normal(size=(2, 1, 3, WIDTH)).astype(np.float32)
  first = np.array([48, 7], np.int32)
  for sections in ((), (4, 2, 2)):
    rope = Rope(WIDTH, sections=sections)
    pos = first[:, None] + np.arange(5)[None]
    every = np.broadcast_to(x, (2, 5, 3, WIDTH))
    pos = np.repeat(pos[..., None], 4, axis=2) if sections else pos
    want = np.asarray(jax.jit(rope.rotate)(every, pos)).mean(axis=1)
    turn = np.asarray(jax.jit(mean_rotation, static_argnums=(0, 2))(rope, first, 5))
    got = np.einsum('bij,bhj->bhi', turn, x[:, 0])
    close(got, want)


@functools.cache
def heavy_hitters():
  raw = load('h2o_official')
  told = signals.Signals(keys=raw['key'].swapaxes(1, 2),
                         received_attention=raw['attn'].mean(axis=2))
  heavy, recent = (int(x) for x in raw['hh_recent'])
  src, scores, *cache = arrays(choose(H2O(recent=recent), told, raw['key'], raw['value'],
                                      heavy + recent))
  return raw, src, np.take_along_axis(scores, src, axis=2), cache


def test_h2o():
  raw, src, heavy, cache = heavy_hitters()
  np.testing.assert_array_equal(src[0], raw['kept_idx'])
  close(heavy[0], raw['hh_score_kept'])
  for part, mine in zip(('key', 'value'), cache, strict=True):
    np.testing.assert_array_equal(mine, raw[f'{part}_out'])


def heads_as_rows(heavy, pos, valid):
  heavy, pos, valid = (x.reshape(-1, x.shape[2]) for x in (heavy, pos, valid))
  return TokenSet.create(jnp.zeros((*pos.shape, 1)), pos=pos, valid=valid,
                         kind=jnp.full(pos.shape, TEXT, jnp.int8), stats={'heavy': heavy})


@functools.partial(jax.jit, static_argnames='recent')
def evict(heavy, pos, valid, *, recent):
  """The slot of a cache that its next entry takes, int[B, K]."""
  stays = H2O(recent=recent).evict(heads_as_rows(heavy, pos, valid), None,
                                   num_slots=pos.shape[2] - 1)
  return jnp.argmin(stays, axis=1).reshape(pos.shape[:2])


@jax.jit
def follow(heavy, pos, valid, row):
  """The sums after the row float32[1, H, S] of one more query."""
  told = signals.by_head(signals.Signals(received_attention=row), pos.shape[1])
  ones = jnp.ones(pos.shape[1], jnp.int32)
  return H2O().update(heads_as_rows(heavy, pos, valid), told, ones)['heavy'][None]


def test_h2o_while_decoding():
  """Against the released bookkeeping in its own order: append, add up, drop the lightest."""
  raw, src, heavy, _ = heavy_hitters()
  recent, rng = int(raw['hh_recent'][1]), np.random.default_rng(0)
  lists = [list(zip(raw['kept_idx'][head], raw['hh_score_kept'][head].astype(np.float64),
                    strict=True)) for head in range(2)]
  empty = ((0, 0), (0, 0), (0, 1))
  pos, heavy = (np.pad(x, empty) for x in (src, heavy))
  valid = np.pad(np.ones(src.shape, bool), empty)
  for step in range(12):
    place = np.asarray(evict(heavy, pos, valid, recent=recent))
    at = np.arange(17)[None, None] == place[..., None]
    pos = np.where(at, np.int32(32 + step), pos)
    heavy, valid = np.where(at, np.float32(0), heavy), valid | at
    row = rng.dirichlet(np.full(100, 0.3), size=(1, 4)).astype(np.float32)
    row = np.take_along_axis(row, np.repeat(pos, 2, axis=1), axis=2)
    heavy = np.asarray(follow(heavy, pos, valid, row))
    for head in range(2):
      entries = [*lists[head], (32 + step, 0.0)]
      gained = {int(p): float(g) for p, g in zip(
          pos[0, head], row[0, 2 * head:2 * head + 2].sum(axis=0), strict=True)}
      entries = [(p, s + gained[p]) for p, s in entries]
      old, new = entries[:-recent], entries[-recent:]
      best = sorted(sorted(old, key=lambda e: -e[1])[:len(old) - 1])
      assert [p for p, _ in entries] == sorted(p for p, _ in entries)
      lists[head] = best + new
      gone = int(np.asarray(evict(heavy, pos, valid, recent=recent))[0, head])
      left = dict(entries)
      del left[int(pos[0, head, gone])]
      assert left == dict(lists[head])
      close([float(heavy[0, head, list(pos[0, head]).index(p)]) for p in left],
            list(left.values()))


def test_evict_fills_empty_places_first_and_drops_the_latest_of_equals():
  pos = np.array([[[5, 3, 9, 7]], [[5, 3, 9, 7]]], np.int32)
  heavy = np.array([[[1.0, 1.0, 0.0, 2.0]], [[1.0, 1.0, 0.0, 2.0]]], np.float32)
  valid = np.array([[[True] * 4], [[True, False, False, True]]])
  np.testing.assert_array_equal(evict(heavy, pos, valid, recent=2), [[0], [1]])
  np.testing.assert_array_equal(np.asarray(evict(heavy, pos, valid, recent=0))[0], [2])
