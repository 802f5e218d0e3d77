"""Top-k and EViT against the outputs of released code: exact indices, floats within 1e-5."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_vit, mostly_long

from models.backbones.vit import Block
from models.blocks import add
from models.plan import make_plan
from ops import tokens as tk
from ops.budgets import annealed_keep_ratio
from ops.reducers.vision.evit import EViT
from ops.reducers.vision.topk import TopK
from ops.tokens import SPECIAL, VISUAL, TokenSet

same = np.testing.assert_array_equal
close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=0)


@functools.partial(jax.jit, static_argnums=(0, 2))
def run_block(method, x, keep):
  """The first block of the tiny ViT with one cut: [CLS] attention, the answer, its tokens."""
  kind = np.where(np.arange(x.shape[1]) < 1, SPECIAL, VISUAL).astype(np.int8)
  tokens = TokenSet.create(x, kind=jnp.broadcast_to(kind, x.shape[:2]), protected=1)
  block = Block(golden_vit.WIDTH, golden_vit.HEADS, 128, parent=None)
  params = {'params': jax.tree.map(lambda leaf: leaf[0], golden_vit.params()['stack']['blocks'])}
  change, signals = block.apply(params, tokens, needs=method.needs, proportional=False,
                                method='attend')
  answer = method(tokens, signals, num_slots=keep)
  reduced = tk.reduce(add(tokens, change), answer)
  change, _ = block.apply(params, reduced, method='feed_forward')
  return signals.cls_attention, answer, add(reduced, change)


@pytest.mark.parametrize('case', ['a', 'b'])
def test_topk_block(case):
  raw = golden_vit.load('topk')
  x, index = raw[f'{case}_x'], raw[f'{case}_idx']
  kept = int(raw[f'{case}_keep_rate'] * (x.shape[1] - 1))
  assert index.shape[1] == kept
  _, answer, tokens = run_block(TopK(), x, 1 + kept)
  same(answer.src[:, 1:], index + 1)
  close(tokens.x, raw[f'{case}_out'])


@pytest.mark.parametrize('case', ['a', 'b'])
def test_evit_block(case):
  raw = golden_vit.load('evit')
  x, index = raw[f'{case}_x'], raw[f'{case}_idx']
  kept = int(raw[f'{case}_left_tokens'])
  attention, answer, tokens = run_block(EViT(), x, 1 + kept + 1)
  close(attention.mean(axis=1)[:, 1:], raw[f'{case}_cls_attn'])
  # The golden's last index, -1, stands for the fused token.
  same(index[:, kept:], -1)
  same(answer.src[:, 1:-1], index[:, :kept] + 1)
  same(np.stack([np.flatnonzero(row == 1 + kept) for row in np.asarray(answer.dst)]),
       raw[f'{case}_complement'] + 1)
  close(tokens.x, raw[f'{case}_out'])


@functools.cache
def run(method, layers, keep_ratio, rounding, ratio_of):
  """The tiny ViT under one plan, compiled once: logits and everything beside them."""
  model = golden_vit.model()
  plan = make_plan({'method': method, 'layers': layers, 'keep_ratio': keep_ratio,
                    'rounding': rounding, 'ratio_of': ratio_of}, model.host)
  return jax.jit(model.clone(plan=plan).apply)({'params': golden_vit.params()}, golden_vit.images())


def check_kept(out, layer, before, index):
  """Kept tokens in the golden's numbering: without [CLS], by slots before the cut.

  `before` int[B, N] names those slots by the position of their anchor; answers the same after.
  """
  tokens = out['cuts'][layer]
  pos = np.asarray(tokens.pos)[:, 1:]
  same(pos[:, :index.shape[1]], np.take_along_axis(before, index, axis=1))
  return pos


K70, K50 = ('k70', (1, 2), 0.7), ('k50', (1, 3), 0.5)
PATCHES = np.broadcast_to(np.arange(64), (2, 64))


@pytest.mark.parametrize(('case', 'layers', 'ratio', 'features'),
                         [(*K70, (1, 2, 3)), (*K50, (1, 3))])
def test_topk_in_the_benchmark(case, layers, ratio, features):
  raw = golden_vit.load('topk')
  logits, out = run('topk', layers, ratio, 'floor', 'start')
  before = PATCHES
  for layer in layers:
    index = raw[f'{case}_Kept_Tokens_block{layer}']
    assert out['cuts'][layer].slots == 1 + index.shape[1]
    before = check_kept(out, layer, before, index)
  check_features(raw, case, logits, out, features)


@pytest.mark.parametrize(('case', 'layers', 'ratio', 'features'),
                         [(*K70, (1, 2, 3)), (*K50, (1, 3))])
def test_evit_in_the_benchmark(case, layers, ratio, features):
  raw = golden_vit.load('evit')
  logits, out = run('evit', layers, ratio, 'floor', 'start')
  before, ends = PATCHES, PATCHES
  for layer in layers:
    index, fused = (raw[f'{case}_{name}_block{layer}'] for name in ('Kept_Tokens', 'Fusion_Assign'))
    tokens = out['cuts'][layer]
    assert tokens.slots == 1 + index.shape[1]
    same(index[:, -1], -1)
    before = check_kept(out, layer, before, index[:, :-1])
    # Original patches whose slot before the cut is on the golden's list, and no others, are fused.
    owner = np.asarray(tokens.owner)[:, 1:] - 1
    for row in range(2):
      same(owner[row] == tokens.slots - 2, np.isin(ends[row], fused[row]))
    ends = owner
  check_features(raw, case, logits, out, features)


def check_features(raw, case, logits, out, layers):
  close(logits, raw[f'{case}_logits'])
  for layer in layers:
    golden_vit.close(out['hidden'][layer], raw[f'{case}_Features_block{layer}'])


@pytest.mark.parametrize(('case', 'layers', 'ratio'),
                         mostly_long(
                             [('f70', (1, 2), 0.7), ('n70', (1, 2), 0.7), ('f50', (1, 3), 0.5)]))
def test_evit_as_released(case, layers, ratio):
  """With the fused token, which counts as a patch from then on, and without: top-k."""
  raw = golden_vit.load('evit_official')
  same(np.flatnonzero(raw[f'{case}_keep_rate'] < 1), layers)
  logits, out = run('evit' if raw[f'{case}_fuse'] else 'topk', layers, ratio, 'ceil', 'current')
  before = PATCHES
  for layer in layers:
    before = check_kept(out, layer, before, raw[f'{case}_idx{layer}'])
  close(logits, raw[f'{case}_logits'])
  for layer in range(golden_vit.DEPTH):
    golden_vit.close(out['hidden'][layer], raw[f'{case}_block{layer}'])


def test_annealed_keep_ratio():
  """Ten epochs of ten steps: 1 for two, down to 0.7 in the eighth."""
  got = [annealed_keep_ratio(0.7, step=step, start_step=20, stop_step=80)
         for step in range(0, 100, 10)]
  np.testing.assert_allclose(got, golden_vit.load('evit_official')['adjust_keep_rate'], atol=1e-12,
                             rtol=0)
  assert got[0] == got[2] == 1
  assert got[-1] == 0.7
  assert math.isclose(got[5], 0.85)
  with pytest.raises(ValueError, match='start_step=80 and stop_step=80 must be in order'):
    annealed_keep_ratio(0.7, step=0, start_step=80, stop_step=80)
