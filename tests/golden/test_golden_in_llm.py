"""Methods in a language model against released code: exact indices, 1e-5 for floats.

Here scores and choices; tests/golden/test_golden_lm_methods.py runs whole models.

Axes: B batch, N slots, V visual tokens, H heads.
"""


import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_long, recorded

from models.reduction import Event, Place, Reduction, reduce
from ops import attention
from ops import tokens as tk
from ops.kv_cache import KV
from ops.primitives import contextual, queries
from ops.reducers.cache.corematching_cache import CoreMatchingCache
from ops.reducers.language.corematching import CoreMatching
from ops.reducers.language.dart import DART
from ops.reducers.language.fastv import FastV
from ops.reducers.language.fitprune import FitPrune
from ops.reducers.language.gemfilter import GemFilter
from ops.reducers.language.llavolta import LLaVolta
from ops.reducers.language.mustdrop import MustDrop
from ops.reducers.language.pact import PACT
from ops.reducers.language.pyramiddrop import PyramidDrop
from ops.reducers.language.sparsevlm import SparseVLM
from ops.rope import Rope
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


@functools.partial(jax.jit, static_argnames='slots')
def averaged(tokens, slots):
  """Tokens behind LLaVolta's cut in a language model."""
  method = LLaVolta()
  event = Event(2, 'before', tokens.slots, slots, Reduction('llavolta', method,
                                                            positions=method.positions))
  return reduce(event, tokens, Signals(), Place(depth=4, causal=True)).tokens


