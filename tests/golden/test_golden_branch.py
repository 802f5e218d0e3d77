"""Branches against released code: one layer of a language model, with those that run it.

Axes: B batch, N slots, V visual tokens, H heads, D width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import recorded
from helpers.tiny_lm import PROMPT, TINY, image_and_text, variables

from lib.cost import lm as lm_cost
from lib.report.attention_ranks import attention_ranks
from lib.report.visual_heads import lowest_heads, visual_ratios
from models.backbones.lm import LM
from models.checkpoints.lm_config import make_lm
from models.compressors import ROUTERS
from models.plan import make_plan
from ops import attention
from ops.primitives.arank import attention_rank, lowest_ranks
from ops.reducers.branch.token_sparse_attention import TokenSparseAttention
from ops.reducers.branch.yopo import YOPO
from ops.rope import Rope
from ops.signals import Signals
from ops.tokens import TEXT, VISUAL, TokenSet


def load(name):
  return recorded.arrays(f'in_llm/{name}')


def close(got, want):
  np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def run_layer(raw, tokens, visual, router, eps=1e-6, **config):
  """The recorded layer under a reduction: its output, and what it tells."""
  width, heads = tokens.x.shape[2], 4
  head, mlp = width // heads, len(raw['w/mlp.gate_proj.weight'])

  def part(name, *shape):
    return raw[f'w/{name}.weight'].T.reshape(1, *shape)

  blocks = {
      'norm1': {'scale': part('input_layernorm', width)},
      'norm2': {'scale': part('post_attention_layernorm', width)},
      **{name: {'kernel': part(f'self_attn.{name}_proj', width, heads, head)} for name in 'qkv'},
      'out': {'kernel': part('self_attn.o_proj', heads, head, width)},
      'gate': {'kernel': part('mlp.gate_proj', width, mlp)},
      'up': {'kernel': part('mlp.up_proj', width, mlp)},
      'down': {'kernel': part('mlp.down_proj', mlp, width)}}
  lm = LM(vocabulary=8, width=width, depth=1, mlp=mlp, heads=heads, kv_heads=heads,
          head_width=head, context=1024, rope=Rope(head), norm_eps=eps, capture=True)
  config = {'layers': 0, **config}
  lm = lm.clone(plan=make_plan(config, lm.host(tokens.slots, visual=visual)))
  zeros = np.zeros((8, width), np.float32)
  params = {'table': zeros, 'stack': {'blocks': blocks, **router}, 'head': {'kernel': zeros.T},
            'norm': {'scale': np.ones(width, np.float32)}}
  _, out = jax.jit(lm.apply)({'params': params}, tokens)
  return out['hidden'][0], out


def test_pmod():
  raw = load('pmod')
  kind = np.where(raw['mod_target_mask'], VISUAL, TEXT).astype(np.int8)
  tokens = TokenSet.create(jnp.asarray(raw['x']), kind=jnp.asarray(kind))
  router = {'router': {'kernel': raw['router_w'].T, 'bias': raw['router_b']}}
  y, out = run_layer(raw, tokens, int((kind == VISUAL).sum()), {'reducer_00': router}, eps=1e-5,
                     method='pmod', token_kinds='visual', keep_ratio=float(raw['ratio']),
                     rounding='floor')
  np.testing.assert_array_equal(out['branches'][0].pos, raw['kept_position_ids'])
  close(y, raw['y'])


def test_the_schedule_of_pmod():
  raw = load('pmod')
  shares = ROUTERS['pmod']().default_shares(32)
  np.testing.assert_array_equal(list(shares), raw['mod_layer_idx_llava15'])
  np.testing.assert_allclose(list(shares.values()), raw['ratio_per_layer_llava15'][8:], atol=1e-12)
  lm = make_lm('llama2_7b')
  plan = make_plan({'method': 'pmod', 'token_kinds': 'visual'}, lm.host(576 + 40, visual=576))
  cost = lm_cost.of(lm.clone(plan=plan), 576 + 40)
  counts = [layer.attention - 40 for layer in cost.layers]
  np.testing.assert_array_equal(counts, raw['kept_576_llava15'])


def test_gamma_mod():
  raw = load('gamma_mod')
  tokens = TokenSet.create(jnp.asarray(raw['x']),
                           kind=jnp.full(raw['x'].shape[:2], TEXT, jnp.int8))
  router = {'router': {'kernel': raw['router_w'].T}}
  y, out = run_layer(raw, tokens, 0, {'reducer_gamma_mod': router}, method='gamma_mod',
                     keep_ratio=1.0, args={'threshold': float(raw['threshold'])})
  ran = out['branches'][0]
  count = int(raw['selected'].sum())
  np.testing.assert_array_equal(ran.valid.sum(), count)
  np.testing.assert_array_equal(ran.pos[:, :count], raw['attn_position_ids'])
  np.testing.assert_array_equal(ran.owner >= 0, raw['selected'])
  close(y, raw['y'])


def test_arank():
  raw = load('gamma_mod_arank')
  maps = jnp.asarray(raw['attn'])[None]
  np.testing.assert_array_equal(attention_rank(maps), [raw['avg_rank']])
  np.testing.assert_array_equal(attention_rank(jnp.swapaxes(maps, 0, 1)), raw['head_ranks'])
  assert lowest_ranks([9.0, 3.0, 5.0, 3.0, 7.0], 3, never=(1,)) == (2, 3, 4)
  with pytest.raises(ValueError, match='3 layers of the lowest rank are too many'):
    lowest_ranks([9.0, 3.0], 3)


@pytest.mark.long
def test_arank_of_a_models_layers():
  """Maps of equal shares, but for their diagonals, lack one direction; padding has none."""
  weights = variables(2)['params']
  q = weights['stack']['blocks']['q']['kernel']
  blocks = weights['stack']['blocks'] | {'q': {'kernel': q.at[1].set(0)}}
  params = {'params': weights | {'stack': {'blocks': blocks}}}
  whole, padded = (attention_ranks(TINY.clone(depth=2), params, tokens) for tokens in (
      image_and_text(), image_and_text(np.tile(np.arange(PROMPT) >= 5, (3, 1)))))
  assert whole.shape == (2,)
  assert (whole[1], padded[1]) == (PROMPT - 1, PROMPT - 6)
  assert (whole <= PROMPT - 1).all()


@pytest.mark.parametrize('budget', ['coverage', pytest.param('count', marks=pytest.mark.long)])
def test_token_sparse_attention(budget):
  raw = load('token_sparse_attention')
  q, k, v = (jnp.swapaxes(jnp.asarray(raw[name]), 1, 2) for name in ('query', 'key', 'value'))
  window, kernel, least = (int(x) for x in raw['window_kernel_min'])
  coverage = float(raw['coverage']) if budget == 'coverage' else 0.0
  method = TokenSparseAttention(window=window, kernel=kernel, coverage=coverage, least=least)
  slots, count = q.shape[1], raw['indices'].shape[2]
  tokens = TokenSet.create(jnp.zeros((1, slots, 1)), kind=jnp.full((1, slots), TEXT, jnp.int8),
                           of=(TEXT,))

  def attend(q, k, v, bias, positions):
    return attention.attend(q, k, v, bias=bias, positions=positions)

  @jax.jit
  def run(q, k, v):
    rows = attention.received(q[:, -window:], k, None, positions=tokens.pos,
                              last=tokens.pos[:, -window:])
    picked = method(tokens, Signals(row_attention=rows),
                    num_slots=slots if budget == 'coverage' else count)
    return rows, picked, picked.attend(attend, q, k, v, None, tokens.pos, causal=True)

  rows, picked, read = run(q, k, v)
  close(rows[:, :, :-window], raw['window_scores'])
  np.testing.assert_array_equal(np.sum(picked.valid, axis=2), count)
  np.testing.assert_array_equal(picked.src[:, :, :count], raw['indices'])
  close(read.reshape(1, slots, -1), raw['decompressed'])


@pytest.mark.parametrize('window', [pytest.param(3, marks=pytest.mark.long), 7])
def test_yopo(window):
  """Against softmax under the released mask, made of a whole map."""
  allowed = load('yopo_neighbor_mask')[f'allowed_w{window}']
  start, visual, slots = 5, 576, 590
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(1, slots, 2, 8)).astype(np.float32) for _ in range(3))
  kind = np.full((1, slots), TEXT, np.int8)
  kind[:, start:start + visual] = VISUAL
  tokens = TokenSet.create(jnp.zeros((1, slots, 1)), kind=jnp.asarray(kind),
                           protected=slots - visual)
  seen = np.tril(np.ones((slots, slots), bool))
  image = slice(start, start + visual)
  seen[image, image] = allowed
  logits = np.einsum('nhd,mhd->hnm', q[0], k[0]) / np.sqrt(8)
  shares = np.where(seen, np.exp(logits), 0)
  shares /= shares.sum(axis=-1, keepdims=True)
  shares[1, :, image] = 0
  want = np.einsum('hnm,mhd->nhd', shares, v[0])
  want[image, 1] = 0

  @jax.jit
  def run(q, k, v):
    pattern = YOPO(window=window, heads=(1,))(tokens, Signals(), num_slots=slots)
    return pattern.attend(None, q, k, pattern.values(v, 2), None, None, causal=True)

  close(run(q, k, v)[0], want)


@pytest.mark.long
def test_yopo_drops_the_heads_that_look_away_from_images():
  """Heads that ask nothing look at all alike: at six patches and up to six words."""
  weights = variables(2)['params']
  q = weights['stack']['blocks']['q']['kernel']
  blocks = weights['stack']['blocks'] | {'q': {'kernel': q.at[1, :, 2].set(0)}}
  params = {'params': weights | {'stack': {'blocks': blocks}}}
  ratios = visual_ratios(TINY.clone(depth=2), params, image_and_text())
  assert ratios.shape == (2, 4)
  seen = [6 / (end + 1) for end in range(8, PROMPT)]  # Of each word behind the image.
  share = np.mean(seen)
  np.testing.assert_allclose(ratios[1, 2], share / (1 - share), rtol=1e-5)
  assert lowest_heads([0.3, 0.1, 0.2, 0.1], 0.75) == (1, 2, 3)
  assert lowest_heads([0.3, 0.1, 0.2, 0.1], 0.25) == (1,)
