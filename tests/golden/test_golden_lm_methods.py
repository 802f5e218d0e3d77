"""Reductions in whole language models against released code, from embeddings to logits.

Indices exactly; features as tests/helpers/golden_vit.py compares those of whole models: within
1e-5, relative above a size of 1.

Axes: B batch, N slots, V visual tokens, H heads, K kv heads, D width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_long, recorded
from helpers.golden_vit import arrays

from models.backbones.lm import LM
from models.decoding import kvzip
from models.decoding.kvzip import KVzip
from models.plan import make_cache_plan, make_plan
from ops.caches.split import SplitKV
from ops.reducers import REDUCERS
from ops.reducers.language import aim
from ops.rope import Rope
from ops.signals import Signals
from ops.tokens import TEXT, VISUAL, TokenSet


def load(name):
  return recorded.arrays(f'in_llm/{name}')


def close(got, want):
  np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def model(name, *, eps, heads=4):
  """The recorded language model and its parameters; embeddings and head where they are there."""
  raw = {key.removeprefix('w/').removeprefix('model.'): value for key, value in load(name).items()
         if key.startswith('w/')}
  depth = 1 + max(int(key.split('.')[1]) for key in raw if key.startswith('layers.'))
  width = len(raw['layers.0.input_layernorm.weight'])
  head = width // heads

  def stack(part, *shape):
    return np.stack([raw[f'layers.{i}.{part}.weight'].T.reshape(shape) for i in range(depth)])

  kv_heads = len(raw['layers.0.self_attn.k_proj.weight']) // head
  mlp = len(raw['layers.0.mlp.gate_proj.weight'])
  blocks = {
      'norm1': {'scale': stack('input_layernorm', width)},
      'norm2': {'scale': stack('post_attention_layernorm', width)},
      'q': {'kernel': stack('self_attn.q_proj', width, heads, head)},
      'k': {'kernel': stack('self_attn.k_proj', width, kv_heads, head)},
      'v': {'kernel': stack('self_attn.v_proj', width, kv_heads, head)},
      'out': {'kernel': stack('self_attn.o_proj', heads, head, width)},
      'gate': {'kernel': stack('mlp.gate_proj', width, mlp)},
      'up': {'kernel': stack('mlp.up_proj', width, mlp)},
      'down': {'kernel': stack('mlp.down_proj', mlp, width)},
  }
  qkv_bias = 'layers.0.self_attn.q_proj.bias' in raw
  for part in 'qkv' if qkv_bias else '':
    blocks[part]['bias'] = np.stack([raw[f'layers.{i}.self_attn.{part}_proj.bias'].reshape(-1, head)
                                     for i in range(depth)])
  table = raw.get('embed_tokens.weight', np.zeros((8, width), np.float32))
  params = {'table': table, 'stack': {'blocks': blocks},
            'norm': {'scale': raw.get('norm.weight', np.ones(width, np.float32))},
            'head': {'kernel': raw.get('lm_head.weight', np.zeros_like(table)).T}}
  lm = LM(vocabulary=len(table), width=width, depth=depth, mlp=mlp, heads=heads, kv_heads=kv_heads,
          head_width=head, context=1024, rope=Rope(head), qkv_bias=qkv_bias, norm_eps=eps,
          capture=True)
  return lm, {'params': params}


def image_and_text(x, start, visual):
  """float[1, N, D]: text, `visual` visual tokens from `start` on, text."""
  slots = np.arange(x.shape[1])
  kind = np.where((slots >= start) & (slots < start + visual), VISUAL, TEXT).astype(np.int8)
  return TokenSet.create(jnp.asarray(x), kind=kind[None])


def run(lm, variables, tokens, visual, **config):
  """A whole forward pass under a reduction of the visual tokens."""
  host = lm.host(tokens.slots, visual=visual)
  plan = make_plan({'token_kinds': 'visual', **config}, host)
  return arrays(jax.jit(lm.clone(plan=plan).apply)(variables, tokens)[1])


def test_fastv():
  raw = load('fastv')
  lm, variables = model('fastv', eps=1e-5)
  out = run(lm, variables, image_and_text(raw['inputs_embeds'], 35, 576), 576, method='fastv',
            layers=(3,), keep_ratio=0.5, rounding='floor')
  np.testing.assert_array_equal(out['cuts'][3].pos[0], raw['keep_index'])
  np.testing.assert_array_equal(out['tokens'].pos, raw['position_ids_last'])
  close(out['before'][3].x[0], raw['hs_layer3_in_full'])
  close(out['hidden'][3][0], raw['hs_layer4_in'])
  close(out['tokens'].x[0], raw['final_normed'])


@pytest.mark.long
@pytest.mark.parametrize(('name', 'weights', 'method', 'layers'), [
    ('pyramiddrop', 'pyramiddrop', 'pyramiddrop', 'layer_list'),
    ('duet_vlm_t2v_alltext', 'pyramiddrop', 'duet_vlm', 'layer_list'),
    ('transprune', 'transprune', 'transprune', 'pruning_layer_list')])
def test_cuts_between_layers(name, weights, method, layers):
  """Layers are numbered from 1 in the releases: a cut after layer 2 stands before our layer 2."""
  raw = load(name)
  lm, variables = model(weights, eps=1e-5)
  visual, start, _ = (int(x) for x in raw['V_PRE_TXT'])
  layers = tuple(int(layer) for layer in raw[layers])
  out = run(lm, variables, image_and_text(raw['inputs_embeds'], start, visual), visual,
            method=method, layers=layers, ratio_of='start', rounding='floor',
            keep_ratio=tuple(float(share) for share in raw['ratio_list'][1:]))
  for stage, layer in enumerate(layers):
    cut = out['cuts'][layer]
    np.testing.assert_array_equal(cut.pos, raw[f'pos_in_layer{layer}'])
    owner = np.asarray(out['before'][layer].owner[0])
    left = np.flatnonzero(np.asarray(cut.owner[0]) >= 0)
    chosen = owner[left][(left >= start) & (left < start + visual)] - start
    np.testing.assert_array_equal(chosen, np.sort(raw[f'topk_stage{stage}']))
    close(cut.x[0], raw[f'hs_in_layer{layer}'])
  close(out['tokens'].x[0], raw['final_normed'])


def test_changes_that_transprune_watches():
  """As released; and in the paper's form, which takes the cosine's size."""
  raw = load('transprune')
  halves = [[raw[f'ttv_call{part}_{end}'] for end in ('before', 'after')] for part in (0, 1)]
  told = Signals(**dict(zip(('hidden', 'attention_out', 'mlp_in', 'mlp_out'),
                            (x[None] for half in halves for x in half), strict=True)))
  tokens = TokenSet.create(halves[0][0][None])

  def changes(variant):
    watch = jax.jit(REDUCERS['transprune'](variant=variant).watch)
    return watch(tokens, told)['change'][0]

  close(changes('release'), raw['ttv_call0_weight'] + raw['ttv_call1_weight'])
  want = 0.0
  for before, added in halves:
    before, added = before.astype(np.float64), added.astype(np.float64)
    lengths = np.linalg.norm(before, axis=1), np.linalg.norm(added, axis=1)
    turn = np.exp(1 - np.abs((before * added).sum(axis=1) / (lengths[0] * lengths[1])))
    want = want + lengths[1] / lengths[0] * turn / turn.sum()
  close(changes('paper'), want)


def test_salient_words_are_the_rows_that_duet_asks():
  """Where a row names some; elsewhere all text behind the image, as released."""
  kind = image_and_text(np.zeros((1, 12, 4), np.float32), 2, 6).kind
  salient = np.zeros((2, 12), bool)
  salient[0, [1, 10]] = True
  tokens = TokenSet.create(np.zeros((2, 12, 4), np.float32), kind=np.repeat(kind, 2, axis=0),
                           stats={'salient': salient})
  read = jax.jit(REDUCERS['duet_vlm']().rows)
  rows = np.asarray(read(tokens))
  np.testing.assert_array_equal(np.flatnonzero(rows[0]), [1, 10])
  np.testing.assert_array_equal(np.flatnonzero(rows[1]), [8, 9, 10, 11])
  without = tokens.replace(stats={})
  np.testing.assert_array_equal(np.asarray(read(without))[0], rows[1])


@pytest.mark.long
def test_sparsevlm():
  """The first cut of a whole prompt, with a mean behind the tokens that stay, numbered anew."""
  raw = load('sparsevlm_model_v1_0')
  lm, variables = model('sparsevlm_model_v1_0', eps=1e-5, heads=16)
  start, visual, _ = (int(x) for x in raw['v_start_n_text'])
  out = run(lm, variables, image_and_text(raw['inputs_embeds'], start, visual), visual,
            method='sparsevlm', layers=2, keep=int(raw['sparse_token_list'][0]) + 1)
  np.testing.assert_array_equal(out['cuts'][2].pos, raw['pos_in_layer3'])
  close(out['cuts'][2].x[0], raw['hs_in_layer3'])


@pytest.mark.long
def test_visiondrop():
  """Two stages, each with its own count of contextual tokens."""
  raw = load('visiondrop')
  base = load('pyramiddrop')
  lm, variables = model('pyramiddrop', eps=1e-5)
  visual, start, text = (int(x) for x in raw['V_PRE_TXT'])
  tokens = image_and_text(base['inputs_embeds'], start, visual)
  stages = list(zip(raw['layer_list'].tolist(), raw['dominant_contextual'][1:].tolist(),
                    strict=True))
  plan = make_plan([{'method': 'visiondrop', 'token_kinds': 'visual', 'layers': layer,
                     'keep': sum(counts), 'args': {'contextual': counts[1]}}
                    for layer, counts in stages], lm.host(tokens.slots, visual=visual))
  out = arrays(jax.jit(lm.clone(plan=plan).apply)(variables, tokens)[1])
  np.testing.assert_array_equal(out['cuts'][2].pos, raw['pos_in_layer2'])
  for stage, (layer, (dominant, _)) in enumerate(stages):
    cut, before = out['cuts'][layer], out['before'][layer]
    kept = before.x[0][start + np.sort(raw[f'topk_stage{stage}'])]
    np.testing.assert_array_equal(cut.x[0][start:start + dominant], kept)
    close(cut.x[0], raw[f'hs_in_layer{layer}'])
    assert cut.slots == len(raw[f'hs_in_layer{layer}']) == start + sum(stages[stage][1]) + text
  close(out['tokens'].x[0], raw['final_normed'])


CACHES = {
    'streaming_llm': ('streaming_llm', {}),
    'knorm': ('knorm', {}),
    'tova': ('tova', {}),
    'observed_attention_h2o': ('observed_attention', {}),
    'snapkv': ('snapkv', {'window': 8, 'variant': 'kvpress'}),
    'expected_attention': ('expected_attention', {'future': 16}),
    'expected_attention_nocov_eps': (
        'expected_attention', {'future': 16, 'covariance': 'none', 'epsilon': 0.01}),
}


@pytest.mark.parametrize('name', mostly_long(CACHES, short=2))
def test_decoding_from_a_reduced_cache(name):
  raw, base = load(f'kvpress_{name}'), load('kvpress_base')
  lm, variables = model('kvpress_base', eps=1e-5)
  lm, (method, args) = lm.clone(capture=False), CACHES[name]
  plan = make_cache_plan({'method': method, 'args': args, 'keep_ratio': 0.5}, lm.host(48))
  lm = lm.clone(cache_plan=plan)
  prefill = jax.jit(functools.partial(lm.apply, room=1, method='prefill'))
  logits, cache = prefill(variables, base['ids'].astype(np.int32))
  close(np.asarray(logits)[0], base['logits_last'])
  assert [layer.k.shape for layer in cache.layers] == [(1, 2, 25, 16)] * 2
  for index, layer in enumerate(cache.layers):
    np.testing.assert_array_equal(np.sort(np.asarray(layer.pos)[0, :, :24], axis=1),
                                  np.sort(raw[f'kept_idx_l{index}'], axis=1))
    np.testing.assert_array_equal(layer.start, 48)
  logits, _ = jax.jit(functools.partial(lm.apply, method='decode'))(
      variables, raw['decode_token'][0].astype(np.int32), cache)
  close(np.asarray(logits)[0], raw['decode_logits'])


AIM_SCHEDULE = {'layers': tuple(range(14, 22)), 'ratio_of': 'start', 'rounding': 'floor',
                'keep_ratio': tuple(1 - step / 8 for step in range(1, 9))}


@pytest.mark.long
def test_aim_as_released():
  """Hides what goes as a key, while it walks on as a query; the last cut leaves text alone."""
  raw = load('aim_pruning_model')
  lm, variables = model('aim_pruning_model', eps=1e-6, heads=2)
  params = variables['params']
  width = lm.width
  params['table'][0] = raw['decode_embed'][0, 0]
  params['head']['kernel'][:] = np.eye(width, lm.vocabulary)
  start, visual, _ = (int(x) for x in raw['PRE_V_T'])
  tokens = image_and_text(raw['inputs_embeds'], start, visual)
  config = {'method': 'aim', 'args': {'variant': 'release'}, 'token_kinds': 'visual',
            **AIM_SCHEDULE}
  lm = lm.clone(plan=make_plan(config, lm.host(tokens.slots, visual=visual)), capture=False)
  prefill = jax.jit(functools.partial(lm.apply, room=1, method='prefill'))
  logits, cache = prefill(variables, tokens)
  close(logits[0, :width], raw['last_hidden'][-1])
  for layer in AIM_SCHEDULE['layers']:
    np.testing.assert_array_equal(cache.layers[layer + 1].bias[0, :tokens.slots] == 0,
                                  raw['keep_mask_after_layer'][layer])
  logits, _ = jax.jit(functools.partial(lm.apply, method='decode'))(
      variables, jnp.zeros((1,), jnp.int32), cache)
  close(logits[0, :width], raw['decode_last_hidden'][0])


@pytest.mark.parametrize('hidden', [False, True])
def test_aim_walks(hidden):
  raw = load('aim_importance')
  logits = raw['attn_logits_causal']
  if hidden:
    logits = np.where(raw['already_pruned_mask'], logits, -1e30)
  ends = jax.jit(lambda logits: aim.ends_of(
      jax.nn.softmax(logits / 0.1, axis=3), jnp.ones((1, 40), bool)))(logits)
  close(jnp.sqrt(jnp.mean(ends * ends, axis=1)),
        raw['importance_with_pruned_cols_masked' if hidden else 'importance'])


@pytest.mark.long
def test_dyvte():
  """The gate of the first layer stays shut, that of the second lets all visual tokens leave."""
  raw = load('dyvte')
  lm, variables = model('dyvte', eps=1e-5, heads=2)
  for layer in range(2):
    variables['params']['stack'][f'reducer_{layer:02d}'] = {
        'fc1': {'kernel': raw['router_w1'][layer].T}, 'fc2': {'kernel': raw['router_w2'][layer].T}}
  out = run(lm, variables, image_and_text(raw['inputs_embeds'], 35, 576), 576, method='dyvte',
            layers=(0, 1), keep=0)
  assert out['cuts'][0].real.all()
  left = np.flatnonzero(out['cuts'][1].real[0])
  np.testing.assert_array_equal(left, raw['pos_after_exit'][0])
  close(out['tokens'].x[0][left][-8:], raw['final_normed_last8'])


# What the tokenizer of the recorded run made of the requests, whatever their words.
REQUESTS = {'ask': (21, 22, 23), 'ask_part': (11, 12, 13, 14), 'opening': (3,), 'piece': 20}
ZIPS = {'kvzip': {}, 'kvzip_plus': {'weigh': 'output'}, 'kvzip_layerwise': {'across': 'heads'}}


def entries(kv, slots):
  """The positions that each head holds of a row: bool[K, N]."""
  kept = np.zeros((2, slots), bool)
  if isinstance(kv, SplitKV):
    at = kv.prompt.valid[0]
    kept[np.broadcast_to(kv.prompt.head[0][:, None], at.shape)[at], kv.prompt.pos[0][at]] = True
    return kept
  for head in range(2):
    kept[head, kv.pos[0, head][kv.valid[0, head]]] = True
  return kept


@pytest.mark.long
@pytest.mark.parametrize('name', [pytest.param(name, marks=pytest.mark.long if name != 'kvzip_plus'
                                               else []) for name in ZIPS])
def test_kvzip_as_kvpress_has_it(name, monkeypatch):
  """Scores and what stays of 48 tokens in pieces of 20 (in_llm/kvpress_kvzip.npz)."""
  raw, base = load('kvpress_kvzip'), load('kvpress_base')
  lm, variables = model('kvpress_base', eps=1e-5)
  told, cut = [], kvzip._cut
  monkeypatch.setattr(kvzip, '_cut', lambda *args, **named: told.append(args[3]) or cut(
      *args, **named))
  method = KVzip(0.5, **REQUESTS, **ZIPS[name])
  tokens = base['ids'].astype(np.int32)
  logits, cache = method(lm, variables, tokens, room=2)
  close(logits[0], base['logits_last'])
  for layer, kv in enumerate(cache.layers):
    scores = np.concatenate([piece[layer][0] for piece in told[0]], axis=1)[:, :48]
    np.testing.assert_allclose(scores, raw[f'{name}_score'][layer], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(entries(kv, 48), raw[f'{name}_kept'][layer])
    assert kv.room == 2
