"""Every method on every kind of backbone: it runs, or the build says why not.

The terminal summary prints all of it as one table (tests/conftest.py).
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contract

from models.backbones.vit import ViT
from models.compressors import COMPRESSORS
from models.plan import make_plan, methods
from ops import tokens as tk
from ops.reducers.base import ByAttention

BATCH, KEEP = 2, 40
TINY = ViT(width=32, depth=3, mlp=48, heads=2, patch=4, image_size=32, num_classes=3)
HOSTS = {
    'cls': {},
    'distilled': {'distilled': True},
    'registers': {'registers': 4},
    'mean': {'pool': 'mean'},
    'no_cls': {'class_token': False, 'pool': 'mean'},
    'map': {'class_token': False, 'pool': 'map', 'activation': 'gelu_tanh'},
    'clip': {'pre_norm': True, 'patch_bias': False, 'activation': 'quick_gelu'},
    'windows': {'window': (4, 4), 'whole_layers': (2,)},
}
# Hosts that differ from the others in what no method sees: what stands beside the patches, and
# which of them are a row. Whether a plan can be made is asked of all methods, whole models are
# traced under one of each kind.
ALIKE = ('distilled', 'registers', 'mean', 'map', 'clip', 'windows')
KINDS = ('none', 'topk', 'tome', 'evit', 'ats', 'token_transforming', 'dynamicvit', 'dtop')
IMAGES = jax.ShapeDtypeStruct((BATCH, 32, 32, 3), jnp.float32)
FALLBACK = "; set args.by='received_attention'"


def planned(name, host, **args):
  """A model that goes from 64 patch tokens to 40 in layer 1."""
  vit = TINY.clone(**HOSTS[host])
  return vit.clone(plan=make_plan(
      {'method': name, 'layers': 1, 'remove': 64 - KEEP, 'args': args}, vit.host))


@functools.cache
def parameters(host, name):
  """Abstract parameters; methods without any share those of the host."""
  vit = planned(name, host) if name else TINY.clone(**HOSTS[host])
  return jax.eval_shape(vit.init, jax.random.key(0), IMAGES)


def check(name, host, **args):
  """A model under a method has the shapes that its plan promises."""
  vit = planned(name, host, **args)
  if host in ALIKE and name not in KINDS:
    return
  params = parameters(host, name if name in COMPRESSORS else '')
  logits, out = jax.eval_shape(vit.apply, params, IMAGES)
  slots = vit.host.protected + (64 if name == 'none' else KEEP)
  assert logits.shape == (BATCH, 3)
  assert out['tokens'].x.shape == (BATCH, slots, 32)
  assert out['tokens'].owner.shape == (BATCH, vit.host.slots)


def cell(name, host):
  """'' where a method runs, what to set where it must be told, or why it does not."""
  method, offers = methods()[name](), TINY.clone(**HOSTS[host]).host.offers
  missing = ', '.join(sorted((method.needs | method.watch_needs) - offers))
  try:
    check(name, host)
  except ValueError as error:
    said = str(error)
    # In the project's own words: what JAX says starts otherwise.
    assert re.match(rf'{name} \w+', said), said
    assert '\n' not in said
    assert bool(missing) == (f'needs {missing}, which this host does not offer' in said)
    assert said.endswith(FALLBACK) == (isinstance(method, ByAttention) and missing == method.by)
  else:
    assert not missing
    return ''
  if said.endswith(FALLBACK):
    check(name, host, by='received_attention')
    return "runs with args.by='received_attention'"
  return re.sub(r': it offers.*', '', said.replace(f'{name} ', '', 1))


PAIRS = [(host, name) for name in methods() for host in HOSTS]


@pytest.mark.parametrize(('host', 'name'), PAIRS)
def test_backbones(host, name, record_property):
  record_property('backbones', (PAIRS.index((host, name)), host, name))
  record_property('reason', cell(name, host))


WITH_FALLBACK = [name for name, method in methods().items()
                 if issubclass(method, ByAttention)]


def test_methods_with_a_fallback():
  assert {'topk', 'evit', 'ats', 'ats_spatial', 'flowcut'} <= set(WITH_FALLBACK)


@pytest.mark.long
@pytest.mark.parametrize('name', sorted(
    set(WITH_FALLBACK) - {'flowcut', 'hiprune', 'fopru'}))
def test_the_fallback_reads_received_attention_as_it_would_cls_attention(name):
  case, keep = contract.random_case(), contract.budget(name, contract.SLOTS, 9)
  received = methods()[name](by='received_attention')
  assert received.needs == methods()[name]().needs - {'cls_attention'} | {'received_attention'}
  signals = case.signals(received.needs)
  answer = received(case.tokens(), signals, num_slots=keep)
  same = methods()[name]()(case.tokens(), signals.replace(
      cls_attention=signals.received_attention, received_attention=None), num_slots=keep)
  chex.assert_trees_all_equal(answer, same)
  other = methods()[name]()(case.tokens(), case.signals(methods()[name]().needs), num_slots=keep)
  assert (tk.reduce(case.tokens(), other).pos != tk.reduce(case.tokens(), answer).pos).any()


@pytest.mark.long
def test_topk_keeps_what_is_attended_to_most_without_a_class_token():
  """A whole run against attention worked out from the features that the layer got."""
  vit = planned('topk', 'no_cls', by='received_attention')
  images = jax.random.normal(jax.random.key(1), IMAGES.shape)
  params = jax.jit(vit.init)(jax.random.key(0), images)
  run = jax.jit(vit.clone(capture=True).apply)
  _, out = run(params, images)
  block = jax.tree.map(lambda leaf: np.asarray(leaf[1], np.float64),
                       params['params']['stack']['blocks'])
  x = np.asarray(out['hidden'][0], np.float64)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  x = x * block['norm1']['scale'] + block['norm1']['bias']
  q, k, _ = (np.einsum('bnd,dkhe->kbhne', x, block['qkv']['kernel'])
             + block['qkv']['bias'][:, None, :, None])
  logits = np.einsum('bhne,bhme->bhnm', q, k) / np.sqrt(q.shape[-1])
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  received = (weights / weights.sum(-1, keepdims=True)).mean(axis=(1, 2))
  np.testing.assert_array_equal(out['cuts'][1].pos, np.argsort(-received, axis=1)[:, :KEEP])
