"""Learned methods against the outputs of released code: exact indices, floats within 1e-5."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_vit, mostly_long

from models.backbones.vit import Block
from models.compressors.dynamicvit import Predictor
from models.compressors.patchmerger import PatchMerger
from models.compressors.sinkhorn import Sinkhorn
from models.compressors.sit import SiT
from models.storage import unstack
from ops import tokens as tk
from ops.attention import attend
from ops.primitives.match import l2_normalize
from ops.signals import Signals
from ops.tokens import TokenSet, key_bias

CLOSE = {'atol': 1e-5, 'rtol': 0}
LAYERS = (1, 2)


def linear(raw, name):
  return {'kernel': raw[f'{name}.weight'].T, 'bias': raw[f'{name}.bias']}


def norm(raw, name):
  return {'scale': raw[f'{name}.weight'], 'bias': raw[f'{name}.bias']}


def predictor(raw, name):
  return {'norm': norm(raw, f'{name}.in_conv.0'), 'embed': linear(raw, f'{name}.in_conv.1'),
          'fc1': linear(raw, f'{name}.out_conv.0'), 'fc2': linear(raw, f'{name}.out_conv.2'),
          'out': linear(raw, f'{name}.out_conv.4')}


def slimming(raw, prefix):
  return {'norm': norm(raw, f'{prefix}weight.0'), 'fc1': linear(raw, f'{prefix}weight.1'),
          'fc2': linear(raw, f'{prefix}weight.3'), 'scale': raw[f'{prefix}scale'].reshape(())}


def reducer_params(method, raw, index):
  """Released parameters of one cut as our tree."""
  if method == 'dynamicvit':
    return {'predictor': predictor(raw, f'param_score_predictor.{index}')}
  name = f'param_cluster_layers.{index}'
  if method == 'sinkhorn':
    return {'v': raw[f'{name}.v']}
  if method == 'sit':
    return slimming(raw, f'{name}.')
  return {'queries': raw[f'{name}.queries'], 'norm': norm(raw, f'{name}.norm')}


@functools.cache
def run(method, *, unstacked=False):
  """The tiny ViT with 0.7 and 0.49 of its patches from layers 1 and 2 on."""
  raw = golden_vit.load(method)
  params = dict(golden_vit.params())
  blocks = params['stack']['blocks']
  params['stack'] = {'blocks': unstack(blocks, golden_vit.DEPTH) if unstacked else blocks}
  params['stack'] |= {f'reducer_{layer:02d}': reducer_params(method, raw, i)
                      for i, layer in enumerate(LAYERS)}
  logits, out = golden_vit.run({'method': method, 'layers': LAYERS, 'keep_ratio': 0.7,
                                'ratio_of': 'start', 'rounding': 'floor'}, params)
  return raw, logits, out


@functools.partial(jax.jit, static_argnums=0, static_argnames='keep')
def operate(module, params, x, *, keep):
  """A method on unprotected tokens: the matrix of its assignment and the reduced tokens."""
  tokens = TokenSet.create(x)
  assignment = module.apply({'params': params}, tokens, Signals(), num_slots=keep)
  return assignment.matrix(), tk.reduce(tokens, assignment)


def test_patchmerger_op():
  raw = golden_vit.load('patchmerger')
  width = raw['a_x'].shape[-1]
  params = {'queries': raw['a_queries'], 'norm': {'scale': np.ones(width, np.float32),
                                                  'bias': np.zeros(width, np.float32)}}
  matrix, reduced = operate(PatchMerger(), params, raw['a_x'], keep=4)
  np.testing.assert_allclose(matrix, raw['a_weights'], **CLOSE)
  np.testing.assert_allclose(reduced.x, raw['a_out'], **CLOSE)


@pytest.mark.parametrize('case', ['a', 'b'])
@pytest.mark.parametrize('centres', ['v', 'v_after'])
def test_sinkhorn_op(case, centres):
  raw = {key[2:]: value for key, value in golden_vit.load('sinkhorn').items()
         if key.startswith(f'{case}_')}
  module = Sinkhorn(eps=float(raw['eps']), iterations=int(raw['iters']))
  np.testing.assert_allclose(jax.jit(l2_normalize)(raw['v']), raw['v_after'], **CLOSE)
  matrix, reduced = operate(module, {'v': raw[centres]}, raw['x'], keep=len(raw['v']))
  np.testing.assert_allclose(matrix, raw['weights'], **CLOSE)
  np.testing.assert_allclose(reduced.x, raw['out'], **CLOSE)


def test_sit_op():
  raw = golden_vit.load('sit')
  matrix, reduced = operate(SiT(), slimming(raw, 'a_param_'), raw['a_x'], keep=4)
  np.testing.assert_allclose(matrix, raw['a_weights'], **CLOSE)
  np.testing.assert_allclose(reduced.x, raw['a_out'], **CLOSE)


def test_dynamicvit_predictor():
  raw = golden_vit.load('dynamicvit')
  params = predictor(raw, 'param_score_predictor.0')
  scores = jax.jit(Predictor().apply)(
      {'params': params}, raw['pred_x'], raw['pred_policy'][..., 0])
  np.testing.assert_allclose(scores, raw['pred_out'], **CLOSE)


def test_dynamicvit_attention_in_training():
  """Under a decision, for the tokens kept; those dropped, here no keys even for themselves, differ.

  The release adds 1e-6 to the exponentials and to their sum, which counts where the largest of them
  was dropped: with that it is what plain numpy makes, and without what we make.
  """
  raw = golden_vit.load('dynamicvit')
  block = Block(golden_vit.WIDTH, golden_vit.HEADS, 128, parent=None)
  params = jax.tree.map(lambda leaf: leaf[1], golden_vit.params()['stack']['blocks'])
  policy = raw['policy_attn_policy'][..., 0]
  tokens = TokenSet.create(jnp.asarray(raw['policy_attn_x']), size=policy)

  def attention(block, tokens):
    q, k, v = block.qkv(tokens.x)
    mixed = attend(q, k, v, bias=key_bias(tokens, proportional=True))
    return q, k, v, block.out(mixed.out)

  call = jax.jit(functools.partial(block.apply, method=attention))
  q, k, v, found = (np.asarray(part, np.float64) for part in call({'params': params}, tokens))
  scores = np.einsum('bnhd,bmhd->bhnm', q, k) / np.sqrt(q.shape[-1])
  weights = np.exp(scores - scores.max(-1, keepdims=True)) * policy[:, None, None]
  kernel, bias = (np.asarray(params['out'][name], np.float64) for name in ('kernel', 'bias'))

  def plain(smooth):
    shares = (weights + smooth / policy.shape[1]) / (weights.sum(-1, keepdims=True) + smooth)
    return np.einsum('bhnm,bmhd,hde->bne', shares, v, kernel) + bias

  kept = policy == 1
  assert kept.any()
  assert not kept.all()
  np.testing.assert_allclose(plain(1e-6)[kept], raw['policy_attn_out'][kept], **CLOSE)
  np.testing.assert_allclose(found[kept], plain(0)[kept], **CLOSE)


@pytest.mark.parametrize('unstacked', [False, True])
@pytest.mark.parametrize('method', mostly_long(
    ['patchmerger', 'sinkhorn', 'dynamicvit', 'sit'], short=2))
def test_model(method, unstacked):
  raw, logits, out = run(method, unstacked=unstacked)
  for layer in range(golden_vit.DEPTH):
    if f'k70_Features_block{layer}' in raw:
      golden_vit.close(out['hidden'][layer], raw[f'k70_Features_block{layer}'])
  np.testing.assert_allclose(logits, raw['k70_logits'], **CLOSE)


@pytest.mark.parametrize('method', ['patchmerger', 'sinkhorn', 'sit'])
def test_model_owners_are_the_heaviest_cluster(method):
  raw, _, out = run(method)
  first = raw['k70_Assignment_Maps_block1']
  second = np.take_along_axis(raw['k70_Assignment_Maps_block2'], first, axis=1)
  np.testing.assert_array_equal(out['cuts'][1].owner[:, 1:] - 1, first)
  np.testing.assert_array_equal(out['cuts'][2].owner[:, 1:] - 1, second)


def test_model_kept_tokens_of_dynamicvit():
  raw, _, out = run('dynamicvit')
  first = raw['k70_Kept_Tokens_block1']
  second = np.take_along_axis(first, raw['k70_Kept_Tokens_block2'], axis=1)
  np.testing.assert_array_equal(out['cuts'][1].pos[:, 1:], first)
  np.testing.assert_array_equal(out['cuts'][2].pos[:, 1:], second)


@pytest.mark.long
def test_sinkhorn_clusters_are_equally_heavy():
  """Converged, both marginals hold: columns add up to 1 and rows to N / K."""
  tokens = TokenSet.create(jax.random.normal(jax.random.key(1), (2, 20, 8)))
  module = Sinkhorn(eps=0.1, iterations=200)
  params = module.init(jax.random.key(0), tokens, Signals(), num_slots=5)
  # Outside jit, where 200 rounds would be one long program.
  weights = np.asarray(module.apply(params, tokens, Signals(), num_slots=5).matrix())
  np.testing.assert_allclose(np.sum(weights, axis=1), np.ones((2, 20)), rtol=1e-5)
  np.testing.assert_allclose(np.sum(weights, axis=2), np.full((2, 5), 4.0), rtol=1e-3)
