"""Both forms of ATS against the outputs of released code: exact indices, floats within 1e-5."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_vit

from models.plan import make_plan
from ops import tokens as tk
from ops.primitives.quantiles import keep_sampled
from ops.reducers.vision.ats import ATS, quantiles, sample, significance
from ops.reducers.vision.ats_spatial import ATSSpatial, sample_in_order
from ops.signals import Signals
from ops.tokens import SPECIAL, VISUAL, TokenSet

CLOSE = {'atol': 1e-5, 'rtol': 0}
SAMPLE = jax.jit(sample, static_argnames='points')
SAMPLE_IN_ORDER = jax.jit(sample_in_order, static_argnames='points')
KEEP_SAMPLED = jax.jit(keep_sampled, static_argnames='num_slots')


def given(x, attention, v, valid=None):
  """Golden features, [CLS] first, and what is told of them."""
  kind = np.where(np.arange(x.shape[1]) < 1, SPECIAL, VISUAL).astype(np.int8)
  tokens = TokenSet.create(x, kind=np.tile(kind, (len(x), 1)), protected=1, valid=valid)
  return tokens, Signals(cls_attention=attention[:, :, 0], values=v.transpose(0, 2, 1, 3))


@jax.jit
def carry_out(tokens, assignment, attention):
  return tk.reduce(tokens, assignment), tk.reduce_attention_map(assignment, attention)


@pytest.mark.long
@pytest.mark.parametrize('case', ['a', 'b'])
def test_op(case):
  raw = golden_vit.load('ats_official')
  x, attention, v = (raw[f'{case}_{name}'] for name in ('raw_x', 'attn', 'v'))
  slots, points = x.shape[1], int(raw[f'{case}_n_ref_tokens']) - 1
  tokens, signals = given(*map(jnp.asarray, (x, attention, v)))

  scores = np.asarray(jax.jit(significance)(signals))[:, 1:]
  order = np.argsort(scores, axis=1)
  np.testing.assert_array_equal(order, raw[f'{case}_sorted_indices'])
  share = np.take_along_axis(scores, order, axis=1) / scores.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(share, raw[f'{case}_sorted_scores'], **CLOSE)

  total = np.cumsum(share, axis=1)
  total = (total - total[:, :1]) / (total[:, -1:] - total[:, :1])
  found = jax.jit(quantiles, static_argnames='points')(
      total, np.ones(total.shape, bool), points=points)
  np.testing.assert_allclose(found, raw[f'{case}_ys'], **CLOSE)

  # Outside jit: quantiles fall on shares exactly, and fused operations round otherwise.
  assignment = ATS(points=points)(tokens, signals, num_slots=slots)
  reduced, rows = carry_out(tokens, assignment, attention)
  policy = raw[f'{case}_policy'][..., 0] == 1
  np.testing.assert_array_equal(reduced.valid, policy)
  np.testing.assert_allclose(reduced.x, np.where(policy[..., None], raw[f'{case}_selected_x'], 0),
                             **CLOSE)
  np.testing.assert_allclose(rows, raw[f'{case}_new_attn'] * policy[:, None, :, None], **CLOSE)


@dataclasses.dataclass(frozen=True)
class WithPadding(ATS):
  """The release's reading of padding: sampled like tokens, at no significance."""

  def __call__(self, tokens, signals, *, num_slots):
    scores = jnp.where(tokens.real, significance(signals), 0.0)
    hit = sample(scores, tokens.kind == VISUAL, points=self.points)
    return keep_sampled(tokens, scores, hit & tokens.free, num_slots=num_slots)


def run(method, keep):
  """The tiny ViT with cuts in layers 1 and 2: features and real slots after each layer."""
  model = golden_vit.model()
  plan = make_plan({'method': 'ats', 'args': {'points': 64}, 'layers': (1, 2), 'keep': keep},
                   model.host)
  plan = plan.with_method(method)
  _, out = golden_vit.arrays(model.clone(plan=plan).apply(
      {'params': golden_vit.params()}, golden_vit.images()))
  first, second = (out['cuts'][layer].valid for layer in (1, 2))
  raw = golden_vit.load('ats_official')
  golden_vit.close(out['embedded'], raw['embed'])
  golden_vit.close(out['hidden'][0], raw['nodrop_block0'])
  return out['hidden'], (np.ones((2, 65), bool), first, second, second)


def same_rows(hidden, real, raw, kind, layer, row):
  count = int(raw[f'{kind}_policy{layer}'][row].sum())
  np.testing.assert_array_equal(real[layer][row], np.arange(real[layer].shape[1]) < count)
  golden_vit.close(hidden[layer][row, :count], raw[f'{kind}_block{layer}'][row, :count])


@pytest.mark.long
@pytest.mark.parametrize('keep', [(47, 36), (41, 29)])
def test_model(keep):
  """Rows that the release left without padding, at two capacities."""
  raw = golden_vit.load('ats_official')
  hidden, real = run(ATS(points=64), keep)
  for layer, row in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (3, 1)):
    same_rows(hidden, real, raw, 'drop', layer, row)


