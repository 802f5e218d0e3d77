"""TextMonkey's filter and resampler against their authors' code: exact indices, 1e-5 for floats."""


import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import recorded

from models.compressors.textmonkey_resampler import TextMonkeyResampler
from ops import tokens as tk
from ops.primitives.farthest import largest_later_cosine
from ops.reducers.projector.textmonkey import TextMonkey
from ops.signals import Signals
from ops.tokens import TokenSet


def load(name):
  return recorded.arrays(f'vlm_pre/textmonkey_{name}')


@pytest.mark.parametrize('case', [0, 1])
def test_filter(case):
  raw = load(f'select_case{case}')
  tokens = TokenSet.create(jnp.asarray(raw['x']))
  answer = TextMonkey()(tokens, Signals(), num_slots=int(raw['keep']))
  np.testing.assert_array_equal(answer.src, raw['kept_indices'])
  np.testing.assert_array_equal(tk.reduce(tokens, answer).x, raw['kept_tokens'])


@pytest.mark.parametrize('chunk', [1, 7, 50, 64])
def test_repetition_is_the_same_in_chunks(chunk):
  x = load('select_case1')['x']
  among = np.arange(50)[None] % 3 > 0
  vectors = x / np.linalg.norm(x, axis=2, keepdims=True)
  scores = np.einsum('bnd,bmd->bnm', vectors, vectors)
  scores = np.where(np.triu(np.ones((50, 50), bool), 1) & among[:, None], scores, -2)
  among = jnp.asarray(np.repeat(among, len(x), axis=0))
  found = largest_later_cosine(jnp.asarray(x), among, chunk=chunk)
  np.testing.assert_allclose(found, scores.max(axis=2), atol=1e-6, rtol=0)


@pytest.mark.long
def test_resampler():
  raw = load('resampler')
  parts = 'layers.0.0', 'layers.0.1'

  def norm(name):
    return {'scale': raw[f'w.{name}.weight'], 'bias': raw[f'w.{name}.bias']}

  def kernel(name):
    return {'kernel': raw[f'w.{name}.weight'].T}

  params = {
      'downsample': kernel('downsample'),
      'attention': {
          'norm_tokens': norm(f'{parts[0]}.norm_media'),
          'norm_latents': norm(f'{parts[0]}.norm_latents'),
          **{name: kernel(f'{parts[0]}.to_{name}') for name in ('q', 'kv', 'out')}},
      'norm': norm(f'{parts[1]}.norm'), 'scale': raw[f'w.{parts[1]}.scale'][0],
      'fc1': kernel(f'{parts[1]}.fc1'), 'fc2': kernel(f'{parts[1]}.fc2')}
  method = TextMonkeyResampler(width=12, heads=int(raw['heads']), head_dim=int(raw['dim_head']))
  tokens, keep = TokenSet.create(jnp.asarray(raw['x'])), int(raw['keep'])
  shapes = jax.eval_shape(lambda key: method.init(key, tokens, Signals(), num_slots=keep),
                          jax.random.key(0))['params']
  chex.assert_trees_all_equal_shapes(params, shapes)
  answer = method.apply({'params': params}, tokens, Signals(), num_slots=keep)
  np.testing.assert_allclose(tk.reduce(tokens, answer).x, raw['out'], atol=1e-5, rtol=0)


@pytest.mark.long
def test_fresh_resampler_changes_nothing():
  tokens = TokenSet.create(jnp.asarray(load('resampler')['x']))
  answer, params = TextMonkeyResampler(12, 3, 4).init_with_output(
      jax.random.key(0), tokens, Signals(), num_slots=10)
  kept = TextMonkey()(tokens, Signals(), num_slots=10)
  np.testing.assert_array_equal(tk.reduce(tokens, answer).x, tk.reduce(tokens, kept).x)
  assert not np.any(params['params']['fc2']['kernel'])