@pytest.mark.parametrize('stride', mostly_long([8, 2, 4]))
def test_llavolta(stride):
  raw, visual = recorded.arrays('learned/llavolta_pool'), 24
  slots, start = np.arange(40)[None], raw['image_start'][:, None]
  kind = np.where((slots >= start) & (slots < start + visual), VISUAL, TEXT).astype(np.int8)
  tokens = TokenSet.create(jnp.asarray(raw['hidden']), kind=jnp.asarray(kind),
                           pos=jnp.asarray(raw['position_ids'], jnp.int32), protected=40 - visual)
  reduced = averaged(tokens, 40 - visual + visual // stride)
  np.testing.assert_allclose(reduced.x, raw[f'hidden_stride{stride}'], atol=1e-5, rtol=0)
  np.testing.assert_array_equal(reduced.pos, raw[f'pos_stride{stride}'])


@pytest.mark.long
def test_a_run_of_llavolta_with_text_inside_stands_behind_it():
  # Its middle token stands at 2, between two of text that must not see its last ones.
  kind = jnp.asarray([[VISUAL, TEXT, VISUAL, TEXT, VISUAL, VISUAL, TEXT]], jnp.int8)
  pos = jnp.asarray([[[place, 10 * place] for place in range(7)]])  # As M-RoPE has it.
  reduced = averaged(TokenSet.create(jnp.eye(7)[None], kind=kind, pos=pos, protected=3), 4)
  np.testing.assert_array_equal(reduced.pos[0], [[1, 10], [3, 30], [4, 20], [6, 60]])
  np.testing.assert_allclose(reduced.x[0, 2], np.where(kind[0] == VISUAL, 0.25, 0.0), atol=1e-6)


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


@pytest.mark.parametrize('stage', mostly_long([0, 1]))
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


def close(got, want):
  np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def rated(name):
  """Tokens of the recorded prompt with its rating words, and the mean of their rows, by head."""
  raw, first = load(name), load('sparsevlm')
  tokens = prompt(first['hidden0'][0], *map(int, first['v_start_n_text'][:2]))
  rates = np.zeros((1, tokens.slots), bool)
  rates[0, raw['rater_idx'] + 37] = True
  rows = (raw['attn'] * rates[:, None, :, None]).sum(axis=2) / rates.sum()
  return raw, tokens.replace(stats={'rates': jnp.asarray(rates)}), jnp.asarray(rows)


def test_sparsevlm():
  """Words that rate, their scores, and what 20 of 32 leaves, with one mean of what goes."""
  raw, tokens, rows = rated('sparsevlm')
  method = SparseVLM()
  found = jax.jit(method.watch)(tokens, Signals(hidden_in=tokens.x))
  np.testing.assert_array_equal(found['rates'], tokens.stats['rates'])
  scores = rows.mean(axis=1)[:, 5:37]
  close(scores, raw['relation_vis_text'])
  answer = jax.jit(functools.partial(method, num_slots=14 + 20 + 1))(
      tokens, Signals(row_attention=rows))
  alone = np.bincount(answer.dst[0], minlength=36)[answer.dst[0]] == 1
  np.testing.assert_array_equal((alone & np.asarray(answer.dst[0] < 34))[5:37], raw['keep_mask'][0])
  pruned = np.flatnonzero(~raw['keep_mask'][0])[raw['recycle_idx_in_pruned']] + 5
  np.testing.assert_array_equal(np.flatnonzero(answer.dst[0] == 34), np.sort(pruned))
  close(answer.apply(tokens.x)[:, 34:], raw['merged'])


def test_sparsevlm_clusters():
  """40 tokens become five means: those of a prompt of which 131 tokens go, as many as make 40."""
  raw = load('sparsevlm')
  x = np.concatenate([raw['cluster_in_big'][0], np.zeros((91, 24), np.float32)])
  tokens = TokenSet.create(jnp.asarray(x)[None])
  scores = -jnp.arange(131.0)[None]
  answer = jax.jit(functools.partial(contextual.recycle, num_slots=5))(tokens, scores)
  close(answer.apply(tokens.x), raw['cluster_out_big'])


def test_sparsevlm_plus_picks_heads():
  raw, tokens, rows = rated('sparsevlm_plus_heads')
  method = SparseVLM(variant='plus')
  spent = rows[0, :, 5:37].sum(axis=1) * 6
  close(spent, raw['head_sum'])

  class Given(SparseVLM):
    def corrected(self, tokens, signals):
      return signals.row_attention

  kept = jax.jit(functools.partial(Given(**dataclasses.asdict(method)), num_slots=14 + 20))(
      tokens, Signals(row_attention=rows))
  chosen = np.sort(np.argsort(-np.asarray(spent), kind='stable')[:14])
  close(rows[0, chosen, 5:37].mean(axis=0), raw['relation_vis_text'][0])
  np.testing.assert_array_equal((np.asarray(kept.dst[0]) < 34)[5:37], raw['keep_mask'][0])


@pytest.mark.long
def test_sparsevlm_plus_divides_by_what_equal_vectors_have():
  """Against the whole maps, which the release divides."""
  rng = np.random.default_rng(0)
  slots, rope = 12, Rope(8)
  q, k = (jnp.asarray(rng.normal(size=(1, slots, heads, 8)), jnp.float32) for heads in (4, 2))
  tokens = prompt(np.zeros((slots, 4), np.float32), 2, 6)
  told = Signals(queries=q, keys=k, rope=rope)
  rows = jax.jit(SparseVLM(variant='plus').corrected)(tokens, told)
  whole = attention.eager(q, k, positions=tokens.pos)
  ones = rope.rotate(jnp.ones((1, slots, 1, 8)), tokens.pos)[0, :, 0]
  close(rows, (whole / (ones @ ones.T / np.sqrt(8))[None, None])[:, :, 8:].sum(axis=2))


@pytest.mark.parametrize('rank', [pytest.param(1, marks=pytest.mark.long), 3])
def test_sparsevlm_of_the_paper_leaves_as_many_as_the_rank_says(rank):
  """Words that ask alike attend alike: of 20 tokens (20 - rank) / 2 go, and a mean comes."""
  rng = np.random.default_rng(1)
  slots = 28
  q = rng.normal(size=(1, slots, 1, 8)).astype(np.float32)
  q[0, -5:] = q[0, -5 + np.arange(5) % rank]
  k = rng.normal(size=(1, slots, 1, 8)).astype(np.float32)
  tokens = prompt(rng.normal(size=(slots, 4)).astype(np.float32), 3, 20)
  told = Signals(queries=jnp.asarray(q), keys=jnp.asarray(k), row_attention=jnp.asarray(
      rng.random((1, 1, slots)), jnp.float32))
  method = SparseVLM(variant='paper')
  answer = jax.jit(functools.partial(method, num_slots=27))(tokens, told)
  stay = 20 - (20 - rank) // 2 + 1
  assert int(answer.wanted[0]) == int(answer.valid.sum()) == 8 + stay
  full = jax.jit(functools.partial(method, num_slots=8 + 5))(tokens, told)
  assert int(full.valid.sum()) == 13


def test_what_sparsevlm_recycles_counts():
  """The lists of the release, with the clusters that each makes: the tokens that layers see."""
  for lists in ((576, (300, 309), (200, 204), (110, 113)), (576, (303, 312), (110, 117), (36, 39)),
                (576, (238, 249), (48, 55), (26, 27)), (576, (66, 82), (30, 32), (17, 18))):
    now = lists[0]
    for stay, left in lists[1:]:
      assert stay + contextual.num_clusters(now - stay) == left
      now = left


def neurons():
  """The recorded prompt of 595 tokens, 576 of them of an image, and its MLP's inner activations."""
  raw = load('corematching')
  first, end = map(int, raw['image_range'])
  tokens = prompt(raw['x'][0], first, end - first)
  gate, up = (raw['x'] @ raw[name].T for name in ('gate_w', 'up_w'))
  hidden = gate / (1 + np.exp(-gate)) * up
  close(hidden[:, :8] @ raw['down_w'].T, raw['mlp_out_first8'][None])
  return raw, tokens, Signals(mlp_hidden=jnp.asarray(hidden), keys=jnp.ones((1, 595, 1, 2)))


@pytest.mark.long
def test_corematching():
  """Shared neurons, the tokens above the elbow, and what becomes of the others in a cache."""
  raw, tokens, told = neurons()
  method = CoreMatching()
  np.testing.assert_array_equal(jax.jit(method.shared)(tokens, told)[0, 5:581],
                                raw['shared_neuron_score'])
  kept = raw['kept_position_mask']
  answer = jax.jit(functools.partial(method, num_slots=594))(tokens, told)
  assert int(answer.wanted[0]) == kept.sum()
  np.testing.assert_array_equal(np.asarray(tk.reduce(tokens, answer).owner[0]) >= 0, kept)

  @functools.partial(jax.jit, static_argnums=0)
  def cached(variant):
    made = CoreMatchingCache(variant=variant)(tokens, told, num_slots=595)
    kv = KV.create(*jnp.ones((2, 1, 1, 595, 2)), pos=tokens.pos, valid=tokens.real, filled=595,
                   start=jnp.zeros(1, jnp.int32))
    return made.shrink(kv, positions='keep', rope=None)

  blank, hidden = cached('release'), cached('hidden')
  np.testing.assert_array_equal(blank.k[0, 0, :, 0] == 1, kept)
  np.testing.assert_array_equal(blank.v[0, 0, :, 0] == 1, kept)
  assert blank.valid.all()
  np.testing.assert_array_equal(hidden.valid[0, 0], kept)


@pytest.mark.long
def test_corematching_keeps_the_best_where_fewer_fit():
  raw, tokens, told = neurons()
  answer = jax.jit(functools.partial(CoreMatching(), num_slots=19 + 10))(tokens, told)
  order = np.argsort(-raw['shared_neuron_score'], kind='stable')[:10]
  left = np.asarray(tk.reduce(tokens, answer).pos[0])
  np.testing.assert_array_equal(left[(left >= 5) & (left < 581)] - 5, np.sort(order))


@pytest.mark.long
def test_corematching_of_the_paper():
  """The tokens that share the neurons which most tokens have among their most active."""
  hidden = np.zeros((1, 12, 10), np.float32)
  hidden[0, 8:, :4] = [4, 3, 2, 1]  # Text: neurons 0 and 1 of its four.
  hidden[0, 2:4, :4] = [4, 3, 1, 1]  # Alike.
  hidden[0, 4:8, 4:8] = [1, 2, 3, 4]  # Unlike, and fewer.
  tokens = prompt(np.zeros((12, 4), np.float32), 2, 6)
  method = CoreMatching(variant='paper', own=0.5, common=0.2)
  answer = jax.jit(functools.partial(method, num_slots=11))(
      tokens, Signals(mlp_hidden=jnp.asarray(hidden)))
  np.testing.assert_array_equal(np.flatnonzero(answer.dst[0] < 11), [0, 1, 2, 3, *range(8, 12)])


def kept_by(method, tokens, told, *, num_slots):
  """The tokens that are left, by their positions."""
  answer = jax.jit(functools.partial(method, num_slots=num_slots))(tokens, told)
  return np.asarray(tk.reduce(tokens, answer).pos[0])


def test_dart():
  raw = load('dart')
  start, visual, text = map(int, raw['v_start_n_text'])
  tokens = prompt(raw['hidden'][0], start, visual)
  told = Signals(keys=jnp.asarray(raw['keys'].swapaxes(1, 2)))
  left = kept_by(DART(), tokens, told, num_slots=start + text + len(raw['kept']))
  np.testing.assert_array_equal(left[(left >= start) & (left < start + visual)], raw['kept'])


@pytest.mark.long
@pytest.mark.parametrize(('image', 'text', 'keep'), [(4, 4, 2), (4, 0, 7), (3, 4, 18)])
def test_dart_keeps_as_many_as_it_is_asked_for(image, text, keep):
  """The longest keys first; what pivots take is divided as evenly as it goes."""
  rng = np.random.default_rng(4)
  tokens = prompt(rng.normal(size=(26, 8)).astype(np.float32), 2, 20)
  told = Signals(keys=jnp.asarray(rng.normal(size=(1, 26, 2, 4)), jnp.float32))
  left = kept_by(DART(image=image, text=text), tokens, told, num_slots=6 + keep)
  assert len(left) == 6 + keep
  longest = np.argsort(-np.abs(np.asarray(told.keys[0, 2:22])).sum((1, 2)), kind='stable')
  assert set(longest[:min(image, keep)] + 2) <= set(left.tolist())


def test_fitprune():
  raw = load('fitprune')
  start, visual, text = map(int, raw['v_start_n_text'])
  tokens = prompt(np.zeros((start + visual + text, 4), np.float32), start, visual)
  told = Signals(**{name: jnp.asarray(raw[key].swapaxes(1, 2))
                    for name, key in (('queries', 'query'), ('keys', 'key'))})
  of = np.stack([tokens.kind == VISUAL, tokens.pos >= start + visual])
  image, words = jax.jit(functools.partial(queries.sum_rows, heads=jnp.max))(tokens, told, of)
  seen = slice(start, start + visual)
  close(image[0, seen] / visual, raw['image_sum'])
  close(words[0, seen], raw['text_sum'])
  left = kept_by(FitPrune(), tokens, told, num_slots=tokens.slots - len(raw['deleted']))
  np.testing.assert_array_equal(left, np.setdiff1d(np.arange(tokens.slots),
                                                   raw['deleted'] + start))


def attending(attn):
  """Queries and keys of attention float32[1, H, N, N], zero where a token is not seen."""
  heads, slots = attn.shape[1:3]
  keys = np.broadcast_to(np.eye(slots, dtype=np.float32)[None, :, None] * slots ** 0.5,
                         (1, slots, heads, slots))
  return Signals(queries=jnp.asarray(np.log(np.maximum(attn, 1e-30)).swapaxes(1, 2)),
                 keys=jnp.asarray(keys))


@pytest.mark.parametrize('fits', [pytest.param('all', marks=pytest.mark.long), 'some'])
def test_mustdrop(fits):
  raw = load('mustdrop')
  start, visual, text = map(int, raw['v_start_n_text'])
  tokens = prompt(np.zeros((start + visual + text, 4), np.float32), start, visual)
  key = np.zeros((1, tokens.slots), bool)
  key[0, raw['key_set'] + start] = True
  overall, single = raw['thresholds'].tolist()
  method, told = MustDrop(overall=overall, single=single), attending(raw['attn'])
  kept = raw['kept']
  if fits == 'some':  # The key tokens, and those with the most attention.
    others = np.setdiff1d(raw['important'], raw['key_set'])
    kept = np.union1d(raw['key_set'], others[np.argsort(-raw['attn_sum'][others])[:9]])
  answer = jax.jit(functools.partial(method, num_slots=start + text + (
      visual - 1 if fits == 'all' else len(kept))))(
          tokens.replace(stats={'key': jnp.asarray(key)}), told)
  left = np.flatnonzero(tk.reduce(tokens, answer).owner[0] >= 0)
  np.testing.assert_array_equal(left[(left >= start) & (left < start + visual)] - start, kept)
  assert int(answer.wanted[0]) == start + text + len(raw['kept'])


@pytest.mark.long
def test_pact():
  """Compares which tokens matter, the centres among them, and the means of what joins these."""
  raw = load('pact')
  start, visual, text = map(int, raw['v_start_n_text'])
  keep, cutoff, coefficient = raw['settings'].tolist()
  tokens = prompt(raw['hidden'][0], start, visual)
  told = Signals(next_queries=jnp.asarray(raw['query']), next_keys=jnp.asarray(raw['key']),
                 rope=Rope(8))
  method = PACT(keep=keep, cutoff=cutoff, coefficient=coefficient)
  seen = slice(start, start + visual)
  close(jax.jit(method.importance)(tokens, told)[0, seen], raw['scores'])
  answer = jax.jit(functools.partial(method, num_slots=tokens.slots - 1))(tokens, told)
  assert int(answer.wanted[0]) == start + text + len(raw['centers'])
  reduced = tk.reduce(tokens, answer)
  np.testing.assert_array_equal(np.asarray(answer.src[0])[np.asarray(answer.valid[0])][
      start:start + len(raw['centers'])] - start, raw['centers'])
  centres = slice(start, start + len(raw['centers']))
  close(reduced.x[0, centres], raw['merged'])
  np.testing.assert_array_equal(reduced.size[0, centres], raw['weights'])
  joined = np.where(raw['labels'] < 0, tokens.slots - 1,
                    start + np.searchsorted(raw['centers'], raw['labels']))
  np.testing.assert_array_equal(answer.dst[0, seen], joined)