@pytest.mark.long
def test_model_with_padding():
  """All rows, where padding takes part as in the release.

  Without dropping, the release smooths its softmax over 35 slots of padding: up to 3e-6 a layer.
  """
  raw = golden_vit.load('ats_official')
  hidden, real = run(WithPadding(points=64), (47, 36))
  for layer in range(golden_vit.DEPTH):
    same_rows(hidden, real, raw, 'drop', layer, 0)
  for layer in (1, 2, 3):
    same_rows(hidden, real, raw, 'nodrop', layer, 0)
    same_rows(hidden, real, raw, 'nodrop', layer, 1)


def test_overflow_drops_the_least_significant():
  scores = np.array([[0.0, 5.0, 1.0, 4.0, 2.0, 3.0]], np.float32)
  kind = np.array([[SPECIAL] + [VISUAL] * 5], np.int8)
  tokens = TokenSet.create(np.ones((1, 6, 2), np.float32), kind=kind, protected=1)
  hit = np.array([[False, True, True, True, False, True]])
  np.testing.assert_array_equal(KEEP_SAMPLED(tokens, scores, hit, num_slots=4).src, [[0, 5, 3, 1]])
  wide = KEEP_SAMPLED(tokens, scores, hit, num_slots=6)
  np.testing.assert_array_equal(np.asarray(wide.src)[:, :5], [[0, 2, 5, 3, 1]])
  np.testing.assert_array_equal(wide.valid, [[True] * 5 + [False]])


@pytest.mark.parametrize('scores', [[0.0, 0.0, 0.0], [2.0, 2.0, 2.0], [0.0, 0.0, 1.0]])
def test_degenerate_scores_keep_one_token_at_least(scores):
  scores = np.array([scores], np.float32)
  hit = np.asarray(SAMPLE(scores, np.ones((1, 3), bool), points=2))
  assert hit.any()
  assert SAMPLE(scores, np.array([[False, True, False]]), points=2).tolist() == [
      [False, True, False]]


def test_bad_points():
  with pytest.raises(ValueError, match='points=0'):
    ATS(points=0)


@pytest.mark.parametrize('case', ['a', 'b'])
def test_spatial_op(case):
  raw = golden_vit.load('ats')
  attention, v, mask, ids = (raw[f'{case}_{name}'] for name in ('attn', 'v', 'mask', 'ids'))
  batch, _, slots, _ = attention.shape
  tokens, signals = given(np.ones((batch, slots, 1), np.float32), attention, v,
                          None if mask.all() else mask)
  assignment = jax.jit(ATSSpatial(), static_argnames='num_slots')(
      tokens, signals, num_slots=int(raw[f'{case}_K']))
  reduced, found = carry_out(tokens, assignment, attention)
  valid = np.asarray(reduced.valid)
  np.testing.assert_array_equal(valid, raw[f'{case}_new_mask'])
  np.testing.assert_array_equal(np.where(valid, assignment.src, 0), ids)
  rows = np.where(valid[:, None, :, None], raw[f'{case}_new_attn'], 0)
  np.testing.assert_allclose(found, rows, **CLOSE)


@pytest.mark.long
def test_spatial_model():
  """The tiny ViT with room for 0.7 and 0.49 of its patches from layers 1 and 2 on."""
  raw = golden_vit.load('ats')
  logits, out = golden_vit.run({'method': 'ats_spatial', 'layers': (1, 2), 'keep_ratio': 0.7,
                                'ratio_of': 'start', 'rounding': 'floor'})
  np.testing.assert_allclose(logits, raw['k70_logits'], **CLOSE)
  for layer in (1, 2, 3):
    cut = out['cuts'][min(layer, 2)]
    for row in range(2):
      real = cut.valid[row]
      count = real.sum()
      np.testing.assert_array_equal(real, np.arange(len(real)) < count)
      np.testing.assert_allclose(out['hidden'][layer][row, :count],
                                 raw[f'k70_Features_block{layer}'][row, :count], **CLOSE)
      # Patches, by their place in what the cut before left; the release pads with -1.
      kept = raw[f'k70_Kept_Tokens_block{min(layer, 2)}'][row]
      kept = kept[kept >= 0]
      if layer > 1:
        kept = raw['k70_Kept_Tokens_block1'][row][kept]
      np.testing.assert_array_equal(cut.pos[row, 1:count], kept)


def test_spatial_quantiles_leave_the_last_part_out():
  """The steps of the release, whose float range has one more of them for a few counts."""
  raw = golden_vit.load('ats')
  for case in ('a', 'b'):
    steps = raw[f'{case}_sample_steps']
    points = len(steps)
    assert points == int(raw[f'{case}_K']) - 1
    # Shares that meet the steps one by one: each step samples a token of its own.
    scores = np.diff(np.append(0, np.append(steps, 1.0)))[None].astype(np.float32)
    hit = np.asarray(SAMPLE_IN_ORDER(scores, np.ones(scores.shape, bool), points=points))[0]
    np.testing.assert_array_equal(hit, np.arange(points + 1) < points)
